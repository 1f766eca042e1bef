from __future__ import annotations

import json

import pytest

from serve import errors
from serve.api.errors import TABLE, error_json, error_response, explain, plain_error
from serve.errors import ServeError

KEYS = {"message", "type", "param", "code"}
KINDS = list(TABLE)


def leaves(kind: type[ServeError]) -> set[type[ServeError]]:
    below = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


def test_table_has_every_error_that_can_reach_a_caller():
    assert set(TABLE) == leaves(ServeError) | {errors.ModelLoadError}  # raised itself too


def test_roots_are_never_raised_themselves():
    assert not set(TABLE) & {ServeError, errors.RequestError, errors.CapacityError, errors.EngineError}


@pytest.mark.parametrize("kind", KINDS)
def test_body_is_openais_error_object(kind):
    response = error_response(kind('a "quoted"\nmessage', param="x[0].y"))
    body = json.loads(bytes(response.body))
    assert set(body) == {"error"}
    assert set(body["error"]) == KEYS
    assert body["error"]["message"] == 'a "quoted"\nmessage'
    assert body["error"]["param"] == "x[0].y"
    assert 400 <= response.status_code < 600


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, errors.CapacityError)])
def test_capacity_error_always_says_when_to_try_again(kind):
    assert int(error_response(kind("busy")).headers["retry-after"]) >= 1
    assert error_response(kind("busy", retry_after=2.2)).headers["retry-after"] == "3"


def test_error_in_a_stream_is_one_line():
    assert b"\n" not in error_json(errors.GenerationFailed('a "quoted"\nmessage'))


def test_plain_error_has_the_same_shape():
    assert set(json.loads(bytes(plain_error(404, "no").body))["error"]) == KEYS


def test_exit_statuses_are_distinct():
    statuses = [errors.ConfigError.exit_status, errors.ModelLoadError.exit_status, errors.EngineDead.exit_status]
    assert statuses == [2, 3, 70]


def test_explain_names_the_deepest_field_the_value_and_the_remedy():
    body = {"messages": [{"role": "user", "content": 5}]}
    where = ("body", "messages", 0, "content")
    problems = [
        {"type": "string_type", "loc": (*where, "str"), "msg": "Input should be a valid string", "input": 5},
        {"type": "list_type", "loc": (*where, "list[x]"), "msg": "Input should be a valid list", "input": 5},
    ]
    error = explain(problems, body)
    assert error.param == "messages[0].content"
    assert error.message == "messages[0].content: input should be a valid string, not 5"


def test_explain_says_what_is_missing():
    error = explain([{"type": "missing", "loc": ("body", "model"), "msg": "Field required", "input": {}}], {})
    assert (error.param, error.message) == ("model", "model is missing; it is required")


def test_explain_shortens_a_long_value():
    problem = {"type": "int_type", "loc": ("body", "seed"), "msg": "Input should be an integer", "input": "x" * 10_000}
    assert len(explain([problem], {"seed": "x"}).message) < 200
