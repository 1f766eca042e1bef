"""Numbers from Python to the device and back without waiting for it, and the tokens that only the device knows yet.

``torch.tensor(..., device="cuda")`` and an index that is a Python list wait until the device has done all before.
Out of pinned memory a copy takes its turn on the device instead; torch keeps that memory until the copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from serve.engine.sequence import Sequence


def on_device(values: Seq[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of (nested) ``values`` on ``device``."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return pinned(values, dtype).to(device, non_blocking=True)


def pinned(values: Seq[Any], dtype: torch.dtype) -> Tensor:
    """A tensor in memory that the device reads by itself."""
    return torch.tensor(values, dtype=dtype, pin_memory=True)


def to_host(*tensors: Tensor) -> Callable[[], tuple[Any, ...]]:
    """Begin to copy ``tensors``; the result waits for that and gives each as (nested) lists."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        lists = _lists(tensors)
        return lambda: lists
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch takes pinned memory for this
    # Waiting must not spin: the event loop needs the core, and the next step covers the time it takes to wake up.
    done = torch.cuda.Event(blocking=True)
    done.record()

    def wait() -> tuple[Any, ...]:
        done.synchronize()
        return _lists(copies)

    return wait


def _lists(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    untyped: Iterable[Any] = tensors
    return tuple(tensor.tolist() for tensor in untyped)


class Drawn:
    """The tokens of the step that was launched last, on the device.

    Args:
        token_ids: ``[num_sequences]``, int64, all within the vocabulary.
        sequences: Whose they are.
    """

    def __init__(self, token_ids: Tensor, sequences: Seq[Sequence]) -> None:
        self._token_ids = token_ids
        # By id: a sequence that has ended must go at once, with all that is kept for it, not with the next step.
        self._rows = {sequence.request.request_id: row for row, sequence in enumerate(sequences)}

    def of(self, sequence: Sequence) -> Tensor:
        """``[1]``: the pending token of a sequence."""
        row = self._rows[sequence.request.request_id]
        return self._token_ids[row : row + 1]

    def fill(self, token_ids: Tensor, sequences: Seq[Sequence]) -> None:
        """Write the pending tokens of ``sequences`` to their places at the beginning of ``token_ids``."""
        pending = [(place, each) for place, each in enumerate(sequences) if each.num_pending_tokens]
        pairs = [(place, self._rows[each.request.request_id]) for place, each in pending]
        if pairs:
            places, rows = on_device(list(zip(*pairs, strict=True)), token_ids.device)
            token_ids.index_copy_(0, places, self._token_ids.index_select(0, rows))


NOTHING_DRAWN = Drawn(torch.empty(0, dtype=torch.int64), ())


def last_known(sequence: Sequence) -> int:
    """The sequence's last token; any token while it is pending, for :meth:`Drawn.fill` to write over."""
    return 0 if sequence.num_pending_tokens else sequence.output_token_ids[-1]
