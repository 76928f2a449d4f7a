"""The ops of an EncoderLayer, with arguments made of its parts, and whether these have changed since."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from ..config import NORMS
from ..patterns.hugging_face import RMS_NORMS, is_idle_hook
from ..patterns.registry import type_name
from ..patterns.transformer_layers import ATTENTION_IMPLEMENTATIONS, HARMLESS, TransformerLayer
from ..qtensor import QTensor, tensors_of
from ..reference import FLOAT_DTYPES
from .attention import (
    STAYS_FLOAT,
    float_attention,
    is_attention_float,
    report_to_watcher,
    scaled_dot_product_attention,
)
from .fused_activation import FusedActivation
from .linear import QLinear
from .merged import MergedLinear
from .multihead_attention import QMultiheadAttention

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_norm = torch.ops.dynquant.linear_norm.default
_linear_mlp = torch.ops.dynquant.linear_mlp.default
_attention = torch.ops.dynquant.attention.default

Tensors = list[Tensor | None]
SAMPLE_SIZE = 61
_HOLDERS = (nn.ModuleList, nn.MultiheadAttention, QMultiheadAttention)
_IDENTITIES = (nn.Identity, FusedActivation)
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


class Arguments(NamedTuple):
    """Of the ops, without input, residual and mask.

    Attributes:
        qkv, qkv_bias, qkv_config: of linear_dynamic, or of linear_norm with ``norm_in`` for pre-norm layers.
        heads: of query, key and value, as they follow each other in the product's columns.
        scale: of the scores, None for 1 / sqrt(head_size).
        mlp: layer, gate, up, down and configs of linear_mlp.
        norms: first_norm, second_norm, eps, norm and pre_norm of linear_mlp.
        hidden: size of the input's rows.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    qkv_bias: Tensor | None
    qkv_config: int
    norm_in: Tensors
    heads: list[int]
    head_size: int
    scale: float | None
    mlp: tuple[Any, ...]
    norms: tuple[Tensors, Tensors, float, int, bool]
    hidden: int
    device: torch.device
    batch_first: bool


class EncoderCall:
    """One layer's ops, valid while :meth:`is_current`.

    Attributes:
        arguments: None if calls must run the parts, for ``reason``.
        parameters: the layer's.
        biases: of query, key and value, if these are three layers; their values may change in place.
    """

    def __init__(self, pattern: TransformerLayer, layer: nn.Module) -> None:
        self.pattern = pattern
        self.arguments: Arguments | None = None
        self.reason: str | None = None
        self.is_reason_of_device = False
        self.layer_id = id(layer)
        self.has_float_attention = is_attention_float(layer)
        self.parameters: tuple[Tensor, ...] = ()
        self._masks = frozenset(pattern.masks)
        # Written-out attention adds a bool mask to its scores, as 0 and 1.
        config = _part(layer, pattern.config) if pattern.config else None
        self.takes_bool = getattr(config, "_attn_implementation", None) in ("sdpa", "dynquant")
        self._hooks: tuple[Any, ...] = _GLOBAL_HOOKS
        self.biases: tuple[Tensor, ...] = ()
        self._quantized: tuple[Tensor, int, Tensor] | None = None
        self._watch(list(_places(layer, pattern)))

    def _watch(self, places: Sequence[tuple[dict[str, Any], str]]) -> None:
        self._dicts = tuple(place[0] for place in places)
        self._names = tuple(place[1] for place in places)
        self._values = tuple(map(dict.get, self._dicts, self._names))

    def is_current(self) -> bool:
        """Whether all parts are the objects that they were, and a weight that was quantized is as it was."""
        if not all(map(is_, self._values, map(dict.get, self._dicts, self._names))):
            return False
        if self._quantized is None:
            return True
        weight, version, sample = self._quantized
        # Changes through .data leave the version as it is.
        return weight._version == version and torch.equal(_sample(weight), sample)

    def is_watched(self) -> bool:
        """Whether hooks on parts want to see their calls."""
        return any(self._hooks) and not all(
            is_idle_hook(hook) for hooks in self._hooks for hook in hooks.values()
        )

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
        """Input and mask of a call; None for arguments that the ops do not take."""
        pattern, arguments = self.pattern, self.arguments
        assert arguments is not None
        names = pattern.arguments
        if len(args) > len(names):
            return None
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        x = given.pop(names[0], None)
        if type(x) is not Tensor or x.dim() != 3 or x.is_nested or x.device != arguments.device:
            return None
        if x.shape[2] != arguments.hidden or x.dtype not in FLOAT_DTYPES:
            return None
        mask = None
        for name, value in given.items():
            if value is None or value is False or name in HARMLESS:
                continue
            if type(value) is not Tensor or value.device != x.device:
                return None
            if (
                name in self._masks
                and value.dim() == 4
                and (value.is_floating_point() or (value.dtype == torch.bool and self.takes_bool))
            ):
                mask = value if mask is None else _both(mask, value)
            elif name == pattern.key_padding and value.dim() == 2:
                mask = (value if value.is_floating_point() else ~value)[:, None, None, :]
            else:
                return None
        return x, mask

    def run(self, x: Tensor, mask: Tensor | None) -> Any:
        """The layer's output."""
        a = self.arguments
        assert a is not None
        bias = torch.cat(self.biases) if self.biases else a.qkv_bias
        if a.norm_in:
            eps, norm = a.norms[2:4]
            y = _linear_norm(x, [*a.qkv, bias], a.qkv_config, None, a.norm_in, [], eps, norm)
        else:
            y = _linear_dynamic(x, *a.qkv, bias, a.qkv_config)
        y = y.unflatten(2, (-1, a.head_size))
        y = y.transpose(1, 2) if a.batch_first else y.permute(1, 2, 0, 3)
        q, k, v = y.split(a.heads, 1)
        if self.has_float_attention:
            y = float_attention(q, k, v, mask, scale=a.scale)
        else:
            report_to_watcher(self.layer_id, q, k, v, mask, False, a.scale)
            y = attention(q, k, v, mask, a.scale)
        y = (y.transpose(1, 2) if a.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out = _linear_mlp(y, *a.mlp, x, *a.norms)
        return (out,) if self.pattern.returns_tuple else out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """int8 attention where the device has a kernel for it, else torch's."""
    if runs_on("attention", q.device.type):
        return _attention(q, k, v, mask, False, scale)
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)


