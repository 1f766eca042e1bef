"""The documented contract holds under generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
import support
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support import chat

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("generated", max_tokens=20),
    "/v1/completions": {"model": "echo", "prompt": ["generated", "too"], "max_tokens": 20},
    "/v1/embeddings": {"model": "all-MiniLM-L6-v2", "input": ["generated", "too"]},
    "/tokenize": {"model": "echo", "prompt": "generated", "messages": None},
    "/detokenize": {"model": "echo", "tokens": [65, 66]},
    "/v1/responses": {"model": "echo", "input": "generated", "max_output_tokens": 20},
    "/v1/responses/input_tokens": {"model": "echo", "input": "generated"},
    "/v1/messages": {"model": "echo", "messages": chat("generated")["messages"], "max_tokens": 20},
    "/v1/messages/count_tokens": {"model": "echo", "messages": chat("generated")["messages"]},
    "/invocations": {"model": "echo", "prompt": "generated"},
}
"""What makes a generated body one that succeeds."""
FREE = {"temperature", "top_p", "seed", "logprobs", "stream", "user", "metadata", "echo", "return_token_strs", "top_k",
    "encoding_format",}  # fmt: skip
"""Fields that succeed whatever their documented value."""
RESPONSE = "/v1/responses/{response_id}"
STORED = [("get", RESPONSE), ("delete", RESPONSE), ("post", RESPONSE + "/cancel"), ("get", RESPONSE + "/input_items")]
OPERATIONS = [
    *(("post", path) for path in GOOD),
    *STORED,
    *(
        ("get", path)
        for path in ("/v1/models", "/v1/models/{model}", "/health", "/ready", "/ping", "/version", "/metrics")
    ),
]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def documented(demo_embedding: Path) -> Iterator[Any]:
    """The schema that the server itself serves, one with an embedding model."""
    with support.serving(embedding_model=str(demo_embedding)) as served:
        yield schemathesis.openapi.from_url(served.url + "/openapi.json")


def conforms(case: Any) -> int:
    """Send one generated request, hold the answer against the document, and return its status."""
    response = case.call_and_validate(checks=CHECKS)
    return response.status_code


def generated(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


# Not schemathesis' own pytest integration, which reads a private attribute that this pytest no longer has.
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_openapi_is_what_the_server_does(documented: Any, method: str, path: str) -> None:
    @generated(max_examples=20 if path in GOOD else 8)
    @given(case=documented[path][method].as_strategy())
    def check(case: Any) -> None:
        conforms(case)

    check()


@pytest.mark.parametrize(
    ("method", "path"), [*(("post", path) for path in GOOD), *STORED, ("get", "/v1/models/{model}")]
)
def test_openapi_documents_the_refusal_of_wrong_requests(documented: Any, method: str, path: str) -> None:
    @generated(max_examples=20)
    @given(case=documented[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        conforms(case)

    check()


def test_openapi_describes_a_stream(documented: Any) -> None:
    operation = documented["/v1/chat/completions"]["post"]
    assert conforms(operation.Case(body=chat("streamed", stream=True), media_type="application/json")) == 200


@pytest.mark.parametrize("path", GOOD)
def test_openapi_describes_the_answers_that_succeed(documented: Any, path: str) -> None:
    """Documented requests to the right model, less what it refuses by name."""
    statuses: list[int] = []

    @generated(max_examples=25)
    @given(case=documented[path]["post"].as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name in FREE} | GOOD[path]
        statuses.append(conforms(case))

    check()
    assert statuses.count(200) > 10


def test_openapi_documents_what_is_served(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()

    assert document["openapi"].startswith("3.")
    documented = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert sorted(documented) == sorted(OPERATIONS)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in operations)


def test_openapi_documents_no_status_that_is_never_sent(client: httpx.Client) -> None:
    """FastAPI adds 422, but a wrong value is 400 here."""
    document = client.get("/openapi.json").json()

    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
    assert "HTTPValidationError" not in document["components"]["schemas"]
