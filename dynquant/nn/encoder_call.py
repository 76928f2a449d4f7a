"""The ops of an EncoderLayer, with arguments made of its parts, and whether these have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from .block_call import (
    BlockCall,
    CannotRun,
    NormOperands,
    Operands,
    Place,
    Tensors,
    check_forward,
    check_parts,
    layer_of,
    operands_of,
    part_of,
    places_of,
    require,
    require_kernels,
    require_one_device,
    runs_on,
)
from .merged import MergedLinear
from .multihead_attention import QMultiheadAttention

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_norm = torch.ops.dynquant.linear_norm.default
_linear_mlp = torch.ops.dynquant.linear_mlp.default
_attention = torch.ops.dynquant.attention.default

SAMPLE_SIZE = 61


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


class Inputs(NamedTuple):
    """Of a call.

    Attributes:
        x: [B, S, hidden], or [S, B, hidden].
        mask: of the scores, or None.
        position_bias: what is added to the scores besides, or None.
        rotary: cosines and sines, [B or 1, S, head_size], or None.
    """

    x: Tensor
    mask: Tensor | None
    position_bias: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class EncoderCall(BlockCall):
    """One layer's ops.

    Attributes:
        biases: of query, key and value, if these are three layers; their values may change in place.
    """

    def __init__(self, pattern: TransformerLayer, layer: nn.Module) -> None:
        super().__init__()
        self.pattern = pattern
        self.layer_id = id(layer)
        self.has_float_attention = is_attention_float(layer)
        self._masks = frozenset(pattern.masks)
        # Written-out attention adds a bool mask to its scores, as 0 and 1.
        config = part_of(layer, pattern.config) if pattern.config else None
        self.takes_bool = getattr(config, "_attn_implementation", None) in ("sdpa", "dynquant")
        self.biases: tuple[Tensor, ...] = ()
        self._quantized: tuple[Tensor, int, Tensor] | None = None
        self._biased = part_of(layer, pattern.position_bias) if pattern.position_bias else None
        self.watch(_places(layer, pattern))

    def is_current(self) -> bool:
        """Besides, a weight that was quantized is as it was."""
        if not super().is_current():
            return False
        if self._quantized is None:
            return True
        weight, version, sample = self._quantized
        # Changes through .data leave the version as it is.
        return weight._version == version and torch.equal(_sample(weight), sample)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        pattern, arguments = self.pattern, self.arguments
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
        if pattern.clamps_fp16 and x.dtype == torch.float16:
            return None
        rotary = None
        if pattern.rotary:
            rotary = given.pop(pattern.rotary, None)
            if not _is_rotary(rotary, x, arguments.head_size):
                return None
        mask = bias = None
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
            elif self._biased is not None and name == "position_bias" and value.dim() == 4:
                bias = value
            else:
                return None
        if self._biased is not None and bias is None:
            if not self._biased.has_relative_attention_bias:
                return None
            bias = self._biased.compute_bias(x.shape[1], x.shape[1], device=x.device)
        return Inputs(x, mask, bias, rotary)

    def run(self, *inputs: Any) -> Any:
        x, mask, position_bias, rotary = inputs
        a = self.arguments
        bias = torch.cat(self.biases) if self.biases else a.qkv_bias
        if a.norm_in:
            eps, norm = a.norms[2:4]
            y = _linear_norm(x, [*a.qkv, bias], a.qkv_config, None, a.norm_in, [], eps, norm)
        else:
            y = _linear_dynamic(x, *a.qkv, bias, a.qkv_config)
        y = y.unflatten(2, (-1, a.head_size))
        if rotary is not None:
            y = _rotated(y, a.heads[0] + a.heads[1], *rotary)
        y = y.transpose(1, 2) if a.batch_first else y.permute(1, 2, 0, 3)
        q, k, v = y.split_with_sizes(a.heads, 1)  # split() is a function of Python
        if position_bias is not None:
            mask = position_bias if mask is None else _both(mask, position_bias)
        if self.has_float_attention:
            y = float_attention(q, k, v, mask, scale=a.scale)
        else:
            report_to_watcher(self.layer_id, q, k, v, mask, False, a.scale)
            y = attention(q, k, v, mask, a.scale)
        y = (y.transpose(1, 2) if a.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        out = _linear_mlp(y, *a.mlp, x, *a.norms)
        if position_bias is not None:
            return out, position_bias, None
        return (out,) if self.pattern.returns_tuple else out


def _is_rotary(given: Any, x: Tensor, head_size: int) -> bool:
    """Whether an argument is cosines and sines for the rows of x."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    return all(
        type(each) is Tensor
        and each.dim() == 3
        and each.device == x.device
        and each.is_floating_point()
        and each.shape[0] in (1, x.shape[0])
        and each.shape[1:] == (x.shape[1], head_size)
        for each in given
    )


