"""A conversation to token ids: template and tokenizer together.  Knows no HTTP and no platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.chat.constraint import GrammarCompiler
from serve.chat.generic_tools import with_tools
from serve.chat.output.choose import AUTO, GENERIC, choose
from serve.chat.reasoning import effort_variables
from serve.chat.template import ChatTemplate, Message, fold
from serve.chat.tokenizer import Tokenizer
from serve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter

USUAL_CHARS_PER_TOKEN = 16
"""A text within the context at this rate is tokenised without further questions."""


END_TOKENS = 16
"""A prompt's last tokens that may open the reasoning."""


class ChatFormat:
    """How one model reads conversations.

    Args:
        tokenizer: The model's.
        template: Jinja that replaces the model's own template.
        max_model_len: The context in tokens: a text that cannot fit is refused without tokenising it.
        folds_messages: Try again with folded messages when the template refuses the roles or their order.
        allows_control_tokens: Control tokens in messages are commands, not text.
        eos_token_ids: What ends the model's text.
        tool_parser: The family of its tool calls, or ``auto``.
        has_tool_prompt: Explain tools to a model whose template knows none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        max_model_len: int | None = None,
        *,
        folds_messages: bool = False,
        allows_control_tokens: bool = False,
        eos_token_ids: frozenset[int] = frozenset(),
        tool_parser: str = AUTO,
        has_tool_prompt: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._folds_messages = folds_messages
        self._control = None if allows_control_tokens else tokenizer.control
        source = template if template is not None else tokenizer.chat_template
        tool_source = tokenizer.tool_chat_template if template is None else None
        self._template = ChatTemplate(source, tokenizer.special_tokens, tool_source) if source is not None else None
        self._explains_tools = has_tool_prompt and not (self._template and self._template.reads_tools)
        family = GENERIC if self._explains_tools and tool_parser == AUTO else tool_parser
        self.output = choose(tool_source or source, family)
        self.decode = tokenizer.decoder(self.output.marks)
        self.eos_token_ids = eos_token_ids
        self.grammars = GrammarCompiler(tokenizer.vocabulary, eos_token_ids)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Token ids of the conversation.  Blocking: call it off the event loop.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
            ContextLengthExceeded: the text is so long that no tokenisation of it can fit.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; the operator can set SERVE_CHAT_TEMPLATE")
        if self._explains_tools:
            messages, tools = with_tools(messages, tools), ()
        elif tools and not self._template.reads_tools:
            raise UnsupportedParameter(
                "this model's chat template knows no tools; leave them out, or the operator can set "
                "SERVE_TOOL_PROMPT=generic",
                param="tools",
            )
        self._refuse_hopeless(sum(len(message.get("content") or "") for message in messages))
        if self._control is not None:
            messages = [self._control.in_message(message) for message in messages]
            tools, variables = self._control.in_value(tools), self._control.in_value(variables or {})
        text = self._rendered(self._template, messages, tools, variables or {})
        self._refuse_hopeless(len(text))
        token_ids = tuple(self.tokenizer.encode(text))
        if not token_ids:
            raise InvalidRequest("messages: the prompt is empty after the chat template; add text", param="messages")
        return self._with_one_bos(token_ids)

    def text_prompt(self, text: str, *, adds_special: bool = True) -> tuple[int, ...]:
        """Token ids of a plain text, in which control tokens count as such.  Blocking: call it off the event loop.

        Raises:
            InvalidRequest: there is no token in it.
            ContextLengthExceeded: the text is so long that no tokenisation of it can fit.
        """
        self._refuse_hopeless(len(text), "prompt")
        token_ids = tuple(self.tokenizer.encode(text, adds_special=adds_special))
        if not token_ids:
            raise InvalidRequest("prompt has no token; add text", param="prompt")
        return self._with_one_bos(token_ids)

    def reasoning_variables(self, effort: str | None) -> dict[str, Any]:
        """The template's switches for a ``reasoning_effort``; None leaves them alone.

        Raises:
            UnsupportedParameter: the template has none.
        """
        if effort is None:
            return {}
        return effort_variables(effort, self._template.variables if self._template else frozenset(), self.output)

    def end_of(self, prompt: Sequence[int]) -> str:
        """How a prompt ends, control tokens and all."""
        return b"".join(map(self.tokenizer.token_bytes, prompt[-END_TOKENS:])).decode(errors="replace")

    def _rendered(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> str:
        try:
            return template.render(messages, tools, variables)
        except InvalidRequest as error:
            folded = fold(messages) if self._folds_messages and error.__cause__ is not None else messages
            if len(folded) == len(messages):
                raise
            return template.render(folded, tools, variables)

    def _with_one_bos(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Some templates write the token that begins a text, and begin with ``bos_token`` besides."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        bos_id = self.tokenizer.token_id(bos) if bos else None
        while bos_id is not None and token_ids[:2] == (bos_id, bos_id):
            token_ids = token_ids[1:]
        return token_ids

    def _refuse_hopeless(self, num_chars: int, name: str = "messages") -> None:
        """Tokenising 8 MiB takes seconds, and two such prompts would keep everybody else's waiting."""
        context = self._max_model_len
        if context is None or num_chars <= context * USUAL_CHARS_PER_TOKEN:
            return
        longest = self.tokenizer.max_chars_per_token
        if longest is not None and num_chars > context * longest:
            raise ContextLengthExceeded(
                f"this model's context is {context} tokens, but the prompt has {num_chars} characters, "
                f"more than {context * longest}, which cannot fit; shorten the {name}",
                param=name,
            )
