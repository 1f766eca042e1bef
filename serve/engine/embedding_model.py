"""A transformers encoder and the pooling that its configuration names: all tensors of embeddings.

In float32: such models are small, and nobody's index should depend on the device's number formats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from serve.engine.device import choose_device, import_torch
from serve.errors import ModelLoadError, OutOfMemory

logger = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 8192
"""Padding included: attention's memory grows with it."""


class EncoderModel:
    """Texts to vectors.

    Args:
        folder: The model's.
        pooling: ``mean``, ``cls``, ``max``, ``mean_sqrt_len_tokens`` or ``lasttoken``.
        normalizes: Whether vectors have length 1.
        device: As in ``SERVE_DEVICE``.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelLoadError: transformers cannot load it, or there is no memory.
    """

    def __init__(
        self, folder: Path, *, pooling: str, normalizes: bool, device: str, trust_remote_code: bool = False
    ) -> None:
        import_torch()
        import torch  # noqa: PLC0415
        from transformers import AutoModel  # noqa: PLC0415

        auto: Any = AutoModel
        self._device = choose_device(device).value
        self._pooling, self._normalizes = pooling, normalizes
        try:
            model = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
            self._model = model.to(self._device).eval()
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ModelLoadError(f"transformers cannot load the embedding model {folder.name}: {reason}") from error
        if getattr(self._model.config, "is_encoder_decoder", False):
            raise ModelLoadError(f"{folder.name} is an encoder-decoder, which is not served for embeddings")
        self.dimensions = len(self.embed([[0]])[0] or b"") // 4
        logger.info("Embedding model on %s: %d dimensions, %s pooling", self._device, self.dimensions, pooling)

    def embed(self, batch: Sequence[Sequence[int]]) -> list[bytes | None]:
        """One vector of little-endian float32 for each text, in parts of like length; None where it is not finite.

        Raises:
            OutOfMemory: the device has no memory left.
        """
        import torch  # noqa: PLC0415

        order = sorted(range(len(batch)), key=lambda at: len(batch[at]))
        vectors: list[bytes | None] = [None] * len(batch)
        try:
            while order:
                longest = len(batch[order[-1]])
                part = order[-max(1, MAX_BATCH_TOKENS // longest) :]
                del order[-len(part) :]
                with torch.inference_mode():
                    found = self._forward([batch[at] for at in part])
                for at, vector in zip(part, found, strict=True):
                    vectors[at] = vector
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise OutOfMemory("the device has no memory left for these texts; send fewer or shorter ones") from None
        return vectors

    def _forward(self, texts: Sequence[Sequence[int]]) -> list[bytes | None]:
        import torch  # noqa: PLC0415

        longest = max(map(len, texts))
        pad = getattr(self._model.config, "pad_token_id", None) or 0
        rows = [[*text, *[pad] * (longest - len(text))] for text in texts]
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        mask = (torch.arange(longest, device=self._device)[None] < lengths[:, None]).long()
        states = self._model(
            input_ids=torch.tensor(rows, device=self._device), attention_mask=mask
        ).last_hidden_state.float()
        pooled = self._pool(states, mask, lengths)
        if self._normalizes:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        numbers = pooled.cpu().numpy().astype("<f4")
        finite: Any = torch.isfinite(pooled).all(-1)
        return [
            row.tobytes() if ok else None for row, ok in zip(numbers, cast("list[bool]", finite.tolist()), strict=True)
        ]

    def _pool(self, states: Any, mask: Any, lengths: Any) -> Any:
        """``states`` is ``[num_texts, longest, dimensions]``; padding counts for nothing."""
        import torch  # noqa: PLC0415

        if self._pooling == "cls":
            return states[:, 0]
        if self._pooling == "lasttoken":
            return states[torch.arange(len(states), device=states.device), lengths - 1]
        if self._pooling == "max":
            return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)
        total = (states * mask[..., None]).sum(1)
        return total / (lengths.sqrt() if self._pooling == "mean_sqrt_len_tokens" else lengths)[:, None]