def _rotated(y: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """The first heads of [B, S, heads, D] turned by rotary position embeddings; the others."""
    turned, half = y[:, :, :heads], y.shape[3] // 2
    cos, sin = cos[:, :, None].float(), sin[:, :, None].float()
    out = torch.empty_like(y)
    out[:, :, heads:] = y[:, :, heads:]
    to = out[:, :, :heads]
    if y.dtype != torch.float32:
        turned = turned.float()
    torch.mul(turned, cos, out=to) if to.dtype == torch.float32 else to.copy_(turned * cos)
    to[..., :half] -= turned[..., half:] * sin[..., :half]
    to[..., half:] += turned[..., :half] * sin[..., half:]
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """int8 attention where the device has a kernel for it, else torch's."""
    if runs_on("attention", q.device.type):
        return _attention(q, k, v, mask, False, scale)
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)


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
    except CannotRun as error:
        call.arguments, call.reason = None, str(error)
    return call


def _fill(call: EncoderCall, layer: nn.Module, base: type[nn.Module]) -> None:
    pattern = call.pattern
    _check_layer(layer, base, pattern)
    heads = part_of(layer, pattern.heads)
    require(type(heads) is int and heads > 0, f"{pattern.heads} is {heads!r}")
    out, mlp = layer_of(layer, pattern.out), Operands(layer, pattern)
    qkv, qkv_bias, widths, qkv_config = _projections(layer, pattern, call)
    require(widths[0] % heads == 0, f"{heads} heads do not divide {widths[0]} channels")
    head_size = widths[0] // heads
    require(
        widths[1] == widths[2] and widths[1] % head_size == 0, "key and value have other heads than query"
    )
    require(not pattern.rotary or head_size % 2 == 0, f"{head_size} elements of a head have no halves")
    pre_norm = (
        pattern.pre_norm if isinstance(pattern.pre_norm, bool) else bool(part_of(layer, pattern.pre_norm))
    )
    second = NormOperands(layer, pattern.second_norm)
    first = None
    if not (pre_norm and type(part_of(layer, pattern.first_norm)) is nn.Identity):
        first = NormOperands(layer, pattern.first_norm)
        require((first.eps, first.kind) == (second.eps, second.kind), "its norms differ in kind or eps")
    require(not second.has_offset and not (first and first.has_offset), "its norms multiply by 1 + weight")
    before, after = [] if first is None else first.tensors, second.tensors
    scale = part_of(layer, pattern.scale) if pattern.scale else None
    require(scale is None or type(scale) is float, f"{pattern.scale} is {scale!r}")
    if pre_norm:
        norms = (after, Tensors(), second.eps, second.kind, True)
    else:
        norms = (before, after, second.eps, second.kind, False)
    call.arguments = Arguments(
        qkv=qkv,
        qkv_bias=qkv_bias,
        qkv_config=qkv_config,
        norm_in=before if pre_norm else [],
        heads=[width // head_size for width in widths],
        head_size=head_size,
        scale=scale,
        mlp=(operands_of(out), mlp.gate, mlp.up, mlp.down, [out._packed[-1], *mlp.codes]),
        norms=norms,
        hidden=mlp.hidden,
        device=mlp.device,
        batch_first=not pattern.batch_first or bool(part_of(layer, pattern.batch_first)),
    )
    tensors = (*qkv, qkv_bias, *call.biases, *before, *after, *operands_of(out), *mlp.tensors)
    require_one_device(tensors, mlp.device)
    call.parameters = tuple(layer.parameters())
    call.watch_hooks(part for part in layer.modules() if part is not layer)
    require_kernels(call, ["linear_mlp", "linear_norm"] if pre_norm else ["linear_mlp"], mlp.device)


def _check_layer(layer: nn.Module, base: type[nn.Module], pattern: TransformerLayer) -> None:
    """Forward, parts and attributes are those that the pattern describes."""
    check_forward(layer, base, pattern.arguments)
    roles = {*pattern.linear_layers, *pattern.norms, pattern.activation}
    check_parts(layer, base, roles | set(pattern.also))
    for name in pattern.unless:
        require(not part_of(layer, name), f"{name} is set")
    if pattern.config:
        used = getattr(part_of(layer, pattern.config), "_attn_implementation", None)
        require(used in ATTENTION_IMPLEMENTATIONS, f"its attention implementation is {used!r}")


Projections = tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, list[int], int]


