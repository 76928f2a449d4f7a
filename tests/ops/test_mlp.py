"""linear_norm, mlp and linear_mlp: the bits of the reference, torch's values, and errors by their words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dynquant import ops as registered
from dynquant import reference
from dynquant.config import Config, rotation_block
from tests.support.isas import ISAS, forced
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant
assert registered is not None


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(
    k: int, n: int, epilogue: str = "none", rotate: bool = False, bias: bool = True, seed: int = 0
) -> Any:
    """The tensors and the config of a random layer."""
    generator = torch.Generator().manual_seed(seed)
    config = Config(rotation_block=rotation_block(k) if rotate else 0, epilogue=epilogue)
    weight = torch.randn(n, k, generator=generator) / max(k, 1) ** 0.5
    q, scale = reference.quantize_weight(weight, config.encode())
    packed, weight_sum = reference.pack_weight(q)
    return [packed, weight_sum, scale, torch.randn(n, generator=generator) if bias else None], config.encode(
        k
    )


def norm(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator) + 0.5, torch.randn(n, generator=generator)]


def arguments(
    op: str, m: int, k: int, inner: int, n: int, variant: str, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The arguments of a call; variant: post, pre, gated, rms, bare."""
    generator = torch.Generator().manual_seed(m + 3 * k)
    x = (torch.randn(m, k, generator=generator) * 2).to(dtype)
    rotate, rms = variant in ("gated", "post"), variant in ("gated", "rms")
    weight_norm = (lambda size, seed: [norm(size, seed)[0], None]) if rms else norm
    kind, eps = int(rms), 1e-12 if variant == "post" else 1e-5
    if op == "linear_norm":
        tensors, code = layer(k, n, rotate=rotate)
        residual = None if variant == "bare" else torch.randn(m, n, generator=generator).to(dtype)
        before = weight_norm(k, 1) if variant in ("pre", "gated") else []
        after = [] if variant in ("pre", "bare") else weight_norm(n, 2)
        return x, tensors, code, residual, before, after, eps, kind
    width = n if op == "linear_mlp" else k
    out = n
    activation = {"gated": "silu", "post": "gelu", "bare": "relu", "rms": "gelu_tanh"}.get(variant, "gelu")
    up = layer(width, inner, "none" if variant == "gated" else activation, rotate, seed=2)
    gate = layer(width, inner, activation, rotate, bias=False, seed=3) if variant == "gated" else ([], 0)
    down = layer(inner, out, rotate=variant == "post", bias=variant != "gated", seed=4)
    configs = [gate[1], up[1], down[1]]
    residual = torch.randn(m, n, generator=generator).to(dtype)
    if op == "mlp":
        before = weight_norm(k, 1) if variant in ("pre", "gated") else []
        after = weight_norm(n, 2) if variant in ("post", "rms") else []
        chosen = None if variant == "bare" else residual
        return x, gate[0], up[0], down[0], configs, chosen, before, after, eps, kind
    first = layer(k, n, rotate=rotate, seed=5)
    pre = variant in ("pre", "gated")
    norms = weight_norm(n, 1), [] if pre else weight_norm(n, 2)
    return x, first[0], gate[0], up[0], down[0], [first[1], *configs], residual, *norms, eps, kind, pre


OPS = ("linear_norm", "mlp", "linear_mlp")
VARIANTS = ("post", "pre", "gated", "rms", "bare")


def check(op: str, given: tuple[Any, ...]) -> None:
    assert_same_bits(getattr(ops, op)(*given), getattr(reference, op)(*given), op)


