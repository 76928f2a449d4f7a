"""Static quantization: the ranges of observers, frozen layers, error messages."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, reference
from dynquant.calibration.observers import OBSERVERS, Mse, Percentile
from tests.support.same_bits import assert_same_bits


def small_model(**scheme) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 7))
    return dynquant.quantize_dynamic(model, **scheme)


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 24, generator=generator) for _ in range(count)]


def frozen(observer: str = "min_max", **options) -> nn.Module:
    model = small_model()
    with dynquant.calibrate(model, observer, **options):
        for x in batches():
            model(x)
    return dynquant.freeze(model)


def test_min_max_is_the_range_of_all_batches() -> None:
    model, seen = small_model(), batches()
    with dynquant.calibrate(model) as ranges:
        for x in seen:
            model(x)
        assert ranges == {}
    everything = torch.cat(seen)
    assert ranges["0"] == (everything.min().item(), everything.max().item())
    assert ranges["2"][0] == 0.0
    assert dynquant.freeze(model) is model
    lo, hi = everything.min()[None], everything.max()[None]
    scale, zero_point = reference.choose_qparams(lo, hi)
    assert_same_bits(model[0].activation_scale, scale)
    assert_same_bits(model[0].activation_zero_point, zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_frozen_layers_run_the_static_op(dtype: torch.dtype) -> None:
    layer = frozen()[0]
    x = torch.randn(3, 5, 24).to(dtype) * 2
    weight = layer.weight
    expected = reference.linear_static(
        x,
        weight.packed_weight,
        weight.weight_sum,
        weight.channel_scale,
        layer.bias.detach(),
        layer.activation_scale,
        layer.activation_zero_point,
        layer.config.encode(),
    )
    assert_same_bits(layer(x), expected)


def test_static_is_close_to_float_and_does_not_depend_on_batch_mates() -> None:
    torch.manual_seed(0)
    linears = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 7))
    model, x = frozen(), torch.cat(batches())
    error = (model(x) - linears(x)).norm() / linears(x).norm()
    assert error < 0.02
    assert_same_bits(model(x)[:3], model(x[:3]))


def test_a_layer_says_that_it_is_static() -> None:
    text = repr(frozen()[2])
    assert "activations=static(scale=" in text
    assert "zero_point=-128" in text
    assert "per_token" not in text


def test_percentile_leaves_outliers_out() -> None:
    observer = Percentile(99.0)
    x = torch.linspace(-1.0, 1.0, 100_001)
    assert observer.observe(torch.cat([x, torch.tensor([1000.0, -300.0])]))
    lo, hi = observer.range()
    step = 2 * 1024 / Percentile.bins
    assert -0.99 - step <= lo <= -0.99 + step
    assert 0.99 - step <= hi <= 0.99 + step


def test_a_percentile_of_100_is_the_range() -> None:
    assert_same_bits(frozen("percentile", percentile=100.0)[0].activation_scale, frozen()[0].activation_scale)


def test_histograms_do_not_depend_on_the_order_of_the_batches() -> None:
    parts = [torch.zeros(10), torch.randn(1000) * 0.01, torch.randn(1000) * 30, torch.rand(1000) * 5]
    forward, backward = Mse(), Mse()
    for part in parts:
        assert forward.observe(part)
    for part in reversed(parts):
        assert backward.observe(part)
    assert torch.equal(forward.counts, backward.counts)
    assert forward.range() == backward.range()


def test_mse_beats_the_whole_range_where_there_are_outliers() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200_000), torch.tensor([20.0, -20.0])])
    errors = {}
    for name, (lo, hi) in {"mse": _observed(Mse(), x), "min_max": (x.min().item(), x.max().item())}.items():
        scale, zero_point = reference.choose_qparams(torch.tensor([lo]), torch.tensor([hi]))
        back = (reference.quantize(x, scale, zero_point).float() - zero_point) * scale
        errors[name] = (back - x).square().mean().item()
    assert errors["mse"] < 0.9 * errors["min_max"]


def _observed(observer: Mse, x: Tensor) -> tuple[float, float]:
    assert observer.observe(x)
    found = observer.range()
    assert found is not None
    return found


@pytest.mark.parametrize("observer", OBSERVERS)
def test_inputs_of_nothing_but_zeros(observer: str) -> None:
    model = small_model()
    with dynquant.calibrate(model, observer) as ranges:
        model(torch.zeros(2, 24))
    assert ranges["0"] == (0.0, 0.0)
    assert dynquant.freeze(model)(torch.zeros(2, 24)).isfinite().all()


def test_state_dict_of_plain_tensors_makes_a_dynamic_model_static(tmp_path) -> None:
    model, x = frozen("mse"), batches(1)[0]
    state = model.state_dict()
    assert state["0.activation_scale"].dtype == torch.float32
    assert state["0.activation_zero_point"].dtype == torch.int32
    safetensors.save_file(state, tmp_path / "model.safetensors")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for loaded in (
        safetensors.load_file(tmp_path / "model.safetensors"),
        torch.load(buffer, weights_only=True),
    ):
        for assign in (False, True):
            other = small_model()
            other.load_state_dict(loaded, assign=assign)
            assert_same_bits(other(x), model(x))
    dynamic = small_model()
    model.load_state_dict(dynamic.state_dict())
    assert model[0].activation_scale is None
    assert_same_bits(model(x), dynamic(x))


def test_copies_pickles_and_casts_stay_static() -> None:
    model, x = frozen(), batches(1)[0]
    for name, bias in model.named_parameters():
        assert name.endswith("bias")
        bias.data = bias.data.half().float()  # a cast reaches the biases
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half()):
        assert other[0].activation_scale.dtype == torch.float32
        assert_same_bits(other(x), model(x))
    assert model.to("meta")[0].activation_scale.device.type == "meta"


def test_compile_and_export() -> None:
    model, x = frozen(), batches(1)[0]
    assert_same_bits(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    assert_same_bits(torch.export.export(model, (x,)).module()(x), model(x))


def test_gradients_reach_the_input() -> None:
    layer = frozen()[0]
    x = torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize_weight().sum(0).expand(4, 24), atol=1e-5)


def test_static_and_dynamic_again() -> None:
    layer, x = frozen()[0], batches(1)[0]
    dynamic = small_model()[0]
    layer.set_activation_qparams(None, None)
    assert_same_bits(layer(x), dynamic(x))


def test_a_second_calibration_replaces_the_first() -> None:
    model = frozen()
    first = model[0].activation_scale.clone()
    with dynquant.calibrate(model) as ranges:
        model(batches(1)[0] * 10)
    dynquant.freeze(model)
    assert model[0].activation_scale > 2 * first
    assert set(ranges) == {"0", "2"}


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model, x = small_model(), batches(1)[0]
    before = model(x)

    def interrupted() -> None:
        with dynquant.calibrate(model):
            model(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert_same_bits(model(x), before)
    with pytest.raises(ValueError, match="none of the 2 QLinear layers has seen a batch"):
        dynquant.freeze(model)


def test_non_finite_inputs_have_no_range() -> None:
    model = small_model()

    def seen() -> None:
        with dynquant.calibrate(model):
            model(torch.full((1, 24), float("inf")))

    with pytest.raises(ValueError, match="the input of layer '0' holds a NaN or an infinity"):
        seen()
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_layers_that_saw_nothing_stay_dynamic() -> None:
    model = small_model()
    with dynquant.calibrate(model):
        model[0](batches(1)[0])
        model[2](torch.empty(0, 40))
    with pytest.warns(UserWarning, match="no input was seen, so these stay dynamic: layer '2'"):
        dynquant.freeze(model)
    assert model[0].activation_scale is not None
    assert model[2].activation_scale is None


def test_a_layer_by_itself() -> None:
    layer = QLinear(8, 3)
    with dynquant.calibrate(layer) as ranges:
        layer(input=torch.ones(2, 8))
    assert ranges == {"": (0.0, 1.0)}
    dynquant.freeze(layer)


def calibrated(model: nn.Module, *args, **options) -> None:
    with dynquant.calibrate(model, *args, **options):
        raise AssertionError("the calibration began")


def test_wrong_arguments_raise_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"expected a model with QLinear layers, got Sequential with none"):
        calibrated(nn.Sequential())
    with pytest.raises(ValueError, match="expected a model with QLinear layers, got Linear with none"):
        dynquant.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="none of the 2 QLinear layers has seen a batch; run some under"):
        dynquant.freeze(small_model())
    with pytest.raises(
        ValueError, match="expected observer to be one of 'min_max', 'percentile', 'mse', got 'max'"
    ):
        calibrated(small_model(), "max")
    with pytest.raises(ValueError, match=r"expected percentile in \(50, 100\], got 0.999"):
        calibrated(small_model(), "percentile", percentile=0.999)
    with pytest.raises(ValueError, match=r"layer '0' rotates its input \(rotation=hadamard\(8\)\)"):
        calibrated(small_model(rotation="hadamard"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_scale": torch.tensor([0.0])}, "activation_scale to be finite and positive, got 0.0"),
        ({"activation_scale": torch.tensor([float("nan")])}, "finite and positive, got nan"),
        ({"activation_scale": torch.ones(2)}, r"activation_scale to be torch.float32 of shape \[1\]"),
        ({"activation_zero_point": torch.tensor([200], dtype=torch.int32)}, r"in \[-128, 127\], got 200"),
        ({"activation_zero_point": torch.tensor([1.0])}, "activation_zero_point to be torch.int32"),
        ({"activation_zero_point": None}, "together, got one of them"),
    ],
)
def test_a_state_dict_with_unsound_qparams(change: dict[str, Tensor | None], words: str) -> None:
    layer = frozen()[0]
    state = {**layer.state_dict(), **change}
    other, x = small_model()[0], batches(1)[0]
    before = other(x)
    with pytest.raises(RuntimeError, match=words):
        other.load_state_dict({key: value for key, value in state.items() if value is not None})
    assert_same_bits(other(x), before)


def test_a_static_layer_has_no_rotation() -> None:
    layer = QLinear(16, 4, rotation="hadamard")
    with pytest.raises(ValueError, match="expected a static layer to have no rotation"):
        layer.set_activation_qparams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert layer.activation_scale is None
    with pytest.raises(ValueError, match="both of scale and zero_point or none"):
        QLinear(16, 4).set_activation_qparams(torch.ones(1), None)
    static = frozen()[0]
    with pytest.raises(ValueError, match="expected a static layer to have no rotation"):
        static.weight = QLinear(24, 40, rotation="hadamard").weight
