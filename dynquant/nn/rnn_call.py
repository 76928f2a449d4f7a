"""A call of a recurrent module: one op for each layer and direction, and what its derivatives are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from ..config import CELLS, recode
from ..qtensor import QTensor, dequantize
from ..reference import FLOAT_DTYPES

_rnn = torch.ops.dynquant.rnn.default
_tracing_state = torch._C._get_tracing_state


class Direction(NamedTuple):
    """A layer in one direction, without its float parameters.

    Attributes:
        cell: index into ``dynquant.config.CELLS``.
        weights: of the input (None: float), the hidden state and, if there is one, the projection.
        tensors: each weight as the op takes it; an empty list for a float one and for no projection.
        configs: of the three, 0 for no projection.
        parameters: names of the float weight of the input, if it is one, and of the biases, if there are.
        reverse: from the last time step to the first.
    """

    cell: int
    weights: tuple[QTensor | None, ...]
    tensors: tuple[list[Tensor], list[Tensor], list[Tensor | None]]
    configs: list[int]
    parameters: tuple[str, ...]
    reverse: bool

    @property
    def device(self) -> torch.device:
        weight = self.weights[1]
        assert weight is not None
        return weight.device


def run_direction(
    direction: Direction,
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """All time steps: what the op ``rnn`` returns, with derivatives in x, the state and the parameters.

    They are those of torch's own layer with the dequantized weights: straight through the quantization.
    """
    if _tracing_state() is not None:
        return _traced_call(direction, x, state, parameters, batch_sizes)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (x, *state, *parameters))):
        raise NotImplementedError(
            f"{_name(direction)}: expected inputs without tangents, since it has no forward-mode derivative"
        )
    configs = _with_autocast_dtype(direction.configs, x)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *state, *parameters)):
        given = x, *state, *parameters
        return list(_StraightThrough.apply(direction, configs, batch_sizes, len(state), *given))
    return _call(direction, configs, x, state, parameters, batch_sizes)


def _name(direction: Direction) -> str:
    return f"a quantized {CELLS[direction.cell].partition('_')[0].upper()}"


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _with_autocast_dtype(configs: list[int], x: Tensor) -> list[int]:
    """The output has the autocast dtype under autocast, as that of the linear ops."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64 or x.dtype not in FLOAT_DTYPES:
        return configs
    return [recode(configs[0], out_dtype=torch.get_autocast_dtype(device)), *configs[1:]]


