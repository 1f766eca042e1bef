"""The whole way with real weights: HTTP, template, tokenizer, engine, detokenizer and back.

In float32, where a request's tokens do not depend on its neighbours' rounding.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from support import Served, eventually, joined, serving, sse_chunks

NAME = "SmolLM2-135M-Instruct"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(engine="transformers", model=str(demo_model), dtype="float32", max_batch_size=4) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def ask(text: str, **fields: object) -> dict[str, object]:
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


def test_model_answers_what_it_knows(client: httpx.Client) -> None:
    answer = client.post(PATH, json=ask("What is the capital of France?", max_tokens=32)).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["Repeat exactly: 👩‍👩‍👧‍👦🫠", "Say 你好世界 three times.", "Write a haiku."])
def test_stream_adds_up_to_the_plain_answer(client: httpx.Client, text: str) -> None:
    """Cases 1 and 2: emoji span several tokens, and max_tokens may cut one in half."""
    body = ask(text, max_tokens=24)
    plain = client.post(PATH, json=body).json()
    chunks = sse_chunks(client.post(PATH, json={**body, "stream": True}).text)
    assert joined(chunks) == plain["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert not any("\ufffd" in (chunk["choices"][0]["delta"].get("content") or "") for chunk in chunks)


def test_stop_string_never_leaks(client: httpx.Client) -> None:
    """Case 4, on whatever the model says: cut its own answer at a piece from its middle."""
    body = ask("Count from 1 to 10, separated by commas.", max_tokens=40)
    whole = client.post(PATH, json=body).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:4]
    chunks = sse_chunks(client.post(PATH, json={**body, "stop": [stop], "stream": True}).text)
    assert joined(chunks) == whole[: whole.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_seeded_answers_are_equal_alone_and_together(served: Served) -> None:
    """Case 32."""

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:

            async def one(seed: int | None) -> str:
                answer = await client.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": "Name a colour and say why you like it."}],
                    temperature=1.5,
                    max_tokens=12,
                    seed=seed,
                )
                return answer.choices[0].message.content or ""

            alone = await one(7)
            return [alone, *await asyncio.gather(one(7), one(None), one(7), one(None))]

    alone, first, free, second, other = asyncio.run(run())
    assert alone == first == second
    assert free != other


def test_prompt_beyond_the_context_is_refused_with_both_numbers(client: httpx.Client) -> None:
    """Case 28."""
    response = client.post(PATH, json=ask("word " * 9000))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "8192" in response.json()["error"]["message"]
    assert "90" in response.json()["error"]["message"]


def test_openai_client_streams_and_lists_the_model(served: Served) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    stream = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=5, temperature=0
    )
    assert sum(len(chunk.choices[0].delta.content or "") for chunk in stream) > 0


def test_client_that_leaves_frees_its_slot(served: Served, client: httpx.Client) -> None:
    """Case 42, plain and streamed."""
    for stream in (False, True):
        body = json.dumps(ask("Write a long story.", max_tokens=4000, stream=stream))
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", PATH, body, {"content-type": "application/json"})
        eventually(lambda: served.on_loop(lambda: served.lifecycle.engine.stats().num_running) == 1)
        connection.close()
        eventually(lambda: served.on_loop(lambda: not served.lifecycle.is_busy))
    assert client.post(PATH, json=ask("Hi", max_tokens=2)).status_code == 200


def test_completion_scores_a_prompt_as_transformers_does(
    served: Served, client: httpx.Client, demo_model: Path
) -> None:
    """What lm-eval reads: the log-probability of each token of a continuation, and whether greedy decoding takes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model)
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    context, continuation = tokenizer.encode("The capital of France is"), tokenizer.encode(" Paris. It is a big city")
    ids = context + continuation
    body = {"model": NAME, "prompt": [ids, context], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choices = client.post("/v1/completions", json={**body, "seed": 1234}).json()["choices"]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)

    logprobs = choices[0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(ids) + 1
    assert "".join(logprobs["tokens"]) == choices[0]["text"]
    assert logprobs["token_logprobs"][0] is None
    for at, token_id in enumerate(ids[1:], start=1):
        assert logprobs["token_logprobs"][at] == pytest.approx(float(expected[at - 1, token_id]), abs=2e-3)
        is_greedy = int(expected[at - 1].argmax()) == token_id
        assert (logprobs["token_logprobs"][at] == max(logprobs["top_logprobs"][at].values())) is is_greedy
        assert choices[0]["text"][logprobs["text_offset"][at] :].startswith(logprobs["tokens"][at])
    chosen = int(expected[len(context) - 1].argmax())
    assert choices[1]["logprobs"]["tokens"][-1] == tokenizer.decode([chosen])


def test_chat_logprobs_are_the_models_own(served: Served, client: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 8, "temperature": 1.3, "seed": 5}
    greedy = client.post(PATH, json=ask("Name a colour.", **{**fields, "temperature": 0})).json()["choices"][0]
    sampled = client.post(PATH, json=ask("Name a colour.", **fields)).json()["choices"][0]

    for choice in (greedy, sampled):
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        for entry in entries:
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            assert tops == sorted(tops, reverse=True)
            assert entry["logprob"] <= tops[0] <= 0
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in greedy["logprobs"]["content"])


def test_logprobs_of_constrained_text_are_numbers(client: httpx.Client) -> None:
    """Case 33: what a grammar or top_k rules out must not become an infinity, which JSON has not."""
    fields: dict[str, object] = {"guided_choice": ["red", "blue"], "logprobs": True, "top_logprobs": 20, "top_k": 1}
    [choice] = client.post(PATH, json=ask("A colour?", **fields)).json()["choices"]

    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 20
        assert all(-10_000 < top["logprob"] <= 0 for top in [entry, *entry["top_logprobs"]])


def test_choices_of_one_seed_differ_and_come_again(served: Served, client: httpx.Client) -> None:
    body = ask("Say something.", n=3, seed=11, max_tokens=12) | {"temperature": 1.5}
    first, second = (client.post(PATH, json=body).json()["choices"] for _ in range(2))

    texts = [choice["message"]["content"] for choice in first]
    assert [choice["message"]["content"] for choice in second] == texts
    assert len(set(texts)) == 3


def test_logit_bias_and_stop_tokens_bind(served: Served, client: httpx.Client) -> None:
    question = "What is the capital of France?"
    plain = client.post(PATH, json=ask(question, max_tokens=8)).json()
    tokens = client.post("/tokenize", json={"prompt": plain["choices"][0]["message"]["content"]}).json()["tokens"]
    banned = client.post(
        PATH, json=ask("What is the capital of France?", logit_bias={str(tokens[0]): -100}, max_tokens=8)
    )
    stopped = client.post(PATH, json=ask(question, stop_token_ids=[tokens[2]], max_tokens=8))
    back = client.post("/detokenize", json={"tokens": tokens[:2]}).json()

    first = client.post("/tokenize", json={"prompt": banned.json()["choices"][0]["message"]["content"]}).json()
    assert first["tokens"][0] != tokens[0]
    assert stopped.json()["choices"][0]["message"]["content"] == back["prompt"]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
