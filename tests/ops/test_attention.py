"""int8 attention: accuracy against float64, the bits of the reference, errors by their words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynquant import reference
from dynquant.reference.softmax import exp2, probabilities
from tests.support.same_bits import assert_same_bits

attention = torch.ops.dynquant.attention
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int, h: int, s: int, d: int, s_kv: int | None = None, h_kv: int | None = None):
    keys = (batch, h_kv or h, s if s_kv is None else s_kv, d)
    return heads(batch, h, s, d), heads(*keys, seed=1), heads(*keys, seed=2)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention in float64."""
    added = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), added, is_causal=is_causal, enable_gqa=True
    )


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


# ---- what it computes ----


def test_exp2_is_within_its_bound() -> None:
    x = torch.cat([-torch.rand(100_000) * 125, -torch.arange(126, dtype=torch.float32)])
    relative = exp2(x).double() / torch.exp2(x.double()) - 1
    assert relative.abs().max() <= 2**-22
    assert exp2(torch.tensor([0.0, -126.6, -1e38, -math.inf])).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert exp2(torch.tensor(math.nan)).isnan()


def test_probabilities_are_rounded_powers_of_2() -> None:
    x = -torch.arange(0, 20, 1e-4)
    p = probabilities(x)
    assert (p - 255 * torch.exp2(x.double())).abs().max() <= 0.52
    assert p[0] == 255
    assert probabilities(torch.tensor([-9.1, -16.0, -1e38, -math.inf])).tolist() == [0.0] * 4


