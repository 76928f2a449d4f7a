"""What the ops of a whole block share: arguments made of its parts, and whether these have changed since."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from .._extension import extension
from ..config import NORMS, recode
from ..patterns.activations import epilogue_of
from ..patterns.hugging_face import OFFSET_RMS_NORMS, RMS_NORMS, is_idle_hook
from ..patterns.registry import type_name
from ..reference.layout import panel_width
from .fused_activation import FusedActivation
from .linear import QLinear
from .merged import MergedLinear
from .multihead_attention import QMultiheadAttention

Tensors = list[Tensor | None]
Place = tuple[dict[str, Any], str]
_HOLDERS = (nn.ModuleList, nn.MultiheadAttention, QMultiheadAttention)
IDENTITIES = (nn.Identity, FusedActivation)
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


def _are_in_place(values: tuple[Any, ...], dicts: tuple[dict[str, Any], ...], names: tuple[str, ...]) -> bool:
    """Whether dicts[i].get(names[i]) is values[i] for all i."""
    return all(map(is_, values, map(dict.get, dicts, names)))


are_in_place = _are_in_place if extension is None else extension.are_in_place


class BlockCall:
    """One block's ops, valid while :meth:`is_current`.

    Attributes:
        arguments: of the ops, without the tensors of a call; None if calls must run the parts, for
            ``reason``.
        parameters: the block's.
    """

    def __init__(self) -> None:
        self.arguments: Any = None
        self.reason: str | None = None
        self.is_reason_of_device = False
        self.parameters: tuple[Tensor, ...] = ()
        self._hooks: tuple[Any, ...] = _GLOBAL_HOOKS

    def watch(self, places: Iterable[Place]) -> None:
        """Take down what is at these places now."""
        found = list(places)
        self._dicts = tuple(place[0] for place in found)
        self._names = tuple(place[1] for place in found)
        self._values = tuple(map(dict.get, self._dicts, self._names))

    def watch_hooks(self, parts: Iterable[nn.Module]) -> None:
        hooks = (hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks))
        self._hooks = (*_GLOBAL_HOOKS, *hooks)

    def is_current(self) -> bool:
        """Whether all parts are the objects that they were."""
        return are_in_place(self._values, self._dicts, self._names)

    def is_watched(self) -> bool:
        """Whether hooks on parts want to see their calls."""
        return any(self._hooks) and not all(
            is_idle_hook(hook) for hooks in self._hooks for hook in hooks.values()
        )

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What :meth:`run` takes, of the arguments of a call; None for arguments that the ops do not take."""
        raise NotImplementedError

    def run(self, *inputs: Any) -> Any:
        """The block's output."""
        raise NotImplementedError

    def needs_gradient(self, inputs: tuple[Any, ...]) -> bool:
        """Whether autograd is to see the call."""
        if not torch.is_grad_enabled():
            return False
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        return any(tensor.requires_grad for tensor in (*tensors, *self.parameters))


class CannotRun(Exception):
    """The ops cannot stand for the parts, as a clause."""


def require(condition: Any, reason: str) -> None:
    if not condition:
        raise CannotRun(reason)


@cache
def runs_on(op: str, device_type: str) -> bool:
    """Whether an op runs as well on a device as the layers alone: by a kernel, or both by the reference."""
    if device_type == "meta" or not hasattr(torch.ops.dynquant, op):
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and (_has_kernel(op, key) or not _has_kernel("linear_dynamic", key))


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dynquant::{op}", key)


def require_kernels(call: BlockCall, needed: Iterable[str], device: torch.device) -> None:
    """The last requirement on a block: a device without the ops is no reason to leave it as it is."""
    call.is_reason_of_device = True
    missing = [op for op in needed if not runs_on(op, device.type)]
    require(not missing, f"{device.type} has no kernel of {', '.join(missing)}")


def require_one_device(tensors: Iterable[Tensor | None], device: torch.device) -> None:
    devices = {tensor.device for tensor in tensors if tensor is not None}
    require(devices == {device}, "its parts are on several devices")


# ---- the parts ----


def part_of(layer: Any, name: str) -> Any:
    """A part or an attribute by its dotted name; None if there is none."""
    for step in name.split("."):
        layer = getattr(layer, step, None)
    return layer


@cache
def methods_of(base: Any) -> tuple[str, ...]:
    """The functions that a type defines beside forward; an instance may have its own in their place."""
    functions = [name for name, value in vars(base).items() if inspect.isfunction(value)]
    return tuple(name for name in functions if name != "forward")


@cache
def _parameters_of(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in found if parameter.kind in kinds)[1:]


def check_forward(layer: nn.Module, base: Any, arguments: tuple[str, ...]) -> None:
    """The forward of ``base`` has the arguments of a pattern, and no method of the layer was replaced."""
    names = _parameters_of(base.forward)
    require(names == arguments, f"its forward takes {', '.join(names)}")
    for name in methods_of(base):
        require(name not in vars(layer), f"its {name} was replaced")


def check_parts(
    layer: nn.Module, base: type[nn.Module], roles: set[str], called: Collection[int] = ()
) -> None:
    """Every part has a role, or holds parts that have, or does nothing in eval mode.

    Args:
        roles: dotted names.
        called: ids of parts that are called as modules, whatever they are.
    """
    holders = {name.rpartition(".")[0] for name in roles}
    holders |= {holder[:i] for holder in holders for i, letter in enumerate(holder) if letter == "."}
    for name, part in layer.named_modules():
        if id(part) in called:
            continue
        require("forward" not in vars(part) or part is layer, f"{name}.forward was replaced")
        if not name or name in roles or type(part) in IDENTITIES:
            continue
        if type(part) is nn.Dropout:
            require(not part.training, f"{name} is in training mode")
            continue
        ours = type(part).__module__ == base.__module__ or type(part) in _HOLDERS
        require(name in holders and ours, f"{name} is a {type_name(part)}")
        require(not part.training, f"{name} is in training mode")


