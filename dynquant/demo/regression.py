"""The seed example: a two-layer regression net, trained, quantized, and compared with float and torch.ao."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dynquant

COEFFICIENTS = (1.1, 2.2, 3.3)


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer before and after quantization."""

    name: str
    weight: Tensor  # fp32 [N, K], before
    weight_int8: Tensor  # int8 [N, K]
    weight_scale: Tensor  # fp32 [N] or [1]; the weight's zero_point is 0
    input_scale: float  # of the first test row
    input_zero_point: int


@dataclass(frozen=True)
class Regression:
    """The trained net's layers and the mean squared error on the test rows of each version of it."""

    layers: tuple[QuantizedLayer, ...]
    losses: dict[str, float]


def quantize_with_torch_ao(model: nn.Module) -> nn.Module:
    """torch.ao's dynamic quantization of every nn.Linear, without its deprecation notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def train(seed: int = 123, steps: int = 100) -> tuple[nn.Sequential, Tensor, Tensor]:
    """3 -> 3 -> 1 with ReLU, Adam, targets x @ COEFFICIENTS; returns the net and the test rows (x, y)."""
    torch.manual_seed(seed)
    x = torch.randn(1000, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    y = x @ torch.tensor(COEFFICIENTS)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[:800]), y[:800]).backward()
        optimizer.step()
    return model.eval(), x[800:], y[800:]


def run(seed: int = 123) -> Regression:
    """Train, quantize, and measure the loss of float, torch.ao and dynquant (per_token and per_tensor)."""
    model, x, y = train(seed)
    quantized = dynquant.quantize_dynamic(model)
    versions = {
        "float": model,
        "torch.ao": quantize_with_torch_ao(model),
        "dynquant per_tensor": dynquant.quantize_dynamic(model, activations="per_tensor"),
        "dynquant per_token": quantized,
    }
    with torch.inference_mode():
        losses = {name: nn.functional.mse_loss(net(x), y).item() for name, net in versions.items()}
        hidden = model[1](model[0](x))
    layers = []
    for index, layer_input in ((0, x), (2, hidden)):
        scale, zero_point = dynquant.reference.choose_qparams(
            *dynquant.reference.min_max(layer_input[:1], per_token=True)
        )
        layer = quantized.get_submodule(str(index))
        assert isinstance(layer, dynquant.QLinear)
        layers.append(
            QuantizedLayer(
                name=str(index),
                weight=model.get_submodule(str(index)).get_parameter("weight").detach(),
                weight_int8=layer.weight.int_repr(),
                weight_scale=layer.weight_scale,
                input_scale=scale.item(),
                input_zero_point=int(zero_point.item()),
            )
        )
    return Regression(tuple(layers), losses)
