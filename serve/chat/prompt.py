"""A conversation to token ids: template and tokenizer together.  Knows no HTTP and no platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.chat.template import ChatTemplate
from serve.chat.tokenizer import Tokenizer
from serve.errors import InvalidRequest


class ChatFormat:
    """How one model reads conversations.

    Args:
        tokenizer: The model's.
        template: Jinja that replaces the model's own template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        source = template if template is not None else tokenizer.chat_template
        self._template = ChatTemplate(source, tokenizer.special_tokens) if source is not None else None

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of the conversation.  Blocking: call it off the event loop.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; the operator can set SERVE_CHAT_TEMPLATE")
        token_ids = tuple(self.tokenizer.encode(self._template.render(messages)))
        if not token_ids:
            raise InvalidRequest("messages give an empty prompt after the chat template; add text", param="messages")
        return token_ids
