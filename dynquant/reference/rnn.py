"""A layer of a recurrent network in one direction: LSTM, GRU and the plain RNN over int8 weights.

The input of all time steps is quantized and multiplied as by linear_dynamic, or multiplied by a float weight
as by linear_fp32; the hidden state of each step is always quantized. Between the products values stay fp32,
whatever the dtype of x. With ``a`` the product of the input and ``b`` that of the hidden state, both with
their biases and split into gates as torch.nn orders these::

    LSTM  i, f, o = sigmoid(a + b), g = tanh(a + b),  c = fma(f, c, i g),  h = o tanh(c)
    GRU   r, z = sigmoid(a + b),  n = tanh(fma(r, b, a)),  h = fma(z, h - n, n)
    RNN   h = tanh(a + b) or relu(a + b)

and with a projection, of an LSTM alone, h = linear_dynamic(o tanh(c)). ``csrc/kernels/cpu/generic/rnn.h`` has
the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CELLS, Config
from .arithmetic import fma
from .checks import check, check_bias, check_device, check_float, check_k, check_memory
from .epilogue import relu, sigmoid, tanh
from .linear import linear_dynamic, linear_fp32
from .mlp import Linear, Tensors, apply_layer, channels, check_layer

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Gates of each cell: a weight has this many times as many rows as there are hidden units."""


def rnn(
    x: Tensor,
    state: Sequence[Tensor],
    input_layer: Tensors,
    hidden_layer: Tensors,
    projection: Tensors | None,
    configs: Sequence[int],
    cell: int,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    *,
    linear: Linear = linear_dynamic,
) -> list[Tensor]:
    """All time steps of a layer in one direction.

    Args:
        x: [T, B, K], or with ``batch_sizes`` the [sum of them, K] data of a PackedSequence; any float dtype.
        state: h [B, P], of an LSTM c [B, H] too, of any float dtype. P is H without a projection.
        input_layer, hidden_layer: packed_weight, weight_sum, weight_scale and bias (or None) as
            linear_dynamic takes them, of shapes [gates H, K] and [gates H, P]. input_layer may be a float
            weight [gates H, K] and a bias (or None) instead.
        projection: likewise, [P, H]; None or empty: none.
        configs: of the two layers and the projection (0 without one), without epilogue; the first one's
            out_dtype is the op's.
        cell: index into ``dynquant.config.CELLS``.
        batch_sizes: int64 [T] on the CPU, the sequences of each time step, longest sequences first; all B at
            the first step.
        reverse: from the last time step to the first; a sequence of a PackedSequence starts at its own last.
        linear: computes linear_dynamic; the op of a device with a kernel for it gives the same bits.

    Returns:
        h of every time step, [T, B, P] or [sum of batch_sizes, P]; h of each sequence's last step, [B, P]; of
        an LSTM c likewise, [B, H]. A sequence with a NaN or an infinity in x is NaN from that step on.

    Raises:
        RuntimeError: for shapes, dtypes and devices that do not fit.
    """
    shape = check_rnn(x, state, input_layer, hidden_layer, projection, configs, cell, batch_sizes)
    sizes = [shape.batch] * x.shape[0] if batch_sizes is None else _sizes(x, shape.batch, batch_sizes)
    kind = CELLS[cell]
    step = _STEPS[kind]
    rows = x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])
    # Not a composition of steps: per_tensor activations have one range for the input of all steps.
    if is_float(input_layer):
        weight, bias = input_layer
        assert weight is not None
        from_input = linear_fp32(rows, weight, bias)
    else:
        from_input = apply_layer(rows, input_layer, configs[0], linear)
    values = tuple(tensor.to(torch.float32, copy=True) for tensor in state)
    out = from_input.new_empty(rows.shape[0], state[0].shape[1])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for size, end in (
        reversed(list(zip(sizes, ends, strict=True))) if reverse else zip(sizes, ends, strict=True)
    ):
        if size == 0:
            continue
        active = tuple(value[:size] for value in values)
        from_hidden = apply_layer(active[0], hidden_layer, configs[1], linear)
        h, *rest = step(from_input[end - size : end], from_hidden, active)
        if projection:
            h = apply_layer(h, projection, configs[2], linear)
        for value, new in zip(active, (h, *rest), strict=True):
            value.copy_(new)
        out[end - size : end] = h
    dtype = Config.decode(configs[0]).out_dtype or x.dtype
    return [tensor.to(dtype) for tensor in (out.reshape(*x.shape[:-1], out.shape[1]), *values)]


def _lstm(a: Tensor, b: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (a + b).chunk(4, 1)
    c = fma(sigmoid(f), state[1], sigmoid(i) * tanh(g))
    return sigmoid(o) * tanh(c), c


def _gru(a: Tensor, b: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3, 1)
    n = tanh(fma(sigmoid(a_r + b_r), b_n, a_n))
    return (fma(sigmoid(a_z + b_z), state[0] - n, n),)


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda a, b, state: (function(a + b),)


_STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(tanh),
    "rnn_relu": _plain(relu),
}


# ---- checks, which the fake kernel shares ----


