"""Derivatives of every order and mode: those of x @ dequantized weight.T + bias and the float epilogue."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dynquant import QLinear
from dynquant.config import EPILOGUES
from dynquant.nn.merged import MergedGroup
from dynquant.patterns.activations import apply_float
from tests.support.same_bits import assert_same_bits

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
KINDS = ("dynamic", "per_tensor", "rotated", "static", "merged")


def made(kind: str, epilogue: str) -> QLinear:
    torch.manual_seed(0)
    options = {"per_tensor": {"activations": "per_tensor"}, "rotated": {"rotation": "hadamard"}}
    layer = QLinear(16, 8, epilogue=epilogue, **options.get(kind, {}))
    if kind == "static":
        layer.set_activation_qparams(torch.tensor([0.03]), torch.tensor([3], dtype=torch.int32))
    if kind == "merged":
        layer = MergedGroup([layer, QLinear(16, 8, epilogue=epilogue)]).layers[0]
    return layer


def straight_through(layer: QLinear, x: Tensor) -> Tensor:
    """The function whose derivatives the layer has at X, with the layer's own value before the epilogue."""
    y = F.linear(x, layer.dequantize_weight(), layer.bias)
    value = without_epilogue(layer)(X).detach()
    return apply_float(layer.config.epilogue, y + (value - y).detach())


def without_epilogue(layer: QLinear) -> QLinear:
    """The same layer without its epilogue."""
    plain = copy.deepcopy(layer)
    QLinear._set_weight(plain, plain.weight, replace(plain.config, epilogue="none"))
    return plain


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=EPILOGUES)
def layer(request, kind):
    return made(kind, request.param)


def test_second_derivatives(layer) -> None:
    """A gradient penalty: the gradient of a function of the gradient."""

    def penalty(function) -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        return gradient.detach(), second

    for actual, expected in zip(penalty(layer), penalty(lambda x: straight_through(layer, x)), strict=True):
        close(actual, expected)


def test_forward_mode(layer) -> None:
    value, tangent = torch.func.jvp(layer, (X,), (TANGENT,))
    assert_same_bits(value, layer(X))
    close(tangent, torch.func.jvp(lambda x: straight_through(layer, x), (X,), (TANGENT,))[1])
    with forward_ad.dual_level():
        out = layer(forward_ad.make_dual(X, TANGENT))
        close(forward_ad.unpack_dual(out).tangent, tangent)


def test_functional_transforms(layer) -> None:
    def loss(x: Tensor) -> Tensor:
        return layer(x).pow(2).sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    close(torch.func.grad(loss)(X), expected)
    value, pullback = torch.func.vjp(layer, X)
    assert_same_bits(value, layer(X))
    close(pullback(torch.ones_like(value))[0], torch.autograd.grad(layer(x).sum(), x)[0])
    linearized = torch.func.linearize(layer, X)[1]
    close(linearized(TANGENT), torch.func.jvp(layer, (X,), (TANGENT,))[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_jacobians_and_hessians() -> None:
    layer, row = made("dynamic", "gelu"), X[0]
    forward, backward = torch.func.jacfwd(layer)(row), torch.func.jacrev(layer)(row)
    close(forward, backward)
    close(backward, torch.autograd.functional.jacobian(layer, row))
    hessian = torch.func.hessian(lambda x: layer(x).sum())(row)
    close(hessian, torch.autograd.functional.hessian(lambda x: layer(x).sum(), row))
    assert hessian.abs().max() > 1e-3


def test_derivatives_by_the_bias(layer) -> None:
    bias = layer.bias.detach().clone()
    tangent = torch.ones_like(bias)

    def function(bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"bias": bias}, (X,))

    value, change = torch.func.jvp(function, (bias,), (tangent,))
    assert_same_bits(value, layer(X))
    gradient = torch.func.grad(lambda bias: function(bias).sum())(bias)
    close(gradient.sum(), change.sum())
    layer.zero_grad()
    layer(X).sum().backward()
    close(layer.bias.grad, gradient)


def test_an_infinite_bias(kind) -> None:
    layer = made(kind, "none")
    with torch.no_grad():
        layer.bias[2] = float("-inf")
    for out in (layer(X), layer(X.clone().requires_grad_()), torch.func.jvp(layer, (X,), (TANGENT,))[0]):
        assert out[:, 2].eq(float("-inf")).all()
        assert out[:, 3].isfinite().all()
    assert torch.func.grad(lambda x: layer(x)[:, 3].sum())(X).isfinite().all()


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_a_bias_of_any_float_dtype_and_stride(dtype, strided, kind) -> None:
    """Computed with in fp32; its gradient has its own dtype."""
    layer = made(kind, "relu")
    bias = layer.bias.detach().to(dtype)
    expected_bias = bias.to(torch.float32)
    if strided:
        bias = torch.stack([bias, bias], 1)[:, 0]
        assert not bias.is_contiguous()
    with torch.no_grad():
        layer.bias.copy_(expected_bias)
    expected = layer(X)
    assert_same_bits(torch.func.functional_call(layer, {"bias": bias}, (X,)), expected)
    layer.bias = torch.nn.Parameter(bias)
    assert_same_bits(layer(X), expected)
    layer(X).sum().backward()
    assert layer.bias.grad.dtype == dtype
    layer.bias = torch.nn.Parameter(expected_bias.clone())
    layer.bias.data = bias
    assert_same_bits(layer(X), expected)


def test_a_bfloat16_checkpoint_that_is_assigned() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8).to(torch.bfloat16))
    layer = torch.nn.Sequential(QLinear(16, 8))
    with pytest.warns(UserWarning, match="float weights"):
        layer.load_state_dict(model.state_dict(), assign=True)
    expected = QLinear.from_float(model[0])
    assert_same_bits(layer(X), expected(X))


FREED = ("x", "bias", "weight_sum", "channel_scale", "packed_weight")


@pytest.mark.parametrize("name", FREED)
def test_memory_that_was_freed_is_a_sentence(name, kind) -> None:
    layer, x = made(kind, "none"), X.clone()
    if kind == "merged" and name != "x":
        pytest.skip("the memory of a merged layer is its group's")
    tensor = x if name == "x" else getattr(layer, name)
    tensor.untyped_storage().resize_(0)
    said = "weight_scale" if name == "channel_scale" else name
    sentence = f"expected {said} to have its memory, got a storage of 0"
    with torch.no_grad(), pytest.raises(RuntimeError, match=sentence):
        layer(x)


def test_a_view_into_memory_that_was_freed() -> None:
    x = torch.zeros(100, 16)
    view = x[50:60]
    x.untyped_storage().resize_(64)
    for call in (made("dynamic", "none"), lambda x: torch.ops.dynquant.min_max(x, True)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="expected x to have its memory"):
            call(view)