def places_of(layer: nn.Module, called: Collection[int] = ()) -> Iterator[Place]:
    """Where the objects are kept whose replacement changes what a layer computes.

    Args:
        called: ids of parts that are called as modules: what is in them does not matter.
    """
    own: Any = getattr(layer, "_base", type(layer))
    for name in methods_of(own):
        yield vars(layer), name
    for module in layer.modules():
        if id(module) in called:
            continue
        state = vars(module)
        for name, child in module._modules.items():
            if child is not None:
                yield module._modules, name
        if module is not layer:
            yield state, "forward"
        if isinstance(module, QLinear):
            yield state, "_packed"
        elif isinstance(module, QMultiheadAttention):
            yield state, "_prepared"
        elif type(module) is nn.Dropout or (module._modules and module is not layer):
            yield state, "training"
        if isinstance(module, MergedLinear):
            yield vars(module.group), "merged"
        for name in ("eps", "variance_epsilon", "approximate"):
            if name in state:
                yield state, name
        for name in module._parameters:
            yield module._parameters, name


# ---- operands ----


def layer_of(layer: nn.Module, name: str) -> QLinear:
    """A part that the ops can take in."""
    part: QLinear = part_of(layer, name)
    require(type(part) in (QLinear, MergedLinear), f"{name} is a {type(part).__name__}")
    require(not part.is_static, f"{name} is static")
    require(part.config.activations == "per_token", f"{name} is quantized per_tensor")
    return part


class Operands:
    """Gate (empty if there is none), up and down of an MLP as the ops take them, with their configs.

    Attributes:
        hidden: size of the input's rows.
    """

    def __init__(self, layer: nn.Module, pattern: Any) -> None:
        activation, down = part_of(layer, pattern.activation), layer_of(layer, pattern.down)
        if pattern.gate_up:
            both = layer_of(layer, pattern.gate_up)
            epilogue = epilogue_of(activation)
            require(epilogue is not None, f"{pattern.activation} is no epilogue")
            require(both.config.epilogue == "none", f"{pattern.gate_up} has an epilogue of its own")
            self.gate, self.up = _halves(both, pattern.gate_up)
            up_code: int = both._packed[-1]
            self.codes = [recode(up_code, epilogue=epilogue), up_code, down._packed[-1]]
            self.hidden, self.device = both.in_features, both.weight.device
        else:
            require(
                type(activation) in IDENTITIES, f"{pattern.activation} is no epilogue of the layer before it"
            )
            gate = layer_of(layer, pattern.gate) if pattern.gate else None
            up = layer_of(layer, pattern.up)
            if gate is not None:  # they read the same quantized rows
                same = _rotation(gate) == _rotation(up)
                require(same, f"{pattern.gate} and {pattern.up} have different rotations")
            self.gate = [] if gate is None else operands_of(gate)
            self.up = operands_of(up)
            self.codes = [0 if gate is None else gate._packed[-1], up._packed[-1], down._packed[-1]]
            self.hidden, self.device = up.in_features, up.weight.device
        self.down = operands_of(down)

    @property
    def tensors(self) -> Tensors:
        return [*self.gate, *self.up, *self.down]


def _rotation(layer: QLinear) -> tuple[int, bool]:
    return layer.config.rotation_block, layer.config.rotation_signs


def operands_of(layer: QLinear) -> Tensors:
    return [*layer._packed[:3], layer._parameters["bias"]]


def _halves(layer: QLinear, name: str) -> tuple[Tensors, Tensors]:
    """The first and the second half of a layer's channels, as views of its operands."""
    n, odd = divmod(layer.out_features, 2)
    weight, *others = operands_of(layer)
    assert weight is not None
    in_panels = weight.dim() == 4
    rows = n
    if in_panels:
        width = weight.shape[2]
        rows = n // width
        require(
            n % width == 0 and panel_width(n) == width,
            f"a half of the {layer.out_features} channels of {name} does not end with a panel of {width}",
        )
    require(not odd and n > 0, f"{name} has {layer.out_features} channels")
    bounds = ((0, n, rows, 0), (n, 2 * n, 2 * rows, rows))
    first, second = (
        [weight[begin:end], *(None if each is None else each.detach()[start:stop] for each in others)]
        for start, stop, end, begin in bounds
    )
    return first, second


class NormOperands:
    """A norm over rows.

    Attributes:
        tensors: weight and bias.
        kind: index into ``dynquant.config.NORMS``.
        has_offset: whether the rows are multiplied by 1 + weight.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        norm = part_of(layer, name)
        parameters = getattr(norm, "_parameters", {})
        eps: Any
        self.has_offset = type_name(norm) in OFFSET_RMS_NORMS
        if type(norm) is nn.LayerNorm:
            kind, eps = "layer_norm", norm.eps
            require(
                len(norm.normalized_shape) == 1, f"{name} is over {len(norm.normalized_shape)} dimensions"
            )
        elif type(norm) is nn.RMSNorm:
            kind, eps = "rms_norm", norm.eps
        else:
            attribute = (RMS_NORMS | OFFSET_RMS_NORMS).get(type_name(norm))
            require(attribute is not None, f"{name} is a {type(norm).__name__}")
            kind, eps = "rms_norm", getattr(norm, str(attribute), None)
        require(isinstance(eps, float), f"{name} has eps {eps!r}")
        self.tensors: Tensors = [parameters.get("weight"), parameters.get("bias")]
        self.eps: float = eps
        self.kind = NORMS.index(kind)
