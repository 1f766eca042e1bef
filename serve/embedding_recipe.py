"""What a sentence-transformers folder says of its model's use.  Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from serve import checkpoint
from serve.errors import ModelLoadError

POOLINGS = {
    "mean_tokens": "mean",
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "lasttoken": "lasttoken",
}
"""The switch of a pooling in its configuration, and its name."""

UNLIMITED = 10**6
"""Tokenizers write 1e30 where they mean that there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRecipe:
    """What a sentence-transformers folder says: how token states become one vector, and what may go in and out.

    ``dimensions`` are the sizes that vectors may be cut to: any up to the model's for True, none for False.
    """

    pooling: str = "mean"
    normalizes: bool = False
    max_tokens: int = 512
    prefix: str = ""
    dimensions: bool | frozenset[int] = False


def read_recipe(folder: Path, config: Mapping[str, Any]) -> EmbeddingRecipe:
    """What the files beside the weights say.

    Raises:
        ModelLoadError: they name a module or a pooling that is not served.
    """
    kinds = _modules(folder)
    if other := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelLoadError(f"{folder.name} has the module {min(other)}, which is not served; choose another model")
    usage = _object(folder / "config_sentence_transformers.json")
    prompts = cast("dict[str, Any]", usage.get("prompts") or {})
    sizes = config.get("matryoshka_dimensions")
    return EmbeddingRecipe(
        pooling=_pooling(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else "mean",
        normalizes="Normalize" in kinds,
        max_tokens=_max_tokens(folder, config),
        prefix=str(prompts.get(str(usage.get("default_prompt_name"))) or ""),
        dimensions=frozenset(cast("list[int]", sizes)) if sizes else bool(config.get("is_matryoshka")),
    )


def _read(path: Path) -> Any:
    """The JSON in a file that may be missing; None then."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download it again.") from None


def _object(path: Path) -> dict[str, Any]:
    found: Any = _read(path)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _modules(folder: Path) -> dict[str, str]:
    """Kind of each module, and its folder."""
    found: Any = _read(folder / "modules.json")
    modules = cast("list[dict[str, Any]]", found) if isinstance(found, list) else []
    return {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}


def _pooling(path: Path) -> str:
    config = _object(path)
    named = config.get("pooling_mode")
    chosen = [name for switch, name in POOLINGS.items() if config.get(f"pooling_mode_{switch}") or named == name]
    if len(chosen) != 1:
        asked = " and ".join(chosen) or str(named or "no known")
        raise ModelLoadError(f"{path} asks for {asked} pooling; one of {', '.join(POOLINGS.values())} is served")
    return chosen[0]


def _max_tokens(folder: Path, config: Mapping[str, Any]) -> int:
    limits = [
        _object(folder / "sentence_bert_config.json").get("max_seq_length"),
        _object(folder / "tokenizer_config.json").get("model_max_length"),
        checkpoint.context_length(config),
    ]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < UNLIMITED]
    return min(known, default=512)
