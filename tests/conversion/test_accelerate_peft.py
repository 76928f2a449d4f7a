"""Converted models in accelerate and peft; without these packages, in what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear
from tests.support.same_bits import assert_same_bits

SCHEMES = [{}, {"activations": "per_tensor", "weights": "per_tensor"}, {"rotation": "hadamard"}]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def sample() -> Tensor:
    return torch.randn(3, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_accelerate_loads_a_saved_model(scheme: dict[str, object], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = dynquant.quantize_dynamic(Net(), **scheme)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for strict in (False, True):
        fresh = dynquant.quantize_dynamic(Net(1), **scheme)
        accelerate.load_checkpoint_in_model(fresh, tmp_path, strict=strict)
        assert_same_bits(fresh(sample()).detach(), model(sample()).detach())


def test_accelerate_loads_no_integers_into_a_float_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    state = dynquant.quantize_dynamic(Net()).state_dict()
    safetensors.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|shape"):
            accelerate.load_checkpoint_in_model(Net(), tmp_path, **options)


def test_accelerate_sees_the_size_of_a_model() -> None:
    modeling = pytest.importorskip("accelerate.utils.modeling", reason="accelerate is not installed")
    sizes = modeling.compute_module_sizes(dynquant.quantize_dynamic(Net()))
    assert 512 * 256 <= sizes["up"] <= 1.1 * 512 * 256
    assert sizes[""] == sizes["up"] + sizes["down"]
    assert sizes[""] < modeling.compute_module_sizes(Net())[""] / 3


class Adapted(nn.Module):
    """peft's LoRA layer in a few lines: the base layer, frozen, plus two small float ones."""

    def __init__(self, base_layer: QLinear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        n, k = base_layer.weight.shape
        self.lora_A, self.lora_B = nn.Linear(k, 4, bias=False), nn.Linear(4, n, bias=False)
        for part in (self.lora_A, self.lora_B):
            part.to(base_layer.weight.device, base_layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _adapted(model: nn.Module) -> nn.Module:
    model.up, model.down = Adapted(model.up), Adapted(model.down)
    return model


def _by_peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed: the stand-in alone is tested")
    config = peft.LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False)
    config._register_custom_module({QLinear: peft.tuners.lora.Linear})
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("adapt", [_adapted, _by_peft], ids=["stand-in", "peft"])
def test_adapters_on_a_converted_model_learn(adapt, scheme: dict[str, object]) -> None:
    model = adapt(dynquant.quantize_dynamic(Net(), **scheme))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    weights = [layer.weight.int_repr() for layer in model.modules() if isinstance(layer, QLinear)]
    assert len(weights) == 2
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(sample()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    after = [layer.weight.int_repr() for layer in model.modules() if isinstance(layer, QLinear)]
    for before, now in zip(weights, after, strict=True):
        assert_same_bits(before, now)


def test_peft_cannot_merge_adapters_into_int8() -> None:
    """Rounding would lose most of an adapter; the weight says that it is read-only."""
    model = _by_peft(dynquant.quantize_dynamic(Net()))
    with pytest.raises(RuntimeError, match="read-only; assign a float tensor"):
        model.merge_adapter()
