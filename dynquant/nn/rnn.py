"""QLSTM and QGRU: torch.nn's recurrent modules over int8 weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..config import CELLS, MAX_ROTATION_BLOCK, Config, layer_config
from ..own_thread import on_own_thread
from ..qtensor import FLOAT_WORDS, QTensor
from ..reference import FLOAT_DTYPES
from .named_weights import NamedWeights
from .rnn_call import Direction, run_direction

if TYPE_CHECKING:
    from typing_extensions import Self

Device = torch.device | str | int | None

MAX_FLOAT_INPUT = 80
"""A first layer with at most this many inputs keeps the weight of its input in float.

Its inputs are features (spectra, sensors), whose columns may differ in range by orders of magnitude; all
others read hidden states or embeddings. In 8 bits, weights of the columns of large values round to 0 beside
those of small ones, and an LSTM adds up the error over time: a pretrained speaker encoder of 40 mel bands
had a lowest cosine of 0.934 with x and this weight in 8 bits, and has 0.993 (docs/design.md). The product of
few inputs is a small part of the layer's work.
"""


def module_config(activations: str, weights: str, rotation: str | int | None) -> Config:
    """The scheme of a module whose weights have several widths; a rotation block is the largest of them."""
    return layer_config(MAX_ROTATION_BLOCK, activations, weights, rotation)


def scheme_text(config: Config) -> str:
    float_input = ", float_input=True" if config.float_input else ""
    return f"activations={config.activations}, weights={config.weights}{config.rotation_text}{float_input}"


def call_of_leaf(module: nn.Module, input: torch.fx.Proxy, hx: Any) -> torch.fx.Proxy:
    """The node of a call for torch.fx.symbolic_trace, which keeps nn.LSTM and the like whole too."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, hx), {})


def check_input_tensor(module: nn.Module, x: Any, input_size: int, device: torch.device) -> None:
    """The requirements on the input of every recurrent module but its dimensions."""
    kind = type(module).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{kind}: expected input to be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise RuntimeError(f"{kind}: expected a dense input, got one of layout {x.layout}")
    if x.dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"{kind}: expected input of dtype {FLOAT_WORDS}, got {x.dtype}")
    if x.device != device:
        raise RuntimeError(f"{kind}: expected input on {device}, where the weights are, got it on {x.device}")
    if x.shape[-1] != input_size:
        raise RuntimeError(
            f"{kind}: expected input.shape[-1] == input_size ({input_size}), got {x.shape[-1]}"
        )


def check_state_tensor(module: nn.Module, name: str, value: Any, shape: Sequence[int], x: Tensor) -> None:
    """A tensor of ``hx``."""
    kind = type(module).__name__
    if not isinstance(value, Tensor):
        raise TypeError(f"{kind}: expected {name} to be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"{kind}: expected {name} of dtype {FLOAT_WORDS}, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(f"{kind}: expected {name} of shape {list(shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise RuntimeError(f"{kind}: expected {name} on {x.device}, where input is, got it on {value.device}")


class QRecurrent(NamedWeights):
    """What :class:`QLSTM` and :class:`QGRU` have in common.

    A layer and a direction are one call of ``torch.ops.dynquant.rnn``: the inputs of all time steps are
    quantized and multiplied together, the hidden state is quantized at each step, and the gate functions are
    fixed sequences of fp32 operations, so that the bits are the same on every device and thread count.
    """

    float_type: ClassVar[type[nn.RNNBase]]
    cell: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]] = ("hx",)

    if TYPE_CHECKING:
        input_size: int
        hidden_size: int
        num_layers: int
        bias: bool
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

    @classmethod
    def from_float(
        cls,
        module: nn.RNNBase,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> Self:
        """Quantize the float module, which does not change.

        Raises:
            TypeError: for any other type.
            ValueError: for scheme words that do not exist; for a weight that is not of a float dtype or
                holds a NaN or an infinity, a bias with a NaN, with its name.
        """
        if not isinstance(module, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float: expected an nn.{cls.float_type.__name__}, got "
                f"{type(module).__name__}"
            )
        config = module_config(activations, weights, rotation)

        def make() -> QRecurrent:
            self = cls.__new__(cls)
            nn.Module.__init__(self)
            self._init_from(module, config)
            return self.train(module.training)

        return cast("Self", on_own_thread(module.parameters(), make))

    def _init_from(self, module: nn.RNNBase, config: Config) -> None:
        for name in _OPTIONS:
            setattr(self, name, getattr(module, name))
        config = replace(config, float_input=self.input_size <= MAX_FLOAT_INPUT)
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for name in self._names():
            (weights if name.startswith("weight") else biases)[name] = getattr(module, name)
        self._init_tensors(weights, biases, config)

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

    def _tensors_of(self, hx: Any) -> Sequence[Any]:
        return (hx,)

    def _as_hx(self, values: list[Tensor]) -> Any:
        return values[0]

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


def parameters_of(module: nn.Module, direction: Direction) -> list[Tensor]:
    """The float parameters as they are now: torch.func.functional_call and the like replace them."""
    parameters: dict[str, Any] = module._parameters
    return [parameters[name] for name in direction.parameters]


def make_direction(
    module: NamedWeights, cell: str, end: str, has_bias: bool, has_projection: bool, reverse: bool
) -> Direction:
    """The layer whose parameters' names end in ``end``."""
    names = [f"weight_{kind}{end}" for kind in ("ih", "hh", *(("hr",) if has_projection else ()))]
    floats = [name for name in names if name not in module._weight_names]
    tensors: list[list[Tensor | None]] = [
        [] if name in floats else list(module._op_tensors(name)) for name in names
    ]
    if has_projection:
        tensors[2].append(None)
    else:
        tensors.append([])
    configs = [
        Config().encode(getattr(module, name).shape[1]) if name in floats else module._code(name)
        for name in names
    ]
    biases = [f"bias_{kind}{end}" for kind in ("ih", "hh")] if has_bias else []
    return Direction(
        CELLS.index(cell),
        tuple(module.__dict__.get(name) for name in names),
        tuple(tensors),  # type: ignore[arg-type]
        configs if has_projection else [*configs, 0],
        (*floats, *biases),
        reverse,
    )


def to_float_module(
    module: NamedWeights, float_type: Callable[..., Any], options: dict[str, Any], names: Sequence[str]
) -> Any:
    """A float module with the dequantized weights, in the dtype that they show."""
    weight: QTensor = next(iter(module.quantized_weights().values()))
    result = float_type(**options, device="meta", dtype=weight.dtype)
    values = {}
    for name in names:
        value = getattr(module, name)
        values[name] = (
            value.dequantize() if isinstance(value, QTensor) else value.detach().to(weight.dtype, copy=True)
        )
    result.load_state_dict(values, assign=True)
    return result.requires_grad_().train(module.training)


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
        super().__init__()
        config = module_config(activations, weights, rotation)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        self._init_from(nn.LSTM(*sizes, device=device, dtype=dtype), config)

    def _sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _tensors_of(self, hx: Any) -> Sequence[Any]:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"QLSTM: expected hx to be a pair of tensors (h, c), got {got}")
        return hx

    def _as_hx(self, values: list[Tensor]) -> Any:
        return tuple(values)


class QGRU(QRecurrent):
    """nn.GRU in int8. Arguments, attributes, shapes and errors as of :class:`QLSTM`, without a projection."""

    float_type = nn.GRU
    cell = "gru"

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
        self._init_from(nn.GRU(*sizes, device=device, dtype=dtype), config)
