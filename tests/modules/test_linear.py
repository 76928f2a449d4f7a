"""QLinear: the interface of nn.Linear, and the guarantees of the scheme."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynquant
from dynquant import Config, QLinear, QTensor
from tests.support.same_bits import assert_same_bits

SCHEMES = [
    {},
    {"activations": "per_tensor"},
    {"weights": "per_tensor"},
    {"activations": "per_tensor", "weights": "per_tensor"},
    {"rotation": "hadamard"},
    {"rotation": "hadamard", "activations": "per_tensor", "weights": "per_tensor"},
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair(k: int, n: int, bias: bool = True, dtype: torch.dtype | None = None, **scheme):
    """An nn.Linear and its quantized counterpart."""
    torch.manual_seed(k * 1000 + n)
    linear = nn.Linear(k, n, bias, dtype=dtype)
    return linear, QLinear.from_float(linear, **scheme)


def bound(linear: nn.Linear, layer: QLinear, x: Tensor) -> Tensor:
    """The largest error of 8 bits, element by element, in float64: half a step for each w, and a whole step
    for each x, whose zero_point is rounded too."""
    x, w = x.detach().double().reshape(-1, x.shape[-1]), linear.weight.detach().double()
    block = layer.config.rotation_block
    if block:
        x = dynquant.reference.rotate(x, block).double()
        w = dynquant.reference.rotate(w, block).double() / block
    ranges = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    if layer.config.activations == "per_tensor":
        ranges = (x.max().clamp(min=0) - x.min().clamp(max=0)).expand_as(ranges)
    dx, dw = ranges[:, None] / 255, layer.weight.channel_scale.double()[None] / 2
    k = x.shape[1]
    return dx * w.abs().sum(1)[None] + x.abs().sum(1)[:, None] * dw + k * dx * dw


def assert_close_to_float(linear: nn.Linear, layer: QLinear, x: Tensor) -> None:
    y, expected = layer(x), linear.double()(x.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    rounding = torch.finfo(x.dtype).eps if x.dtype in (torch.bfloat16, torch.float16) else 1e-6
    error = (y.double() - expected).abs().reshape(-1, linear.out_features)
    limit = bound(linear, layer, x) + rounding * (1 + expected.abs().reshape(error.shape))
    assert (error <= limit).all(), f"off by {(error / limit).max():.3f} times the bound"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 3), (5, 17), (64, 33), (128, 256), (200, 65)])
def test_equals_nn_linear_within_the_bound(k, n, scheme):
    linear, layer = pair(k, n, **scheme)
    assert_close_to_float(linear, layer, torch.randn(7, k) * torch.logspace(-2, 2, 7)[:, None])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_any_float_dtype_of_input_and_weight(dtype, weight_dtype):
    linear, layer = pair(32, 9, dtype=weight_dtype)
    assert layer.weight.dtype == weight_dtype
    assert layer.bias.dtype == weight_dtype
    assert layer.weight_scale.dtype == torch.float32
    assert_close_to_float(linear, layer, torch.randn(4, 32, dtype=dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "shape", [(16,), (1, 16), (5, 16), (2, 3, 16), (2, 1, 4, 16), (0, 16), (2, 0, 16), (1, 1, 1, 1, 16)]
)
def test_any_number_of_dimensions(shape, scheme):
    linear, layer = pair(16, 6, **scheme)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == linear(x).shape
    if x.numel():
        assert_close_to_float(linear, layer, x)
    if scheme.get("activations") != "per_tensor":
        rows = [layer(row) for row in x.reshape(-1, 16)]
        assert_same_bits(y, torch.stack(rows).reshape(y.shape) if rows else torch.empty(y.shape))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: torch.stack([x, x, x])[1],
        lambda x: x[:1].expand(4, -1),
        lambda x: x.flip(0)[1:],
        lambda x: torch.randn(12, 4)[::1].t(),
        lambda x: x.reshape(2, 2, 12).transpose(0, 1),
        lambda x: torch.randn(100)[3:51].view(4, 12),
    ],
)
def test_any_strides(strided):
    _, layer = pair(12, 5)
    x = strided(torch.randn(4, 12))
    assert_same_bits(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_empty_layers(k, n, bias, scheme):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.Linear's warning about an empty initialisation
        layer = QLinear(k, n, bias, **scheme)
    y = layer(torch.randn(3, k))
    expected = layer.bias.detach() if bias and k == 0 else torch.zeros(n)
    assert_same_bits(y, expected.expand(3, n))
    assert layer.to_float().weight.shape == (n, k)
    layer.load_state_dict(layer.state_dict())


def test_attributes():
    linear, layer = pair(16, 6)
    assert isinstance(layer, nn.Module)
    assert not isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (16, 6)
    assert type(layer.weight) is QTensor
    assert layer.weight is layer.weight
    assert layer.weight_scale.shape == (6,)
    assert isinstance(layer.bias, nn.Parameter)
    assert_same_bits(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert pair(16, 6, weights="per_tensor")[1].weight_scale.shape == (1,)
    assert pair(16, 6, bias=False)[1].bias is None
    linear.bias.requires_grad_(False)
    assert not QLinear.from_float(linear).bias.requires_grad


def test_a_fresh_layer_is_initialised_as_nn_linear():
    torch.manual_seed(3)
    linear = nn.Linear(16, 6)
    after = torch.rand(1)
    torch.manual_seed(3)
    layer = QLinear(16, 6)
    assert_same_bits(torch.rand(1), after)
    assert_same_bits(layer.weight.int_repr(), QLinear.from_float(linear).weight.int_repr())
    assert_same_bits(layer.bias, linear.bias)
    layer = QLinear(16, 6, bias=False, device="cpu", dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias is None


def test_repr_shows_the_scheme():
    assert repr(QLinear(96, 6)) == (
        "QLinear(in_features=96, out_features=6, bias=True, activations=per_token, weights=per_channel)"
    )
    layer = QLinear(
        96, 6, False, activations="per_tensor", weights="per_tensor", rotation="hadamard", epilogue="relu"
    )
    assert layer.extra_repr() == (
        "in_features=96, out_features=6, bias=False, activations=per_tensor, weights=per_tensor, "
        "rotation=hadamard(32), epilogue=relu"
    )


@pytest.mark.parametrize(
    ("rotation", "block"), [(None, 0), ("hadamard", 32), (64, 32), (16, 16), (1, 1), (128, 32)]
)
def test_rotation_block(rotation, block):
    layer = QLinear(96, 6, rotation=rotation)
    assert layer.config == Config(rotation_block=block)


@pytest.mark.parametrize("kind", ["normal", "relu", "gelu", "sigmoid", "outlier"])
def test_a_rotation_keeps_the_error_of_normal_inputs(kind):
    torch.manual_seed(0)
    x = torch.randn(64, 1024)
    if kind == "outlier":
        x[:, 7] *= 50
    elif kind != "normal":
        x = {"relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid}[kind](x)
    linear = nn.Linear(1024, 256)
    expected = F.linear(x.double(), linear.weight.detach().double(), linear.bias.detach().double())
    layer = QLinear.from_float(linear, rotation="hadamard")
    error = (layer(x).detach().double() - expected).norm() / expected.norm()
    assert error < 0.0115


def test_a_layer_without_signs_says_so():
    config = Config(rotation_block=32, rotation_signs=False)
    layer = QLinear(96, 6, rotation="hadamard")
    assert "rotation_signs" not in repr(layer)
    assert "rotation_signs" not in repr(layer.weight)
    layer.weight = QTensor.quantize(torch.randn(6, 96), config)
    assert layer.config == config
    assert "rotation=hadamard(32), rotation_signs=False" in repr(layer)
    assert "rotation_block=32, rotation_signs=False" in repr(layer.weight)


def test_signs_need_a_rotation():
    assert Config(rotation_signs=True) == Config(rotation_signs=False) == Config.decode(0)
    with pytest.raises(ValueError, match="has bits that this version does not know"):
        Config.decode(1 << 17)


def test_rotation_of_an_odd_layer_is_none_in_effect():
    linear, layer = pair(7, 5, rotation="hadamard")
    assert layer.config.rotation_block == 1
    x = torch.randn(3, 7)
    assert_same_bits(layer(x), QLinear.from_float(linear)(x))


def test_rotation_spreads_an_outlier():
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64), torch.randn(32, 128)
    x[:, 7] *= 100
    layers = [QLinear.from_float(linear, rotation=rotation) for rotation in (None, "hadamard")]
    plain, rotated = ((layer(x) - layer.to_float()(x)).norm().item() for layer in layers)
    assert rotated < 0.3 * plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_to_float_and_dequantize_weight(scheme, dtype):
    linear, layer = pair(64, 9, dtype=dtype, **scheme)
    dequantized = layer.dequantize_weight()
    assert dequantized.dtype == torch.float32
    steps = layer.weight.channel_scale[:, None] * max(layer.config.rotation_block, 1)
    assert ((dequantized - linear.weight.detach().float()).abs() <= steps / 2 * 1.001).all()

    layer.eval()
    layer.bias.requires_grad_(False)
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight.dtype == back.bias.dtype == dtype
    assert not back.training
    assert back.weight.requires_grad
    assert not back.bias.requires_grad
    assert_same_bits(back.weight, dequantized.to(dtype))
    assert_same_bits(back.bias, layer.bias.to(dtype))
    assert back.bias.data_ptr() != layer.bias.data_ptr()


def test_to_float_refuses_an_epilogue():
    with pytest.raises(RuntimeError, match=r"the layer ends in 'relu', which nn.Linear cannot hold"):
        QLinear(4, 4, epilogue="relu").to_float()


def test_epilogue_runs_after_the_bias():
    linear, layer = pair(16, 6)
    fused = QLinear.from_float(linear, epilogue="relu")
    x = torch.randn(5, 16)
    assert_same_bits(fused(x), layer(x).relu())


def test_train_and_eval_compute_the_same():
    linear, layer = pair(16, 6)
    x = torch.randn(5, 16)
    assert_same_bits(layer.train()(x), layer.eval()(x))
    assert not QLinear.from_float(linear.eval()).training
    assert QLinear.from_float(linear.train()).training


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_dequantized_layer(scheme):
    _, layer = pair(16, 6, **scheme)
    x = torch.randn(2, 5, 16, requires_grad=True)
    grad = torch.randn(2, 5, 6)
    layer(x).backward(grad)
    got_x, got_bias, x.grad = x.grad, layer.bias.grad, None
    back = layer.to_float()
    back(x).backward(grad)
    torch.testing.assert_close(got_x, x.grad)
    torch.testing.assert_close(got_bias, back.bias.grad)


def test_no_graph_without_gradients():
    _, layer = pair(16, 6)
    layer.requires_grad_(False)
    assert not layer(torch.randn(2, 16)).requires_grad
    assert layer(torch.randn(2, 16, requires_grad=True)).requires_grad
    with torch.no_grad():
        assert not layer(torch.randn(2, 16, requires_grad=True)).requires_grad


def test_a_converted_layer_trains_its_bias():
    _, layer = pair(8, 4)
    x, target = torch.randn(64, 8), torch.randn(64, 4) + 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_inputs_give_nan_and_nothing_else(value):
    x = torch.randn(4, 16)
    x[2, 9] = value
    y = pair(16, 6)[1](x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()
    assert pair(16, 6, activations="per_tensor")[1](x).isnan().all()


def test_tiny_and_huge_inputs_keep_their_precision():
    """The scale has no lower bound, and its range does not overflow."""
    linear, layer = pair(16, 6, bias=False)
    x = torch.randn(4, 16)
    for factor in (1e-30, 1e-4, 1e4, 1e34):
        got, expected = layer(x * factor).double(), linear(x * factor).double()
        assert ((got - expected).norm() / expected.norm()).item() < 0.03


def test_long_sums_do_not_wrap():
    k = 200_000
    layer = QLinear(k, 1, bias=False)
    layer.weight = torch.ones(1, k)
    torch.testing.assert_close(layer(torch.ones(1, k)), torch.full((1, 1), float(k)), rtol=1e-5, atol=0)


def test_hooks_run():
    _, layer = pair(16, 6)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: output * 0)
    assert (layer(torch.randn(2, 16)) == 0).all()
    assert seen == ["pre"]


def test_casts_change_the_dtype_that_weight_shows_and_the_bias():
    _, layer = pair(16, 6)
    x = torch.randn(3, 16)
    bias = layer.bias.detach().clone()
    for cast, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float64), torch.float64),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.float(), torch.float32),
    ):
        assert cast(layer) is layer
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.weight_scale.dtype == torch.float32
        bias = bias.to(dtype)
        assert_same_bits(layer.bias.detach(), bias)
        fp32 = copy.deepcopy(layer).float()
        assert_same_bits(layer(x), fp32(x))


def test_moving_to_another_device_and_back():
    _, layer = pair(16, 6)
    y = layer(torch.ones(2, 16))
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.device.type == meta.bias.device.type == meta.weight_scale.device.type == "meta"
    assert meta(torch.ones(2, 16, device="meta")).shape == (2, 6)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert_same_bits(back(torch.ones(2, 16)), y)
    on_meta = QLinear(16, 6, device="meta")
    assert on_meta.weight.is_meta
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bits(on_meta(torch.ones(2, 16)), y)


def test_share_memory():
    _, layer = pair(16, 6)
    layer.share_memory()
    assert layer.bias.is_shared()
    assert layer.weight.packed_weight.is_shared()
    assert layer.weight_scale.is_shared()


def test_a_cast_to_no_float_is_refused_and_changes_nothing():
    _, layer = pair(16, 6)
    y = layer(torch.ones(2, 16))
    with pytest.raises(TypeError, match=r"QLinear: expected a cast to float32, .* got torch.complex64"):
        layer.to(torch.complex64)
    assert_same_bits(layer(torch.ones(2, 16)), y)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deep", "pickle"],
)
def test_copies_and_pickles(scheme, duplicate):
    _, layer = pair(32, 6, dtype=torch.float16, **scheme)
    layer.eval().register_forward_hook(_negate)
    other = duplicate(layer)
    x = torch.randn(3, 32)
    assert_same_bits(other(x), layer(x))
    assert (other.config, other.training, other.weight.dtype) == (layer.config, False, torch.float16)
    assert_same_bits(other.weight.int_repr(), layer.weight.int_repr())


def _negate(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return -output


def test_a_pickle_holds_no_packed_weight():
    _, layer = pair(128, 256)
    assert len(pickle.dumps(layer)) < 1.15 * 128 * 256
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    x = torch.randn(2, 128)
    assert_same_bits(torch.load(stream, weights_only=False)(x), layer(x))


@pytest.mark.parametrize(("k", "n"), [(128, 256), (256, 512), (128, 257), (131, 260)])
def test_the_weight_is_held_once(k, n):
    before = _resident_int8()
    layer = QLinear(k, n)
    layer(torch.randn(2, k))
    held = _resident_int8() - before
    assert held <= 1.1 * k * n
    del layer


def _resident_int8() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.int8]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_assigning_a_float_weight_quantizes_it():
    linear, layer = pair(16, 6)
    other = nn.Linear(16, 6).half()
    layer.weight = other.weight
    assert type(layer.weight) is QTensor
    assert layer.weight.dtype == torch.float16
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.bias = nn.Parameter(other.bias.detach().float())
    x = torch.randn(3, 16)
    assert_same_bits(layer(x), QLinear.from_float(other)(x))
    layer.weight = linear.weight.detach()
    assert_same_bits(layer.weight.int_repr(), QLinear.from_float(linear).weight.int_repr())


def test_assigning_a_qtensor_shares_it():
    _, first = pair(32, 6, rotation="hadamard")
    second = QLinear(32, 6, bias=False, activations="per_tensor", epilogue="relu")
    second.weight = first.weight
    assert second.weight is first.weight
    assert second.config == Config("per_tensor", "per_channel", 32, "relu")


def test_the_bias_can_be_replaced():
    _, layer = pair(16, 6)
    x = torch.randn(3, 16)
    without = QLinear(16, 6, bias=False)
    without.weight = layer.weight
    zeros = torch.func.functional_call(layer, {"bias": torch.zeros(6)}, (x,))
    assert_same_bits(zeros, without(x))
    layer.bias = nn.Parameter(torch.zeros(6))
    assert_same_bits(layer(x), without(x))
    layer.bias = None
    assert_same_bits(layer(x), without(x))


def test_bad_assignments_are_refused():
    _, layer = pair(16, 6)
    y = layer(torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"expected a weight of shape \[6, 16\], got \[16, 6\]"):
        layer.weight = torch.randn(16, 6)
    with pytest.raises(ValueError, match=r"expected weight to be finite, got nan at weight\[0, 0\]"):
        layer.weight = torch.full((6, 16), float("nan"))
    with pytest.raises(TypeError, match=r"expected a tensor for .weight, got NoneType"):
        layer.weight = None
    assert_same_bits(layer(torch.ones(2, 16)), y)


# ---- wrong input


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.randn(2, 512), "QLinear: expected input.shape[-1] == in_features (768), got 512"),
        (torch.randn(512), "QLinear: expected input.shape[-1] == in_features (768), got 512"),
        (torch.randn(2, 767), "QLinear: expected input.shape[-1] == in_features (768), got 767"),
        (torch.randn(2, 0), "QLinear: expected input.shape[-1] == in_features (768), got 0"),
        (
            torch.zeros(2, 768, dtype=torch.int64),
            "QLinear: expected input of dtype float32, bfloat16, float16 or float64, got torch.int64",
        ),
        (
            torch.zeros(2, 768, dtype=torch.complex64),
            "QLinear: expected input of dtype float32, bfloat16, float16 or float64, got torch.complex64",
        ),
        (torch.zeros(2, 768, dtype=torch.bool), "got torch.bool"),
        (torch.tensor(1.0), "QLinear: expected input with at least 1 dimension, got a scalar"),
    ],
)
def test_input_that_does_not_fit(x, sentence):
    with pytest.raises(RuntimeError) as error:
        QLinear(768, 4)(x)
    assert sentence in str(error.value)


def test_input_that_is_no_tensor():
    with pytest.raises((TypeError, RuntimeError), match=r"x"):
        QLinear(3, 4)([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        (
            {"activations": "per_row"},
            "expected activations to be one of 'per_token', 'per_tensor', got 'per_row'",
        ),
        ({"weights": "int4"}, "expected weights to be one of 'per_channel', 'per_tensor', got 'int4'"),
        (
            {"rotation": "random"},
            "expected rotation to be None, 'hadamard' or one of [1, 2, 4, 8, 16, 32, 64, 128]",
        ),
        ({"rotation": 48}, "got 48"),
        ({"rotation": True}, "got True"),
        ({"rotation": 256}, "got 256"),
        (
            {"epilogue": "tanh"},
            "expected epilogue to be one of 'none', 'relu', 'gelu', 'gelu_tanh', 'silu', 'quick_gelu'",
        ),
    ],
)
def test_unknown_schemes(scheme, sentence):
    for build in (lambda: QLinear(96, 4, **scheme), lambda: QLinear.from_float(nn.Linear(96, 4), **scheme)):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below
            build()
        assert sentence in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(value):
    linear = nn.Linear(16, 6)
    with torch.no_grad():
        linear.weight[3, 11] = value
    with pytest.raises(ValueError, match=rf"expected weight to be finite, got {value} at weight\[3, 11\]"):
        QLinear.from_float(linear)


def test_a_nan_bias_is_refused_an_infinite_one_accepted():
    linear = nn.Linear(16, 6)
    with torch.no_grad():
        linear.bias[4] = float("-inf")
    assert QLinear.from_float(linear)(torch.randn(2, 16))[:, 4].eq(float("-inf")).all()
    with torch.no_grad():
        linear.bias[2] = float("nan")
    with pytest.raises(ValueError, match=r"expected bias without NaN, got nan at bias\[2\]"):
        QLinear.from_float(linear)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes(dtype):
    linear = nn.Linear(16, 6)
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype))
    with pytest.raises(ValueError, match=f"float32, bfloat16, float16 or float64, got {dtype}"):
        QLinear.from_float(linear)


def test_from_float_requires_an_nn_linear():
    with pytest.raises(TypeError, match=r"expected an nn.Linear, got Conv1d"):
        QLinear.from_float(nn.Conv1d(1, 1, 1))


# ---- state_dict


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_state_dict_round_trip(scheme, bias, dtype):
    _, layer = pair(32, 6, bias, dtype, **scheme)
    state = layer.state_dict()
    names = ["weight", "weight_scale", *(["bias"] if bias else []), "format"]
    assert list(state) == names
    assert all(type(value) is Tensor for value in state.values())
    assert (state["weight"].dtype, state["weight"].shape) == (torch.int8, (6, 32, 1))
    assert state["weight_scale"].dtype == torch.float32
    assert state["weight_scale"].shape == ((1,) if scheme.get("weights") else (6,))
    assert state["format"].tolist() == [2, layer.config.encode(), 1 + FLOATS.index(dtype), 0]

    other = QLinear(32, 6, bias)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.weight.dtype == dtype
    assert other.config == layer.config
    x = torch.randn(3, 32)
    assert_same_bits(other(x), layer(x))


def test_state_dict_through_files(tmp_path):
    model = nn.Sequential(
        QLinear(32, 16), nn.ReLU(), QLinear(16, 4, weights="per_tensor", rotation="hadamard")
    )
    fresh = copy.deepcopy(model)
    for layer in (fresh[0], fresh[2]):
        layer.weight = torch.randn(layer.weight.shape)
    x = torch.randn(3, 32)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_same_bits(fresh(x), model(x))
    fresh[0].weight = torch.randn(16, 32)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert_same_bits(fresh(x), model(x))


def test_a_float_state_dict_is_quantized_with_a_warning():
    linear, layer = pair(32, 6, weights="per_tensor")
    fresh = QLinear(32, 6, weights="per_tensor").half()
    with pytest.warns(UserWarning, match=r"QLinear: the state_dict holds float weights"):
        fresh.load_state_dict(linear.state_dict())
    x = torch.randn(3, 32)
    assert_same_bits(fresh(x), layer.half()(x))
    assert fresh.weight.dtype == fresh.bias.dtype == torch.float16


def _altered(**changes) -> dict[str, Tensor]:
    torch.manual_seed(1)
    state = {**QLinear(32, 6).state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            _altered(weight=torch.zeros(6, 31, 1, dtype=torch.int8)),
            "expected weight of shape [6, 32, 1], got [6, 31, 1]",
        ),
        (
            _altered(weight=torch.zeros(6, 32, dtype=torch.int8)),
            "expected weight of shape [6, 32, 1], got [6, 32]",
        ),
        (
            _altered(format=torch.tensor([1, 0, 1, 0])),
            "expected weight of shape [6, 32], got [6, 32, 1]",
        ),
        (
            _altered(weight=torch.zeros(6, 32, 1, dtype=torch.uint8)),
            "expected weight to be int8 [N, K], got torch.uint8",
        ),
        (_altered(weight=torch.zeros(6, 32, 1)), "expected weight to be int8 [N, K], got torch.float32"),
        (
            _altered(weight=torch.full((6, 32, 1), -128, dtype=torch.int8)),
            "expected weight in [-127, 127], got -128",
        ),
        (_altered(weight_scale=torch.ones(5)), "expected weight_scale to be float32 of shape [6]"),
        (_altered(weight_scale=torch.zeros(6)), "finite and positive, got weight_scale[0] = 0.0"),
        (_altered(weight_scale=-torch.ones(6)), "finite and positive, got weight_scale[0] = -1.0"),
        (
            _altered(weight_scale=torch.full([6], float("nan"))),
            "finite and positive, got weight_scale[0] = nan",
        ),
        (_altered(weight_scale=torch.ones(6).double()), "got torch.float64"),
        (
            _altered(format=torch.tensor([3, 0, 1, 0])),
            "format [3, 0, 1, 0] is not one that this dynquant reads",
        ),
        (_altered(format=torch.tensor([2, 0, 9, 0])), "a newer dynquant may have written it"),
        (_altered(format=torch.tensor([2, 0, 1, 7])), "a newer dynquant may have written it"),
        (
            _altered(format=torch.tensor([2, 1 << 20, 1, 0])),
            "config 1048576 has bits that this version does not know",
        ),
        (_altered(format=torch.tensor([2, 1 << 12, 1, 0])), "config 4096 has bits that no file holds"),
        (_altered(format=torch.tensor([2, 1 << 6, 1, 0])), "expected epilogue 'none', got 'relu'"),
        (
            _altered(format=torch.tensor([2, 2, 1, 0])),
            "expected weight_scale to be float32 of shape [1] (per_tensor)",
        ),
        (
            _altered(format=torch.tensor([2, 8 << 2, 1, 0])),
            "expected K to be a multiple of the rotation block 128",
        ),
        (_altered(format=torch.tensor([1])), "expected format to be int64 [4], got torch.int64 [1]"),
        (_altered(format=torch.zeros(4)), "expected format to be int64 [4], got torch.float32 [4]"),
        (_altered(format=torch.tensor([0, 0, 1, 0])), "(versions 1 to 2)"),
        (
            _altered(format=torch.zeros(4, dtype=torch.int64, device="meta")),
            "format to have values, got it on meta",
        ),
        (_altered(bias=torch.zeros(6).int()), "expected bias of dtype float32, bfloat16, float16 or float64"),
        (_altered(weight=None), "the state_dict has weight_scale and format, but no weight"),
        (_altered(format=None), "the state_dict has weight and weight_scale, but no format"),
        (_altered(format=None, weight=None), "the state_dict has weight_scale, but no weight and no format"),
        (_altered(bias=torch.full([6], float("nan"))), "expected bias without NaN, got nan at bias[0]"),
        (_altered(bias=torch.zeros(5)), "expected bias of shape [6], got [5]"),
        (
            {"weight": torch.full((6, 32), float("nan"))},
            "expected weight to be finite, got nan at weight[0, 0]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:QLinear")
def test_a_state_dict_that_does_not_fit_is_refused(state, sentence):
    model = nn.Sequential(nn.ReLU(), QLinear(32, 6))
    x = torch.randn(2, 32)
    y = model(x)
    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict({f"1.{name}": value for name, value in state.items()}, strict=strict)
        assert sentence in str(error.value)
        if "size mismatch" not in sentence:
            assert "QLinear '1': " in str(error.value)
            assert_same_bits(model(x), y)


def test_a_weight_without_its_scale_is_not_loaded():
    _, layer = pair(32, 6)
    x = torch.randn(2, 32)
    y = layer(x)
    state = _altered(weight_scale=None, bias=layer.bias)
    with pytest.raises(RuntimeError, match='Missing key.*"weight_scale"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["weight_scale"]
    assert_same_bits(layer(x), y)


def test_missing_and_unexpected_keys():
    model = nn.Sequential(QLinear(32, 6))
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"0.weight", "0.weight_scale", "0.format", "0.bias"'
    ):
        model.load_state_dict({})
    model.load_state_dict({}, strict=False)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.extra"'):
        model.load_state_dict({**state, "0.extra": torch.zeros(1)})
    del state["0.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.bias"]


def test_a_state_dict_taken_under_another_default_device():
    _, layer = pair(32, 6)
    with torch.device("meta"):
        state = layer.state_dict()
    layer.load_state_dict(state)


def test_a_state_dict_is_no_view_of_the_packed_weight():
    _, layer = pair(32, 6)
    x = torch.randn(3, 32)
    y = layer(x)
    layer.state_dict()["weight"].zero_()
    assert_same_bits(layer(x), y)
