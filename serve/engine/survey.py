"""One pass that shows what every layer of a model asks of attention.

It computes nothing of use, so it is cheap: it counts the calls of attention, sees what each layer passes to it, and
asks transformers' own mask functions which keys each layer sees, at any distance.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Kind, Pattern
from serve.errors import ModelLoadError

SURVEY = "trimaran-survey"

HANDLED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
"""Options of attention that change its result, and that the engine carries out."""

EXTRAS = frozenset({"softcap", "s_aux"})
"""Those of them that fused kernels do not know."""

NEUTRAL = frozenset(
    {
        "cache", "cache_params", "cache_position", "dropout", "logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict", "use_cache",
    }
)  # fmt: skip
"""Options that leave the result of attention alone when nothing is trained."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' description of a mask: batch, head, positions of query and key; True where the key is seen."""


class NotBatchable(Exception):
    """The model would be wrong in a batch; the message says why."""


class _Survey:
    """Collects what each layer's attention is called with."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._sizes = {
            size
            for size in (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
            if isinstance(size, int) and size > 0
        }
        self._masks: dict[int, tuple[MaskFunction, Tensor]] = {}
        self.num_calls = 0
        self.patterns: dict[int, Pattern] = {}
        self.cache = KVCache(2, 1, model.dtype, model.device)
        self._has_values = model.device.type != "meta"

    def mask(self, *, q_length: int, kv_length: int, mask_function: MaskFunction, **options: Any) -> Tensor:
        """Stands for transformers' mask builders: remembers the description behind each mask."""
        if isinstance(size := options.get("local_size"), int):
            self._sizes.add(size)
        made = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=options.get("device"))
        self._masks[_storage(made)] = mask_function, made
        return made

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Stands for attention: notes the call and returns zeros."""
        self.num_calls += 1
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise NotBatchable("its attention layers have no numbers")
        given = {name for name, option in options.items() if option is not None}
        if odd := sorted(given - HANDLED - NEUTRAL - {"is_causal"}):
            raise NotBatchable(f"its attention uses {', '.join(odd)}")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise NotBatchable("its attention looks ahead")
        if query.shape[0] != 1 or query.shape[1] % key.shape[1]:
            raise NotBatchable(f"its attention has the shape {tuple(query.shape)} over {tuple(key.shape)}")
        if isinstance(size := options.get("sliding_window"), int):
            self._sizes.add(size)
        self.cache.has_extras |= not EXTRAS.isdisjoint(given)
        found = None if attention_mask is None else self._masks.get(_storage(attention_mask))
        if found is None:
            raise NotBatchable("it makes its attention mask itself")
        self.patterns[layer] = self._pattern(found[0], layer)
        self.cache.layer(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def _pattern(self, mask: MaskFunction, layer: int) -> Pattern:
        candidates = [FULL, *(Pattern(kind, size) for size in self._sizes for kind in (Kind.SLIDING, Kind.CHUNKED))]
        try:
            for candidate in candidates:
                if agrees(candidate, mask, self._sizes):
                    return candidate
        except RuntimeError:
            if self._has_values:
                raise
            return FULL  # a mask without values, of a model without weights: nothing is ever computed with it
        raise NotBatchable(f"layer {layer} sees other tokens than full, sliding or chunked attention would")


def _storage(mask: Tensor) -> int:
    """What names a mask, also after a model has cut it to the length of the keys, and on the meta device."""
    storage: Any = mask.untyped_storage()
    return storage._cdata


def agrees(pattern: Pattern, mask: MaskFunction, sizes: Iterable[int]) -> bool:
    """Whether both show the same keys, at every place where windows and chunks of ``sizes`` begin or end."""
    edges = {multiple * size for size in sizes for multiple in (1, 2, 3)} | {8, 32768}
    queries = sorted({edge + near for edge in edges for near in (-1, 0, 1)} | {0, 1})
    starts = {first for query in queries for size in sizes for first in (query - size, query // size * size)}
    keys = sorted({max(0, at + near) for at in starts | set(queries) for near in (-1, 0, 1, 2)})
    rows, columns = torch.tensor(queries), torch.tensor(keys)
    zero = torch.tensor(0)
    theirs = mask(zero, zero, rows[:, None], columns[None, :]).cpu().expand(len(rows), len(columns))
    return torch.equal(pattern.visible(rows, columns), theirs)


def survey(model: Any) -> KVCache:
    """One pass that computes nothing of use and shows all layers.

    Returns:
        A small cache that knows the shapes and patterns of all layers.

    Raises:
        NotBatchable: a layer is no attention, or one that the engine would get wrong.
    """
    import transformers  # noqa: PLC0415
    from transformers.masking_utils import AttentionMaskInterface  # noqa: PLC0415

    check_claims(model)
    found = _Survey(model)
    interfaces: tuple[Any, Any] = transformers.AttentionInterface, AttentionMaskInterface
    for interface, function in zip(interfaces, (found.attend, found.mask), strict=True):
        interface.register(SURVEY, function)
    tokens = probe_tokens(model.config.get_text_config().vocab_size, 4, 0)
    with attention_of(model, SURVEY), explained():
        row = torch.tensor([tokens], device=model.device)
        model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    num_layers = model.config.get_text_config().num_hidden_layers
    if not found.num_calls == len(found.patterns) == num_layers:
        raise NotBatchable(f"it has {num_layers} layers, but {found.num_calls} of them call the engine's attention")
    found.cache.patterns = tuple(found.patterns[layer] for layer in range(num_layers))
    return found.cache


def check_claims(model: Any) -> None:
    """Believe a model that says of itself that it is more than attention.

    Raises:
        NotBatchable: it says so.
    """
    config = model.config.get_text_config()
    known = {kind.value for kind in Kind}
    odd = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in known})
    if odd:
        raise NotBatchable(f"it has layers of type {', '.join(odd)}")
    if getattr(model, "_is_stateful", False):
        raise NotBatchable("it is recurrent")


@contextmanager
def explained() -> Generator[None]:
    """Whatever a model raises is a reason against batching it, except that memory ran out."""
    try:
        yield
    except (NotBatchable, ModelLoadError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotBatchable(f"it does not run behind the engine's attention: {first_line}") from error


@contextmanager
def attention_of(model: Any, name: str) -> Generator[None]:
    """Let ``model`` use the attention registered as ``name`` for a while."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def probe_tokens(vocab_size: int, count: int, offset: int) -> list[int]:
    """Token ids of no meaning, spread over the vocabulary."""
    return [3 + (offset + 37 * number) % max(1, vocab_size - 3) for number in range(count)]
