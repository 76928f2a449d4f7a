"""``quantize_dynamic(rotation="auto")``: which layers it rotates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, quantize_dynamic
from tests.support.same_bits import assert_same_bits

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
OUTLIERS = X * torch.where(torch.arange(64) == 5, 60.0, 1.0)


class Scores(nn.Module):
    """q and k read one tensor; only k gains by a rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x)


def blocks(model: nn.Module) -> dict[str, int]:
    """The rotation block of each layer; 0 for none."""
    layers = model.named_modules(remove_duplicate=False)
    return {name: layer.config.rotation_block for name, layer in layers if isinstance(layer, QLinear)}


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish()], ids=str
)
def test_without_a_sample_a_layer_behind_an_activation_stays_plain(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(64, 32), activation, nn.Dropout(), nn.Linear(32, 16), nn.Linear(16, 8))
    assert blocks(quantize_dynamic(model, rotation="auto")) == {"0": 64, "3": 0, "4": 16}
    assert blocks(quantize_dynamic(model, rotation="auto", activations="per_tensor"))["3"] == 0


def test_without_a_sample_known_patterns_say_what_is_behind_an_activation() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    found = blocks(quantize_dynamic(layer, rotation="auto"))
    assert (found["linear1"], found["linear2"]) == (64, 0)
    fused = quantize_dynamic(layer.eval(), rotation="auto", fuse=True)
    torch.testing.assert_close(fused(X[None]), layer(X[None]), atol=0.1, rtol=0)


def test_a_sample_decides_by_the_error_of_each_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    auto = quantize_dynamic(model, rotation="auto", sample=OUTLIERS)
    assert blocks(auto) == {"0": 64, "2": 0}
    whole = {
        rotation: dynquant.report(model, quantize_dynamic(model, rotation=rotation), OUTLIERS).model.sqnr_db
        for rotation in (None, "hadamard")
    }
    assert dynquant.report(model, auto, OUTLIERS).model.sqnr_db > max(filter(None, whole.values()))


def test_a_sample_decides_against_what_the_model_looks_like() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(64, 8))
    assert blocks(quantize_dynamic(model, rotation="auto")) == {"1": 0}
    assert blocks(quantize_dynamic(model, rotation="auto", sample=OUTLIERS.abs())) == {"1": 64}


def test_layers_that_read_one_tensor_have_one_rotation() -> None:
    torch.manual_seed(0)
    model = Scores()
    with torch.no_grad():
        model.q.weight[:, 5] = 0  # the outlier's channel: all error of a plain layer comes from its scale
    dynquant.register_pattern(Scores, dynquant.patterns.SharedInput(("q", "k")))
    found = blocks(quantize_dynamic(model, rotation="auto", sample=OUTLIERS, fuse=True))
    assert found["q"] == found["k"] == 64


def test_a_layer_that_the_sample_does_not_reach() -> None:
    model = nn.ModuleDict({"used": nn.Linear(64, 8), "unused": nn.Linear(64, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    assert blocks(quantize_dynamic(model, rotation="auto", sample=X.relu())) == {"used": 0, "unused": 64}


@pytest.mark.parametrize("options", [{"report": True}, {"min_sqnr": 3.0}, {"inplace": True}], ids=str)
def test_other_options_see_the_chosen_rotation(options: dict[str, Any], quick_measuring: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    result = quantize_dynamic(model, rotation="auto", sample=OUTLIERS, **options)
    quantized = result[0] if isinstance(result, tuple) else result
    assert blocks(quantized) == {"0": 64, "2": 0}
    if isinstance(result, tuple):
        assert [layer.rotation_block for layer in result[1].layers] == [64, 0]


def test_a_config_in_the_spec_keeps_its_own_rotation() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    spec = {nn.Linear: dynquant.Config(rotation_block=16)}
    assert blocks(quantize_dynamic(model, spec, rotation="auto")) == {"0": 16, "2": 16}
    with pytest.raises(
        ValueError, match="the Config of Linear has rotation_signs=False, which only layers from"
    ):
        quantize_dynamic(model, {nn.Linear: dynquant.Config(rotation_block=16, rotation_signs=False)})


def test_a_single_layer_cannot_choose() -> None:
    for make in (
        lambda: QLinear(8, 8, rotation="auto"),
        lambda: QLinear.from_float(nn.Linear(8, 8), rotation="auto"),
    ):
        with pytest.raises(ValueError, match=r"got 'auto', which dynquant\.quantize_dynamic alone takes"):
            make()


def test_the_same_layers_as_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    by_hand = quantize_dynamic(model, {"0": dynquant.Config(rotation_block=64), "2": dynquant.Config()})
    assert_same_bits(quantize_dynamic(model, rotation="auto")(X), by_hand(X))
