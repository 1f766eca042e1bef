"""Where a model's tokenizer and weights come from, in the two steps that a cold start needs.

Joins ``serve.weights`` (files), ``serve.chat`` (tokenizer and template) and what the engine wants to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from serve import checkpoint, hub, weights
from serve.chat.constraint import Vocabulary
from serve.chat.control import ControlTokens
from serve.chat.prompt import ChatFormat
from serve.chat.tokenizer import HubTokenizer, Tokenizer
from serve.engine import echo
from serve.engine.base import ModelFiles
from serve.errors import ConfigError, ModelLoadError
from serve.settings import EngineName, Settings, ToolPrompt

DEFAULT_MAX_MODEL_LEN = 8192
"""Without a setting, a longer context is cut here: each slot of the KV cache reserves all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """Everything that is needed to validate a request before the weights are there."""

    chat: ChatFormat
    max_model_len: int
    vocab_size: int | None = None
    default_sampling: Mapping[str, float] = field(default_factory=dict[str, float])


class ModelOrigin(Protocol):
    """Both methods block; they run in the loader's thread, in this order."""

    def load_tokenizer(self) -> LoadedTokenizer:
        """Find the model and read its tokenizer.  Raises ``ModelLoadError``."""
        ...

    def fetch(self, tokenizer: LoadedTokenizer) -> ModelFiles:
        """Bring the weights.  Raises ``ModelLoadError``."""
        ...


class CheckpointOrigin:
    """A model folder or a Hub id.

    Raises:
        ConfigError: the name is malformed, or the operator's chat template cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        weights.check_name(settings.model)
        self._settings = settings
        self._template = _operator_template(settings.chat_template)
        self._source: weights.ModelSource | None = None

    def load_tokenizer(self) -> LoadedTokenizer:
        """Find the model; bring and read its tokenizer and template."""
        settings = self._settings
        source = weights.locate(settings.model, settings.model_revision, settings.trust_remote_code)
        self._source = source
        max_model_len = _max_model_len(settings.max_model_len, source.config)
        tokenizer = HubTokenizer(source.tokenizer_folder)
        eos_token_ids = checkpoint.eos_token_ids(source.folder, source.config) | _own_eos(tokenizer)
        return LoadedTokenizer(
            chat=_chat_format(settings, tokenizer, eos_token_ids, self._template, max_model_len),
            max_model_len=max_model_len,
            vocab_size=checkpoint.vocab_size(source.config),
            default_sampling=checkpoint.default_sampling(source.folder),
        )

    def fetch(self, tokenizer: LoadedTokenizer) -> ModelFiles:
        """Bring the weights and check that every file is whole."""
        if self._source is None:
            raise RuntimeError("load_tokenizer() must come before fetch()")
        source = weights.fetch_weights(self._source)
        hub.close_connections()
        return ModelFiles(
            folder=source.folder,
            decode=tokenizer.chat.decode,
            eos_token_ids=tokenizer.chat.eos_token_ids,
            max_model_len=tokenizer.max_model_len,
            adapter=source.adapter,
            origin=source.origin,
            num_bytes=source.num_bytes,
        )


class EchoOrigin:
    """Bytes as tokens, and no weights."""

    special_tokens: Mapping[str, str] = MappingProxyType({})
    chat_template = echo.CHAT_TEMPLATE
    tool_chat_template: str | None = None
    control: ControlTokens | None = None
    max_chars_per_token: int | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._template = _operator_template(settings.chat_template)

    def encode(self, text: str, *, adds_special: bool = False) -> list[int]:
        """Its bytes; no text begins with a special token."""
        del adds_special
        return echo.encode(text)

    def decode(self, token_ids: Sequence[int], *, skips_special: bool = True) -> str:
        """The bytes' text; the only special token has none."""
        del skips_special
        return echo.decode(token_ids)

    def token_id(self, token: str) -> int | None:
        """No token has a name."""
        del token
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself."""
        return bytes((token_id,)) if token_id < echo.EOS_TOKEN_ID else b""

    def vocabulary(self) -> Vocabulary:
        """All bytes, and the end."""
        tokens = [self.token_bytes(token_id) for token_id in range(echo.VOCAB_SIZE)]
        return Vocabulary(tokens, frozenset({echo.EOS_TOKEN_ID}), echo.encode)

    def decoder(self, kept: Iterable[str]) -> Callable[[Sequence[int]], str]:
        """There are no special tokens with a text."""
        del kept
        return self.decode

    def load_tokenizer(self) -> LoadedTokenizer:
        """Bytes as tokens."""
        settings = self._settings
        return LoadedTokenizer(
            chat=_chat_format(settings, self, frozenset({echo.EOS_TOKEN_ID}), self._template, None),
            max_model_len=settings.max_model_len or echo.MAX_MODEL_LEN,
            vocab_size=echo.VOCAB_SIZE,
        )

    def fetch(self, tokenizer: LoadedTokenizer) -> ModelFiles:
        """Nothing to bring."""
        return ModelFiles(
            folder=Path(),
            decode=echo.decode,
            eos_token_ids=frozenset({echo.EOS_TOKEN_ID}),
            max_model_len=tokenizer.max_model_len,
        )


def choose_origin(settings: Settings) -> ModelOrigin:
    """The origin that fits ``SERVE_ENGINE``."""
    return CheckpointOrigin(settings) if settings.engine is EngineName.TRANSFORMERS else EchoOrigin(settings)


def _chat_format(
    settings: Settings,
    tokenizer: Tokenizer,
    eos_token_ids: frozenset[int],
    template: str | None,
    context: int | None,
) -> ChatFormat:
    return ChatFormat(
        tokenizer,
        template,
        context,
        eos_token_ids=eos_token_ids,
        tool_parser=settings.tool_parser.value,
        has_tool_prompt=settings.tool_prompt is ToolPrompt.GENERIC,
        folds_messages=settings.fold_messages,
        allows_control_tokens=settings.allow_control_tokens,
    )


def _operator_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"SERVE_CHAT_TEMPLATE={path} cannot be read: {error}") from error


def _max_model_len(requested: int | None, config: Mapping[str, Any]) -> int:
    if requested is None:
        return min(checkpoint.context_length(config) or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    longest = checkpoint.longest_context(config)
    if longest is not None and requested > longest:
        raise ModelLoadError(
            f"SERVE_MAX_MODEL_LEN={requested} exceeds the model's context of {longest} tokens; lower it"
        )
    return requested


def _own_eos(tokenizer: Tokenizer) -> frozenset[int]:
    name = tokenizer.special_tokens.get("eos_token")
    token_id = tokenizer.token_id(name) if name else None
    return frozenset() if token_id is None else frozenset({token_id})
