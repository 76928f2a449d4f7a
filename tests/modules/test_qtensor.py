"""``.weight`` of a quantized layer, read by code written for float weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynquant import Config, QLinear, QTensor
from tests.support.nets import CountInt8
from tests.support.same_bits import assert_same_bits


def quantized(n: int = 6, k: int = 8, dtype: torch.dtype = torch.float32, **scheme) -> QTensor:
    torch.manual_seed(0)
    return QTensor.quantize(torch.randn(n, k).to(dtype), Config(**scheme))


SCHEMES = [{}, {"weights": "per_tensor"}, {"rotation_block": 4}, {"activations": "per_tensor"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_looks_like_the_float_weight(dtype):
    w = quantized(dtype=dtype)
    assert isinstance(w, Tensor)
    assert not isinstance(w, nn.Parameter)
    assert (w.shape, w.dtype, w.device) == ((6, 8), dtype, torch.device("cpu"))
    assert (w.dim(), w.size(0), w.numel(), len(w), w.stride()) == (2, 6, 48, 6, (8, 1))
    assert w.is_floating_point()
    assert w.is_contiguous()
    assert not w.is_quantized
    assert not w.requires_grad
    assert torch.zeros(3, dtype=w.dtype, device=w.device).dtype == dtype
    assert {w: 1}[w] == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_within_half_a_step(scheme):
    torch.manual_seed(0)
    weight = torch.randn(6, 8)
    w = QTensor.quantize(weight, Config(**scheme))
    steps = w.channel_scale[:, None] * (scheme.get("rotation_block") or 1)
    assert ((w.dequantize() - weight).abs() <= steps / 2 * 1.0001).all()


def test_reads_like_a_quantized_tensor_of_torch():
    w = quantized()
    assert w() is w
    assert w.int_repr().dtype == torch.int8
    assert_same_bits(torch.int_repr(w()), w.int_repr())
    assert w().int_repr().abs().amax(1).tolist() == [127] * 6
    assert w.q_scale().shape == (6, 1)
    assert_same_bits(w.int_repr() * w.q_scale(), w.dequantize())
    assert_same_bits(torch.dequantize(w), w.dequantize())
    assert w.q_zero_point() == torch.q_zero_point(w) == 0
    assert_same_bits(w.q_per_channel_scales(), w.channel_scale)
    assert w.q_per_channel_zero_points().tolist() == [0] * 6
    assert w.q_per_channel_axis() == 0
    assert w.qscheme() == torch.per_channel_affine

    w = quantized(weights="per_tensor")
    assert isinstance(w.q_scale(), float)
    assert w.qscheme() == torch.per_tensor_affine
    assert_same_bits(w.int_repr() * w.q_scale(), w.dequantize())


def test_code_written_for_torch_ao_runs_unchanged():
    """Code that reads the weight of a torch.ao layer, applied to our layer."""
    for layer in (QLinear(3, 3), QLinear(3, 1, weights="per_tensor")):
        text = str(torch.int_repr(layer.weight()))
        text += f"{layer.weight().int_repr()} {layer.weight().q_scale()} {layer.weight().q_zero_point()}"
        assert text.count("int8") == 2
        assert layer.weight().dequantize().shape == layer.weight().shape


def test_repr_shows_values_and_scheme():
    text = repr(quantized(2, 4, weights="per_tensor", rotation_block=4))
    assert text.startswith("QTensor([[")
    assert "weights=per_tensor, activations=per_token, rotation_block=4" in text
    assert "dtype=torch.float16" in repr(quantized(dtype=torch.float16))
    assert "device='meta', size=(6, 8)" in repr(quantized().to("meta"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_linear_with_it_runs_in_int8(scheme):
    w, x, bias = quantized(**scheme), torch.randn(3, 8), torch.randn(6)
    layer = QLinear(8, 6)
    layer.weight = w
    layer.bias = nn.Parameter(bias)
    expected = torch.ops.dynquant.linear_dynamic(
        x, w.packed_weight, w.weight_sum, w.channel_scale, bias, w.config.encode()
    )
    with CountInt8() as count:
        assert_same_bits(F.linear(x, w, bias), expected)
        assert_same_bits(F.linear(x, weight=w.to(x.dtype), bias=bias), expected)
        assert F.linear(x.half(), w.to(torch.float16), bias.half()).dtype == torch.float16
        assert F.linear(x.bfloat16(), w.bfloat16().detach().contiguous().clone().data).dtype == torch.bfloat16
    assert count.calls == 4


@pytest.mark.parametrize(
    "same",
    [
        lambda w: w.to(torch.float16),
        lambda w: w.to("cpu", torch.float16),
        lambda w: w.to(torch.empty(0, dtype=torch.float16)),
        lambda w: w.to(dtype=torch.float16, device=torch.device("cpu"), copy=True),
        lambda w: w.half(),
        lambda w: w.bfloat16().half(),
        lambda w: w.double().float().half().cpu().detach().contiguous().data,
        lambda w: torch.detach(w.half()),
    ],
)
def test_casts_and_copies_stay_quantized(same):
    w = quantized()
    half = same(w)
    assert type(half) is QTensor
    assert half.dtype == torch.float16
    assert_same_bits(half.int_repr(), w.int_repr())
    assert half.packed_weight is w.packed_weight


@pytest.mark.parametrize("clone", [Tensor.clone, torch.clone, lambda w: w.half().clone().float()])
def test_a_clone_has_memory_of_its_own(clone):
    w = quantized()
    copied = clone(w)
    assert type(copied) is QTensor
    assert_same_bits(copied.int_repr(), w.int_repr())
    for name in ("packed_weight", "weight_sum", "channel_scale"):
        assert getattr(copied, name).data_ptr() != getattr(w, name).data_ptr()


def test_a_cast_that_changes_nothing_returns_itself():
    w = quantized()
    assert w.to(torch.float32) is w.to("cpu") is w.float() is w.cpu() is w.contiguous() is w
    assert w.detach() is not w
    nn.Parameter(w)
    assert not w.requires_grad


def test_any_other_op_sees_the_values():
    w = quantized()
    values = w.dequantize()
    assert type(values) is Tensor
    x = torch.randn(3, 8, requires_grad=True)
    for op in (
        lambda t: x @ t.t(),
        lambda t: x @ t.T,
        lambda t: x @ torch.cat(t.chunk(2)).mT,
        lambda t: x @ t[1:].transpose(0, 1),
        lambda t: x * t.unbind(0)[2],
        lambda t: t.view(-1),
        lambda t: t + 1,
        lambda t: 2 * t,
        lambda t: t.norm(dim=1),
        lambda t: t.to(torch.int64),
        lambda t: t.type(torch.float16),
        lambda t: F.embedding(torch.tensor([1, 4]), t),
        lambda t: torch.einsum("bk,nk->bn", x, t),
        lambda t: F.linear(t, torch.eye(8)),
        lambda t: torch.zeros(6, 8).copy_(t),
    ):
        out = op(w)
        assert type(out) is Tensor
        assert_same_bits(out.detach(), op(values).detach())
    assert w.tolist() == values.tolist()
    assert (w.numpy() == values.numpy()).all()
    assert [row.shape for row in w] == [(8,)] * 6
    assert f"{w.sum():.4f}" == f"{values.sum():.4f}"
    with torch._C.DisableTorchFunctionSubclass():
        assert_same_bits(F.linear(x, w).detach(), F.linear(x, values).detach())


def test_gradients_pass_through_it():
    w, x = quantized(), torch.randn(3, 8, requires_grad=True)
    (x @ w.t()).sum().backward()
    expected, x.grad = x.grad, None
    torch.testing.assert_close(expected, w.dequantize().sum(0).expand(3, 8))
    F.linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("mul_", lambda w: w.mul_(2)),
        ("copy_", lambda w: w.copy_(torch.zeros(6, 8))),
        ("copy_", lambda w: w.data.copy_(torch.zeros(6, 8))),
        ("normal_", lambda w: nn.init.normal_(w)),
        ("__setitem__", lambda w: w.__setitem__(0, 1.0)),
        (".data =", lambda w: setattr(w, "data", torch.zeros(6, 8))),
        ("add", lambda w: torch.add(torch.ones(6, 8), 1, out=w)),
    ],
)
def test_writing_to_it_is_refused(name, write):
    w = quantized()
    before = w.dequantize()
    with pytest.raises(RuntimeError) as error, torch.no_grad():
        write(w)
    assert str(error.value).startswith(f"QTensor: {name}")
    assert "assign a float tensor to the layer's .weight" in str(error.value)
    assert_same_bits(w.dequantize(), before)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_and_pickles(scheme, duplicate):
    w = quantized(dtype=torch.float16, **scheme)
    other = duplicate(w)
    assert type(other) is QTensor
    assert other is not w
    assert (other.dtype, other.config) == (w.dtype, w.config)
    assert_same_bits(other.dequantize(), w.dequantize())
    assert_same_bits(other.packed_weight, w.packed_weight)
    assert_same_bits(other.weight_sum, w.weight_sum)


def test_deepcopy_keeps_ties():
    w = quantized()
    first, second = copy.deepcopy([w, w])
    assert first is second
    assert first.packed_weight.data_ptr() != w.packed_weight.data_ptr()


def test_pickle_holds_one_byte_per_weight():
    assert len(pickle.dumps(quantized(256, 256))) < 1.1 * 256 * 256


def test_moving_repacks():
    w = quantized()
    meta = w.to("meta")
    assert (meta.device.type, meta.shape, meta.dtype) == ("meta", w.shape, w.dtype)
    assert meta.packed_weight.shape == (6, 16)


@pytest.mark.parametrize("shape", [(0, 8), (6, 0), (0, 0), (1, 1), (17, 5)])
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_any_shape(shape, weights):
    w = quantized(*shape, weights=weights)
    assert w.shape == w.int_repr().shape == w.dequantize().shape == shape
    assert F.linear(torch.randn(2, shape[1]), w).shape == (2, shape[0])
    assert pickle.loads(pickle.dumps(w)).shape == shape


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"weight": torch.zeros(6, 8)},
            "expected weight to be int8 [N, K], got torch.float32 of shape [6, 8]",
        ),
        ({"weight": torch.zeros(48, dtype=torch.int8)}, "expected weight to be int8 [N, K]"),
        ({"weight": torch.full((6, 8), -128, dtype=torch.int8)}, "expected weight in [-127, 127], got -128"),
        ({"weight_scale": torch.ones(1)}, "expected weight_scale to be float32 of shape [6] (per_channel)"),
        ({"weight_scale": torch.ones(6).half()}, "got torch.float16 of shape [6]"),
        ({"weight_scale": torch.tensor([1, 1, 0, 1, 1, 1.0])}, "positive, got weight_scale[2] = 0.0"),
        ({"weight_scale": torch.tensor([1, 1, 1, -1, 1, 1.0])}, "positive, got weight_scale[3] = -1.0"),
        ({"weight_scale": torch.full([6], float("nan"))}, "finite and positive, got weight_scale[0] = nan"),
        ({"weight_scale": torch.full([6], float("inf"))}, "finite and positive, got weight_scale[0] = inf"),
        (
            {"config": Config(rotation_block=16)},
            "expected K to be a multiple of the rotation block 16, got 8",
        ),
        (
            {"dtype": torch.int8},
            "expected the weight to show dtype float32, bfloat16, float16 or float64, got torch.int8",
        ),
    ],
)
def test_arguments_are_checked(change, sentence):
    parts = {
        "weight": torch.ones(6, 8, dtype=torch.int8),
        "weight_scale": torch.ones(6),
        "config": Config(),
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
        QTensor.from_int8(**{**parts, **change})
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_that_is_not_finite_is_named(value, scheme):
    weight = torch.randn(6, 8)
    weight[3, 5] = value
    with pytest.raises(RuntimeError, match=rf"expected weight to be finite, got {value} at weight\[3, 5\]"):
        QTensor.quantize(weight, Config(**scheme))
