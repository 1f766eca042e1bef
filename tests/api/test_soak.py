"""The soak itself: a few seconds of its storm, and that it can fail."""

from __future__ import annotations

import random

import httpx2 as httpx
import pytest
from support import serving

from bench.soak import PROMPTS, Storm, main, slope, text_of, warmed_up


def storm() -> Storm:
    return Storm("http://127.0.0.1:9", "echo", {}, 400, random.Random(1), right={"a": "a"})


@pytest.mark.parametrize(
    ("status", "headers", "text", "outcome"),
    [
        (200, {}, "a", "right"),
        (200, {}, "b", "wrong"),
        (200, {}, "", "wrong"),
        (200, {}, None, "lost"),
        (500, {}, None, "lost"),
        (429, {}, None, "lost"),
        (429, {"retry-after": "3"}, None, "shed"),
    ],
)
def test_soak_judges_answers(status, headers, text, outcome):
    found = storm()
    rest_s = found.judge("plain", "a", httpx.Response(status, headers=headers), text)
    assert dict(found.counts) == {outcome: 1}
    assert rest_s == (3.0 if outcome == "shed" else 0.0)


def test_soak_takes_a_broken_stream_for_no_answer():
    chunk = 'data: {"choices": [{"delta": {"content": "é"}}]}'
    assert text_of([chunk, "", chunk, "", "data: [DONE]"]) == "éé"
    assert text_of([chunk]) is None
    assert text_of([]) is None
    assert text_of([chunk, 'data: {"error": {}}', "data: [DONE]"]) is None


def test_soak_reads_the_slope_of_the_second_half():
    warm_up = [(float(at), 10.0 * at) for at in range(30)]
    assert slope([*warm_up, *((30.0 + at, 300.0) for at in range(30))]) == pytest.approx(0)
    assert slope([*warm_up, *((30.0 + at, 300.0 + at) for at in range(30))]) == pytest.approx(60)


def test_soak_tells_memory_of_the_moment_from_memory_that_is_kept():
    kept = [(float(at), 500.0 + min(at, 40) + 30 * (at % 7 > 0)) for at in range(200)]
    assert slope(kept) == pytest.approx(0)
    assert warmed_up(kept) == pytest.approx(40)


def test_soak_of_a_moment_loses_nothing(capsys: pytest.CaptureFixture[str]):
    status = main(["--minutes", "0.05", "--slots", "2"])
    shown = capsys.readouterr().out
    assert status == 0, shown
    for line in ("| wrong answers | 0 |", "| lost | 0 |", "| leaked slots | 0 |", "| /health, not 200 | 0 |"):
        assert line in shown
    assert int(shown.partition("| right answers | ")[2].split()[0]) > 0


def test_soak_knows_the_answers_of_its_prompts():
    with serving() as served, httpx.Client(base_url=served.url) as client:
        for prompt in PROMPTS[:3]:
            body = Storm(served.url, "echo", {}, 400, random.Random(1)).body(prompt)
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == prompt