def _call(
    direction: Direction,
    configs: list[int],
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    of_input, of_hidden, projection = direction.tensors
    weight, biases = _split(direction, parameters)
    bias_ih, bias_hh = biases if biases else (None, None)
    results: list[Tensor] = _rnn(
        x,
        list(state),
        [*(of_input if weight is None else [weight]), bias_ih],
        [*of_hidden, bias_hh],
        projection,
        configs,
        direction.cell,
        batch_sizes,
        direction.reverse,
    )
    return results


def _rnn_of_tensors(
    x: Tensor,
    state: list[Tensor],
    input_weight: Tensor,
    input_sum: Tensor | None,
    input_scale: Tensor | None,
    input_bias: Tensor | None,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    projection: list[Tensor],
    configs: list[int],
    cell: int,
    reverse: bool,
) -> list[Tensor]:
    """The op for torch.jit.trace, which records calls of scripted functions, but no list with a None."""
    input_layer: list[Tensor | None] = [input_weight]
    if input_sum is not None:
        input_layer += [input_sum, input_scale]
    input_layer += [input_bias]
    hidden_layer: list[Tensor | None] = [packed_weight, weight_sum, weight_scale, bias]
    projected: list[Tensor | None] = []
    if len(projection) > 0:
        projected += [projection[0], projection[1], projection[2], None]
    return torch.ops.dynquant.rnn(
        x, state, input_layer, hidden_layer, projected, configs, cell, None, reverse
    )


@cache
def _rnn_in_torch_script() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scripting; tracing has warned
        return torch.jit.script(_rnn_of_tensors)


def _traced_call(
    direction: Direction,
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """The op in a trace, which has no derivatives."""
    if batch_sizes is not None:
        raise RuntimeError(
            f"{_name(direction)}: expected torch.export or torch.compile for a PackedSequence, since "
            "torch.jit.trace would keep the lengths of this one"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *state, *parameters)):
        raise RuntimeError(
            f"{_name(direction)}: expected torch.no_grad() or inputs that require no gradient in "
            "torch.jit.trace, which cannot record its derivatives"
        )
    of_input, of_hidden, projection = direction.tensors
    weight, biases = _split(direction, parameters)
    bias_ih, bias_hh = biases if biases else (None, None)
    results: list[Tensor] = _rnn_in_torch_script()(
        x,
        list(state),
        *(of_input if weight is None else (weight, None, None)),
        bias_ih,
        *of_hidden,
        bias_hh,
        [tensor for tensor in projection if tensor is not None],
        _with_autocast_dtype(direction.configs, x),
        direction.cell,
        direction.reverse,
    )
    return results


def _split(direction: Direction, parameters: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The float weight of the input, if it is one, and the biases."""
    return (parameters[0], parameters[1:]) if direction.weights[0] is None else (None, parameters)


class _StraightThrough(torch.autograd.Function):
    """The op; its backward computes the float layer once more."""

    @staticmethod
    def forward(
        ctx: Any,
        direction: Direction,
        configs: list[int],
        batch_sizes: Tensor | None,
        states: int,
        x: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.direction, ctx.batch_sizes, ctx.states = direction, batch_sizes, states
        ctx.save_for_backward(x, *others)
        with torch.no_grad():
            return tuple(_call(direction, configs, x, others[:states], others[states:], batch_sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        inputs = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            x, *others = (tensor.to(torch.float32) for tensor in inputs)
            outputs = _float_direction(
                ctx.direction, x, others[: ctx.states], others[ctx.states :], ctx.batch_sizes
            )
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        given = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
        return None, None, None, None, *(next(found) if needs else None for needs in needed)


def _float_direction(
    direction: Direction,
    x: Tensor,
    state: Sequence[Tensor],
    parameters: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> list[Tensor]:
    """The layer with dequantized weights by torch's own function, which runs forwards in time."""
    order = _reversed_order(x.shape[0], batch_sizes, x.device) if direction.reverse else None
    if order is not None:
        x = x[order]
    float_weight, biases = _split(direction, parameters)
    dequantized = [dequantize(weight) for weight in direction.weights if weight is not None]
    of_input, of_hidden, *projection = dequantized if float_weight is None else [float_weight, *dequantized]
    weights = [of_input, of_hidden, *biases, *projection]
    hx = [tensor.unsqueeze(0) for tensor in state]
    function = getattr(torch._VF, CELLS[direction.cell])
    sizes = () if batch_sizes is None else (batch_sizes,)
    # One layer in training mode, without which cuDNN has no backward, without dropout.
    options = (bool(biases), 1, 0.0, True, False, *(() if sizes else (False,)))
    out, *last = function(x, *sizes, hx if len(hx) > 1 else hx[0], weights, *options)
    if order is not None:
        out = out[order]
    return [out, *(tensor.squeeze(0) for tensor in last)]


def _reversed_order(rows: int, batch_sizes: Tensor | None, device: torch.device) -> Tensor:
    """The rows of the time steps in reverse, each sequence within its own length: its own inverse."""
    if batch_sizes is None:
        return torch.arange(rows - 1, -1, -1, device=device)
    sizes = batch_sizes.tolist()
    starts = [0, *batch_sizes.cumsum(0).tolist()]
    lengths = [sum(size > i for size in sizes) for i in range(max(sizes, default=0))]
    order = [starts[lengths[i] - 1 - t] + i for t, size in enumerate(sizes) for i in range(size)]
    return torch.tensor(order, device=device)
