"""Inputs that are not dense tensors, and threads that flush denormals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear
from dynquant.nn.merged import MergedGroup
from tests.support.same_bits import assert_same_bits


def static() -> QLinear:
    layer = QLinear(24, 7)
    layer.set_activation_qparams(torch.tensor([0.03]), torch.tensor([-5], dtype=torch.int32))
    return layer


LAYERS: dict[str, Callable[[], QLinear]] = {
    "dynamic": lambda: QLinear(24, 7),
    "without bias": lambda: QLinear(24, 7, bias=False),
    "per_tensor": lambda: QLinear(24, 7, activations="per_tensor", weights="per_tensor"),
    "rotated": lambda: QLinear(24, 7, rotation="hadamard"),
    "fused": lambda: QLinear(24, 7, epilogue="gelu"),
    "static": static,
    "merged": lambda: MergedGroup([QLinear(24, 64), QLinear(24, 64)]).layers[0],
}
PARTS = {
    "[rows, K]": [(3, 24), (5, 24)],
    "[rows, 2, K]": [(3, 2, 24), (1, 2, 24), (4, 2, 24)],
    "one": [(4, 24)],
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> QLinear:
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("shapes", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_input_gives_a_nested_output(layer: QLinear, layout: torch.layout, shapes) -> None:
    parts = [torch.randn(shape, requires_grad=True) for shape in shapes]
    nested = layer(torch.nested.as_nested_tensor(parts, layout=layout))
    assert nested.is_nested
    assert nested.layout is layout
    expected = layer(torch.cat([part.reshape(-1, 24) for part in parts]))
    assert_same_bits(torch.cat([out.reshape(-1, out.shape[-1]) for out in nested.unbind()]), expected)
    assert [out.shape[:-1] for out in nested.unbind()] == [part.shape[:-1] for part in parts]
    sum(out.sum() for out in nested.unbind()).backward()
    gradients = [part.grad for part in parts]
    for part in parts:
        part.grad = None
    layer(torch.cat([part.reshape(-1, 24) for part in parts])).sum().backward()
    for before, part in zip(gradients, parts, strict=True):
        torch.testing.assert_close(before, part.grad)


def test_values_between_the_parts_of_a_nested_input_count_for_nothing() -> None:
    layer = QLinear(24, 7, activations="per_tensor")
    padded = torch.randn(2, 5, 24)
    padded[0, 3:] = torch.inf
    lengths = torch.tensor([3, 5])
    nested = torch.nested.narrow(padded, 1, torch.tensor([0, 0]), lengths, layout=torch.jagged)
    expected = layer(torch.cat([padded[0, :3], padded[1]]))
    assert_same_bits(layer(nested).values().detach(), expected.detach())


@pytest.mark.parametrize(
    ("nested", "sentence"),
    [
        (
            lambda: torch.nested.nested_tensor([torch.randn(3, 23), torch.randn(5, 23)]),
            r"in_features \(24\), got 23",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.randn(3, 23), torch.randn(5, 23)], layout=torch.jagged),
            r"in_features \(24\), got 23",
        ),
        (lambda: torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(5, 23)]), r"got \[23, 24\]"),
        (
            lambda: torch.nested.nested_tensor(
                [torch.randn(24, 12), torch.randn(24, 12)], layout=torch.jagged
            ).transpose(1, 2),
            "ragged there",
        ),
    ],
)
def test_a_nested_input_that_does_not_fit_is_named(nested: Callable[[], Tensor], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=f"QLinear: expected .*{sentence}"):
        QLinear(24, 7)(nested())


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (Tensor.to_sparse, "torch.sparse_coo"),
        (Tensor.to_sparse_csr, "torch.sparse_csr"),
        (Tensor.to_mkldnn, "torch._mkldnn"),
    ],
    ids=["coo", "csr", "mkldnn"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts_are_refused_by_name(
    layer: QLinear, make: Callable[[Tensor], Tensor], layout: str
) -> None:
    x = torch.randn(3, 24)
    with pytest.raises(RuntimeError, match=f"QLinear: expected a dense input, got one of layout {layout}; "):
        layer(make(x))
    assert_same_bits(layer(make(x).to_dense()).detach(), layer(x).detach())


# ---- torch.set_flush_denormal


@pytest.fixture
def flush() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


SMALL = 2.0**-130
"""A subnormal number of fp32, a normal one of fp64."""


@pytest.mark.parametrize("scale", [1.0, SMALL], ids=["normal", "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_input_is_read_the_same_where_denormals_are_flushed(
    layer: QLinear, dtype: torch.dtype, scale: float
) -> None:
    if dynquant.info().path == "reference":
        pytest.skip("the reference is torch's own ops, which flush")
    x = (torch.randn(3, 24, dtype=torch.float64) * scale).to(dtype)
    layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().double() * scale)
    expected = layer(x).detach()
    torch.set_flush_denormal(True)
    try:
        actual = layer(x).detach()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("n", [7, 700], ids=["on this thread", "on its own thread"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scheme", [{}, {"weights": "per_tensor"}, {"rotation": "hadamard"}], ids=str)
def test_a_weight_is_quantized_the_same_where_denormals_are_flushed(
    scheme: dict[str, str], dtype: torch.dtype, n: int
) -> None:
    linear = nn.Linear(24, n, dtype=dtype)
    linear.weight.data *= torch.where(torch.arange(n) % 2 == 0, 1.0, SMALL).to(dtype)[:, None]
    expected = QLinear.from_float(linear, **scheme)
    torch.set_flush_denormal(True)
    try:
        actual = QLinear.from_float(linear, **scheme)
        loaded = QLinear(24, n, **scheme)
        loaded.load_state_dict(expected.state_dict())
    finally:
        torch.set_flush_denormal(False)
    for layer in (actual, loaded):
        assert_same_bits(layer.weight.int_repr(), expected.weight.int_repr())
        assert_same_bits(layer.weight_scale, expected.weight_scale)


def test_a_scale_that_is_subnormal_is_loaded_where_denormals_are_flushed(flush: None) -> None:
    layer = QLinear(24, 7)
    state = layer.state_dict()
    torch.set_flush_denormal(False)
    state["weight_scale"] = torch.full([7], SMALL)
    torch.set_flush_denormal(True)
    layer.load_state_dict(state)
    torch.set_flush_denormal(False)
    assert_same_bits(layer.weight_scale, torch.full([7], SMALL))
