"""Text to token ids and back, through the Rust ``tokenizers`` library; transformers only where that is not exact.

A tokenizer is ready a tenth of a second after its files are, long before the model, so that requests are
validated while the weights still load.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from serve.chat.constraint import Vocabulary
from serve.chat.control import ControlTokens
from serve.chat.token_bytes import TokenBytes
from serve.errors import ModelLoadError

logger = logging.getLogger(__name__)

MAX_SHRINKING = 4
"""Normalisers shorten a text and some tokenisers drop spaces; more than this happens only to contrived texts."""

MARK = re.compile(r"[<\[].*[>\]]")
"""An added token like this commands the model (``<think>``), whether or not it is declared special."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer(Protocol):
    """What chat and the engine need of a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Such as ``{"bos_token": "<s>"}``; chat templates use them."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own template, in Jinja."""
        ...

    @property
    def tool_chat_template(self) -> str | None:
        """Its template for requests with tools, where that is another one."""
        ...

    @property
    def control(self) -> ControlTokens | None:
        """Separates control tokens in texts, so that :meth:`encode` reads them as text."""
        ...

    @property
    def max_chars_per_token(self) -> int | None:
        """A text with more characters for each token than this does not exist; None: unknown."""
        ...

    def encode(self, text: str, *, adds_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text count as such unless :attr:`control` separated them.

        ``adds_special`` adds those that begin (and end) every text of this model.
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = True) -> str:
        """Text, special tokens left out unless asked for."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one token."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones too; empty for an unknown id."""
        ...

    def vocabulary(self) -> Vocabulary:
        """All tokens, for grammars.  Takes a while."""
        ...

    def decoder(self, kept: Iterable[str]) -> Callable[[Sequence[int]], str]:
        """:meth:`decode`, which leaves some special tokens in."""
        ...


class HubTokenizer:
    """A tokenizer from a model's folder.

    Raises:
        ModelLoadError: the folder has no tokenizer that can be read.
    """

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        self._rust = _load_rust(folder, config)
        self._rust.no_truncation()
        self._rust.no_padding()
        self._max_chars_per_token: int | None = None
        self._token_bytes: TokenBytes | None = None
        self.special_tokens = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        templates = _chat_templates(folder, config)
        self.chat_template, self.tool_chat_template = templates.get("default"), templates.get("tool_use")
        self.control = _control_tokens(self._rust)
        self._separator_id = self._rust.token_to_id(self.control.separator)

    @property
    def max_chars_per_token(self) -> int | None:
        """A text with more characters for each token than this does not exist.

        Found when first asked for: listing the vocabulary holds the GIL for tens of milliseconds.
        """
        if self._max_chars_per_token is None:
            longest = max(map(len, self._rust.get_vocab(with_added_tokens=True)), default=1)
            self._max_chars_per_token = longest * MAX_SHRINKING
        return self._max_chars_per_token

    def encode(self, text: str, *, adds_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text count as such unless ``control`` separated them."""
        # The batch call releases the GIL, so that a long prompt does not stop the event loop.
        token_ids: list[int] = self._rust.encode_batch([text], add_special_tokens=adds_special)[0].ids
        if self.control.separator in text:
            return [token_id for token_id in token_ids if token_id != self._separator_id]
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = True) -> str:
        """Text, special tokens left out unless asked for."""
        return self._rust.decode(token_ids, skip_special_tokens=skips_special)

    def token_id(self, token: str) -> int | None:
        """The id of one token."""
        return self._rust.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones too; empty for an unknown id."""
        if self._token_bytes is None:
            self._token_bytes = TokenBytes(self._rust)
        return self._token_bytes[token_id]

    def vocabulary(self) -> Vocabulary:
        """All tokens, for grammars.  Takes a while."""
        ids = set(self._rust.get_vocab(with_added_tokens=True).values()) - {self._separator_id}
        tokens = [self.token_bytes(token_id) if token_id in ids else b"" for token_id in range(max(ids) + 1)]
        return Vocabulary(tokens, self._special_ids(), lambda text: self.encode(self.control.in_value(text)))

    def decoder(self, kept: Iterable[str]) -> Callable[[Sequence[int]], str]:
        """:meth:`decode`, which leaves some special tokens in."""
        kept_ids = {self.token_id(token) for token in kept} & self._special_ids()
        if not kept_ids:
            return self.decode
        dropped = self._special_ids() - kept_ids

        def decode(token_ids: Sequence[int]) -> str:
            shown = [token_id for token_id in token_ids if token_id not in dropped]
            return self._rust.decode(shown, skip_special_tokens=False)

        return decode

    def _special_ids(self) -> frozenset[int]:
        added = self._rust.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)


def _load_rust(folder: Path, config: dict[str, Any]) -> Any:
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            import tokenizers  # noqa: PLC0415

            rust: Any = tokenizers.Tokenizer.from_file(str(path))
            if _has_all_added_tokens(rust, config):
                logger.info("Tokenizer: %s (tokenizers, exact)", path.name)
                return rust
        from transformers import AutoTokenizer  # noqa: PLC0415

        slow: Any = cast("Any", AutoTokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelLoadError(f"the tokenizer in {folder.name} cannot be read: {error}") from error
    logger.info("Tokenizer: %s (transformers; tokenizer.json is missing or incomplete)", type(slow).__name__)
    if not hasattr(slow, "backend_tokenizer"):
        raise ModelLoadError(f"{type(slow).__name__} has no fast tokenizer; convert it to tokenizer.json")
    return slow.backend_tokenizer


def _has_all_added_tokens(rust: Any, config: dict[str, Any]) -> bool:
    """tokenizer_config.json may add tokens that tokenizer.json lacks; transformers then adds them while loading."""
    added = cast("dict[str, dict[str, Any]]", config.get("added_tokens_decoder") or {})
    return all(rust.token_to_id(token["content"]) == int(token_id) for token_id, token in added.items())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name} is not a JSON object")
    return cast("dict[str, Any]", content)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        text = cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The model's templates by name; ``default`` and ``tool_use`` are the usual names."""
    template: Any = config.get("chat_template")
    listed = cast("list[Any]", template) if isinstance(template, list) else []
    try:
        templates = {str(entry["name"]): entry["template"] for entry in listed}
    except (LookupError, TypeError):
        raise ModelLoadError("chat_template in tokenizer_config.json is no list of names and templates") from None
    if template is not None and not isinstance(template, list):
        templates = {"default": template}
    if not all(isinstance(text, str) for text in templates.values()):
        raise ModelLoadError("chat_template in tokenizer_config.json is not a text")
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return templates | {name: _read_template(path) for name, path in files.items() if path.is_file()}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"the chat template {path} cannot be read: {error}") from None


def _control_tokens(rust: Any) -> ControlTokens:
    """The tokenizer's control tokens; it learns their separator."""
    from tokenizers import AddedToken  # noqa: PLC0415

    added = list(rust.get_added_tokens_decoder().values())
    special = [token.content for token in added if token.special]
    control = ControlTokens(special, [token.content for token in added if MARK.fullmatch(token.content)])
    rust.add_special_tokens([AddedToken(control.separator, special=True, normalized=False)])
    return control
