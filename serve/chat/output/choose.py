"""Which family's format a model speaks: read off its chat template, or named by the operator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from serve.chat.output.deepseek import DeepSeekParser
from serve.chat.output.gemma import GemmaParser
from serve.chat.output.harmony import HarmonyParser
from serve.chat.output.kimi import KimiParser
from serve.chat.output.kimi_xtml import KimiXtmlParser
from serve.chat.output.llama import LlamaParser
from serve.chat.output.mistral import MistralParser
from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Tools
from serve.chat.output.tagged import TaggedParser

logger = logging.getLogger(__name__)

AUTO, NONE, GENERIC = "auto", "none", "hermes"

PARSERS: Mapping[str, type[OutputParser]] = {
    "harmony": HarmonyParser,
    "kimi_k3": KimiXtmlParser,
    "kimi": KimiParser,
    "deepseek": DeepSeekParser,
    "gemma": GemmaParser,
    "mistral": MistralParser,
    "hermes": TaggedParser,
    "llama": LlamaParser,
}
"""By the names that ``SERVE_TOOL_PARSER`` knows, in the order in which templates are asked."""

_SIGNS: Mapping[str, tuple[str, ...]] = {
    "harmony": ("<|channel|>",),
    "kimi_k3": ("<|open|>",),
    "kimi": ("<|tool_calls_section_begin|>",),
    "deepseek": ("<｜tool▁calls▁begin｜>", "｜DSML｜"),  # noqa: RUF001 - as DeepSeek has it
    "gemma": ("<|tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "hermes": ("<tool_call>",),
    "llama": ("<|python_tag|>", "<|eom_id|>", "<|python_start|>"),
}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How to read what a model writes.

    ``family`` is None where calls have no known format; ``thinks`` says whether there is reasoning to find.
    """

    family: str | None
    thinks: bool

    @property
    def parser_class(self) -> type[OutputParser]:
        """The family's parser; of models without one only the reasoning is read."""
        return PARSERS[self.family] if self.family else OutputParser

    @property
    def marks(self) -> frozenset[str]:
        """The texts that the parser looks for; a special token among them must not be dropped."""
        return frozenset(self.parser_class.all_marks()) if self.family or self.thinks else frozenset()

    def parser(self, prompt_end: str, tools: Tools, *, reads_calls: bool) -> OutputParser | None:
        """A parser for one answer; None where its text is nothing but content.

        Args:
            prompt_end: How the prompt's text ends: it may have opened the reasoning.
            tools: The request's.
            reads_calls: Whether the model may call one.
        """
        reads_calls = reads_calls and self.family is not None
        if not (reads_calls or self.thinks or self.parser_class.always):
            return None
        is_reasoning = self.thinks and self.parser_class.opens_reasoning(prompt_end)
        return self.parser_class(tools, is_reasoning=is_reasoning, reads_calls=reads_calls, thinks=self.thinks)


def choose(template: str | None, wanted: str) -> OutputFormat:
    """The format of a model whose chat template is ``template``, unless the operator ``wanted`` another."""
    family, reason = _family(template or "", wanted)
    thinks = _thinks(template or "", family)
    logger.info("Output: tool calls %s (%s), reasoning %s", family or "not read", reason, "read" if thinks else "none")
    return OutputFormat(family, thinks)


def _family(template: str, wanted: str) -> tuple[str | None, str]:
    if wanted != AUTO:
        return (None if wanted == NONE else wanted), "SERVE_TOOL_PARSER"
    for name, signs in _SIGNS.items():
        if sign := next((sign for sign in signs if sign in template), None):
            return name, f"the chat template has {sign}"
    return None, "the chat template has no format that is known"


def _thinks(template: str, family: str | None) -> bool:
    parser = PARSERS[family] if family else OutputParser
    marks = (*parser.think_openers, *parser.think_closers)
    return parser.always or any(mark.strip() in template for mark in marks)
