"""LayerNorm and RMSNorm in a torch.fx graph, by torch's functions or written out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from ..config import NORMS
from .nodes import value_at

_aten = torch.ops.aten
_LAYER_NORM, _RMS_NORM = NORMS.index("layer_norm"), NORMS.index("rms_norm")
_MULTIPLICATIONS = (operator.mul, torch.mul, _aten.mul.Tensor, "mul")
_ADDITIONS = (operator.add, torch.add, _aten.add.Tensor, "add")
_POWERS = (operator.pow, torch.pow, _aten.pow.Tensor_Scalar, "pow", "__pow__")
_MEANS = (torch.mean, _aten.mean.dim, "mean")
_ROOTS = (torch.rsqrt, _aten.rsqrt.default, "rsqrt")
_CASTS = ("to", "float", "type_as", _aten.to.dtype, _aten._to_copy.default)


class Norm(NamedTuple):
    """A norm over the last dimension.

    Attributes:
        parameters: weight and bias.
        kind: index into ``dynquant.config.NORMS``.
    """

    x: fx.Node
    parameters: list[fx.Node | None]
    eps: float
    kind: int


def norm_of(node: Any) -> Norm | None:
    """The norm whose output a node is."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function":
        if node.target in (F.layer_norm, torch.layer_norm, _aten.layer_norm.default):
            return _of_function(node, _LAYER_NORM, ("input", "normalized_shape", "weight", "bias", "eps"))
        if node.target in (F.rms_norm, torch.rms_norm, _aten.rms_norm.default):
            return _of_function(node, _RMS_NORM, ("input", "normalized_shape", "weight", "eps"))
    return _written_rms_norm(node)


def _of_function(node: fx.Node, kind: int, names: Sequence[str]) -> Norm | None:
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, eps = given["input"], given.get("eps", 1e-5 if kind == _LAYER_NORM else None)
    if len(given["normalized_shape"]) != 1 or not isinstance(eps, float) or not isinstance(x, fx.Node):
        return None
    return Norm(x, [given.get("weight"), given.get("bias")], eps, kind)


def _written_rms_norm(node: fx.Node) -> Norm | None:
    """weight * (x * rsqrt(mean(x ** 2, -1, keepdim=True) + eps)), in any order of the factors, whose values
    inside have no other reader. Models of transformers write it so."""
    outer = _factors(_through_casts(node, node))
    for weight, inner in _both_orders(outer):
        scaled = _through_casts(inner, _reader(inner))
        for x, root in _both_orders(_factors(scaled)):
            found = _squares(root, scaled)
            if found is None or _source(x) is not _source(found[0]):
                continue
            vector, rows = value_at(weight), value_at(node)
            if vector is None or rows is None or vector.shape != rows.shape[-1:]:
                continue
            return Norm(_source(x), [weight, None], found[1], _RMS_NORM)
    return None


def _squares(root: Any, reader: Any) -> tuple[fx.Node, float] | None:
    """x and eps of rsqrt(mean(x ** 2, -1, keepdim=True) + eps)."""
    if not _is_call(root, _ROOTS, reader):
        return None
    total: Any = root.args[0]
    if not _is_call(total, _ADDITIONS, root) or len(total.args) != 2 or total.kwargs:
        return None
    mean, eps = total.args
    if not _is_call(mean, _MEANS, total) or not isinstance(eps, float):
        return None
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | mean.kwargs
    square, dim = given.pop("input", None), given.pop("dim", None)
    if dim not in (-1, [-1], (-1,)) or given != {"keepdim": True}:
        return None
    if not _is_call(square, _POWERS, mean) or len(square.args) != 2 or square.args[1] not in (2, 2.0):
        return None
    return (square.args[0], eps) if isinstance(square.args[0], fx.Node) else None


def _is_call(node: Any, targets: tuple[Any, ...], reader: Any) -> bool:
    """Whether a node calls one of the targets and nothing but ``reader`` reads it."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return node.target in targets and set(node.users) == {reader}


def _factors(node: Any) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node.target not in _MULTIPLICATIONS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _both_orders(pair: tuple[fx.Node, fx.Node] | None) -> list[tuple[fx.Node, fx.Node]]:
    return [] if pair is None else [pair, pair[::-1]]


def _reader(node: fx.Node) -> Any:
    """The one node that reads a node, None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_idle_cast(node: Any) -> bool:
    """Whether a node is a cast to the dtype that its input has."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    value, before = value_at(node), value_at(node.args[0])
    return (
        value is not None
        and before is not None
        and (value.dtype, value.device, value.shape) == (before.dtype, before.device, before.shape)
    )


def _through_casts(node: Any, reader: Any) -> Any:
    """The node behind casts that do nothing; None if a value on the way has another reader."""
    while isinstance(node, fx.Node) and (reader is node or set(node.users) == {reader}):
        if not _is_idle_cast(node):
            return node
        node, reader = node.args[0], node
    return None


def _source(node: Any) -> Any:
    """The node behind casts that do nothing, whoever else reads it."""
    while _is_idle_cast(node):
        node = node.args[0]
    return node