# (M, K, inner, N): one row, tiles and pieces of rows with tails, channels beyond a panel, a deep K.
SHAPES = [(1, 24, 40, 24), (7, 64, 128, 64), (49, 33, 70, 33), (100, 64, 200, 64), (130, 192, 96, 192)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits(isa: str, op: str, shape: tuple[int, int, int, int], variant: str) -> None:
    with forced(isa):
        check(op, arguments(op, *shape, variant, torch.float32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [1, 5, 16, 60, 300])
@pytest.mark.parametrize("op", OPS)
def test_threads(threads: int, op: str, m: int, variant: str) -> None:
    check(op, arguments(op, m, 256, 640, 256, variant, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(op: str, dtype: torch.dtype, variant: str) -> None:
    check(op, arguments(op, 20, 64, 96, 64, variant, dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_nan_and_others_unchanged(op: str, bad: float) -> None:
    given = arguments(op, 12, 64, 96, 64, "post", torch.float32)
    clean = getattr(ops, op)(*given)
    given[0][3, 5] = bad
    out = getattr(ops, op)(*given)
    assert out[3].isnan().all()
    rest = torch.arange(12) != 3
    assert_same_bits(out[rest], clean[rest])
    check(op, given)


@pytest.mark.parametrize("op", OPS)
def test_views_and_empty_inputs(op: str) -> None:
    x, *rest = arguments(op, 12, 64, 96, 64, "post", torch.float32)
    place = {"linear_norm": 2, "mlp": 4, "linear_mlp": 5}[op]
    wide = torch.randn(12, 100)
    wide[:, 7:71] = x
    check(op, (wide[:, 7:71], *rest))
    check(op, (x.t().contiguous().t(), *rest))
    shaped = list(rest)
    shaped[place] = rest[place].reshape(3, 4, 64).transpose(0, 1).contiguous().transpose(0, 1)
    check(op, (x.reshape(3, 4, 64), *shaped))
    empty = list(rest)
    empty[place] = rest[place][:0]
    assert getattr(ops, op)(x[:0], *empty).shape == (0, 64)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 384, 1000])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])
def test_norms_are_torchs(size: int, magnitude: float) -> None:
    y = torch.randn(50, size, dtype=torch.float64) * magnitude + 3 * magnitude
    y = y.float()
    weight, bias = norm(size)
    exact = F.layer_norm(y.double(), [size], weight.double(), bias.double(), 1e-5)
    assert (reference.layer_norm(y, weight, bias, 1e-5) - exact).abs().max() < 2e-4
    exact = F.rms_norm(y.double(), [size], weight.double(), 1e-5)
    assert (reference.rms_norm(y, weight, 1e-5) - exact).abs().max() < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_those_of_the_parts(variant: str) -> None:
    """linear_mlp is linear_norm and mlp, one after the other, if nothing is rounded in between."""
    x, first, gate, up, down, configs, residual, norm0, norm1, eps, kind, pre = arguments(
        "linear_mlp", 30, 64, 96, 64, variant, torch.float32
    )
    h = ops.linear_norm(x, first, configs[0], residual, [], [] if pre else norm0, eps, kind)
    out = ops.mlp(h, gate, up, down, configs[1:], h, norm0 if pre else [], [] if pre else norm1, eps, kind)
    whole = ops.linear_mlp(x, first, gate, up, down, configs, residual, norm0, norm1, eps, kind, pre)
    assert_same_bits(whole, out)


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_is_refused(op: str) -> None:
    x, *rest = arguments(op, 3, 24, 40, 24, "post", torch.float32)
    with pytest.raises(NotImplementedError, match=f"{op}: expected inputs that require no gradient"):
        getattr(ops, op)(x.requires_grad_(), *rest)
    with torch.no_grad():
        assert not getattr(ops, op)(x, *rest).requires_grad


def changed(op: str, change: str) -> tuple[tuple[Any, ...], str]:
    given = list(arguments(op, 4, 24, 40, 24, "post", torch.float32))
    down_or_layer = {"linear_norm": 1, "mlp": 3, "linear_mlp": 4}[op]
    residual = {"linear_norm": 3, "mlp": 5, "linear_mlp": 6}[op]
    if change == "width":
        given[0] = given[0][:, :23]
        return tuple(given), r"K .*23|23"
    if change == "residual":
        given[residual] = torch.randn(4, 23)
        return tuple(given), r"expected residual of shape \[4, 24\], got \[4, 23\]"
    if change == "bundle":
        given[down_or_layer] = given[down_or_layer][:3]
        return tuple(given), "expected packed_weight, weight_sum, weight_scale and bias .* got 3 tensors"
    if change == "norm":
        given[-2 if op != "linear_mlp" else -3] = 1e-5
        norms = -3 if op != "linear_mlp" else -4
        given[norms] = [torch.ones(23), None]
        return tuple(given), r"weight of shape \[24\], got \[23\]"
    given[0] = given[0].to(torch.int32)
    return tuple(given), "expected x of dtype"


@pytest.mark.parametrize("through", ["op", "reference"])
@pytest.mark.parametrize("change", ["width", "residual", "bundle", "norm", "dtype"])
@pytest.mark.parametrize("op", OPS)
def test_errors_are_sentences(op: str, change: str, through: str) -> None:
    given, words = changed(op, change)
    with pytest.raises(RuntimeError, match=words) as error:
        getattr(ops if through == "op" else reference, op)(*given)
    assert str(error.value).startswith(op)