@pytest.mark.parametrize(("s", "d"), [(1, 32), (16, 32), (65, 64), (129, 16), (300, 96)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_accuracy(s: int, d: int, is_causal: bool) -> None:
    q, k, v = qkv(2, 2, s, d)
    assert relative_error(attention(q, k, v, None, is_causal), exact(q, k, v, None, is_causal)) < 0.02


def test_a_peak_leaves_the_other_blocks_their_precision() -> None:
    """One key that takes most of the weight; the others together still count."""
    q, k, v = qkv(1, 1, 64, 32, s_kv=512)
    k = k * 0.5
    k[:, :, 0] = 2.0 * q.mean(2) / q.mean(2).norm() * 4
    v[:, :, 0] = 0.0
    assert relative_error(attention(q, k, v), exact(q, k, v)) < 0.06


def masks(s: int, s_kv: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ragged = torch.arange(s_kv) < torch.tensor([s_kv, max(s_kv // 3, 1)]).view(2, 1, 1, 1)
    some = torch.rand(2, 3, s, s_kv, generator=generator) < 0.6
    some[..., 0] = True
    lowest = torch.finfo(torch.float32).min
    return {
        "ragged": ragged,
        "ragged, expanded": ragged.expand(2, 1, s, s_kv),
        "any keys": some,
        "one for all heads": some[:1, :1],
        "two dimensions": some[0, 0],
        "a row for all queries": some[:, :, :1],
        "a column for all keys": some[..., :1],
        "no key for some queries": some & (torch.arange(s) % 3 > 0)[:, None],
        "added": torch.randn(3, s, s_kv, generator=generator),
        "added, half precision": torch.randn(3, s, s_kv, generator=generator).half(),
        "added, lowest": torch.where(ragged, 0.0, lowest),
        "added, -inf": torch.where(some, 0.5, -math.inf),
        "transposed": torch.randn(s_kv, s, generator=generator).t(),
    }


MASKS = masks(1, 1).keys()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_accuracy_with_masks(name: str, is_causal: bool) -> None:
    q, k, v = qkv(2, 3, 40, 32, s_kv=100)
    mask = masks(40, 100)[name]
    seen = mask
    if is_causal:
        keep = torch.ones(40, 100, dtype=torch.bool).tril()
        seen = mask & keep if mask.dtype == torch.bool else torch.where(keep, mask.float(), -math.inf)
    out = attention(q, k, v, mask, is_causal)
    assert relative_error(out, exact(q, k, v, seen)) < 0.02


@pytest.mark.parametrize("h_kv", [1, 2, 8])
def test_accuracy_of_shared_heads(h_kv: int) -> None:
    q, k, v = qkv(2, 8, 33, 32, s_kv=70, h_kv=h_kv)
    assert relative_error(attention(q, k, v), exact(q, k, v)) < 0.02


def test_the_scale_multiplies_the_products() -> None:
    q, k, v = qkv(1, 2, 20, 32)
    out = attention(q, k, v, scale=0.5)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.5)
    assert relative_error(out, expected) < 0.02


def test_the_output_is_a_view_for_the_output_projection() -> None:
    q, k, v = qkv(2, 3, 5, 8)
    out = attention(q, k, v)
    assert out.shape == (2, 3, 5, 8)
    assert out.transpose(1, 2).is_contiguous()


# ---- values that are not finite ----


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = qkv(1, 2, 7, 16, s_kv=0)
    assert_same_bits(attention(q, k, v), torch.zeros(1, 2, 7, 16))
    q, k, v = qkv(1, 2, 7, 16)
    q[0, 0, 3] = math.nan
    assert_same_bits(attention(q, k, v, torch.zeros(7, 7, dtype=torch.bool)), torch.zeros(1, 2, 7, 16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_exactly_where_it_belongs(value: float) -> None:
    q, k, v = qkv(1, 2, 70, 16)
    clean = attention(q, k, v, None, True)

    bad = q.clone()
    bad[0, 1, 5, 3] = value
    expected = clean.clone()
    expected[0, 1, 5] = math.nan
    assert_same_bits(attention(bad, k, v, None, True), expected)

    bad = k.clone()
    bad[0, 1, 5, 3] = value
    expected = clean.clone()
    expected[0, 1, 5:] = math.nan  # queries before it do not see it
    assert_same_bits(attention(q, bad, v, None, True), expected)

    bad = v.clone()
    bad[0, 1, 66, 3] = value
    expected = clean.clone()
    expected[0, 1, 64:, 3] = math.nan  # those that see a key of its block
    assert_same_bits(attention(q, k, bad, None, True), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_that_is_not_finite(value: float) -> None:
    q, k, v = qkv(1, 2, 70, 16)
    mask = torch.zeros(70, 70)
    clean = attention(q, k, v, mask)
    mask[5, 69] = value
    expected = clean.clone()
    expected[:, :, 5] = math.nan
    assert_same_bits(attention(q, k, v, mask), expected)


# ---- the bits of the reference ----

# (batch, heads, heads of k and v, queries, keys, head size) by purpose.
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 1),
    "one query": (1, 2, 2, 1, 70, 32),
    "15": (2, 2, 2, 15, 15, 16),
    "16": (1, 2, 2, 16, 16, 64),
    "17 and a ragged head": (1, 2, 1, 17, 65, 33),
    "127, one head of k and v": (1, 2, 1, 127, 127, 32),
    "128": (1, 2, 2, 128, 128, 32),
    "129, two heads of k and v": (1, 4, 2, 129, 129, 20),
    "eight heads of k and v": (1, 8, 8, 9, 40, 8),
    "1000 keys": (1, 1, 1, 13, 1000, 48),
    "wide heads": (1, 1, 1, 20, 70, 256),
    "no queries": (1, 2, 2, 0, 5, 8),
    "no keys": (1, 2, 2, 5, 0, 8),
    "empty heads": (1, 2, 2, 5, 5, 0),
    "no batch": (0, 2, 2, 5, 5, 8),
}


@functools.cache
def case(name: str, mask: str) -> tuple[tuple[object, ...], Tensor]:
    """Arguments, with values that are not finite for some masks, and what the reference gives."""
    batch, h, h_kv, s, s_kv, d = SHAPES[name]
    q, k, v = qkv(batch, h, s, d, s_kv, h_kv)
    generator = torch.Generator().manual_seed(7)
    some = torch.rand(batch, 1, s, s_kv, generator=generator) < 0.5
    some[:, :, ::3] = False
    made = {
        "none": None,
        "causal": None,
        "bool": some,
        "padding": (torch.arange(s_kv) < s_kv * 2 // 3).expand(batch, 1, s, s_kv),
        "added": torch.randn(h, s, s_kv, generator=generator).masked_fill(some[:1, 0], -math.inf)
        if batch
        else torch.randn(h, s, s_kv),
        "added, bf16, by rows": torch.randn(s, 1, generator=generator).bfloat16(),
        "bad values": some,
    }[mask]
    if mask == "bad values" and q.numel() and k.numel():
        q[0, 0, s // 2, 0] = math.nan
        q[0, -1, -1] *= 1e30
        k[0, 0, s_kv // 2, 0] = math.inf
        k[0, -1, -1] *= 1e20
        v[0, 0, s_kv // 3, 0] = -math.inf
        v[0, -1, :, -1] *= 1e36
    arguments = (q, k, v, made, mask == "causal")
    return arguments, reference.attention(*arguments)


MASK_KINDS = ("none", "causal", "bool", "padding", "added", "added, bf16, by rows", "bad values")


@pytest.mark.parametrize("mask", MASK_KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_bits(isa: str, name: str, mask: str) -> None:
    arguments, expected = case(name, mask)
    assert_same_bits(attention(*arguments), expected, "attention")


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def large_case() -> tuple[tuple[object, ...], Tensor]:
    q, k, v = qkv(2, 6, 129, 32, s_kv=200, h_kv=3)
    return (q, k, v, None, True), reference.attention(q, k, v, None, True)


def test_bits_on_threads(isa: str, threads: int) -> None:
    """Heads are shared out on 1 to 3 threads, queries of a head on 4. Memory of outputs starts as NaN."""
    arguments, expected = large_case()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert_same_bits(attention(*arguments), expected, "attention")
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bits_of_other_dtypes(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(1, 2, 19, 24, s_kv=70))
    expected = reference.attention(q, k, v)
    assert expected.dtype == dtype
    assert_same_bits(attention(q, k, v), expected, "attention")


def test_bits_of_strided_views(isa: str) -> None:
    x = heads(2, 21, 3 * 4 * 16)
    q, k, v = x.view(2, 21, 3, 4, 16).permute(2, 0, 3, 1, 4)  # of a merged projection
    assert_same_bits(attention(q, k, v), reference.attention(q, k, v), "views of one tensor")
    columns = heads(2, 4, 16, 21).transpose(2, 3)
    expected = reference.attention(columns, k, v.flip(2))
    assert_same_bits(attention(columns, k, v.flip(2)), expected, "strided elements")
    one = heads(1, 1, 1, 16).expand(2, 4, 21, 16)
    assert_same_bits(attention(q, one, one), reference.attention(q, one, one), "strides of 0")


# ---- arguments ----

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float | None]
BAD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[object, ...]], str]] = {
    "q int8": (lambda q, k, v: (q.to(torch.int8), k, v), "expected q of dtype float32, .* got torch.int8"),
    "v complex": (lambda q, k, v: (q, k, v * 1j), "expected v of dtype float32, .* got torch.complex64"),
    "k of 3 dimensions": (lambda q, k, v: (q, k[0], v), r"expected k with 4 dimensions .* got 3"),
    "q of 5 dimensions": (lambda q, k, v: (q[None], k, v), r"expected q with 4 dimensions .* got 5"),
    "dtypes": (
        lambda q, k, v: (q, k.half(), v),
        "expected q, k and v of one dtype, got torch.float32, torch.float16 and torch.float32",
    ),
    "keys without values": (
        lambda q, k, v: (q, k, v[:, :, 1:]),
        r"expected k and v of one shape, got \[2, 2, 9, 8\] and \[2, 2, 8, 8\]",
    ),
    "batch": (lambda q, k, v: (q[:1], k, v), r"expected k and v of q's batch size \(1\), got 2"),
    "head size": (lambda q, k, v: (q[..., :4], k, v), r"expected k and v of q's head size \(4\), got 8"),
    "heads": (
        lambda q, k, v: (q[:, :3], k, v),
        r"expected the heads of k and v to divide those of q \(3\), got 2",
    ),
    "no heads": (
        lambda q, k, v: (q, k[:, :0], v[:, :0]),
        r"expected the heads of k and v to divide those of q \(4\), got 0",
    ),
    "mask int64": (
        lambda q, k, v: (q, k, v, torch.ones(5, 9, dtype=torch.int64)),
        "expected mask of dtype bool or a float dtype, got torch.int64",
    ),
    "mask of the wrong length": (
        lambda q, k, v: (q, k, v, torch.ones(5, 8)),
        r"expected mask to broadcast to \[B, H, S_q, S_kv\] = \[2, 4, 5, 9\], got \[5, 8\]",
    ),
    "mask of 5 dimensions": (
        lambda q, k, v: (q, k, v, torch.ones(1, 2, 4, 5, 9)),
        r"expected mask to broadcast to .* got \[1, 2, 4, 5, 9\]",
    ),
    "scale": (
        lambda q, k, v: (q, k, v, None, False, math.nan),
        "expected scale to be finite, got nan",
    ),
    "k elsewhere": (
        lambda q, k, v: (q, k.to("meta"), v),
        "expected all tensors on one device, got q on cpu and k on meta",
    ),
    "mask elsewhere": (
        lambda q, k, v: (q, k, v, torch.ones(5, 9, device="meta")),
        "expected all tensors on one device, got q on cpu and mask on meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    make, words = BAD[name]
    arguments = make(*qkv(2, 4, 5, 8, s_kv=9, h_kv=2))
    messages = set()
    for function in (
        reference.attention,
        lambda *arguments: attention.default.redispatch(CPU, *arguments),
    ):
        with pytest.raises(RuntimeError, match=f"^attention: {words}") as caught:
            function(*arguments)
        messages.add(str(caught.value).split("\n")[0])
    assert len(messages) == 1


def test_memory_that_was_freed() -> None:
    q, k, v = qkv(1, 2, 5, 8)
    k.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="attention: expected k to have its memory"):
        attention(q, k, v)


# ---- derivatives, tools ----


@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_the_float_formula(mask: str | None, is_causal: bool) -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 4, 6, 8, h_kv=2)]
    m = {None: None, "bool": torch.rand(6, 6) < 0.7, "added": torch.randn(6, 6, requires_grad=True)}[mask]
    if mask == "bool":
        m[:, 0] = True
    out = attention(*inputs, m, is_causal)
    assert_same_bits(out.detach(), reference.attention(*(x.detach() for x in inputs), m, is_causal).detach())
    wanted = [*inputs, m] if mask == "added" else inputs
    grad = heads(*out.shape, seed=5)
    actual = torch.autograd.grad(out, wanted, grad)
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    full = m if not is_causal else keep if m is None else None
    if full is None and m is not None:
        full = m & keep if mask == "bool" else torch.where(keep, m, -math.inf)
    expected = F.scaled_dot_product_attention(*inputs, full, enable_gqa=True)
    for a, b in zip(actual, torch.autograd.grad(expected, wanted, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    q, k, v = (x.requires_grad_(requires_grad) for x in qkv(2, 4, 5, 8, s_kv=9, h_kv=2))
    for arguments in (
        (q, k, v),
        (q, k, v, torch.rand(5, 9) < 0.5),
        (q, k, v, torch.randn(4, 1, 9), True, 0.3),
    ):
        torch.library.opcheck(attention.default, arguments)


def test_compile_and_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            return attention(q, k, v).transpose(1, 2).flatten(2)

    x = heads(2, 10, 96)
    module = Attention()
    expected = module(x)
    assert_same_bits(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    assert_same_bits(torch.export.export(module, (x,)).module()(x), expected)
