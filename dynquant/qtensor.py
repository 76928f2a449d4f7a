"""QTensor: the ``.weight`` of a quantized layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .config import Config
from .own_thread import keeping_subnormals, on_own_thread
from .reference import FLOAT_DTYPES, rotate_back
from .traced_reads import OPERATORS, REFLECTED, WITHOUT_VALUES, untraced

FLOAT_WORDS = "float32, bfloat16, float16 or float64"

_ops = torch.ops.dynquant


class QTensor(torch.Tensor):
    """A packed int8 weight [N, K] that looks like the float tensor it replaces.

    Shape, dtype and device are those of the float weight, and ``F.linear(x, w, bias)`` runs in int8. Any
    other op sees the dequantized values, computed anew each time: there is no float copy. It is read-only.

    It has the interface of torch's own quantized tensors, as methods and, where torch has them, functions:
    ``int_repr()`` (int8 [N, K]; in the rotated basis if the config rotates), ``dequantize()``
    (in this tensor's dtype), ``qscheme()``, ``q_scale()`` (per_tensor a float; per_channel fp32 [N, 1], so
    that it multiplies ``int_repr()``), ``q_zero_point()`` (0), ``q_per_channel_scales()`` and
    ``q_per_channel_zero_points()`` ([N]), ``q_per_channel_axis()`` (0). Calling it returns itself, since
    torch.ao's layers have a method ``weight()``.

    ``.to``, ``.half`` and the like, ``.detach``, ``.clone``, ``.contiguous`` and ``.data`` return a QTensor.

    Attributes:
        packed_weight, weight_sum: as ``torch.ops.dynquant.pack_weight`` returns them; for the table of an
            embedding (:attr:`is_rows`) int8 [N, K] as it is, and no sums.
        channel_scale: fp32 [N].
        config: the :class:`Config` it was quantized with; it has no epilogue.
        casts: the same weight in the other float dtypes, made in advance: torch.compile cannot make them.
    """

    packed_weight: Tensor
    weight_sum: Tensor
    channel_scale: Tensor
    config: Config
    casts: dict[torch.dtype, QTensor]

    @staticmethod
    def __new__(
        cls,
        packed_weight: Tensor,
        weight_sum: Tensor,
        channel_scale: Tensor,
        config: Config,
        shape: torch.Size,
        dtype: torch.dtype,
        with_casts: bool = True,
    ) -> QTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed_weight.device)
        # Code that reads memory below __torch_dispatch__ gets an exception instead of a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.packed_weight, self.weight_sum, self.channel_scale = packed_weight, weight_sum, channel_scale
        self.config = config
        arguments = packed_weight, weight_sum, channel_scale, config, shape
        others = [other for other in FLOAT_DTYPES if other != dtype and with_casts]
        self.casts = {other: QTensor(*arguments, other, with_casts=False) for other in others}
        return self

    @property
    def is_rows(self) -> bool:
        """Whether its int8 is in rows [N, K], as embeddings read it, and not packed for products."""
        return self.packed_weight.shape == self.shape and self.weight_sum.shape[0] == 0

    @staticmethod
    def quantize(weight: Tensor, config: Config, rows: bool = False) -> QTensor:
        """Quantize and pack a float weight.

        Args:
            weight: [N, K], fp32, bf16, fp16 or fp64.
            config: its epilogue is dropped.
            rows: keep the rows instead of packing them, see :attr:`is_rows`.

        Raises:
            RuntimeError: for another dtype or shape, or a non-finite element, with its index.
        """
        if weight.dtype not in FLOAT_DTYPES:
            raise RuntimeError(f"expected weight of dtype {FLOAT_WORDS}, got {weight.dtype}")
        config = replace(config, epilogue="none", out_dtype=None, full_range=False)

        def quantize_and_pack() -> QTensor:
            with torch.no_grad(), torch.inference_mode(False), keeping_subnormals():
                weight_int8, weight_scale = _ops.quantize_weight(weight.detach(), config.encode())
                return pack(weight_int8, weight_scale, config, weight.dtype, rows)

        return on_own_thread([weight], quantize_and_pack)

    @staticmethod
    def from_int8(
        weight: Tensor, weight_scale: Tensor, config: Config, dtype: torch.dtype, rows: bool = False
    ) -> QTensor:
        """Check and pack an int8 weight from outside, such as a file.

        Args:
            weight: int8 [N, K], as ``int_repr()`` returned it; in [-127, 127] unless ``config.full_range``.
            weight_scale: fp32, finite and positive; [N] per_channel, [1] per_tensor.
            dtype: the float dtype that the tensor shows.
            rows: as of :meth:`quantize`.

        Raises:
            ValueError: for a shape, dtype or value that does not fit.
        """
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ValueError(
                f"expected weight to be int8 [N, K], got {weight.dtype} of shape {list(weight.shape)}"
            )
        scales = [weight.shape[0] if config.weights == "per_channel" else 1]
        if weight_scale.dtype != torch.float32 or list(weight_scale.shape) != scales:
            raise ValueError(
                f"expected weight_scale to be float32 of shape {scales} ({config.weights}), got "
                f"{weight_scale.dtype} of shape {list(weight_scale.shape)}"
            )
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"expected the weight to show dtype {FLOAT_WORDS}, got {dtype}")
        k = weight.shape[1]
        if config.rotation_block and k % config.rotation_block:
            raise ValueError(
                f"expected K to be a multiple of the rotation block {config.rotation_block}, got {k}"
            )

        def check_and_pack() -> QTensor:
            with torch.no_grad(), torch.inference_mode(False), keeping_subnormals():
                if weight.device.type != "meta":
                    _check_values(weight, weight_scale, config)
                return pack(weight, weight_scale, config, dtype, rows)

        return on_own_thread([weight, weight_scale], check_and_pack)

    def __call__(self) -> QTensor:
        return self

    @property
    def data(self) -> QTensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _read_only(".data =")

    T = mT = H = mH = property(lambda self: _dequantize(self).t())
    real = property(lambda self: _dequantize(self))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = repr(self.dequantize()).removeprefix("tensor(").removesuffix(")").replace("\n", "\n ")
        config = self.config
        rotation = f", rotation_block={config.rotation_block}" if config.rotation_block else ""
        rotation += ", rotation_signs=False" if config.rotation_block and not config.rotation_signs else ""
        return f"QTensor({values}, weights={config.weights}, activations={config.activations}{rotation})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        if id(self) not in memo:
            memo[id(self)] = _map_tensors(self, Tensor.clone, self.dtype)
        return cast(QTensor, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        tensors = _int_repr(self), weight_scale(self)
        return _unpickle, (*tensors, self.config.encode(), self.dtype, self.is_rows)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **kwargs)
        if func is Tensor.__setitem__ and isinstance(args[0], QTensor):
            raise _read_only(func.__name__)
        if func.__name__ in REFLECTED and isinstance(args[1], Tensor):
            # torch.compile's form of args[1] / args[0] and the like; a reflected method rounds otherwise.
            right, left = tree_map_only(QTensor, _dequantize, args)
            return REFLECTED[func.__name__](left, right)
        if func.__name__ == "__get__":
            return untraced(func, *args)
        # Neither torch.compile nor torch.jit.trace sees into __torch_dispatch__.
        is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if func in _NEEDS_STORAGE or is_traced:
            args, kwargs = tree_map_only(QTensor, _dequantize, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every op below autograd runs on the dequantized values."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            arguments = func._schema.arguments
            values = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
            if any(
                argument.is_write and isinstance(values[argument.name], QTensor) for argument in arguments
            ):
                raise _read_only(func.__name__)
        args, kwargs = tree_map_only(QTensor, _dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _check_values(weight: Tensor, weight_scale: Tensor, config: Config) -> None:
    if not config.full_range and (weight == -128).any():
        raise ValueError("expected weight in [-127, 127], got -128")
    bad = ~(weight_scale.isfinite() & (weight_scale > 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"expected weight_scale to be finite and positive, got weight_scale[{index}] = "
            f"{weight_scale[index].item()}"
        )


def _read_only(name: str) -> RuntimeError:
    return RuntimeError(
        f"QTensor: {name} would write to a quantized weight, which is read-only; assign a float tensor to "
        "the layer's .weight to quantize it anew"
    )


def tensors_of(w: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """w's tensors, in the order of the op's arguments."""
    return w.packed_weight, w.weight_sum, w.channel_scale


def with_tensor(w: QTensor, name: str, value: Tensor) -> QTensor:
    """w with one of its tensors replaced by another of the same dtype and shape.

    Raises:
        ValueError: for anything else.
    """
    old = getattr(w, name)
    if not isinstance(value, Tensor) or (value.dtype, value.shape) != (old.dtype, old.shape):
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"QLinear: expected {name} to be {old.dtype} {list(old.shape)}, got {got}")
    packed_weight, weight_sum, channel_scale = (
        value if tensor is old else tensor for tensor in tensors_of(w)
    )
    return QTensor(packed_weight, weight_sum, channel_scale, w.config, w.shape, w.dtype)


def weight_scale(w: QTensor) -> Tensor:
    """fp32 [N] per_channel, [1] per_tensor."""
    if w.config.weights == "per_channel":
        return w.channel_scale
    return w.channel_scale[:1].clone() if w.shape[0] else w.channel_scale.new_ones(1)


def dequantize(w: QTensor) -> Tensor:
    """fp32 [N, K] in the original basis."""
    return in_original_basis(_int_repr(w) * w.channel_scale[:, None], w.config)


def in_original_basis(rows: Tensor, config: Config) -> Tensor:
    """Dequantized rows of a weight, fp32 [..., K], without its rotation."""
    block, signs = config.rotation_block, config.rotation_signs
    return rotate_back(rows, block, signs) if block else rows


def pack(
    weight_int8: Tensor, weight_scale: Tensor, config: Config, dtype: torch.dtype, rows: bool = False
) -> QTensor:
    """A QTensor of checked tensors: packed, or in ``rows``."""
    # Copies: what a file or a caller holds is not the layer's memory.
    if rows:
        packed_weight = weight_int8.clone(memory_format=torch.contiguous_format)
        weight_sum = weight_int8.new_empty(0, dtype=torch.int32)
    else:
        packed_weight, weight_sum = _ops.pack_weight(weight_int8, config.full_range)
    channel_scale = (
        weight_scale.detach().expand(weight_int8.shape[0]).clone(memory_format=torch.contiguous_format)
    )
    return QTensor(packed_weight, weight_sum, channel_scale, config, weight_int8.shape, dtype)


def as_packed(w: QTensor) -> QTensor:
    """w, packed for products."""
    return pack(w.packed_weight, weight_scale(w), w.config, w.dtype) if w.is_rows else w


def _unpickle(
    weight_int8: Tensor, weight_scale: Tensor, config: int, dtype: torch.dtype, rows: bool = False
) -> QTensor:
    return QTensor.from_int8(weight_int8, weight_scale, Config.decode(config), dtype, rows)


def _share(w: QTensor) -> tuple[Any, ...]:
    """Reduction for multiprocessing: another process receives the packed weight itself, in shared memory."""
    return QTensor, (w.packed_weight, w.weight_sum, w.channel_scale, w.config, w.shape, w.dtype)


ForkingPickler.register(QTensor, _share)


def _dequantize(w: QTensor) -> Tensor:
    return dequantize(w).to(w.dtype)


def _int_repr(w: QTensor) -> Tensor:
    if w.is_rows:
        return w.packed_weight.clone()
    weight_int8: Tensor = _ops.unpack_weight(w.packed_weight, *w.shape)
    return weight_int8


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QTensor) or isinstance(input, QTensor) or isinstance(bias, QTensor):
        input, weight, bias = tree_map_only(QTensor, _dequantize, (input, weight, bias))
        return F.linear(input, weight, bias)
    if input.dim() and input.shape[-1] != weight.shape[1]:
        expected, got = weight.shape[1], input.shape[-1]
        raise RuntimeError(f"F.linear: expected input.shape[-1] == weight.shape[1] ({expected}), got {got}")
    if bias is not None:
        bias = bias.to(torch.float32)
    config = weight.config.encode(weight.shape[1])
    tensors = weight.packed_weight, weight.weight_sum
    if weight.is_rows:
        tensors = _ops.pack_weight(weight.packed_weight)
    out: Tensor = _ops.linear_dynamic(input, *tensors, weight.channel_scale, bias, config)
    return out


def _to(w: QTensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``: a QTensor as long as the dtype is a float one."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, (str, torch.device)) or type(arg) is int:
            device = arg
    dtype = dtype or w.dtype
    if dtype not in FLOAT_DTYPES:
        return _dequantize(w).to(*args, **kwargs)
    if device is None or torch.device(device) == w.device:
        return with_dtype(w, dtype)
    return to_device(w, lambda tensor: tensor.to(device), dtype)


def with_dtype(w: QTensor, dtype: torch.dtype) -> QTensor:
    """w as a tensor of ``dtype``; w itself if that is its dtype."""
    if dtype == w.dtype:
        return w
    return w.casts[dtype] if dtype in w.casts else _map_tensors(w, lambda tensor: tensor, dtype)


def to_device(w: QTensor, move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QTensor:
    """w as a tensor of ``dtype``, moved by ``move`` and repacked if the device needs another layout."""
    if w.is_rows or move(w.channel_scale[:0]).device.type == w.device.type:
        return _map_tensors(w, move, dtype)
    with torch.no_grad(), torch.inference_mode(False):
        # to_empty returns uninitialized memory, in which -128 may occur.
        lowest = -128 if w.config.full_range else -127
        return pack(move(_int_repr(w)).clamp(min=lowest), move(w.channel_scale), w.config, dtype)


def _map_tensors(w: QTensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QTensor:
    """A QTensor of w's tensors, each after ``function``."""
    with torch.no_grad(), torch.inference_mode(False):
        packed_weight, weight_sum, scale = map(function, (w.packed_weight, w.weight_sum, w.channel_scale))
        return QTensor(packed_weight, weight_sum, scale, w.config, w.shape, dtype)


