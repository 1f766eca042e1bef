"""The playground in Chromium, on the real app with the echo engine: it answers with the last message."""

from __future__ import annotations

import os
import subprocess

import pytest
import support
from playground import answer, ask, expect_answer, finished_answer
from playwright.sync_api import expect

from serve.engine.echo import EchoEngine

LONG = "A quiet wake behind three hulls. " * 60
SLOW_STEP_S = 0.05  # LONG would take more than a minute and a half


def num_running(served: support.Served) -> int:
    return served.on_loop(served.lifecycle.engine.stats).num_running


def test_playground_streams_an_answer_with_its_numbers(open_page):
    with support.serving(EchoEngine(step_s=0.01)) as served:
        page = open_page(served.url)
        expect(page.get_by_role("status")).to_have_text("echo · ready")
        ask(page, "Grüße, 船!")
        expect_answer(page, "Grüße, 船!")
        facts = answer(page).locator("dl")
        for name in ("TTFT", "ms", "tokens/s", "13 in, 14 out", "stop"):
            expect(facts).to_contain_text(name)


def test_playground_shows_part_of_the_answer_before_its_end(open_page):
    engine = EchoEngine(step_s=SLOW_STEP_S)
    with support.serving(engine) as served:
        page = open_page(served.url)
        ask(page, LONG)
        expect(answer(page).locator(".text")).to_contain_text("A quiet wake")
        expect(answer(page)).to_have_attribute("aria-busy", "true")
        page.get_by_role("button", name="Stop").click()


@pytest.mark.parametrize("how", ["button", "Escape", "new chat", "closed tab"])
def test_playground_stop_reaches_the_engine(open_page, how):
    engine = EchoEngine(step_s=SLOW_STEP_S)
    with support.serving(engine) as served:
        page = open_page(served.url)
        ask(page, LONG)
        expect(answer(page).locator(".text")).to_contain_text("A quiet")
        assert num_running(served) == 1
        match how:
            case "button":
                page.get_by_role("button", name="Stop").click()
            case "Escape":
                page.keyboard.press("Escape")
            case "new chat":
                page.get_by_role("button", name="New chat").click()
            case _:
                page.close()
        support.eventually(lambda: num_running(served) == 0)
        if how in ("button", "Escape"):
            expect(answer(page).locator("dl")).to_contain_text("stopped")
            expect(page.get_by_label("Message")).to_be_focused()
            expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_playground_new_chat_forgets_the_conversation(open_page):
    with support.serving() as served:
        page = open_page(served.url)
        ask(page, "first")
        expect_answer(page, "first")
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("article")).to_have_count(0)
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "second")
        assert [message["content"] for message in sent.value.post_data_json["messages"]] == ["second"]


def test_playground_sends_the_settings_and_the_history(open_page):
    with support.serving() as served:
        page = open_page(served.url)
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature", exact=True).fill("0.25")
        expect(page.get_by_label("Temperature slider")).to_have_value("0.25")
        page.get_by_label("Max tokens").fill("64")
        ask(page, "one")
        expect_answer(page, "one")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "two")
        expect_answer(page, "two")
        assert sent.value.post_data_json == {
            "model": "echo",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "one"},
                {"role": "user", "content": "two"},
            ],
            "temperature": 0.25,
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_playground_shift_enter_writes_a_line_and_enter_sends(open_page):
    with support.serving() as served:
        page = open_page(served.url)
        message = page.get_by_label("Message")
        expect(message).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        expect(message).to_have_value("one\ntwo")
        expect(page.locator("article")).to_have_count(0)
        page.keyboard.press("Enter")
        expect(message).to_have_value("")
        expect_answer(page, "one two")
        assert answer(page).locator(".text").inner_text() == "one\ntwo"


def test_playground_asks_for_a_key_and_keeps_it_out_of_every_address(open_page):
    with support.serving(api_keys="s3cret-key") as served:
        page = open_page(served.url, viewport={"width": 360, "height": 640})
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        page.get_by_role("button", name="Settings").click()
        ask(page, "knock, knock")
        expect(answer(page).get_by_role("alert")).to_contain_text("401")
        expect(key).to_be_focused()
        expect(page.locator("#key-note")).to_contain_text("Enter a key")
        key.fill("s3cret-key")
        key.press("Enter")
        expect_answer(page, "knock, knock")
        expect(page.get_by_role("status")).to_have_text("echo · ready")
        assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
            ["s3cret-key"],
            0,
            "",
        ]
        assert not [url for url in urls if "s3cret" in url]
        page.reload()
        ask(page, "still open")
        expect_answer(page, "still open")


def test_playground_shows_the_servers_refusal_and_the_next_question_replaces_it(open_page):
    with support.serving(max_model_len=64) as served:
        page = open_page(served.url)
        ask(page, LONG)
        expect(answer(page).get_by_role("alert")).to_contain_text("context_length_exceeded")
        page.get_by_label("Max tokens").fill("16")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "short")
        expect_answer(page, "short")
        expect(page.locator("article")).to_have_count(2)
        assert len(sent.value.post_data_json["messages"]) == 1


def test_playground_shows_markup_as_text(open_page):
    prose, code = "<img src=x onerror=alert(1)><script>alert(2)</script>", "</pre><svg onload=alert(3)>"
    attack = f"{prose}\n```<b>\n{code}\n```\n&lt;i&gt; **bold**"
    with support.serving() as served:
        page = open_page(served.url)
        ask(page, attack)
        finished_answer(page)
        assert page.locator("article").locator("img, script, svg, b, i").count() == 0
        shown = answer(page).locator(".text").inner_text()
        for part in (prose, code, "&lt;i&gt;"):
            assert part in shown


def test_playground_sets_fenced_code_apart(open_page):
    code = "def f(x):\n    return x  # `tick`"
    with support.serving() as served:
        page = open_page(served.url)
        ask(page, f"Before\n\n```python\n{code}\n```\nafter")
        finished_answer(page)
        assert answer(page).locator("pre").inner_text() == code
        expect(answer(page).locator("figcaption")).to_have_text("python")
        assert answer(page).locator(".prose").all_inner_texts() == ["Before", "after"]
        assert "mono" in answer(page).locator("pre").evaluate("node => getComputedStyle(node).fontFamily").lower()


def test_playground_waits_for_a_model_that_is_loading(open_page):
    with support.serving(EchoEngine(load_s=2.0), wait=False) as served:
        page = open_page(served.url)
        expect(page.get_by_role("status")).to_contain_text("Model is loading…")
        expect(page.get_by_role("status")).to_have_text("echo · ready", timeout=20_000)


def test_playground_curl_command_gives_the_same_answer(open_page):
    with support.serving(api_keys="s3cret-key") as served:
        page = open_page(served.url)
        page.get_by_label("API key").fill("s3cret-key")
        page.get_by_label("API key").press("Enter")
        page.get_by_label("Message").fill('it\'s $HOME & `id` "quoted"\nnext')
        page.get_by_role("button", name="curl").click()
        command = page.get_by_role("dialog").locator("pre").inner_text()
        assert "s3cret" not in command
        environment = os.environ | {"TRIMARAN_API_KEY": "s3cret-key", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, env=environment)
        events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: {")]
        text = page.evaluate(
            "events => events.map(event => JSON.parse(event).choices[0]?.delta.content ?? '').join('')", events
        )
        assert text == 'it\'s $HOME & `id` "quoted"\nnext'
        page.get_by_role("button", name="Close").click()
        expect(page.get_by_role("dialog")).to_be_hidden()
