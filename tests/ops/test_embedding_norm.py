"""Sums of rows of several tables with a norm: the bits of the reference on every instruction set, worded
errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynquant import reference
from dynquant.config import NORMS
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant

# By purpose: none, one, and widths around the vectors and the 16 lanes of the sums.
WIDTHS = [0, 1, 3, 16, 17, 100, 384]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def int8_table(n: int, k: int, packed: bool) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return (ops.pack_weight(weight)[0] if packed else weight), torch.rand(n) * 0.02 + 0.001


def arguments(k: int, shape: tuple[int, ...] = (3, 11), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A table of each kind, with indices of the shapes in which models have them."""
    torch.manual_seed(k)
    rows, row_scale = int8_table(50, k, packed=False)
    packed, packed_scale = int8_table(70, k, packed=True)
    tables = [torch.randn(40, k).to(dtype), torch.randn(2, k), rows, packed, torch.randn(9, 2 * k)[:, :k]]
    counts = (40, 2, 50, 70, 9)
    shapes = (shape, (1,), (1, *shape[1:]), shape, (shape[0], *[1] * (len(shape) - 1)))
    return {
        "indices": [torch.randint(0, n, of) for n, of in zip(counts, shapes, strict=True)],
        "tables": tables,
        "scales": [None, None, row_scale, packed_scale, None],
        "k": k,
        "norm_out": [torch.randn(k), torch.randn(k)] if k else [],
        "eps": 1e-12,
        "norm": NORMS.index("layer_norm"),
        "dtype": torch.float32,
    }


def both(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return ops.embedding_norm(*given.values()), reference.embedding_norm(*given.values())


@pytest.mark.parametrize("k", WIDTHS)
def test_bits(isa: str, k: int) -> None:
    for table_dtype in DTYPES:
        given = arguments(k, dtype=table_dtype)
        for dtype in reference.FLOAT_DTYPES:
            assert_same_bits(*both({**given, "dtype": dtype}))
        for norm_out in ([], [None, None], [torch.randn(k).bfloat16(), None])[: 3 if k else 1]:
            assert_same_bits(*both({**given, "norm_out": norm_out}))
            assert_same_bits(*both({**given, "norm_out": norm_out, "norm": NORMS.index("rms_norm")}))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 17, 127])
def test_rows_that_share_a_norm(isa: str, rows: int) -> None:
    assert_same_bits(*both(arguments(33, (rows,))))
    assert_same_bits(*both(arguments(33, (2, rows))))


def test_threads_share_the_rows(isa: str, threads: int) -> None:
    assert_same_bits(*both(arguments(257, (4, 333))))


