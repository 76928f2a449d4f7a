"""Rows and bags of an int8 table: the bits of the reference on every instruction set, worded errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynquant import reference
from dynquant.reference.embedding import MODES
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def table(n: int, k: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, generator=generator) + 0.01
    return (ops.pack_weight(weight)[0] if packed else weight), scale


def bags(count: int, n: int, longest: int = 40) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags, some of them empty."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(0, longest, (count,), generator=generator)
    lengths[::5] = 0
    indices = torch.randint(0, n, (int(lengths.sum()),), generator=generator)
    return indices, lengths.cumsum(0) - lengths


# By purpose: none, one, and widths around the vectors and the blocks of columns of each instruction set.
WIDTHS = [0, 1, 3, 16, 17, 100, 129, 384]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", WIDTHS)
def test_rows(isa: str, k: int, packed: bool) -> None:
    weight, scale = table(70, k, packed)
    indices = torch.randint(0, 70, (3, 41))
    for dtype in reference.FLOAT_DTYPES:
        out = ops.embedding(indices, weight, scale, k, dtype)
        assert_same_bits(out, reference.embedding(indices, weight, scale, k, dtype))
    rows, _ = table(70, k)
    values = rows.float() * scale[:, None]
    assert_same_bits(ops.embedding(indices, weight, scale, k, torch.float32), F.embedding(indices, values))


@pytest.mark.parametrize("mode", range(3), ids=MODES)
@pytest.mark.parametrize("k", WIDTHS)
def test_bags(isa: str, k: int, mode: int) -> None:
    n = 90
    indices, offsets = bags(12, n, 20)
    for packed, padding, last in itertools.product((False, True), (-1, int(indices[0])), (False, True)):
        weight, scale = table(n, k, packed)
        begins = torch.cat([offsets, torch.tensor([indices.numel() - 3])]) if last else offsets
        arguments = indices, begins, weight, scale, None, k, mode, last, padding
        for dtype in (torch.float32, torch.bfloat16):
            assert_same_bits(ops.embedding_bag(*arguments, dtype), reference.embedding_bag(*arguments, dtype))


def test_threads_share_rows_and_bags(isa: str, threads: int) -> None:
    weight, scale = table(1000, 100)
    indices, offsets = bags(1000, 1000, 8)
    out = ops.embedding(indices, weight, scale, 100, torch.float32)
    assert_same_bits(out, reference.embedding(indices, weight, scale, 100, torch.float32))
    factors = torch.randn(indices.numel())
    arguments = indices, offsets, weight, scale, factors, 100, 0, False, 7, torch.float32
    assert_same_bits(ops.embedding_bag(*arguments), reference.embedding_bag(*arguments))


@pytest.mark.parametrize("mode", MODES)
def test_bags_are_those_of_the_dequantized_table(mode: str) -> None:
    weight, scale = table(50, 33)
    indices, offsets = bags(20, 50)
    values = weight.double() * scale.double()[:, None]
    factors = torch.randn(indices.numel()) if mode == "sum" else None
    expected = F.embedding_bag(
        indices,
        values,
        offsets,
        mode=mode,
        padding_idx=3,
        per_sample_weights=None if factors is None else factors.double(),
    )
    arguments = indices, offsets, weight, scale, factors, 33, MODES.index(mode), False, 3
    out = ops.embedding_bag(*arguments, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    assert_same_bits(ops.embedding_bag(*arguments, torch.float64), out.double())


def test_int32_indices_and_strides() -> None:
    weight, scale = table(50, 20)
    indices = torch.randint(0, 50, (6, 8))
    expected = reference.embedding(indices, weight, scale, 20, torch.float32)
    assert_same_bits(ops.embedding(indices.int(), weight, scale, 20, torch.float32), expected)
    strided = torch.empty(8, 6, dtype=torch.int64).t().copy_(indices)
    assert_same_bits(ops.embedding(strided, weight, scale, 20, torch.float32), expected)


def test_non_finite_weights_reach_their_own_bag_alone() -> None:
    weight, scale = table(10, 5)
    factors = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    arguments = (
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0, 1, 2, 3]),
        weight,
        scale,
        factors,
        5,
        0,
        False,
        -1,
    )
    out = ops.embedding_bag(*arguments, torch.float32)
    assert_same_bits(out, reference.embedding_bag(*arguments, torch.float32))
    assert out.isfinite().all(1).tolist() == [True, False, True, False]


ROWS = {
    "indices of floats": (
        {"indices": torch.ones(3)},
        "expected indices of dtype int64 or int32, got torch.float32",
    ),
    "an index of N": (
        {"indices": torch.tensor([[0, 9], [50, 1]])},
        "expected indices in [0, 50), got 50 at position 2",
    ),
    "a negative index": (
        {"indices": torch.tensor([3, -1])},
        "expected indices in [0, 50), got -1 at position 1",
    ),
    "a float table": (
        {"weight": torch.ones(50, 20)},
        "expected weight to be contiguous int8, got torch.float32",
    ),
    "a table of another width": ({"weight": torch.ones(50, 21, dtype=torch.int8)}, "expected"),
    "a transposed table": ({"weight": torch.ones(20, 50, dtype=torch.int8).t()}, "contiguous: False"),
    "a scale too few": ({"weight_scale": torch.ones(49)}, "expected"),
    "a matrix of scales": ({"weight_scale": torch.ones(50, 1)}, "weight_scale with 1 dimension, got 2"),
    "a negative width": ({"k": -1}, "expected k of at least 0, got -1"),
    "an int result": ({"dtype": torch.int8}, "expected dtype to be float32"),
}
BAGS = {
    "indices of two dimensions": (
        {"indices": torch.ones(2, 2, dtype=torch.int64)},
        "with 1 dimension, got 2",
    ),
    "an index out of range": ({"indices": torch.tensor([50])}, "expected indices in [0, 50), got 50"),
    "offsets of floats": ({"offsets": torch.zeros(1)}, "expected offsets of dtype int64 or int32"),
    "offsets that begin late": ({"offsets": torch.tensor([1, 2])}, "expected offsets[0] to be 0, got 1"),
    "offsets that decrease": ({"offsets": torch.tensor([0, 3, 2])}, "got 3 and then 2 at offsets[2]"),
    "offsets beyond": ({"offsets": torch.tensor([0, 7])}, "at most 6, the number of indices, got 7"),
    "no offset at all": (
        {"offsets": torch.tensor([], dtype=torch.int64), "include_last_offset": True},
        "at least 1 offset with include_last_offset",
    ),
    "a mode": ({"mode": 3}, "expected mode to be 0 (sum), 1 (mean) or 2 (max), got 3"),
    "weights of a mean": (
        {"mode": 1, "per_sample_weights": torch.ones(6)},
        "with mode 'sum' alone, got mode 'mean'",
    ),
    "too few weights": (
        {"per_sample_weights": torch.ones(5)},
        "of shape [6], got torch.float32 of shape [5]",
    ),
    "weights of ints": ({"per_sample_weights": torch.ones(6, dtype=torch.int64)}, "of a float dtype"),
}


def refuses(op: str, arguments: dict[str, object], words: str) -> None:
    for function in (getattr(ops, op), getattr(reference, op)):
        with pytest.raises((RuntimeError, ValueError), match=re.escape(words)) as error:
            function(*arguments.values())
        assert str(error.value).startswith(f"{op}: ")


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows(name: str) -> None:
    change, words = ROWS[name]
    weight, scale = table(50, 20)
    good = {
        "indices": torch.arange(6),
        "weight": weight,
        "weight_scale": scale,
        "k": 20,
        "dtype": torch.float32,
    }
    refuses("embedding", good | change, words)


@pytest.mark.parametrize("name", BAGS)
def test_bad_bags(name: str) -> None:
    change, words = BAGS[name]
    weight, scale = table(50, 20)
    good = {
        "indices": torch.arange(6),
        "offsets": torch.tensor([0, 2]),
        "weight": weight,
        "weight_scale": scale,
        "per_sample_weights": None,
        "k": 20,
        "mode": 0,
        "include_last_offset": False,
        "padding_idx": -1,
        "dtype": torch.float32,
    }
    refuses("embedding_bag", good | change, words)


def test_tables_without_memory_are_refused() -> None:
    weight, scale = table(50, 20)
    weight.untyped_storage().resize_(0)
    arguments = {
        "indices": torch.arange(3),
        "weight": weight,
        "scale": scale,
        "k": 20,
        "dtype": torch.float32,
    }
    refuses("embedding", arguments, "expected weight to have its memory")
