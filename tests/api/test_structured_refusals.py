"""Constraints that are wrong, each refused by its field's name."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from support import chat, json_schema, openai_error

PATH = "/v1/chat/completions"

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not wrapped": ({"response_format": {"type": "json_schema", "schema": {}}}, "response_format.json_schema"),
    "wrong type": ({"response_format": json_schema({"type": "wat"})}, "response_format.json_schema.schema"),
    "unknown kind": ({"response_format": {"type": "xml"}}, "response_format"),
    "a string": ({"response_format": "json_object"}, "response_format"),
    "no name": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    "schema a string": ({"response_format": json_schema("x")}, "response_format.json_schema.schema"),
    "unsupported": ({"response_format": json_schema({"uniqueItems": True})}, "response_format.json_schema.schema"),
    "regex": ({"guided_regex": "("}, "guided_regex"),
    "choice": ({"guided_choice": []}, "guided_choice"),
    "grammar": ({"guided_grammar": "start: nope"}, "guided_grammar"),
    "json": ({"guided_json": "{"}, "guided_json"),
    "number": ({"guided_json": 5}, "guided_json"),
    "outputs": ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    "two": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    "endless": ({"guided_json": {"$ref": "#"}}, "guided_json"),
    "large": ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_constraint_is_refused_by_name(client: httpx.Client, name: str) -> None:
    """Case 40."""
    fields, param = BAD[name]
    response = client.post(PATH, json=chat("Invent somebody.", **fields))
    assert response.status_code == 400, response.text
    error = openai_error(response.json())
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert len(error["message"]) < 500
