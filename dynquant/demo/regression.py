"""The seed example: a two-layer regression net, trained, quantized, and compared with float and torch.ao."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dynquant

COEFFICIENTS = (1.1, 2.2, 3.3)
TRAINING_ROWS, TEST_ROWS = 12_000, 1_000


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer before and after quantization, by torch.ao and by dynquant."""

    name: str
    weight: Tensor  # fp32 [N, K], before
    torch_ao_int8: Tensor  # int8 [N, K]
    torch_ao_scale: float  # of the whole weight
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
    """3 -> 3 -> 1 with ReLU and without biases, Adam, targets x @ COEFFICIENTS.

    Returns:
        The net and the test rows: x fp32 [TEST_ROWS, 3], y fp32 [TEST_ROWS, 1].
    """
    torch.manual_seed(seed)
    # The weights are drawn before the rows: this order gives the weights that the notebook prints.
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    x, test_x = torch.randn(TRAINING_ROWS, 3), torch.randn(TEST_ROWS, 3)
    coefficients = torch.tensor(COEFFICIENTS)[:, None]
    y, test_y = x @ coefficients, test_x @ coefficients
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), test_x, test_y


def run(seed: int = 123) -> Regression:
    """Train, quantize, and measure the loss of float, torch.ao and dynquant (per_token and per_tensor)."""
    model, x, y = train(seed)
    quantized, torch_ao = dynquant.quantize_dynamic(model), quantize_with_torch_ao(model)
    versions = {
        "float": model,
        "torch.ao": torch_ao,
        "dynquant per_tensor": dynquant.quantize_dynamic(model, activations="per_tensor"),
        "dynquant per_token": quantized,
    }
    with torch.inference_mode():
        losses = {name: nn.functional.mse_loss(net(x), y).item() for name, net in versions.items()}
        hidden = model[1](model[0](x))
    layers = (
        _compare(name, layer_input, model, torch_ao, quantized)
        for name, layer_input in (("0", x), ("2", hidden))
    )
    return Regression(tuple(layers), losses)


def _compare(
    name: str, layer_input: Tensor, model: nn.Module, torch_ao: nn.Module, quantized: nn.Module
) -> QuantizedLayer:
    reference = dynquant.reference
    scale, zero_point = reference.choose_qparams(*reference.min_max(layer_input[:1], per_token=True))
    layer = quantized.get_submodule(name)
    assert isinstance(layer, dynquant.QLinear)
    other = torch_ao.get_submodule(name).weight()  # type: ignore[operator]
    return QuantizedLayer(
        name=name,
        weight=model.get_submodule(name).get_parameter("weight").detach(),
        torch_ao_int8=other.int_repr(),
        torch_ao_scale=other.q_scale(),
        weight_int8=layer.weight.int_repr(),
        weight_scale=layer.weight_scale,
        input_scale=scale.item(),
        input_zero_point=int(zero_point.item()),
    )
