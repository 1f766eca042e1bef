"""The count that keeps a hostile body from being parsed at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.api import routing
from serve.api.schemas.chat import ChatCompletionRequest

LIMIT = 5
TEXTS = st.text(alphabet='a,"\\[{é', max_size=8)
LEAVES = TEXTS | st.integers()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=12)


def marks_outside_strings(text: str) -> int:
    """The count by a scanner that reads one character after the other."""
    count, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        else:
            count += character in ",[{"
    return count


@given(VALUES, st.booleans())
def test_values_are_counted_outside_strings_only(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "MAX_VALUES", LIMIT)
        too_many = routing._has_too_many_values(text.encode())
    exact = marks_outside_strings(text) > LIMIT
    # Strings alone may be refused sooner, but only when there are more of them than that many values can hold.
    assert too_many == exact or (too_many and text.count('"') > 4 * LIMIT)


def test_long_text_with_many_commas_is_not_many_values():
    body = json.dumps({"messages": [{"role": "user", "content": 'a, [b] {c} \\ " ' * 200_000}]}).encode()
    assert not routing._has_too_many_values(body)


@pytest.mark.parametrize("field", ["messages", "tools", "functions"])
def test_list_of_wrong_items_is_explained_once(field):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], field: [1] * 10_000}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("field", ["metadata", "logit_bias"])
def test_object_with_too_many_entries_is_explained_once(field):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], field: dict.fromkeys(map(str, range(9999)))}
    with pytest.raises(ValidationError, match="at most") as caught:
        ChatCompletionRequest.model_validate(body)
    assert caught.value.error_count() == 1
