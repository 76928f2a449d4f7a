"""quantize_dynamic: the selection of layers, and the attributes, hooks and ties that conversion keeps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    default_dynamic_qconfig,
    default_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    per_channel_dynamic_qconfig,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dynquant
from dynquant import Config, QLinear, QMultiheadAttention, quantize_dynamic
from tests.support.nets import CountInt8, Net, assert_unchanged, converted, net, state
from tests.support.same_bits import assert_same_bits

NAN = float("nan")


EVERY = ["fc1", "block.0", "block.2", "head"]


def test_every_linear_is_converted_and_nothing_else():
    model, x = net(), torch.randn(5, 12)
    before = state(model)
    quantized = quantize_dynamic(model)
    assert_unchanged(model, before)
    assert model.training
    assert converted(quantized) == EVERY
    assert type(quantized) is Net
    assert type(quantized.norm) is nn.LayerNorm
    assert quantized.norm is not model.norm
    assert not any(module.training for module in quantized.modules())
    model.eval()
    expected = model(x)
    assert ((quantized(x) - expected).norm() / expected.norm()) < 0.05
    by_hand = copy.deepcopy(model)
    by_hand.fc1, by_hand.head = QLinear.from_float(model.fc1), QLinear.from_float(model.head)
    by_hand.block[0], by_hand.block[2] = (
        QLinear.from_float(model.block[0]),
        QLinear.from_float(model.block[2]),
    )
    assert_same_bits(quantized(x), by_hand(x))


def test_no_float_weight_is_copied():
    """Conversion into a copy never allocates a float weight."""

    class Watched(nn.Parameter):
        def __deepcopy__(self, memo):
            raise AssertionError("a float weight was copied")

    model = net()
    model.fc1.weight = Watched(model.fc1.weight.detach())
    assert isinstance(model.fc1.weight, Watched)
    assert isinstance(quantize_dynamic(model, {"fc1"}).fc1, QLinear)


def test_inplace():
    model = net()
    norm, hook = model.norm, []
    model.fc1.register_forward_hook(lambda *args: hook.append(1))
    assert quantize_dynamic(model, inplace=True) is model
    assert converted(model) == EVERY
    assert model.norm is norm
    model(torch.randn(1, 12))
    assert hook == [1]


def test_the_root_module_itself():
    linear, x = nn.Linear(12, 4), torch.randn(3, 12)
    for inplace in (False, True):
        layer = quantize_dynamic(linear, inplace=inplace, rotation="hadamard")
        assert_same_bits(layer(x), QLinear.from_float(linear, rotation="hadamard")(x))
    assert isinstance(quantize_dynamic(linear, {""}), QLinear)
    assert isinstance(quantize_dynamic(linear, {nn.Linear}), QLinear)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.qint8, torch.int8])
def test_both_names_of_int8(dtype):
    assert converted(quantize_dynamic(net(), dtype=dtype)) == EVERY
    assert converted(quantize_dynamic(net(), {nn.Linear}, dtype)) == EVERY


NOTHING = (
    "quantize_dynamic: no layer was converted; left as they are: 4 Linear ('fc1', 'block.0', 'block.2' and 1 "
    "more): the spec leaves it float"
)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, EVERY),
        ({nn.Linear}, EVERY),
        ({"fc1"}, ["fc1"]),
        ({"block"}, ["block.0", "block.2"]),
        ({"block.2", "head"}, ["block.2", "head"]),
        (["fc1", nn.Sequential], ["fc1", "block.0", "block.2"]),
        ({""}, EVERY),
        (set(), []),
        ({}, []),
        ({nn.Linear: default_dynamic_qconfig}, EVERY),
        ({nn.Linear: None}, []),
        ({nn.Linear: default_dynamic_qconfig, "head": None}, EVERY[:3]),
        ({"block": per_channel_dynamic_qconfig, "block.0": None}, ["block.2"]),
        ({"": Config(), "block": None, "block.2": Config()}, ["fc1", "block.2", "head"]),
        ({"block.0": Config(), nn.Linear: None}, ["block.0"]),
        ({nn.Module: Config(), "block": None}, ["fc1", "block.0", "block.2", "head"]),
        ({nn.LSTM, nn.Linear}, EVERY),
    ],
)
def test_selection_by_spec(spec, names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert converted(quantize_dynamic(net(), spec)) == names
    assert [str(warning.message) for warning in caught] == ([] if names else [NOTHING])


def test_schemes_by_keyword():
    scheme = {"activations": "per_tensor", "weights": "per_tensor", "rotation": 8}
    model = quantize_dynamic(net(), **scheme)
    assert model.fc1.config == Config("per_tensor", "per_tensor", 4)
    assert model.head.config == Config("per_tensor", "per_tensor", 8)
    assert quantize_dynamic(net(), {"head"}, **scheme).head.config == Config("per_tensor", "per_tensor", 8)


def test_schemes_by_config():
    spec = {
        nn.Linear: Config(weights="per_tensor"),
        "head": Config("per_tensor", rotation_block=128),
        "fc1": Config(epilogue="relu"),
        "block.0": default_dynamic_qconfig,
        "block.2": per_channel_dynamic_qconfig,
    }
    model = quantize_dynamic(net(), spec, rotation="hadamard")
    assert model.head.config == Config("per_tensor", "per_channel", 16)
    assert model.fc1.config == Config(epilogue="relu")
    assert model.block[0].config == Config("per_token", "per_tensor", 16)
    assert model.block[2].config == Config("per_token", "per_channel", 16)


def test_a_qconfig_attribute_wins():
    model = net()
    model.head.qconfig = None
    model.block[0].qconfig = default_dynamic_qconfig
    quantized = quantize_dynamic(model)
    assert converted(quantized) == ["fc1", "block.0", "block.2"]
    assert quantized.block[0].config.weights == "per_tensor"
    assert quantized.fc1.config.weights == "per_channel"
    assert not hasattr(quantized.block[0], "qconfig")


def test_the_same_calls_as_torch_ao():
    """Each call that torch.ao accepts selects the same layers here."""
    calls = [
        lambda f: f(net(), {nn.Linear}, dtype=torch.qint8),
        lambda f: f(net(), qconfig_spec={nn.Linear}, dtype=torch.qint8, inplace=True),
        lambda f: f(net(), {"fc1", "block"}),
        lambda f: f(net(), {nn.Linear: default_dynamic_qconfig, "head": None}),
        lambda f: f(net(), {"block": per_channel_dynamic_qconfig}, torch.qint8, None, False),
    ]
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao's deprecation
            theirs = call(torch.ao.quantization.quantize_dynamic)
        ours = call(quantize_dynamic)
        dynamic = torch.ao.nn.quantized.dynamic.Linear
        assert converted(ours) == [
            name for name, module in theirs.named_modules() if isinstance(module, dynamic)
        ]
        assert ours.training == theirs.training


# ---- subclasses, ties, hooks


class Subclass(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.tag = "from the model"


class OtherForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() * 2


def test_subclasses_where_the_forward_is_nn_linears_own():
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x
    model = nn.Sequential(
        Subclass(8), OtherForward(8, 8), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), patched
    )
    with pytest.warns(
        UserWarning, match="2 layers converted; left as they are: 1 Oth.*; 1 Linear .'3'.: its forw"
    ):
        quantized = quantize_dynamic(model)
    assert converted(quantized) == ["0", "2"]
    assert quantized[0].tag == "from the model"
    for spec in (None, {nn.Linear}, {OtherForward}):
        sentence = "left as they are: .*1 OtherForward .'1'.: its forward is not that of Linear"
        with pytest.warns(UserWarning, match=sentence):
            quantize_dynamic(model, spec)


def test_tied_modules_are_converted_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared))
    for inplace in (False, True):
        quantized = quantize_dynamic(model, inplace=inplace)
        assert converted(quantized) == ["0", "2", "3.0"]
        assert quantized[0] is quantized[2] is quantized[3][0]
    assert len(list(quantized.parameters())) == 1


def test_a_tied_module_that_one_name_leaves_float_stays_so():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    assert converted(quantize_dynamic(model, {nn.Linear: Config(), "b.0": None})) == ["c"]


def test_layers_that_share_a_weight_go_on_sharing_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    for quantized in (quantize_dynamic(model), copy.deepcopy(quantize_dynamic(model))):
        assert quantized[0].weight is quantized[1].weight
        assert quantized[0].weight is not quantized[2].weight
        assert quantized[0].bias is not quantized[1].bias
    spec = {"0": Config(), "1": Config(weights="per_tensor")}
    quantized = quantize_dynamic(model, spec)
    assert quantized[1].config.weights == "per_tensor"


def test_an_embedding_tied_to_a_layer_stays_as_it_is():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    quantized = quantize_dynamic(model)
    assert_same_bits(quantized["embed"].weight, model["embed"].weight)
    before = quantized["head"].weight.int_repr()
    quantized["head"].weight = quantized["embed"].weight  # as Hugging Face's tie_weights()
    assert isinstance(quantized["head"], QLinear)
    assert_same_bits(quantized["head"].weight.int_repr(), before)


class Owner(nn.Module):
    """Refers to its layer twice more: outside the modules, and through a bound hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.also = [self.layer]
        self.seen = 0
        self.layer.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.also[0](self.layer(x))


