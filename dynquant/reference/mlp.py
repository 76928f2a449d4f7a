"""Layers with what stands around them in a transformer block: residual, norm, and whole MLPs.

Between the layers of one op values stay fp32, whatever the dtype of x: one cast, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import Config, recode
from .checks import check, check_device, check_float, check_k, check_memory
from .layout import check_packed_k
from .linear import check_operands, linear_dynamic
from .norm import check_norm, normed

Tensors = Sequence[Tensor | None]
Linear = Callable[..., Tensor]


def linear_norm(
    x: Tensor,
    layer: Tensors,
    config: int,
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    eps: float,
    norm: int,
    *,
    linear: Linear = linear_dynamic,
) -> Tensor:
    """norm_out(layer(norm_in(x)) + residual).

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        layer: packed_weight, weight_sum, weight_scale and bias (or None) as linear_dynamic takes them.
        config: of the layer; activations per_token. Its out_dtype is the op's.
        residual: [..., N] of any float dtype, or None.
        norm_in, norm_out: weight and bias, each of any float dtype or None; an empty list for no norm.
        eps: of both norms, rounded to fp32.
        norm: index into ``dynquant.config.NORMS``.
        linear: computes linear_dynamic; the op of a device with a kernel for it gives the same bits.

    Returns:
        [..., N].

    Raises:
        RuntimeError: for shapes, dtypes and devices that do not fit.
    """
    check_linear_norm(x, layer, config, residual, norm_in, norm_out, norm)
    y = apply_layer(normed(_rows(x), norm_in, eps, norm), layer, config, linear)
    return _output(normed(_add(y, residual), norm_out, eps, norm), x, config)


def mlp(
    x: Tensor,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    eps: float,
    norm: int,
    *,
    linear: Linear = linear_dynamic,
) -> Tensor:
    """norm_out(down(up(n)) + residual), n = norm_in(x); with a gate, gate(n) * up(n) instead of up(n).

    Args:
        x: [..., K].
        gate, up, down: layers as in :func:`linear_norm`; gate may be empty. Activations are their epilogues.
        configs: of gate (0 without one), up and down.
        residual: [..., N] of any float dtype, or None.

    Other arguments, results and errors as in :func:`linear_norm`.
    """
    check_mlp(x, gate, up, down, configs, residual, norm_in, norm_out, norm)
    y = _mlp(normed(_rows(x), norm_in, eps, norm), gate, up, down, configs, linear)
    return _output(normed(_add(y, residual), norm_out, eps, norm), x, configs[2])


def linear_mlp(
    x: Tensor,
    layer: Tensors,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor,
    first_norm: Tensors,
    second_norm: Tensors,
    eps: float,
    norm: int,
    pre_norm: bool,
    *,
    linear: Linear = linear_dynamic,
) -> Tensor:
    """What follows attention in a transformer block: output projection, MLP, both with residual and norm.

    ``h = layer(x) + residual``; post-norm ``h = first_norm(h)``, ``out = second_norm(mlp(h) + h)``; pre-norm
    ``out = mlp(first_norm(h)) + h``, and ``second_norm`` is empty.

    Args:
        x: [..., K], the output of attention.
        layer, gate, up, down: as in :func:`mlp`.
        configs: of layer, gate (0 without one), up and down.
        residual: [..., N] of any float dtype.

    Other arguments, results and errors as in :func:`linear_norm`.
    """
    check_linear_mlp(x, layer, gate, up, down, configs, residual, first_norm, second_norm, norm, pre_norm)
    h = _add(apply_layer(_rows(x), layer, configs[0], linear), residual)
    inner = normed(h, first_norm, eps, norm)
    y = _mlp(inner, gate, up, down, configs[1:], linear)
    out = y + h if pre_norm else normed(y + inner, second_norm, eps, norm)
    return _output(out, x, configs[3])


# ---- checks, which the fake kernels share ----


def channels(layer: Tensors) -> int:
    """N of a packed layer."""
    scale = layer[2] if len(layer) == 4 else None
    return 0 if scale is None else scale.numel()


def check_layer(
    op: str, name: str, layer: Tensors, x: Tensor, k: int, config: int, *, per_token: bool = True
) -> None:
    """A layer with k inputs, its operands on the device of x; with ``per_token``, activations are."""
    check_float(op, "x", x)
    op = f"{op}, {name}"
    check(
        len(layer) == 4,
        f"{op}: expected packed_weight, weight_sum, weight_scale and bias (or None), "
        f"got {len(layer)} tensors",
    )
    packed_weight, weight_sum, weight_scale, bias = layer
    if packed_weight is None or weight_sum is None or weight_scale is None:
        raise RuntimeError(f"{op}: expected packed_weight, weight_sum and weight_scale, got None")
    activations = Config.decode(config).activations
    check(
        activations == "per_token" or not per_token,
        f"{op}: expected per_token activations in config, got {activations}",
    )
    check_operands(op, x, packed_weight, weight_sum, weight_scale, bias)
    check_packed_k(op, "K", k, packed_weight, weight_scale.numel())
    check_k(op, k, config)


def _check_mlp_layers(
    op: str, x: Tensor, k: int, gate: Tensors, up: Tensors, down: Tensors, configs: Sequence[int]
) -> None:
    """The layers of an MLP fit each other; gate and up read the same quantized rows."""
    check(len(configs) == 3, f"{op}: expected a config of gate, up and down, got {len(configs)} configs")
    check_layer(op, "up", up, x, k, configs[1])
    inner = channels(up)
    if gate:
        check_layer(op, "gate", gate, x, k, configs[0])
        check(
            channels(gate) == inner,
            f"{op}: expected gate to have {inner} channels, as up has, got {channels(gate)}",
        )
        rotations = [_rotation_of(code) for code in configs[:2]]
        check(
            rotations[0] == rotations[1],
            f"{op}: expected gate and up with one rotation, got {rotations[0]} and {rotations[1]}",
        )
    check_layer(op, "down", down, x, inner, configs[2])


def _rotation_of(code: int) -> str:
    config = Config.decode(code)
    return f"block {config.rotation_block} {'with' if config.rotation_signs else 'without'} signs"


def _check_residual(op: str, residual: Tensor | None, x: Tensor, n: int) -> None:
    """A residual has the shape of the output."""
    if residual is None:
        return
    check_float(op, "residual", residual)
    expected = [*x.shape[:-1], n]
    check(
        list(residual.shape) == expected,
        f"{op}: expected residual of shape {expected}, got {list(residual.shape)}",
    )
    check_device(op, "x", x, "residual", residual)
    check_memory(op, "residual", residual)


def check_linear_norm(
    x: Tensor,
    layer: Tensors,
    config: int,
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    norm: int,
) -> None:
    """All requirements of :func:`linear_norm`."""
    check_layer("linear_norm", "layer", layer, x, x.shape[-1], config)
    check_norm("linear_norm", "norm_in", norm_in, x, x.shape[-1], norm)
    check_norm("linear_norm", "norm_out", norm_out, x, channels(layer), norm)
    _check_residual("linear_norm", residual, x, channels(layer))


def check_mlp(
    x: Tensor,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    norm: int,
) -> None:
    """All requirements of :func:`mlp`."""
    check_float("mlp", "x", x)
    _check_mlp_layers("mlp", x, x.shape[-1], gate, up, down, configs)
    check_norm("mlp", "norm_in", norm_in, x, x.shape[-1], norm)
    check_norm("mlp", "norm_out", norm_out, x, channels(down), norm)
    _check_residual("mlp", residual, x, channels(down))


def check_linear_mlp(
    x: Tensor,
    layer: Tensors,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor,
    first_norm: Tensors,
    second_norm: Tensors,
    norm: int,
    pre_norm: bool,
) -> None:
    """All requirements of :func:`linear_mlp`."""
    op, n = "linear_mlp", channels(layer)
    check(
        len(configs) == 4, f"{op}: expected a config of layer, gate, up and down, got {len(configs)} configs"
    )
    check_layer(op, "layer", layer, x, x.shape[-1], configs[0])
    _check_mlp_layers(op, x, n, gate, up, down, configs[1:])
    check(
        channels(down) == n, f"{op}: expected down to have {n} channels, as layer has, got {channels(down)}"
    )
    check_norm(op, "first_norm", first_norm, x, n, norm)
    check_norm(op, "second_norm", second_norm, x, n, norm)
    check(not (pre_norm and second_norm), f"{op}: expected no second_norm with pre_norm")
    _check_residual(op, residual, x, n)


# ---- parts ----


def _rows(x: Tensor) -> Tensor:
    return x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])


def apply_layer(x: Tensor, layer: Tensors, config: int, linear: Linear) -> Tensor:
    packed_weight, weight_sum, weight_scale, bias = layer
    assert packed_weight is not None
    assert weight_sum is not None
    assert weight_scale is not None
    fp32 = recode(config, out_dtype=torch.float32)
    return linear(x, packed_weight, weight_sum, weight_scale, bias, fp32)


def _mlp(
    x: Tensor, gate: Tensors, up: Tensors, down: Tensors, configs: Sequence[int], linear: Linear
) -> Tensor:
    hidden = apply_layer(x, up, configs[1], linear)
    if gate:
        hidden = apply_layer(x, gate, configs[0], linear) * hidden
    return apply_layer(hidden, down, configs[2], linear)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + _rows(residual)


def _output(y: Tensor, x: Tensor, config: int) -> Tensor:
    dtype = Config.decode(config).out_dtype or x.dtype
    return y.to(dtype).reshape(*x.shape[:-1], y.shape[1])