def _projections(layer: nn.Module, pattern: TransformerLayer, call: EncoderCall) -> Projections:
    """Operands of query, key and value in one product, their bias, their widths, its config."""
    if pattern.in_proj:
        return _projections_of_torch(layer, pattern, call)
    if pattern.qkv:
        whole = layer_of(layer, pattern.qkv)
        width, rest = divmod(whole.out_features, 3)
        require(rest == 0, f"{pattern.qkv} has {whole.out_features} channels")
        *operands, code = whole._packed
        return (*operands[:3],), whole._parameters["bias"], [width] * 3, code  # type: ignore[return-value]
    parts = [layer_of(layer, name) for name in (pattern.query, pattern.key, pattern.value)]
    groups = {id(part.group): part.group for part in parts if isinstance(part, MergedLinear)}
    group = next(iter(groups.values()), None)
    is_whole = len(groups) == 1 and group is not None and group.layers == parts and group.merged is not None
    require(is_whole, "query, key and value are not merged")
    assert group is not None
    assert group.merged is not None
    merged = group.merged
    biases = [part._parameters["bias"] for part in parts]
    call.biases = tuple(bias for bias in biases if bias is not None)
    require(len(call.biases) in (0, 3), "some of query, key and value have a bias and some have none")
    return merged[:3], None, [part.out_features for part in parts], merged.config


def _projections_of_torch(layer: nn.Module, pattern: TransformerLayer, call: EncoderCall) -> Projections:
    """Of a QMultiheadAttention; or of an nn.MultiheadAttention, whose float in_proj is quantized in the
    scheme of the pattern's ``up``."""
    part = part_of(layer, pattern.in_proj)
    own = part.in_proj_weight
    if type(part) is QMultiheadAttention and own is not None:
        require(own.config.activations == "per_token", f"{pattern.in_proj} is quantized per_tensor")
        code = own.config.encode(part.embed_dim)
        return tensors_of(own), part.in_proj_bias, [part.embed_dim] * 3, code
    require(type(part) is nn.MultiheadAttention, f"{pattern.in_proj} is a {type(part).__name__}")
    weight, bias, up = part.in_proj_weight, part.in_proj_bias, layer_of(layer, pattern.up)
    require(weight is not None, "key or value have sizes of their own")
    require(not weight.is_inference(), "a parameter was made in inference mode, where changes leave no trace")
    config = replace(up.config, epilogue="none")
    with torch.inference_mode(False), torch.no_grad():
        call._quantized = weight, weight._version, _sample(weight).clone()
        quantized = QTensor.quantize(weight, config)
    return tensors_of(quantized), bias, [up.in_features] * 3, config.encode(up.in_features)


def _sample(weight: Tensor) -> Tensor:
    """A few of a weight's values, from all over it."""
    values = weight.detach().flatten()
    return values[:: max(1, values.numel() // SAMPLE_SIZE)]


def _places(layer: nn.Module, pattern: TransformerLayer) -> Iterator[Place]:
    """Where the objects are kept whose replacement changes what the layer computes."""
    yield vars(layer), STAYS_FLOAT
    yield from places_of(layer)
    for name in (*pattern.unless, pattern.heads, pattern.scale, pattern.config, pattern.batch_first):
        path, _, last = name.rpartition(".")
        owner = part_of(layer, path) if path else layer
        if last and owner is not None and hasattr(owner, "__dict__"):
            yield vars(owner), last
    config = part_of(layer, pattern.config) if pattern.config else None
    if config is not None:
        yield vars(config), "_attn_implementation_internal"
