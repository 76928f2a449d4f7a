"""The table of activation functions: each with its epilogue and the forms in which models call it.

A new activation: a row here; its formula in :mod:`dynquant.reference.epilogue` and
csrc/kernels/epilogue_math.h; its name at the end of DYNQUANT_ACTIVATIONS in csrc/kernels/config.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import type_name

_aten = torch.ops.aten


class Activation(NamedTuple):
    """One activation function, under the name of its epilogue.

    Attributes:
        function: torch's float function.
        backward: the gradient of y from that of function(y), in ops that have derivatives themselves.
        modules: types of torch.nn that compute it.
        type_names: dotted names of such types in packages that are not imported here.
        functions: functions that a module may hold as its activation.
        targets: of nodes in a torch.fx graph. In-place forms count: nothing else reads their input.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    modules: tuple[type[nn.Module], ...] = ()
    type_names: tuple[str, ...] = ()
    functions: tuple[Any, ...] = ()
    targets: tuple[Any, ...] = ()


def _transformers(*names: str) -> tuple[str, ...]:
    return tuple(f"transformers.activations.{name}" for name in names)


def _quick_gelu(y: Tensor) -> Tensor:
    return y * torch.sigmoid(1.702 * y)


def _of_gate(slope: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The backward of y * sigmoid(slope * y); torch's silu_backward has no derivative."""

    def backward(grad: Tensor, y: Tensor) -> Tensor:
        gate = torch.sigmoid(slope * y)
        return grad * gate * (1 + slope * y * (1 - gate))

    return backward


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        F.relu,
        lambda grad, y: grad * (y > 0),
        modules=(nn.ReLU,),
        functions=(F.relu, torch.relu),
        targets=(
            F.relu,
            F.relu_,
            torch.relu,
            torch.relu_,
            "relu",
            "relu_",
            _aten.relu.default,
            _aten.relu_.default,
        ),
    ),
    # nn.GELU and gelu in a graph may be gelu_tanh as well: their argument ``approximate`` says so.
    "gelu": Activation(
        F.gelu,
        lambda grad, y: _aten.gelu_backward(grad, y, approximate="none"),
        type_names=_transformers("GELUActivation"),
        functions=(F.gelu,),
        targets=(F.gelu, _aten.gelu.default, _aten.gelu_.default),
    ),
    "gelu_tanh": Activation(
        lambda y: F.gelu(y, approximate="tanh"),
        lambda grad, y: _aten.gelu_backward(grad, y, approximate="tanh"),
        type_names=_transformers("NewGELUActivation", "FastGELUActivation", "PytorchGELUTanh", "GELUTanh"),
    ),
    "silu": Activation(
        F.silu,
        _of_gate(1.0),
        modules=(nn.SiLU,),
        type_names=_transformers("SiLUActivation"),
        functions=(F.silu,),
        targets=(F.silu, torch._C._nn.silu, _aten.silu.default, _aten.silu_.default),
    ),
    "quick_gelu": Activation(
        _quick_gelu,
        _of_gate(1.702),
        type_names=(
            *_transformers("QuickGELUActivation"),
            "clip.model.QuickGELU",
            "open_clip.transformer.QuickGELU",
        ),
    ),
}
"""In the order of their codes in files, 1 first: add at the end."""

EPILOGUE_OF_GATE_FACTOR = {1.0: "silu", 1.702: "quick_gelu"}
"""Epilogue of y * sigmoid(factor * y), the form in which graphs contain it."""

GELU_OF_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}
"""Epilogue by the argument ``approximate`` of torch's gelu."""

EPILOGUE_OF_TARGET: dict[Any, str] = {
    target: epilogue for epilogue, entry in ACTIVATIONS.items() for target in entry.targets
}
"""Epilogue by the target of a node in a torch.fx graph."""

_MODULES = {module: epilogue for epilogue, entry in ACTIVATIONS.items() for module in entry.modules}
_TYPE_NAMES = {name: epilogue for epilogue, entry in ACTIVATIONS.items() for name in entry.type_names}
_FUNCTIONS = [(function, epilogue) for epilogue, entry in ACTIVATIONS.items() for function in entry.functions]


def epilogue_of(activation: Any) -> str | None:
    """The epilogue that computes an activation module or function, None if there is none."""
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if type(activation) in _MODULES:
        return _MODULES[type(activation)]
    if isinstance(activation, nn.Module):
        return _TYPE_NAMES.get(type_name(activation))
    return next((epilogue for function, epilogue in _FUNCTIONS if function is activation), None)


def remove_activation(parent: nn.Module, name: str) -> None:
    """Put nn.Identity in the place of an activation that the layer before it computes."""
    setattr(parent, name, nn.Identity())
    if isinstance(getattr(parent, "activation_relu_or_gelu", None), int):
        # The activation that the float kernel of nn.TransformerEncoderLayer would apply.
        setattr(parent, "activation_relu_or_gelu", 0)  # noqa: B010


def apply_float(epilogue: str, y: Tensor) -> Tensor:
    """torch's float function of an epilogue's name; y itself for ``"none"``."""
    return y if epilogue == "none" else ACTIVATIONS[epilogue].function(y)