def test_references_and_bound_hooks_follow_the_copy():
    model = Owner()
    quantized = quantize_dynamic(model)
    assert quantized.also[0] is quantized.layer
    with CountInt8() as count:
        quantized(torch.randn(2, 8))
    assert count.calls == 2
    assert (quantized.seen, model.seen) == (2, 0)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_of_every_kind_come_along(inplace):
    model, seen = net(), []
    layer = model.fc1
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre kwargs"), with_kwargs=True),
        layer.register_forward_hook(lambda m, args, out: seen.append("post")),
        layer.register_forward_hook(
            lambda m, args, kwargs, out: seen.append("post kwargs"), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward")),
    ]
    quantized = quantize_dynamic(model, inplace=inplace)
    quantized(torch.randn(2, 12, requires_grad=True)).sum().backward()
    assert seen == ["pre", "pre kwargs", "post", "post kwargs", "backward"]
    if inplace:
        for handle in handles:
            handle.remove()
        quantized(torch.randn(2, 12))
        assert len(seen) == 5


@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda m: weight_norm(m),
        lambda m: spectral_norm(m),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: parametrizations.weight_norm(m),
        lambda m: parametrizations.spectral_norm(m).eval(),
        lambda m: parametrizations.orthogonal(m),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrized_weights(reparametrize):
    model = nn.Sequential(reparametrize(nn.Linear(8, 8))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # as load_state_dict does: the computed weight is now stale
    x = torch.randn(16, 8)
    before = state(model)
    quantized = quantize_dynamic(model)
    assert_unchanged(model, before)
    assert type(quantized[0]) is QLinear
    expected = model(x)
    assert ((quantized(x) - expected).norm() / expected.norm()) < 0.03


def test_requires_grad_and_dtype_come_along():
    model = net().half().requires_grad_(False)
    quantized = quantize_dynamic(model)
    assert not quantized.fc1.bias.requires_grad
    assert quantized.fc1.weight.dtype == torch.float16
    assert quantized(torch.randn(2, 12).half()).dtype == torch.float16


def test_models_on_the_meta_device():
    model = quantize_dynamic(net().to("meta"))
    assert all(tensor.is_meta for tensor in (model.fc1.weight, model.fc1.bias))
    model.to_empty(device="cpu").load_state_dict(quantize_dynamic(net()).state_dict())
    x = torch.randn(2, 12)
    assert_same_bits(model(x), quantize_dynamic(net())(x))


def test_uninitialised_memory_can_be_packed(monkeypatch):
    """Memory of to_empty may hold -128, which no quantized weight does."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: torch.full_like(like, -128, **options))
    model = quantize_dynamic(net().to("meta")).to_empty(device="cpu")
    monkeypatch.undo()
    assert model.fc1.weight.int_repr().min() == -127


def test_conversion_under_inference_mode_leaves_a_model_that_trains():
    model = net()
    with torch.inference_mode():
        model = quantize_dynamic(model)
    x = torch.randn(2, 12, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_converting_twice_changes_nothing():
    once = quantize_dynamic(net())
    twice = quantize_dynamic(once)
    x = torch.randn(2, 12)
    assert_same_bits(twice(x), once(x))


# ---- attention


def _encoder(batch_first: bool, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_encoder(batch_first, options):
    model = _encoder(batch_first, **options)
    quantized = quantize_dynamic(model)
    assert len(converted(quantized)) == 6
    assert type(quantized.layers[0].self_attn) is QMultiheadAttention
    x = torch.randn(3, 5, 32)
    padding = torch.zeros(3 if batch_first else 5, 5 if batch_first else 3, dtype=torch.bool)
    padding[-1, -2:] = True
    for mask in (None, padding):
        with torch.inference_mode(), CountInt8() as count:
            y = quantized(x, src_key_padding_mask=mask)
        assert count.calls == 8, "in_proj, out_proj, linear1, linear2 of two layers"
        expected = model(x, src_key_padding_mask=mask)
        tokens = ~mask if mask is not None else torch.ones_like(padding, dtype=torch.bool)
        tokens = tokens if batch_first else tokens.t()
        y, expected = y[tokens], expected[tokens]
        assert ((y - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 8, "vdim": 12}, {"bias": False}, {"batch_first": True}], ids=str
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(options, need_weights):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, **options).eval()
    quantized = quantize_dynamic(model)
    assert converted(quantized) == ["out_proj"]
    query = torch.randn(3, 2, 16)
    key, value = torch.randn(3, 2, options.get("kdim", 16)), torch.randn(3, 2, options.get("vdim", 16))
    with CountInt8() as count:
        y, attention = quantized(query, key, value, need_weights=need_weights)
    assert count.calls == 4
    expected, expected_attention = model(query, key, value, need_weights=need_weights)
    assert ((y - expected).norm() / expected.norm()) < 0.03
    if need_weights:
        torch.testing.assert_close(attention, expected_attention, rtol=0.1, atol=0.01)


def test_transformer_with_decoder():
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    quantized = quantize_dynamic(model)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    with CountInt8() as count:
        y = quantized(source, target)
    assert count.calls == 4 + 7
    assert ((y - model(source, target)).norm() / y.norm()) < 0.05


# ---- float layers and warnings


class OwnLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


def test_recurrent_layers_without_int8_stay_float_and_warn_once():
    model = nn.ModuleDict({"rnn": nn.RNN(4, 4), "own": OwnLSTM(4, 4), "fc": nn.Linear(4, 4)})
    for spec in ({nn.RNN, nn.LSTM, nn.Linear}, None):
        with pytest.warns(UserWarning, match="left as they are") as caught:
            quantized = quantize_dynamic(model, spec)
        (warning,) = caught
        assert str(warning.message) == (
            "quantize_dynamic: 1 layer converted; left as they are: 1 RNN ('rnn'): there is no int8 version "
            "of it; 1 OwnLSTM ('own'): its forward is not that of LSTM"
        )
        assert warning.filename == __file__
        assert converted(quantized) == ["fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert converted(quantize_dynamic(model, {nn.Linear})) == ["fc"]


def test_a_name_without_a_convertible_layer_warns():
    with pytest.warns(
        UserWarning, match=r"left as they are: 1 LayerNorm \('norm'\): there is nothing in it to convert"
    ):
        quantize_dynamic(net(), {"norm", "fc1"})


def test_weights_of_other_dtypes_stay_float():
    model = net()
    model.fc1 = nn.Linear(12, 16, dtype=torch.complex64)
    for spec, names in ((None, EVERY[1:]), ({"fc1"}, [])):
        with pytest.warns(UserWarning, match="1 Linear .'fc1'.: its weight is torch.complex64"):
            assert converted(quantize_dynamic(model, spec)) == names


def test_mapping():
    class Mine(QLinear):
        pass

    class Bare(nn.Module):
        @classmethod
        def from_float(cls, linear, weights="unset"):
            layer = cls()
            layer.weights = weights
            return layer

    assert type(quantize_dynamic(net(), mapping={nn.Linear: Mine}).fc1) is Mine
    assert (
        quantize_dynamic(net(), {"fc1"}, mapping={nn.Linear: Bare}, weights="per_tensor").fc1.weights
        == "per_tensor"
    )
    assert converted(quantize_dynamic(net(), mapping={})) == []
    model = quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4), Subclass(4)), mapping={Subclass: QLinear, nn.Linear: Mine}
    )
    assert [type(layer) for layer in model] == [Mine, QLinear]


def test_a_bar_is_shown_where_it_takes_longer_than_a_second(capsys, monkeypatch):
    quantize_dynamic(net())
    assert "quantize_dynamic" not in capsys.readouterr().err
    clock: Iterator[float] = iter(range(10_000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    quantize_dynamic(net())
    assert "quantize_dynamic: 100%" in capsys.readouterr().err


# ---- wrong arguments


def _with_nan(layer: str, index: tuple[int, ...], value: float = NAN, tensor: str = "weight") -> Net:
    model = net()
    with torch.no_grad():
        getattr(model.get_submodule(layer), tensor)[index] = value
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("model", "arguments", "error", "sentence"),
    [
        (
            net,
            {"qconfig_spec": {"fc3"}},
            ValueError,
            "qconfig_spec names 'fc3', which the model does not have; did you mean 'fc1'?",
        ),
        (
            net,
            {"qconfig_spec": "fc1"},
            TypeError,
            "expected qconfig_spec to be None, a set of types and names",
        ),
        (net, {"qconfig_spec": 3}, TypeError, "expected qconfig_spec to be None, a set of types and names"),
        (net, {"qconfig_spec": {3}}, TypeError, "expected types and names in qconfig_spec, got 3"),
        (
            net,
            {"qconfig_spec": {"fc1": "int8"}},
            TypeError,
            "expected None, a dynquant.Config or a QConfig of torch.ao for layer 'fc1', got 'int8'",
        ),
        (
            net,
            {"qconfig_spec": {nn.Linear: float16_dynamic_qconfig}},
            ValueError,
            "the qconfig of layer 'fc1' (Linear) to ask for weights of torch.qint8, got torch.float16",
        ),
        (
            net,
            {"qconfig_spec": {"fc1": float_qparams_weight_only_qconfig}},
            ValueError,
            "the qconfig of layer 'fc1' (Linear) to ask for weights of torch.qint8, got torch.quint8",
        ),
        (
            net,
            {"qconfig_spec": {"fc1": Config(out_dtype=torch.float16)}},
            ValueError,
            "the Config of layer 'fc1' has an out_dtype",
        ),
        (
            net,
            {"dtype": torch.float16},
            ValueError,
            "expected dtype to be torch.qint8 or torch.int8, got torch.float16",
        ),
        (net, {"qconfig_spec": {nn.Linear}, "dtype": torch.quint8}, ValueError, "got torch.quint8"),
        (
            net,
            {"activations": "per_row"},
            ValueError,
            "expected activations to be one of 'per_token', 'per_tensor', got 'per_row'",
        ),
        (net, {"weights": "int4"}, ValueError, "expected weights to be one of"),
        (net, {"rotation": 3}, ValueError, "expected rotation to be None, 'hadamard' or one of"),
        (
            lambda: _with_nan("head", (2, 7)),
            {},
            ValueError,
            "quantize_dynamic: layer 'head': expected weight to be finite, got nan at weight[2, 7]",
        ),
        (
            lambda: _with_nan("block.2", (0, 3), float("-inf")),
            {},
            ValueError,
            "layer 'block.2': expected weight to be finite, got -inf at weight[0, 3]",
        ),
        (
            lambda: _with_nan("head", (1,), NAN, "bias"),
            {},
            ValueError,
            "layer 'head': expected bias without NaN, got nan at bias[1]",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)),
            {},
            ValueError,
            "layer '1' (LazyLinear) has no weight before its first batch",
        ),
    ],
)
def test_wrong_arguments_raise_a_sentence_and_change_nothing(model, arguments, error, sentence, inplace):
    model = model()
    before = state(model) if not any(map(torch.nn.parameter.is_lazy, model.parameters())) else None
    modules = list(model.modules())
    with pytest.raises(error) as caught:
        quantize_dynamic(model, inplace=inplace, **arguments)
    assert sentence in str(caught.value)
    assert list(model.modules()) == modules
    assert converted(model) == []
    if before is not None:
        assert_unchanged(model, before)


def test_an_interrupted_conversion_changes_nothing(monkeypatch):
    model = net()
    before = state(model)
    calls = []

    def interrupted(linear, **words):
        calls.append(linear)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return QLinear.from_float(linear, **words)

    class Target:
        from_float = staticmethod(interrupted)

    with pytest.raises(KeyboardInterrupt):
        quantize_dynamic(model, mapping={nn.Linear: Target}, inplace=True)
    assert_unchanged(model, before)


def test_static_qconfigs_of_torch_ao_say_how_weights_are_quantized():
    assert quantize_dynamic(net(), {"fc1": default_qconfig}).fc1.config.weights == "per_tensor"


def test_public_name():
    assert dynquant.quantize_dynamic is quantize_dynamic
