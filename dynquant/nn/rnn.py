"""QLSTM and QGRU: torch.nn's recurrent modules over int8 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..config import Config
from .recurrent import (
    Device,
    Recurrent,
    call_of_leaf,
    check_input_tensor,
    check_state_tensor,
    make_direction,
    module_config,
    parameters_of,
    scheme_text,
    to_float_module,
)
from .rnn_call import Direction, run_direction


class QRecurrent(Recurrent):
    """What :class:`QLSTM` and :class:`QGRU` have in common.

    A layer and a direction are one call of ``torch.ops.dynquant.rnn``: the inputs of all time steps are
    quantized and multiplied together, the hidden state is quantized at each step, and the gate functions are
    fixed sequences of fp32 operations, so that the bits are the same on every device and thread count.
    """

    cell: ClassVar[str]

    if TYPE_CHECKING:
        num_layers: int
        batch_first: bool
        dropout: float
        bidirectional: bool
        proj_size: int
        _prepared: list[Direction]

    replaced_attributes = (
        "mode",
        "_flat_weights",
        "_flat_weights_names",
        "_flat_weight_refs",
        "_all_weights",
    )

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> None:
        super().__init__()
        config = module_config(activations, weights, rotation)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        self._init_from(self.float_type(*sizes, device=device, dtype=dtype), config)

    def _init_from(self, module: Any, config: Config) -> None:
        for name in _OPTIONS:
            setattr(self, name, getattr(module, name))
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for name in self._names():
            (weights if name.startswith("weight") else biases)[name] = getattr(module, name)
        self._init_tensors(weights, biases, self._config_of_input(config))

    def _input_weight_names(self) -> tuple[str, ...]:
        return ("weight_ih_l0", "weight_ih_l0_reverse") if self.bidirectional else ("weight_ih_l0",)

    def _names(self) -> list[str]:
        """The names of all parameters of the float module, a layer and a direction after the other."""
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size else []
        return [f"{kind}_l{layer}{end}" for layer, end in self._places() for kind in kinds]

    def _places(self) -> list[tuple[int, str]]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [(layer, end) for layer in range(self.num_layers) for end in ends]

    def _prepare(self) -> list[Direction]:
        return [
            make_direction(self, self.cell, f"_l{layer}{end}", self.bias, bool(self.proj_size), bool(end))
            for layer, end in self._places()
        ]

    # ---- a call

    def _sizes(self) -> tuple[int, ...]:
        """The sizes of the tensors of the state."""
        return (self.hidden_size,)

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, torch.fx.Proxy):
            return call_of_leaf(self, input, hx)
        if isinstance(input, PackedSequence):
            return self._of_packed(input, hx)
        x = input
        dim = x.dim() if isinstance(x, Tensor) else 3
        if dim not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected input with 2 or 3 dimensions, got {dim}")
        check_input_tensor(self, x, self.input_size, self._device())
        if dim == 2:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        state = self._read_state(hx, x, x.shape[1], has_batch=dim == 3)
        out, last = self._run(x, state, None)
        if dim == 2:
            return out.squeeze(1), self._as_hx([tensor.squeeze(1) for tensor in last])
        return out.transpose(0, 1) if self.batch_first else out, self._as_hx(last)

    def _of_packed(self, input: PackedSequence, hx: Any) -> Any:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        check_input_tensor(self, x, self.input_size, self._device())
        if x.dim() != 2:
            raise RuntimeError(
                f"{type(self).__name__}: expected a PackedSequence of 2-D data, got {x.dim()} dimensions"
            )
        state = self._read_state(hx, x, int(batch_sizes[0]), has_batch=True)
        if hx is not None and sorted_indices is not None:
            state = [tensor.index_select(1, sorted_indices) for tensor in state]
        out, last = self._run(x, state, batch_sizes)
        if unsorted_indices is not None:
            last = [tensor.index_select(1, unsorted_indices) for tensor in last]
        return PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices), self._as_hx(last)

    def _device(self) -> torch.device:
        return self._prepared[0].device

    def _read_state(self, hx: Any, x: Tensor, batch: int, *, has_batch: bool) -> list[Tensor]:
        """The tensors of ``hx``, [layers * directions, batch, size] each; zeros without it."""
        count = len(self._prepared)
        if hx is None:
            return [x.new_zeros(1, batch, size).expand(count, batch, size) for size in self._sizes()]
        values = self._tensors_of(hx)
        for name, value, size in zip(self.state_names, values, self._sizes(), strict=True):
            shape = (count, batch, size) if has_batch else (count, size)
            check_state_tensor(self, name, value, shape, x)
        return list(values) if has_batch else [value.unsqueeze(1) for value in values]

    def _run(self, x: Tensor, state: list[Tensor], batch_sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        ends: list[list[Tensor]] = []
        directions = 2 if self.bidirectional else 1
        for first in range(0, len(self._prepared), directions):
            outputs = []
            for i in range(first, first + directions):
                direction = self._prepared[i]
                own = [tensor[i] for tensor in state]
                out, *last = run_direction(direction, x, own, parameters_of(self, direction), batch_sizes)
                outputs.append(out)
                ends.append(last)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and first + directions < len(self._prepared):
                x = F.dropout(x, self.dropout)
        return x, [torch.stack(tensors) for tensors in zip(*ends, strict=True)]

    # ---- what nn.RNNBase has

    @property
    def all_weights(self) -> list[list[Any]]:
        names = self._names()
        each = len(names) // len(self._prepared)
        return [[getattr(self, name) for name in names[i : i + each]] for i in range(0, len(names), each)]

    def flatten_parameters(self) -> None:
        """Nothing: the weights are packed."""

    def to_float(self) -> nn.RNNBase:
        """The float module that computes the same without quantized activations."""
        options = {name: getattr(self, name) for name in _OPTIONS if name != "proj_size" or self.proj_size}
        return to_float_module(self, self.float_type, options, self._names())

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False}
        for name, default in {**defaults, "dropout": 0.0, "bidirectional": False}.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, {scheme_text(self.config)}"


_OPTIONS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)


class QLSTM(QRecurrent):
    """nn.LSTM in int8: weights quantized once, the input and the hidden state at each call and time step.

    A new module is initialized as nn.LSTM is. Casts (``.half()``, ``.to(dtype)``) change the dtype that the
    weights show, and the biases; the op computes in fp32, keeps h and c in fp32 over all time steps, and
    takes inputs of every float dtype. With gradients enabled, the derivatives in input and hx are those of
    nn.LSTM with the dequantized weights (straight-through); biases require a gradient once
    ``requires_grad_`` asks for it.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype: as nn.LSTM's.
        activations: ``"per_token"`` (qparams for each sequence and time step) or ``"per_tensor"`` (for the
            whole input, and for the hidden states of each time step).
        weights: ``"per_channel"`` (a scale for each row) or ``"per_tensor"``.
        rotation: None, ``"hadamard"`` or a block size, see :func:`dynquant.config.layer_config`; for each
            weight the largest block that divides its width.

    Attributes:
        weight_ih_l0, weight_hh_l0, ...: a :class:`dynquant.QTensor` of all gates for each of nn.LSTM's
            weights. Assigning a float tensor quantizes that one instead. With at most MAX_FLOAT_INPUT inputs
            weight_ih_l0 (and weight_ih_l0_reverse) are float, and the product of the input is fp32.
        bias_ih_l0, bias_hh_l0, ...: float Parameters that require no gradient.
        config: the :class:`dynquant.Config`; its rotation block is the largest of all weights.

    Shape:
        As nn.LSTM: input [T, B, K], [B, T, K] with ``batch_first``, [T, K] or a PackedSequence of float32,
        bfloat16, float16 or float64; the outputs have that dtype (under autocast, the autocast dtype).

    Raises:
        ValueError: for scheme words that do not exist, an input of another number of dimensions.
        RuntimeError: for an input or hx of another shape, dtype or device.
    """

    float_type = nn.LSTM
    cell = "lstm"
    state_names = ("hx[0]", "hx[1]")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = module_config(activations, weights, rotation)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        self._init_from(nn.LSTM(*sizes, device=device, dtype=dtype), config)

    def _sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size


class QGRU(QRecurrent):
    """nn.GRU in int8. Arguments, attributes, shapes and errors as of :class:`QLSTM`, without a projection."""

    float_type = nn.GRU
    cell = "gru"
