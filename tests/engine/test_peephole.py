"""A recorded graph in fewer operators: found by what is computed, the same numbers, left alone where in doubt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toy import graph_of, inputs, of_ids

from serve.engine import peephole, program

HEADS, KV_HEADS, SIZE = 3, 2, 8
WIDTH = (HEADS + 2 * KV_HEADS) * SIZE
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, WIDTH, generator=GENERATOR)
SCALE = torch.rand(WIDTH, generator=GENERATOR) + 0.5


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(hidden.dtype)


def hidden_of(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """A value of the program that is no weight's view, and neither zero nor regular."""
    return nn.functional.embedding(ids, WEIGHT.to(dtype)) + torch.arange(ids.shape[1], dtype=dtype)[None, :, None] / 7


def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosines + torch.cat((-x[..., half:], x[..., :half]), -1) * sines


def angles(ids: Tensor, dtype: torch.dtype, size: int = SIZE) -> tuple[Tensor, Tensor]:
    frequencies = 1 / 10 ** torch.arange(0, 1, 2 / size)
    turned = ids[..., None].float() * torch.cat((frequencies, frequencies))
    return turned.cos().to(dtype).unsqueeze(1), turned.sin().to(dtype).unsqueeze(1)


def heads(hidden: Tensor, begin: int, count: int) -> Tensor:
    part = hidden[..., begin * SIZE : (begin + count) * SIZE]
    return part.view(*part.shape[:2], count, SIZE).transpose(1, 2)


def counted(forward: Callable[[Tensor], Tensor]) -> tuple[Counter[str], Callable[..., Tensor]]:
    """How often each function is called, and the program."""
    graph = peephole.simplified(graph_of(of_ids(forward)))
    return Counter(getattr(node.function, "__name__", "") for node in graph.nodes), program.compiled(graph)


def check(forward: Callable[[Tensor], Tensor], run: Callable[..., Tensor], tolerance: float) -> None:
    for rows in (1, 2, 7, 19):
        ids, wanted = inputs(rows, 1)
        with torch.inference_mode():
            got, expected = run(rows, 1, ids, wanted), forward(ids)
        assert got.dtype == expected.dtype
        assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance), rows


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_norms_become_one_kernel(dtype, tolerance):
    def forward(ids: Tensor) -> Tensor:
        hidden = hidden_of(ids, dtype)
        return norm(hidden + norm(hidden, SCALE.to(dtype)), SCALE.to(dtype)).view(-1, WIDTH)

    names, run = counted(forward)
    assert names["rms_norm"] == 2
    assert names["rsqrt"] + names["pow"] + names["mean"] == 0
    check(forward, run, tolerance)


def heads_of_norm(ids: Tensor) -> Tensor:
    """No weight behind it."""
    hidden = hidden_of(ids, torch.float32)
    return heads(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5), 0, 2).exp()


def norm_and_its_root(ids: Tensor) -> Tensor:
    """Somebody else reads a part of it."""
    hidden = hidden_of(ids, torch.float32)
    root = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
    return SCALE * (hidden * root) + root


def norm_of_turned_rows(ids: Tensor) -> Tensor:
    """Its result is not contiguous, and somebody counts on that."""
    return norm(heads(hidden_of(ids, torch.float32), 0, 2), SCALE[:SIZE])[..., 1:].exp()


def cubes(ids: Tensor) -> Tensor:
    hidden = hidden_of(ids, torch.float32)
    return SCALE * (hidden * torch.rsqrt(hidden.pow(4).mean(-1, keepdim=True) + 1e-5))


def mean_of_rows(ids: Tensor) -> Tensor:
    hidden = hidden_of(ids, torch.float32)
    return SCALE * (hidden * torch.rsqrt(hidden.pow(2).mean(1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("forward", [heads_of_norm, norm_and_its_root, norm_of_turned_rows, cubes, mean_of_rows])
def test_what_only_resembles_a_norm_stays_as_it_is(forward):
    names, run = counted(forward)
    assert not names["rms_norm"]
    check(forward, run, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_and_keys_side_by_side_are_rotated_at_once_bit_for_bit(dtype):
    def forward(ids: Tensor) -> Tensor:
        hidden, (cosines, sines) = hidden_of(ids, dtype), angles(ids, dtype)
        queries = turn(heads(hidden, 0, HEADS), cosines, sines)
        keys = turn(heads(hidden, HEADS, KV_HEADS), cosines, sines)
        return torch.cat((queries, keys, heads(hidden, HEADS + KV_HEADS, KV_HEADS)), 1)

    names, run = counted(forward)
    assert (names["rotated_pair"], names["rotated"], names["signed"], names["neg"]) == (1, 0, 1, 0)
    check(forward, run, 0)


def test_queries_and_keys_apart_are_rotated_one_by_one():
    def forward(ids: Tensor) -> Tensor:
        hidden, (cosines, sines) = hidden_of(ids, torch.float32), angles(ids, torch.float32)
        queries, keys = heads(hidden, 0, HEADS), heads(hidden, HEADS + 1, KV_HEADS)
        return torch.cat((turn(queries, cosines, sines), turn(keys, cosines, sines)), 1)

    names, run = counted(forward)
    assert (names["rotated_pair"], names["rotated"], names["signed"]) == (0, 2, 1)
    check(forward, run, 0)


def test_a_part_of_a_head_is_rotated():
    def forward(ids: Tensor) -> Tensor:
        x, (cosines, sines) = heads(hidden_of(ids, torch.float32), 0, 2), angles(ids, torch.float32, 4)
        return torch.cat((turn(x[..., :4], cosines, sines), x[..., 4:]), -1)

    names, run = counted(forward)
    assert names["rotated"] == 1
    check(forward, run, 0)


def same_half_twice(ids: Tensor) -> Tensor:
    x, (cosines, sines) = heads(hidden_of(ids, torch.float32), 0, 2), angles(ids, torch.float32)
    return x * cosines + torch.cat((-x[..., 4:], x[..., 4:]), -1) * sines


def other_sign(ids: Tensor) -> Tensor:
    x, (cosines, sines) = heads(hidden_of(ids, torch.float32), 0, 2), angles(ids, torch.float32)
    return x * cosines + torch.cat((x[..., 4:], -x[..., :4]), -1) * sines


def viewed_afterwards(ids: Tensor) -> Tensor:
    """Counts on how the result lies in memory."""
    x, (cosines, sines) = heads(hidden_of(ids, torch.float32), 0, 2), angles(ids, torch.float32)
    return turn(x, cosines, sines).transpose(1, 2).exp()


@pytest.mark.parametrize("forward", [same_half_twice, other_sign, viewed_afterwards])
def test_what_only_resembles_a_rotation_stays_as_it_is(forward):
    names, run = counted(forward)
    assert names["rotated"] + names["rotated_pair"] == 0
    check(forward, run, 0)