def test_is_the_embedding_stage_of_a_transformer() -> None:
    words, kinds, positions = torch.randn(100, 64), torch.randn(2, 64), torch.randn(30, 64)
    ids, kind_ids = torch.randint(0, 100, (3, 20)), torch.randint(0, 2, (3, 20))
    weight, bias = torch.randn(64), torch.randn(64)
    total = F.embedding(ids, words) + F.embedding(kind_ids, kinds) + positions[:20]
    expected = F.layer_norm(total.double(), (64,), weight.double(), bias.double(), 1e-12)
    indices = [ids, kind_ids.int(), torch.arange(20)[None]]
    out = ops.embedding_norm(
        indices, [words, kinds, positions], [None] * 3, 64, [weight, bias], 1e-12, 0, torch.float32
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_non_finite_rows_are_alone() -> None:
    given = arguments(20, (8,))
    given["tables"][0][5, 3] = torch.nan
    given["indices"][0][:] = torch.tensor([0, 5, 1, 2, 3, 4, 6, 7])
    out, expected = both(given)
    assert_same_bits(out, expected)
    assert out.isfinite().all(1).tolist() == [True, False, *[True] * 6]


def test_strided_and_empty_inputs() -> None:
    given = arguments(20, (6, 8))
    whole = given["indices"][0]
    assert_same_bits(*both({**given, "indices": [whole.t().contiguous().t(), *given["indices"][1:]]}))
    expanded = [whole, torch.zeros(1, dtype=torch.int64).expand(6, 8), *given["indices"][2:]]
    assert_same_bits(*both({**given, "indices": expanded}))
    scalar = [torch.tensor(3), *[torch.tensor(0)] * 4]
    out, expected = both({**given, "indices": scalar})
    assert out.shape == (20,)
    assert_same_bits(out, expected)


K = 20
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no tables": (
        {"indices": [], "tables": [], "scales": []},
        "expected at least one table, with indices and a scale (or None) each, got 0 tables, 0 indices and 0 "
        "scales",
    ),
    "too few scales": (
        {"scales": [None]},
        "expected at least one table, with indices and a scale (or None) each, got 5 tables, 5 indices and 1 "
        "scales",
    ),
    "k below 0": ({"k": -1}, "expected k of at least 0, got -1"),
    "an integer dtype": (
        {"dtype": torch.int32},
        "expected dtype to be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "bias of an rms_norm": (
        {"norm": NORMS.index("rms_norm")},
        "expected no bias in norm_out, since rms_norm has none",
    ),
    "a norm that does not exist": ({"norm": 2}, "expected norm in [0, 1], got 2"),
    "a norm of another size": (
        {"norm_out": [torch.ones(K + 1), None]},
        f"expected norm_out's weight of shape [{K}], got [{K + 1}]",
    ),
}
TABLE_FAULTS: dict[str, tuple[int, str, Any, str]] = {
    "indices of floats": (
        1,
        "indices",
        torch.ones(1),
        "expected indices of dtype int64 or int32, got torch.float32",
    ),
    "indices that do not broadcast": (
        2,
        "indices",
        torch.zeros(1, 10, dtype=torch.int64),
        "expected indices that broadcast to [3, 11], got [1, 10]",
    ),
    "indices with more dimensions": (
        2,
        "indices",
        torch.zeros(1, 3, 11, dtype=torch.int64),
        "expected indices that broadcast to [3, 11], got [1, 3, 11]",
    ),
    "an index of N": (1, "indices", torch.tensor([2]), "expected indices in [0, 2), got 2 at position 0"),
    "a negative index": (
        4,
        "indices",
        torch.tensor([[0], [-1], [0]]),
        "expected indices in [0, 9), got -1 at position ",
    ),
    "a table of float64": (
        0,
        "tables",
        torch.ones(40, K, dtype=torch.float64),
        "expected a table of dtype float32, bfloat16 or float16, or int8 with a scale, got torch.float64",
    ),
    "rows of another size": (
        0,
        "tables",
        torch.ones(40, K + 1),
        f"expected rows of shape [N, {K}], got [40, {K + 1}]",
    ),
    "columns": (
        0,
        "tables",
        torch.ones(K, 40).t(),
        "expected rows with adjacent elements, got stride 40",
    ),
    "a scale for each of other rows": (
        2,
        "scales",
        torch.ones(49),
        "expected weight to be rows of shape",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", [ops.embedding_norm, reference.embedding_norm], ids=["kernel", "reference"])
def test_faults(op: Any, fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        op(*{**arguments(K), **change}.values())


@pytest.mark.parametrize("fault", TABLE_FAULTS)
@pytest.mark.parametrize("op", [ops.embedding_norm, reference.embedding_norm], ids=["kernel", "reference"])
def test_faults_name_the_table(op: Any, fault: str) -> None:
    number, name, value, message = TABLE_FAULTS[fault]
    given = arguments(K)
    given[name][number] = value
    if fault == "a scale for each of other rows":
        message = "expected weight to be " if op is ops.embedding_norm else "expected "
    with pytest.raises(RuntimeError, match=re.escape(f"embedding_norm, table {number}: {message}")):
        op(*given.values())


def test_memory_that_was_taken() -> None:
    given = arguments(K)
    given["tables"][0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="table 0: expected rows to have its memory"):
        ops.embedding_norm(*given.values())


def test_fake_kernel_and_gradients() -> None:
    given = arguments(K)
    torch.library.opcheck(
        ops.embedding_norm.default,
        tuple(given.values()),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    given["tables"][1].requires_grad_()
    with pytest.raises(RuntimeError, match="embedding_norm"):
        ops.embedding_norm(*given.values())
