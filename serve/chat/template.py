"""Messages to prompt text through a model's chat template, and what the template wants messages to look like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, cast

import jinja2

from serve.chat.sandbox import TemplateSandbox
from serve.errors import InvalidRequest

Message = Mapping[str, Any]
"""A message as a template reads it: ``role``, ``content`` and, where there are, ``tool_calls`` and the like."""

_PROBE_NAME, _PROBE_ID = "probe_of_tools", "abcdef123"
_PROBE_TOOL: Message = {"type": "function", "function": {"name": _PROBE_NAME, "description": "", "parameters": {}}}
_PROBE_USER = {"role": "user", "content": "probe"}


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source.
        special_tokens: Variables such as ``bos_token``.
        tool_source: Another template, for requests with tools.

    Raises:
        ModelLoadError: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        self._sandbox = TemplateSandbox()
        self._special_tokens = dict(special_tokens)
        self._plain = self._sandbox.prepare(source)
        self._with_tools = self._sandbox.prepare(tool_source) if tool_source else self._plain
        self.source = tool_source or source
        self.variables = self._sandbox.variables(self.source)
        self._reads_developer = "developer" in source
        self.reads_tools = self._finds_tools()
        self._null_content, self._parses_arguments = self._learn_calls()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the assistant speaks.

        Args:
            messages: As callers send them; they are adapted to what the template wants.
            tools: In OpenAI's form.
            variables: Switches of the template, such as ``enable_thinking``.

        Raises:
            InvalidRequest: the template refuses these messages, in its own words, or takes too long over them.
        """
        adapted = [self._adapted(message) for message in messages]
        return self._render(self._with_tools if tools else self._plain, adapted, tools, variables or {})

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> str:
        known = {"messages": messages, "tools": list(tools) or None, "add_generation_prompt": True}
        return self._sandbox.run(template, {**variables, **self._special_tokens, **known})

    def _adapted(self, message: Message) -> Message:
        if message["role"] == "developer" and not self._reads_developer:
            return {**message, "role": "system"}
        if not message.get("tool_calls"):
            return message if message.get("content") is not None else {**message, "content": ""}
        calls = [self._adapted_call(call) for call in message["tool_calls"]]
        content = message.get("content")
        return {**message, "content": self._null_content if content is None else content, "tool_calls": calls}

    def _adapted_call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        if not self._parses_arguments:
            return call
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}

    # What the template wants is found out by trying, once, when it is loaded.

    def _finds_tools(self) -> bool:
        try:
            return _PROBE_NAME in self._render(self._with_tools, [_PROBE_USER], [_PROBE_TOOL], {})
        except InvalidRequest:
            return "tools" in self.source

    def _learn_calls(self) -> tuple[str | None, bool]:
        """The content beside calls (None or empty) and whether their arguments come as objects."""
        empty = {parses: self._call_text("", parses) for parses in (True, False)}
        for parses, content in product((True, False), (None, "")):
            text = self._call_text(content, parses)
            if text is None or _PROBE_NAME not in text:
                continue
            usual = empty[parses]
            if content is None and usual is not None and text.count("None") > usual.count("None"):
                continue  # it prints the None
            return content, parses
        return "", True

    def _call_text(self, content: str | None, parses_arguments: bool) -> str | None:
        """A conversation with a call, rendered; None: the template refuses it."""
        arguments: Any = {"a": 1} if parses_arguments else '{"a": 1}'
        function = {"name": _PROBE_NAME, "arguments": arguments}
        messages: list[Message] = [
            _PROBE_USER,
            {
                "role": "assistant",
                "content": content,
                "tool_calls": [{"type": "function", "id": _PROBE_ID, "function": function}],
            },
            {"role": "tool", "content": "1", "tool_call_id": _PROBE_ID, "name": _PROBE_NAME},
        ]
        try:
            return self._render(self._with_tools, messages, [], {})
        except InvalidRequest:
            return None


def fold(messages: Sequence[Message]) -> list[Message]:
    """For templates without a system role, or where user and assistant must alternate: no words are lost.

    System messages go in front of the next user message; neighbours of one role become one message.
    """
    folded: list[Message] = []
    for message in _without_system(messages):
        last = folded[-1] if folded else None
        is_plain = not (message.get("tool_calls") or message["role"] == "tool")
        if last and is_plain and last["role"] == message["role"] and not last.get("tool_calls"):
            folded[-1] = {**last, "content": _joined(last.get("content"), message.get("content"))}
        else:
            folded.append(message)
    return folded


def _without_system(messages: Sequence[Message]) -> Iterator[Message]:
    waiting: str | None = None
    for message in messages:
        if message["role"] in {"system", "developer"}:
            waiting = _joined(waiting, message.get("content"))
        elif message["role"] == "user" and waiting is not None:
            yield {**message, "content": _joined(waiting, message.get("content"))}
            waiting = None
        else:
            yield message
    if waiting is not None:
        yield {"role": "user", "content": waiting}


def _joined(first: str | None, second: str | None) -> str:
    return "\n\n".join(text for text in (first, second) if text)


def _parsed(arguments: str) -> Any:
    """The object that a call's arguments are; what is none stays text, since a model may have written it so."""
    try:
        value: Any = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    return cast("dict[str, Any]", value) if isinstance(value, dict) else arguments
