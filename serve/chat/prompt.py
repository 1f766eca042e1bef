"""A conversation to token ids: template and tokenizer together.  Knows no HTTP and no platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.chat.template import ChatTemplate
from serve.chat.tokenizer import Tokenizer
from serve.errors import ContextLengthExceeded, InvalidRequest

USUAL_CHARS_PER_TOKEN = 16
"""A text within the context at this rate is tokenised without further questions."""


class ChatFormat:
    """How one model reads conversations.

    Args:
        tokenizer: The model's.
        template: Jinja that replaces the model's own template.
        max_model_len: The context in tokens: a text that cannot fit is refused without tokenising it.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, max_model_len: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        source = template if template is not None else tokenizer.chat_template
        self._template = ChatTemplate(source, tokenizer.special_tokens) if source is not None else None

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of the conversation.  Blocking: call it off the event loop.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
            ContextLengthExceeded: the text is so long that no tokenisation of it can fit.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; the operator can set SERVE_CHAT_TEMPLATE")
        text = self._template.render(messages)
        self._refuse_hopeless(text)
        token_ids = tuple(self.tokenizer.encode(text))
        if not token_ids:
            raise InvalidRequest("messages give an empty prompt after the chat template; add text", param="messages")
        return token_ids

    def _refuse_hopeless(self, text: str) -> None:
        """Tokenising 8 MiB takes seconds, and two such prompts would keep everybody else's waiting."""
        context = self._max_model_len
        if context is None or len(text) <= context * USUAL_CHARS_PER_TOKEN:
            return
        longest = self.tokenizer.max_chars_per_token
        if longest is not None and len(text) > context * longest:
            raise ContextLengthExceeded(
                f"this model's context is {context} tokens, but the prompt has {len(text)} characters, "
                f"more than {context * longest}, which cannot fit; shorten the messages",
                param="messages",
            )
