"""What one chat request asks of the model: its prompt, the constraint on its text, and how that text is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve.api.conversation import template_variables, to_messages
from serve.api.schemas.chat import ChatCompletionRequest
from serve.api.structured import MakeGrammar, constraint
from serve.api.tools import ToolPlan, tool_plan
from serve.chat.calls import DemandedCallsParser, calls_grammar
from serve.chat.constraint import COMPILE_LIMIT_S
from serve.chat.grammar import after_reasoning, any_of
from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Tools
from serve.chat.prompt import ChatFormat
from serve.errors import InvalidRequest, UnsupportedParameter
from serve.lifecycle import Lifecycle
from serve.types import Grammar

MakeParser = Callable[[], OutputParser | None]

_THINK = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """``grammar`` and ``parser`` make what one choice needs; None: any text, which is all content."""

    prompt: tuple[int, ...]
    grammar: Callable[[], Grammar] | None
    parser: MakeParser
    is_single: bool
    """At most one call is wanted."""
    demands: bool = False
    """A call must come, which no stop string or stop token cuts."""


async def chat_prompt(body: ChatCompletionRequest, lifecycle: Lifecycle, received_at: float) -> tuple[int, ...]:
    """The prompt of a request alone, for those who count it.

    Raises:
        RequestError: a field is wrong, or the template refuses the messages.
        CapacityError: too many prompts wait, or the tokenizer is not there yet.
    """
    tools = tool_plan(body.tools, body.tool_choice, body.parallel_tool_calls)
    wanted = constraint(body)
    return await lifecycle.read(_rendering(_Work(tools, wanted[1] if wanted else None), body), received_at)


def _rendering(work: _Work, body: ChatCompletionRequest) -> Callable[[ChatFormat], tuple[int, ...]]:
    messages, variables = to_messages(body.messages), template_variables(body.chat_template_kwargs)
    return lambda chat: work.prompt(chat, messages, variables, body.reasoning_effort)


async def chat_plan(body: ChatCompletionRequest, lifecycle: Lifecycle, received_at: float) -> ChatPlan:
    """Read a request, render its prompt and compile its constraint, all that takes long off the event loop.

    Raises:
        RequestError: a field is wrong, the template refuses the messages, or a schema cannot be enforced.
        CapacityError: too many prompts wait, or the tokenizer is not there yet.
    """
    tools = tool_plan(body.tools, body.tool_choice, body.parallel_tool_calls)
    wanted = constraint(body)
    work, known = _Work(tools, wanted[1] if wanted else None), Tools(tools.tools)
    render = _rendering(work, body)

    def read(chat: ChatFormat) -> tuple[tuple[int, ...], MakeParser]:  # at once: going to a thread costs more than this
        prompt = render(chat)
        return prompt, work.parser(chat, prompt, known)

    prompt, parser = await lifecycle.read(read, received_at)
    grammar = None
    if work.is_constrained:
        param = wanted[0] if wanted else "tools"
        try:
            grammar = await asyncio.wait_for(
                lifecycle.read(lambda chat: work.grammar(chat, prompt, param), received_at), COMPILE_LIMIT_S
            )
        except TimeoutError:
            message = f"{param} takes more than {COMPILE_LIMIT_S:g} s to compile; make it simpler"
            raise InvalidRequest(message, param=param) from None
    return ChatPlan(prompt, grammar, parser, tools.is_single, tools.demands)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done off the event loop."""

    tools: ToolPlan
    make_text: MakeGrammar | None

    @property
    def is_constrained(self) -> bool:
        return self.tools.demands or self.make_text is not None

    def prompt(
        self, chat: ChatFormat, messages: list[dict[str, Any]], variables: Mapping[str, Any], effort: str | None
    ) -> tuple[int, ...]:
        prompt = chat.prompt(messages, self.tools.tools, {**chat.reasoning_variables(effort), **variables})
        if self.tools.shown and not self.is_constrained and chat.output.family is None:
            raise UnsupportedParameter(
                "the form of this model's tool calls is not known; use tool_choice required, or the operator can set "
                "SERVE_TOOL_PARSER",
                param="tools",
            )
        return prompt

    def grammar(self, chat: ChatFormat, prompt: tuple[int, ...], param: str) -> Callable[[], Grammar]:
        """Calls where they are demanded, the text where it is constrained, either where both may come."""
        text = self.make_text() if self.make_text and not self.tools.demands else None
        calls = None
        if self.tools.shown:
            arguments = self.tools.arguments()
            for index, grammar in zip(self.tools.shown, arguments.values(), strict=True):
                chat.grammars.check(grammar, f"tools[{index}].function.parameters")
            calls = calls_grammar(arguments, is_single=self.tools.is_single)
        if text is not None:
            chat.grammars.check(text, param)
        whole = any_of(text, calls) if text and calls else text or calls or ""
        if self._thinks(chat):
            is_open = chat.output.parser_class.opens_reasoning(chat.end_of(prompt))
            whole = after_reasoning(whole, *_THINK, is_open=is_open)
        return chat.grammars.compile(whole, param)

    def parser(self, chat: ChatFormat, prompt: tuple[int, ...], known: Tools) -> MakeParser:
        end = chat.end_of(prompt)
        if not self.is_constrained:
            return lambda: chat.output.parser(end, known, reads_calls=bool(self.tools.shown))
        thinks, reads_calls = self._thinks(chat), bool(self.tools.shown)
        if not (thinks or reads_calls):
            return lambda: None
        is_reasoning = thinks and chat.output.parser_class.opens_reasoning(end)
        demands = self.tools.demands
        return lambda: DemandedCallsParser(
            known, is_reasoning=is_reasoning, reads_calls=reads_calls, thinks=thinks, demands=demands
        )

    def _thinks(self, chat: ChatFormat) -> bool:
        """Whether reasoning may come before the constrained text: only where it stands between plain tags."""
        return chat.output.thinks and chat.output.parser_class.think_openers[0] == _THINK[0]
