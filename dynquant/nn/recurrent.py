"""What QLSTM, QGRU and the cells share: scheme, checks, the tensors of the op, and the way back to float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..config import CELLS, MAX_ROTATION_BLOCK, Config, layer_config
from ..own_thread import on_own_thread
from ..qtensor import FLOAT_WORDS, QTensor
from ..reference import FLOAT_DTYPES
from .module import NotScriptable
from .named_weights import NamedWeights
from .rnn_call import Direction

if TYPE_CHECKING:
    from typing_extensions import Self

Device = torch.device | str | int | None

MAX_FLOAT_INPUT = 40
"""A first layer with at most this many inputs keeps the weight of its input in float.

Its inputs are features (spectra, sensors), whose columns may differ in range by orders of magnitude; all
others read hidden states or embeddings. In 8 bits, weights of the columns of large values round to 0 beside
those of small ones, and an LSTM adds up the error over time: a pretrained speaker encoder of 40 mel bands
had a lowest cosine of 0.934 with x and this weight in 8 bits, and has 0.993 (docs/design.md). The product of
few inputs is a small part of the layer's work: on Zen 4, hidden 256 to 1024, an LSTM of 40 inputs takes 1.0
to 1.3 times as long as all in int8, one of 64 inputs up to 1.8 times.
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


class Recurrent(NotScriptable, NamedWeights):
    """What the layers (:mod:`.rnn`) and the cells (:mod:`.rnn_cells`) have in common.

    Attributes:
        float_type: the module of torch.nn.
        state_names: of the tensors of ``hx``, in messages; with two of them, ``hx`` is a pair.
    """

    float_type: ClassVar[type[nn.Module]]
    state_names: ClassVar[tuple[str, ...]] = ("hx",)

    if TYPE_CHECKING:
        input_size: int
        hidden_size: int
        bias: bool

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
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

        def make() -> Recurrent:
            self = cls.__new__(cls)
            nn.Module.__init__(self)
            self._init_from(module, config)
            return self.train(module.training)

        return cast("Self", on_own_thread(module.parameters(), make))

    def _init_from(self, module: Any, config: Config) -> None:
        """Take over the options of the float module, and quantize its weights."""
        raise NotImplementedError

    def _config_of_input(self, config: Config) -> Config:
        return replace(config, float_input=self.input_size <= MAX_FLOAT_INPUT)

    def _tensors_of(self, hx: Any) -> Sequence[Any]:
        if len(self.state_names) == 1:
            return (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"{type(self).__name__}: expected hx to be a pair of tensors (h, c), got {got}")
        return hx

    def _as_hx(self, values: list[Tensor]) -> Any:
        return values[0] if len(self.state_names) == 1 else tuple(values)