def _alias(w: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """A new QTensor of the same tensors."""
    if torch.compiler.is_compiling():
        return w
    return _map_tensors(w, lambda tensor: tensor, w.dtype)


def _clone(w: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    """A copy: loading a state_dict writes to the tensors of a layer's weight."""
    if torch.compiler.is_compiling():
        return w
    return _map_tensors(w, Tensor.clone, w.dtype)


def _share_memory(w: QTensor) -> QTensor:
    for tensor in (w.packed_weight, w.weight_sum, w.channel_scale):
        tensor.share_memory_()
    return w


def _without_storage(name: str) -> Callable[..., Any]:
    def method(w: QTensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"QTensor.{name}: a quantized weight has no float memory; .packed_weight, .weight_sum and "
            ".channel_scale hold it, .dequantize() makes a float tensor of it"
        )

    return method


def _q_scale(w: QTensor) -> float | Tensor:
    scale = weight_scale(w)
    return scale.item() if w.config.weights == "per_tensor" else scale[:, None]


def _qscheme(w: QTensor) -> torch.qscheme:
    return torch.per_channel_affine if w.config.weights == "per_channel" else torch.per_tensor_affine


# F.multi_head_attention_forward begins with has_torch_function, which leads back to this table without end.
# The same code without that check reaches F.linear with the QTensor.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

_METHODS: dict[str, Callable[..., Any]] = {
    "int_repr": _int_repr,
    "dequantize": _dequantize,
    "qscheme": _qscheme,
    "q_scale": _q_scale,
    "q_zero_point": lambda w: 0,
    "q_per_channel_scales": lambda w: w.channel_scale,
    "q_per_channel_zero_points": lambda w: torch.zeros_like(w.channel_scale, dtype=torch.int64),
    "q_per_channel_axis": lambda w: 0,
    "to": _to,
    "cpu": lambda w, *args, **kwargs: _to(w, "cpu"),
    "cuda": lambda w, device="cuda", *args, **kwargs: _to(w, device),
    "float": lambda w, *args, **kwargs: _to(w, torch.float32),
    "half": lambda w, *args, **kwargs: _to(w, torch.float16),
    "bfloat16": lambda w, *args, **kwargs: _to(w, torch.bfloat16),
    "double": lambda w, *args, **kwargs: _to(w, torch.float64),
    "contiguous": lambda w, *args, **kwargs: w,
    "detach": _alias,
    "clone": _clone,
    "size": lambda w, dim=None: w.shape if dim is None else w.shape[dim],
    "dim": lambda w: 2,
    "numel": lambda w: w.shape.numel(),
    "is_floating_point": lambda w: True,
    "is_contiguous": lambda w, memory_format=torch.contiguous_format: True,
    "stride": lambda w, dim=None: (w.shape[1], 1) if dim is None else (w.shape[1], 1)[dim],
    "storage_offset": lambda w: 0,
    "element_size": lambda w: w.dtype.itemsize,
    "t": lambda w: _dequantize(w).t(),
    "share_memory_": _share_memory,
    "is_shared": lambda w: w.packed_weight.is_shared(),
    **{name: _without_storage(name) for name in ("data_ptr", "storage", "untyped_storage", "_typed_storage")},
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {F.linear: _linear, F.multi_head_attention_forward: _attention}
for _name, _method in _METHODS.items():
    # torch.compile traces methods of a subclass only if they are written in Python.
    setattr(QTensor, _name, _method)
    # torch.cpu and torch.cuda are modules.
    FUNCTIONS |= {
        function: _method for owner in (torch, Tensor) if callable(function := getattr(owner, _name, None))
    }
_NEEDS_STORAGE = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}


def _method_of_values(name: str) -> Callable[..., Any]:
    def method(w: QTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(_dequantize(w), name)(*args, **kwargs)

    return method


def _method_that_writes(name: str) -> Callable[..., Any]:
    def method(w: QTensor, *args: Any, **kwargs: Any) -> Any:
        raise _read_only(name)

    return method


def _add_methods() -> None:
    """Every method of Tensor that reads or writes values, in Python, for torch.compile."""
    own = vars(QTensor).keys() | _METHODS.keys() | WITHOUT_VALUES
    for name in dir(Tensor):
        is_public = not name.startswith("_") or name in OPERATORS
        if is_public and name not in own and callable(getattr(Tensor, name)):
            writes = name.endswith("_") and name not in OPERATORS
            setattr(QTensor, name, _method_that_writes(name) if writes else _method_of_values(name))
    QTensor.__hash__ = Tensor.__hash__  # type: ignore[method-assign]


_add_methods()