def is_float(layer: Tensors) -> bool:
    """Whether a layer is a float weight and a bias (or None)."""
    return len(layer) == 2


class RnnShape(NamedTuple):
    """Sizes of a checked call: sequences B, hidden units H, and P, the size of h."""

    batch: int
    hidden: int
    out: int


def _sizes(x: Tensor, batch: int, batch_sizes: Tensor) -> list[int]:
    """The requirements on values; returns the number of sequences at each time step."""
    sizes: list[int] = batch_sizes.tolist()
    # The sentence names the sizes; [] has none, which B must then fit.
    falling = all(a >= b for a, b in zip([batch, *sizes], sizes, strict=False))
    check(
        falling and all(size > 0 for size in sizes) and sizes[:1] in ([], [batch]),
        f"rnn: expected batch_sizes to fall from B ({batch}) and to be positive, got {_listed(sizes)}",
    )
    check(
        sum(sizes) == x.shape[0],
        f"rnn: expected batch_sizes to add up to x.shape[0] ({x.shape[0]}), got {sum(sizes)}",
    )
    return sizes


def _listed(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, ...]"


def check_rnn(
    x: Tensor,
    state: Sequence[Tensor],
    input_layer: Tensors,
    hidden_layer: Tensors,
    projection: Tensors | None,
    configs: Sequence[int],
    cell: int,
    batch_sizes: Tensor | None,
) -> RnnShape:
    """The requirements of :func:`rnn` that no value takes part in."""
    check(0 <= cell < len(CELLS), f"rnn: expected cell in [0, {len(CELLS) - 1}], got {cell}")
    kind = CELLS[cell]
    check(
        len(configs) == 3,
        f"rnn: expected a config of each layer and the projection, got {len(configs)} configs",
    )
    check_float("rnn", "x", x)
    _check_dimensions(x, batch_sizes)
    check(not projection or kind == "lstm", f"rnn: expected no projection of a cell of kind {kind}")
    states = 2 if kind == "lstm" else 1
    check(
        len(state) == states,
        f"rnn: expected {states} tensor{'s' if states > 1 else ''} of state for {kind}, got {len(state)}",
    )
    gates, gated = GATES[kind], channels(hidden_layer)
    hidden = gated // gates
    out = channels(projection) if projection else hidden
    if is_float(input_layer):
        input_channels = _check_float_layer("rnn, input_layer", input_layer, x, configs[0])
    else:
        check_layer("rnn", "input_layer", input_layer, x, x.shape[-1], configs[0], per_token=False)
        input_channels = channels(input_layer)
    check_layer("rnn", "hidden_layer", hidden_layer, x, out, configs[1], per_token=False)
    check(
        gated % gates == 0 and input_channels == gated,
        f"rnn: expected input_layer and hidden_layer with {gates} gates of one size, got "
        f"{input_channels} and {gated} channels",
    )
    if projection:
        check_layer("rnn", "projection", projection, x, hidden, configs[2], per_token=False)
    plain = all(Config.decode(config).epilogue == "none" for config in configs)
    check(plain, f"rnn: expected no epilogue in the configs, got {list(configs)}")
    batch = x.shape[1] if batch_sizes is None else state[0].shape[0] if state[0].dim() else 0
    for name, tensor, size in zip(("h", "c"), state, (out, hidden), strict=False):
        check_float("rnn", name, tensor)
        check(
            list(tensor.shape) == [batch, size],
            f"rnn: expected {name} of shape {[batch, size]}, got {list(tensor.shape)}",
        )
        check_device("rnn", "x", x, name, tensor)
    return RnnShape(batch, hidden, out)


def _check_float_layer(op: str, layer: Tensors, x: Tensor, config: int) -> int:
    """A float weight and a bias (or None); returns N."""
    weight, bias = layer
    if weight is None:
        raise RuntimeError(f"{op}: expected a float weight, got None")
    check_float(op, "weight", weight)
    check(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1],
        f"{op}: expected weight of shape [N, {x.shape[-1]}], got {list(weight.shape)}",
    )
    check_device(op, "x", x, "weight", weight)
    n = weight.shape[0]
    if bias is not None:
        check_bias(op, bias, n)
        check_device(op, "x", x, "bias", bias)
    block = Config.decode(config).rotation_block
    check(block == 0, f"{op}: expected no rotation in config with a float weight, got block {block}")
    check_k(op, x.shape[-1], config)
    return n


def _check_dimensions(x: Tensor, batch_sizes: Tensor | None) -> None:
    if batch_sizes is None:
        check(x.dim() == 3, f"rnn: expected x with 3 dimensions [T, B, K], got {x.dim()}")
        return
    check(
        batch_sizes.dtype == torch.int64
        and batch_sizes.dim() == 1
        and batch_sizes.device.type in ("cpu", "meta"),
        f"rnn: expected batch_sizes to be int64 of 1 dimension on the CPU, got {batch_sizes.dtype} of shape "
        f"{list(batch_sizes.shape)} on {batch_sizes.device}",
    )
    check_memory("rnn", "batch_sizes", batch_sizes)
    check(x.dim() == 2, f"rnn: expected packed x with 2 dimensions [sum of batch_sizes, K], got {x.dim()}")