@cache
def runs_on(op: str, device_type: str) -> bool:
    """Whether an op runs as well on a device as the layers alone: by a kernel, or both by the reference."""
    if device_type == "meta" or not hasattr(torch.ops.dynquant, op):
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and (_has_kernel(op, key) or not _has_kernel("linear_dynamic", key))


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dynquant::{op}", key)


def _both(a: Tensor, b: Tensor) -> Tensor:
    """One mask for two that apply together."""
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        return torch.where(a, b, -torch.inf)
    return torch.where(b, a, -torch.inf) if b.dtype == torch.bool else a + b


# ---- preparation ----


def prepare(layer: nn.Module, pattern: TransformerLayer, base: type[nn.Module]) -> EncoderCall:
    """The ops of a layer.

    Args:
        base: the type whose forward the pattern describes.
    """
    call = EncoderCall(pattern, layer)
    try:
        _fill(call, layer, base)
    except _CannotRun as error:
        call.arguments, call.reason = None, str(error)
    return call


class _CannotRun(Exception):
    """The ops cannot stand for the parts, as a clause."""


def _require(condition: Any, reason: str) -> None:
    if not condition:
        raise _CannotRun(reason)


def _fill(call: EncoderCall, layer: nn.Module, base: type[nn.Module]) -> None:
    pattern = call.pattern
    _check_forward(base, pattern)
    _check_parts(layer, base, pattern)
    described: Any = base
    for name in _methods(described):
        _require(name not in vars(layer), f"its {name} was replaced")
    for name in pattern.unless:
        _require(not _part(layer, name), f"{name} is set")
    if pattern.config:
        used = getattr(_part(layer, pattern.config), "_attn_implementation", None)
        _require(used in ATTENTION_IMPLEMENTATIONS, f"its attention implementation is {used!r}")
    heads = _part(layer, pattern.heads)
    _require(type(heads) is int and heads > 0, f"{pattern.heads} is {heads!r}")

    out, up, down = (_layer(layer, name) for name in (pattern.out, pattern.up, pattern.down))
    gate = _layer(layer, pattern.gate) if pattern.gate else None
    qkv, qkv_bias, widths, qkv_config = _projections(layer, pattern, up, call)
    _require(widths[0] % heads == 0, f"{heads} heads do not divide {widths[0]} channels")
    head_size = widths[0] // heads
    _require(
        widths[1] == widths[2] and widths[1] % head_size == 0, "key and value have other heads than query"
    )
    pre_norm = (
        pattern.pre_norm if isinstance(pattern.pre_norm, bool) else bool(_part(layer, pattern.pre_norm))
    )
    (first, eps, kind), (second, *other) = (_norm(layer, name) for name in pattern.norms)
    _require(other == [eps, kind], "its norms differ in kind or eps")
    scale = _part(layer, pattern.scale) if pattern.scale else None
    _require(scale is None or type(scale) is float, f"{pattern.scale} is {scale!r}")

    configs = [0 if part is None else part._packed[-1] for part in (out, gate, up, down)]
    device = up.weight.device
    operands = [[] if part is None else _operands(part) for part in (out, gate, up, down)]
    mlp = (*operands, configs)
    norms = (second, [], eps, kind, True) if pre_norm else (first, second, eps, kind, False)
    call.arguments = Arguments(
        qkv=qkv,
        qkv_bias=qkv_bias,
        qkv_config=qkv_config,
        norm_in=first if pre_norm else [],
        heads=[width // head_size for width in widths],
        head_size=head_size,
        scale=scale,
        mlp=mlp,
        norms=norms,
        hidden=up.in_features,
        device=device,
        batch_first=not pattern.batch_first or bool(_part(layer, pattern.batch_first)),
    )
    tensors = [
        *qkv,
        qkv_bias,
        *call.biases,
        *first,
        *second,
        *(tensor for part in operands for tensor in part),
    ]
    devices = {tensor.device for tensor in tensors if tensor is not None}
    _require(devices == {device}, "its parts are on several devices")
    call.parameters = tuple(parameter for parameter in layer.parameters())
    call._hooks = (*_GLOBAL_HOOKS, *(hooks for part in _inside(layer) for hooks in _hooks_of(part)))
    call.is_reason_of_device = True
    needed = ["linear_mlp", "linear_norm"] if pre_norm else ["linear_mlp"]
    missing = [op for op in needed if not runs_on(op, device.type)]
    _require(not missing, f"{device.type} has no kernel of {', '.join(missing)}")


@cache
def _methods(base: Any) -> tuple[str, ...]:
    """The functions that a type defines beside forward; an instance may have its own in their place."""
    functions = [name for name, value in vars(base).items() if inspect.isfunction(value)]
    return tuple(name for name in functions if name != "forward")


@cache
def _parameters_of(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in found if parameter.kind in kinds)[1:]


def _check_forward(base: Any, pattern: TransformerLayer) -> None:
    names = _parameters_of(base.forward)
    _require(names == pattern.arguments, f"its forward takes {', '.join(names)}")


def _check_parts(layer: nn.Module, base: type[nn.Module], pattern: TransformerLayer) -> None:
    """Every part has a role, or holds parts that have, or does nothing in eval mode."""
    roles = {*pattern.linear_layers, *pattern.norms, pattern.activation}
    holders = {name.rpartition(".")[0] for name in roles}
    holders |= {holder[:i] for holder in holders for i, letter in enumerate(holder) if letter == "."}
    activation = _part(layer, pattern.activation)
    _require(type(activation) in _IDENTITIES, f"{pattern.activation} is no epilogue of the layer before it")
    for name, part in layer.named_modules():
        _require("forward" not in vars(part) or part is layer, f"{name}.forward was replaced")
        if not name or name in roles or type(part) in _IDENTITIES:
            continue
        if type(part) is nn.Dropout:
            _require(not part.training, f"{name} is in training mode")
            continue
        ours = type(part).__module__ == base.__module__ or type(part) in _HOLDERS
        _require(name in holders and ours, f"{name or 'the layer'} is a {type_name(part)}")
        _require(not part.training, f"{name} is in training mode")


def _layer(layer: nn.Module, name: str) -> QLinear:
    """A part that linear_mlp can take."""
    part: QLinear = _part(layer, name)
    _require(type(part) in (QLinear, MergedLinear), f"{name} is a {type(part).__name__}")
    _require(not part.is_static, f"{name} is static")
    _require(part.config.activations == "per_token", f"{name} is quantized per_tensor")
    return part


def _operands(layer: QLinear) -> Tensors:
    return [*layer._packed[:3], layer._parameters["bias"]]


def _norm(layer: nn.Module, name: str) -> tuple[Tensors, float, int]:
    """Weight and bias, eps, and the index of the kind of a norm over rows."""
    norm = _part(layer, name)
    parameters = getattr(norm, "_parameters", {})
    eps: Any
    if type(norm) is nn.LayerNorm:
        kind, eps = "layer_norm", norm.eps
        _require(len(norm.normalized_shape) == 1, f"{name} is over {len(norm.normalized_shape)} dimensions")
    elif type(norm) is nn.RMSNorm:
        kind, eps = "rms_norm", norm.eps
    else:
        attribute = RMS_NORMS.get(type_name(norm))
        _require(attribute is not None, f"{name} is a {type(norm).__name__}")
        kind, eps = "rms_norm", getattr(norm, str(attribute), None)
    _require(isinstance(eps, float), f"{name} has eps {eps!r}")
    tensors = [parameters.get("weight"), parameters.get("bias")]
    return tensors, eps, NORMS.index(kind)


def _projections(
    layer: nn.Module, pattern: TransformerLayer, up: QLinear, call: EncoderCall
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, list[int], int]:
    """Operands of query, key and value in one product, their widths, its config."""
    if pattern.in_proj:
        return _projections_of_torch(layer, pattern, up, call)
    parts = [_layer(layer, name) for name in (pattern.query, pattern.key, pattern.value)]
    groups = {id(part.group): part.group for part in parts if isinstance(part, MergedLinear)}
    group = next(iter(groups.values()), None)
    is_whole = len(groups) == 1 and group is not None and group.layers == parts and group.merged is not None
    _require(is_whole, "query, key and value are not merged")
    assert group is not None
    assert group.merged is not None
    merged = group.merged
    biases = [part._parameters["bias"] for part in parts]
    call.biases = tuple(bias for bias in biases if bias is not None)
    _require(len(call.biases) in (0, 3), "some of query, key and value have a bias and some have none")
    return merged[:3], None, [part.out_features for part in parts], merged.config


def _projections_of_torch(
    layer: nn.Module, pattern: TransformerLayer, up: QLinear, call: EncoderCall
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, list[int], int]:
    """Of a QMultiheadAttention; or of an nn.MultiheadAttention, whose float in_proj is quantized in the
    scheme of ``up``."""
    part = _part(layer, pattern.in_proj)
    own = part.in_proj_weight
    if type(part) is QMultiheadAttention and own is not None:
        _require(own.config.activations == "per_token", f"{pattern.in_proj} is quantized per_tensor")
        code = own.config.encode(part.embed_dim)
        return tensors_of(own), part.in_proj_bias, [part.embed_dim] * 3, code
    _require(type(part) is nn.MultiheadAttention, f"{pattern.in_proj} is a {type(part).__name__}")
    weight, bias = part.in_proj_weight, part.in_proj_bias
    _require(weight is not None, "key or value have sizes of their own")
    _require(
        not weight.is_inference(), "a parameter was made in inference mode, where changes leave no trace"
    )
    config = replace(up.config, epilogue="none")
    with torch.inference_mode(False), torch.no_grad():
        call._quantized = weight, weight._version, _sample(weight).clone()
        quantized = QTensor.quantize(weight, config)
    return tensors_of(quantized), bias, [up.in_features] * 3, config.encode(up.in_features)


def _sample(weight: Tensor) -> Tensor:
    """A few of a weight's values, from all over it."""
    values = weight.detach().flatten()
    return values[:: max(1, values.numel() // SAMPLE_SIZE)]


def _part(layer: Any, name: str) -> Any:
    """A part or an attribute by its dotted name; None if there is none."""
    for step in name.split("."):
        layer = getattr(layer, step, None)
    return layer


def _inside(layer: nn.Module) -> list[nn.Module]:
    return [part for part in layer.modules() if part is not layer]


def _hooks_of(part: nn.Module) -> tuple[Any, Any]:
    return part._forward_hooks, part._forward_pre_hooks


def _places(layer: nn.Module, pattern: TransformerLayer) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the objects are kept whose replacement changes what the layer computes."""
    own: Any = getattr(layer, "_base", type(layer))
    for name in (*_methods(own), STAYS_FLOAT):
        yield vars(layer), name
    for module in layer.modules():
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
        for name in ("eps", "variance_epsilon"):
            if name in state:
                yield state, name
        for name in module._parameters:
            yield module._parameters, name
    for name in (*pattern.unless, pattern.heads, pattern.scale, pattern.config, pattern.batch_first):
        path, _, last = name.rpartition(".")
        owner = _part(layer, path) if path else layer
        if last and owner is not None and hasattr(owner, "__dict__"):
            yield vars(owner), last
    config = _part(layer, pattern.config) if pattern.config else None
    if config is not None:
        yield vars(config), "_attn_implementation_internal"
