"""Models and checks of models for several test files."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynquant import QLinear
from dynquant.nn.block import Block
from dynquant.reference import epilogue as written
from tests.support.same_bits import assert_same_bits


class CountInt8(TorchDispatchMode):
    """Counts the int8 linear calls inside the context."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.dynquant.linear_dynamic.default
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.block(self.norm(self.fc1(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def converted(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, QLinear)
    ]


def state(model: nn.Module) -> dict[str, object]:
    """All parts of a model that a conversion could have changed."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    tensors = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return {"modules": modules, "tensors": tensors, "attributes": attributes}


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    assert after["modules"] == before["modules"]
    assert after["attributes"] == before["attributes"]
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert_same_bits(after["tensors"][name][1], value)


def in_parts(model: nn.Module) -> nn.Module:
    """The model with the parts of each block called one by one, by the layer's own forward."""
    for layer in list(model.modules()):
        if isinstance(layer, Block):
            layer.restore()
    return model


class Written(nn.Module):
    """An activation by the reference's function in place of torch's."""

    def __init__(self, epilogue: str) -> None:
        super().__init__()
        self.function = getattr(written, epilogue)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.float()).to(x.dtype)
