"""QLSTMCell, QGRUCell and QRNNCell: one time step of a recurrent layer over int8 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

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


class QRecurrentCell(Recurrent):
    """What :class:`QLSTMCell`, :class:`QGRUCell` and :class:`QRNNCell` have in common."""

    cell: ClassVar[str]

    if TYPE_CHECKING:
        _prepared: Direction

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> None:
        super().__init__()
        config = module_config(activations, weights, rotation)
        self._init_from(self.float_type(input_size, hidden_size, bias, device=device, dtype=dtype), config)

    def _init_from(self, module: Any, config: Config) -> None:
        self.input_size, self.hidden_size, self.bias = module.input_size, module.hidden_size, module.bias
        weights = {name: getattr(module, name) for name in ("weight_ih", "weight_hh")}
        biases = {name: getattr(module, name) for name in ("bias_ih", "bias_hh")}
        self._init_tensors(weights, biases, self._config_of_input(config))

    def _input_weight_names(self) -> tuple[str, ...]:
        return ("weight_ih",)

    def _prepare(self) -> Direction:
        return make_direction(self, self._cell(), "", self.bias, has_projection=False, reverse=False)

    def _cell(self) -> str:
        return self.cell

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, torch.fx.Proxy):
            return call_of_leaf(self, input, hx)
        kind, direction = type(self).__name__, self._prepared
        dim = input.dim() if isinstance(input, Tensor) else 2
        if dim not in (1, 2):
            raise ValueError(f"{kind}: expected input with 1 or 2 dimensions, got {dim}")
        check_input_tensor(self, input, self.input_size, direction.device)
        x = input if dim == 2 else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            state = [zeros] * len(self.state_names)
        else:
            state = []
            for name, value in zip(self.state_names, self._tensors_of(hx), strict=True):
                check_state_tensor(self, name, value, (*input.shape[:-1], self.hidden_size), input)
                state.append(value if dim == 2 else value.unsqueeze(0))
        _, *last = run_direction(direction, x.unsqueeze(0), state, parameters_of(self, direction), None)
        return self._as_hx(last if dim == 2 else [tensor.squeeze(0) for tensor in last])

    def to_float(self) -> Any:
        """The float module that computes the same without quantized activations."""
        names = [*self._weight_names, *self._prepared.parameters]
        return to_float_module(self, self.float_type, self._options(), names)

    def _options(self) -> dict[str, Any]:
        return {"input_size": self.input_size, "hidden_size": self.hidden_size, "bias": self.bias}

    def extra_repr(self) -> str:
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}, {scheme_text(self.config)}"


class QLSTMCell(QRecurrentCell):
    """nn.LSTMCell in int8. Scheme, attributes and gradients as of :class:`dynquant.QLSTM`.

    Shape:
        input [B, K] or [K], hx a pair of [B, H] or [H] -> the same pair one step later.
    """

    float_type = nn.LSTMCell
    cell = "lstm"
    state_names = ("hx[0]", "hx[1]")


class QGRUCell(QRecurrentCell):
    """nn.GRUCell in int8. Scheme, attributes and gradients as of :class:`dynquant.QLSTM`.

    Shape:
        input [B, K] or [K], hx [B, H] or [H] -> hx one step later.
    """

    float_type = nn.GRUCell
    cell = "gru"


class QRNNCell(QRecurrentCell):
    """nn.RNNCell in int8, with tanh or relu. All else as of :class:`QGRUCell`."""

    float_type = nn.RNNCell

    if TYPE_CHECKING:
        nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = module_config(activations, weights, rotation)
        self._init_from(
            nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device=device, dtype=dtype), config
        )

    def _init_from(self, module: Any, config: Config) -> None:
        self.nonlinearity = str(module.nonlinearity)
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"expected nonlinearity 'tanh' or 'relu', got {self.nonlinearity!r}")
        super()._init_from(module, config)

    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "nonlinearity": self.nonlinearity}

    def extra_repr(self) -> str:
        nonlinearity = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}"
        return super().extra_repr() + nonlinearity
