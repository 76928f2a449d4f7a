"""QLinear: nn.Linear with int8 weights and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from ..config import Config, layer_config
from ..own_thread import on_own_thread
from ..patterns.activations import apply_float
from ..patterns.hugging_face import CONV1D
from ..patterns.registry import type_name
from ..qtensor import (
    FLOAT_WORDS,
    QTensor,
    as_packed,
    dequantize,
    tensors_of,
    to_device,
    weight_scale,
    with_tensor,
)
from ..reference import FLOAT_DTYPES
from . import tied
from .fused_activation import WithActivation
from .layouts import is_dense, of_nested, refusal
from .module import OpCall
from .names import LinearNames
from .state import (
    check_activation_qparams,
    check_bias,
    check_entries,
    check_loaded_bias,
    check_not_rotated,
    check_origin,
    for_autograd,
    format_entry,
    is_float_weight,
    missing_entries,
    quantized,
    read_activation_qparams,
    read_weight,
    warn_of_float_weights,
    warn_of_meta,
    weight_entries,
)

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_static = torch.ops.dynquant.linear_static.default

_PACKED = ("packed_weight", "weight_sum", "channel_scale")
"""Non-persistent buffers: the tensors of ``.weight``, in the order of the op's arguments."""
_QPARAMS = ("activation_scale", "activation_zero_point")
"""Buffers of a static layer, None in others."""


class QLinear(WithActivation, LinearNames):
    """nn.Linear in int8: y = epilogue(x @ weight.T + bias), weights quantized once, x at each call.

    A new layer is initialized as nn.Linear is. Casts (``.half()``, ``.to(dtype)``) change the dtype that
    ``.weight`` shows, and the bias as nn.Linear's; the op computes with it in fp32. Scales stay fp32, and
    inputs of every float dtype are accepted.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        activations: ``"per_token"`` (qparams for each row of x) or ``"per_tensor"``.
        weights: ``"per_channel"`` (a scale for each output) or ``"per_tensor"``.
        rotation: None, ``"hadamard"`` or a block size, see :func:`dynquant.config.layer_config`.
        epilogue: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or
            ``"quick_gelu"``.

    Attributes:
        weight: the :class:`dynquant.QTensor` [N, K]. Assigning a float tensor quantizes that one instead.
        weight_scale: fp32 [N], [1] per_tensor.
        bias: float Parameter [N], or None.
        activation_scale, activation_zero_point: fp32 and int32 [1], the qparams of every input if the
            layer is static (see :func:`dynquant.freeze`), else None: qparams come from each input.
        config: the :class:`dynquant.Config` in use.
        packed_weight, weight_sum, channel_scale: the tensors of ``.weight``, as buffers that the state_dict
            does not hold.

    Shape:
        input [..., K] of float32, bfloat16, float16 or float64 -> [..., N] of the same dtype (under autocast:
        of the autocast dtype). A nested tensor, jagged or strided, gives one of the same layout.

    Raises:
        ValueError: for scheme words that do not exist.
        RuntimeError: for an input of another shape, dtype or device.
    """

    if TYPE_CHECKING:  # at run time torch.jit.script would read them as its own types
        in_features: int
        out_features: int
        weight: QTensor
        bias: nn.Parameter | None
        packed_weight: Tensor
        weight_sum: Tensor
        channel_scale: Tensor
        activation_scale: Tensor | None
        activation_zero_point: Tensor | None
        _packed: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, int]
        _code: int

    __jit_ignored_attributes__ = ("weight", "_packed", "fused_activation")

    has_static_form = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
        epilogue: str = "none",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = layer_config(in_features, activations, weights, rotation, epilogue)
        self._init_from(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), config)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
        epilogue: str = "none",
    ) -> QLinear:
        """Quantize an nn.Linear, which does not change.

        Raises:
            TypeError: for any other type.
            ValueError: for scheme words that do not exist, a weight that is not float32, bfloat16, float16 or
                float64, a NaN or an infinity in the weight, a NaN in the bias.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QLinear.from_float: expected an nn.Linear, got {type(linear).__name__}")
        config = layer_config(linear.in_features, activations, weights, rotation, epilogue)

        def make() -> QLinear:
            if linear.bias is not None:
                check_bias(linear.bias)
            layer = cls.__new__(cls)
            nn.Module.__init__(layer)
            layer._init_from(linear, config)
            return layer.train(linear.training)

        return on_own_thread(linear.parameters(), make)

    def _init_from(self, linear: nn.Linear, config: Config) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = linear.bias
        if bias is not None:
            with torch.inference_mode(False):
                copy = bias.detach().clone(memory_format=torch.contiguous_format)
                bias = nn.Parameter(copy, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self.register_buffer("activation_scale", None)
        self.register_buffer("activation_zero_point", None)
        self._set_weight(quantized(linear.weight, config), config)

    def _set_weight(self, weight: QTensor, config: Config) -> None:
        expected, got = [self.out_features, self.in_features], list(weight.shape)
        if got != expected:
            raise ValueError(f"QLinear: expected a weight of shape {expected}, got {got}")
        weight = as_packed(weight)
        scale, zero_point = self.activation_scale, self.activation_zero_point
        qparams = None if scale is None or zero_point is None else (scale, zero_point)
        if qparams is not None:
            check_not_rotated(config)
        # Sizes, broadcasts and devices of a model are read from its buffers. They come before the activation
        # qparams: torch.export miscounts the buffers after one that is None.
        others = {name: buffer for name, buffer in self._buffers.items() if name not in _PACKED}
        self.__dict__["_buffers"] = dict(zip(_PACKED, tensors_of(weight), strict=True)) | others
        self._non_persistent_buffers_set.update(_PACKED)
        config = replace(config, full_range=weight.config.full_range)
        # All arguments of the op but x and bias in one tuple: a forward call has one attribute to look up.
        self.__dict__["weight"] = weight
        self.__dict__["_packed"] = (
            *tensors_of(weight),
            qparams,
            config.encode(self.in_features),
        )
        self.__dict__["_code"] = self._packed[-1]

    def set_activation_qparams(self, scale: Tensor | None, zero_point: Tensor | None) -> None:
        """Make the layer static, with these qparams for every input; None for both: dynamic again.

        Args:
            scale, zero_point: fp32 and int32 [1], on the layer's device.

        Raises:
            ValueError: for another shape or dtype, a scale that is not finite and positive, a zero_point
                beyond [-128, 127], a layer that rotates its input.
        """
        if scale is not None and zero_point is not None:
            check_activation_qparams(scale, zero_point)
            check_not_rotated(self.config)
            for name, value in zip(_QPARAMS, (scale, zero_point), strict=True):
                if value.device != self.weight.device:
                    device = self.weight.device
                    raise ValueError(f"QLinear: expected {name} on {device}, got it on {value.device}")
        elif scale is not None or zero_point is not None:
            raise ValueError("QLinear: expected both of scale and zero_point or none of them")
        self._set_qparams(None if scale is None or zero_point is None else (scale, zero_point))
        self._set_weight(self.weight, self.config)

    def _set_qparams(self, qparams: tuple[Tensor, Tensor] | None) -> None:
        """Checked ones; :meth:`_set_weight` has them used."""
        scale, zero_point = (None, None) if qparams is None else map(for_autograd, qparams)
        self._buffers["activation_scale"], self._buffers["activation_zero_point"] = scale, zero_point

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKED:
            self._set_weight(with_tensor(self.weight, name, value), self.config)
        elif name in _QPARAMS and name in self.__dict__.get("_buffers", ()):
            qparams = {other: self._buffers[other] for other in _QPARAMS} | {name: value}
            self.set_activation_qparams(*qparams.values())
        elif name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, QTensor):
            weight, own = value.config, self.config
            self._set_weight(value, replace(weight, activations=own.activations, epilogue=own.epilogue))
        elif isinstance(value, Tensor):
            self._set_weight(quantized(value, self.config), self.config)
        else:
            raise TypeError(f"QLinear: expected a tensor for .weight, got {type(value).__name__}")

    def forward(self, input: Tensor) -> Tensor:
        fused = self.fused_activation
        if fused is not None and not torch.compiler.is_compiling() and not fused.is_intact():
            fused.dissolve()
        packed_weight, weight_sum, weight_scale, qparams, config = self._packed
        try:
            # Parameters and buffers are looked up where torch.func.functional_call and the like replace them.
            bias = self._parameters["bias"]
            if qparams is None:
                return _linear_dynamic(input, packed_weight, weight_sum, weight_scale, bias, config)
            scale, zero_point = self._buffers["activation_scale"], self._buffers["activation_zero_point"]
            return _linear_static(
                input, packed_weight, weight_sum, weight_scale, bias, scale, zero_point, config
            )
        except (AttributeError, RuntimeError) as error:  # the reference reads attributes before it checks
            if isinstance(input, Tensor) and input.is_nested:
                return of_nested(self, input)
            raise self._explain(input, error) from None

    def _forward_in_torch_script(self, input: Tensor) -> Tensor:
        """:meth:`forward` for torch.jit.script, which knows no ``try`` and no ``_parameters``."""
        scale, zero_point = self.activation_scale, self.activation_zero_point
        if scale is not None and zero_point is not None:
            return torch.ops.dynquant.linear_static(
                input,
                self.packed_weight,
                self.weight_sum,
                self.channel_scale,
                self.bias,
                scale,
                zero_point,
                self._code,
            )
        return torch.ops.dynquant.linear_dynamic(
            input, self.packed_weight, self.weight_sum, self.channel_scale, self.bias, self._code
        )

    # torch.jit.script compiles the source of a method, which inspect finds here. __prepare_scriptable__ would
    # put other modules in place of the layers, in the eager model too.
    forward.__wrapped__ = _forward_in_torch_script  # type: ignore[attr-defined]

    def _explain(self, x: Tensor, error: Exception) -> Exception:
        """The op's error; in terms of the layer if x is at fault."""
        if not isinstance(x, Tensor):
            return TypeError(f"QLinear: expected input to be a tensor, got {type(x).__name__}")
        if not is_dense(x):
            return RuntimeError(refusal(x))
        if x.dtype not in FLOAT_DTYPES:
            return RuntimeError(f"QLinear: expected input of dtype {FLOAT_WORDS}, got {x.dtype}")
        if x.dim() == 0:
            return RuntimeError("QLinear: expected input with at least 1 dimension, got a scalar")
        if x.device != self.weight.device:
            return RuntimeError(
                f"QLinear: expected input on {self.weight.device}, where the weight is, got it on {x.device}"
            )
        if x.shape[-1] != self.in_features:
            return RuntimeError(
                f"QLinear: expected input.shape[-1] == in_features ({self.in_features}), got {x.shape[-1]}"
            )
        return error

    @property
    def config(self) -> Config:
        return Config.decode(self._packed[-1])

    @property
    def is_static(self) -> bool:
        return self._packed[3] is not None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def quantized_weights(self) -> dict[str, QTensor]:
        return {"weight": self.weight}

    def expected(self, float_module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = float_module.forward(*args, **kwargs)
        return apply_float(self.config.epilogue, y)

    def fits(self, float_module: nn.Module) -> bool:
        weight = getattr(float_module, "weight", None)
        if not isinstance(weight, Tensor):
            return False
        is_transposed = type_name(float_module) == CONV1D
        return tuple(weight.shape) == self.matrix_shape[:: -1 if is_transposed else 1]

    @property
    def takes_epilogue(self) -> bool:
        return self.config.epilogue == "none"

    def set_epilogue(self, epilogue: str) -> None:
        self._set_weight(self.weight, replace(self.config, epilogue=epilogue))

    @property
    def is_mergeable(self) -> bool:
        return type(self) is QLinear

    def why_not_static(self) -> str | None:
        block = self.config.rotation_block
        if not block:
            return None
        return (
            f"rotates its input (rotation=hadamard({block})), and a static range would be of the input before"
        )

    def op_call(self) -> OpCall | None:
        if type(self).forward is not QLinear.forward:
            return None
        *weight, qparams, config = self._packed
        names = ("packed_weight", "weight_sum", "weight_scale")
        constants: dict[str, Tensor | None] = {**dict(zip(names, weight, strict=True)), "bias": self.bias}
        if qparams is None:
            return OpCall(_linear_dynamic, constants, config)
        return OpCall(_linear_static, constants | dict(zip(_QPARAMS, qparams, strict=True)), config)

    @property
    def weight_scale(self) -> Tensor:
        return weight_scale(self.weight)

    def dequantize_weight(self) -> Tensor:
        """The values of the int8 weight: fp32 [N, K], in the original basis also if the config rotates."""
        return dequantize(self.weight)

    def to_float(self) -> nn.Linear:
        """An nn.Linear that computes the same without quantized activations, in the dtype of ``.weight``.

        Raises:
            RuntimeError: if the layer has an epilogue, which nn.Linear cannot hold.
        """
        if self.config.epilogue != "none":
            raise RuntimeError(
                f"QLinear.to_float: the layer ends in {self.config.epilogue!r}, which nn.Linear cannot hold"
            )
        dtype = self.weight.dtype
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.dequantize_weight().to(dtype))
        if self.bias is not None:
            copy = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(copy, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        config = self.config
        activations = config.activations
        if self.activation_scale is not None and self.activation_zero_point is not None:
            activations = "static"
            if self.activation_scale.device.type != "meta":
                scale, zero_point = self.activation_scale.item(), self.activation_zero_point.item()
                activations += f"(scale={scale:.4g}, zero_point={zero_point})"
        scheme = f"activations={activations}, weights={config.weights}"
        scheme += config.rotation_text
        if config.epilogue != "none":
            scheme += f", epilogue={config.epilogue}"
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """Implements ``.to``, ``.cuda``, ``.half``, ``.to_empty`` …: moves all tensors, casts the bias."""

        @torch.inference_mode(False)
        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            # Memory formats are for images: a packed weight has four dimensions too.
            return out.contiguous() if out.dtype == tensor.dtype else tensor.to(out.device)

        dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"QLinear: expected a cast to {FLOAT_WORDS}, got {dtype}")
        weight = tied.replaced(self.weight, fn, lambda: to_device(self.weight, move, dtype))
        for name in _PACKED:
            del self._buffers[name]
        own = {id(tensor) for tensor in (self.activation_scale, self.activation_zero_point)}
        try:
            if recurse:
                for child in self.children():
                    child._apply(fn)
            super()._apply(lambda tensor: (move if id(tensor) in own else fn)(tensor), recurse=False)
        finally:
            self._set_weight(weight, self.config)
        return self

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: buffer for name, buffer in self._buffers.items() if name not in _PACKED}
        state = {**self.__dict__, "_buffers": buffers, "_packed": self.config.encode()}
        del state["_code"]
        state.pop("fused_activation", None)  # which knows this layer, and the module around both
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_weight(self.weight, Config.decode(state["_packed"]))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"], destination[prefix + "weight_scale"] = weight_entries(self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("activation_scale", "activation_zero_point"):
            if prefix + name in destination:
                destination[prefix + name] = destination[prefix + name].clone()
        destination[prefix + "format"] = format_entry(self.weight.dtype, self.config)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the weight whole or not at all; quantizes a float weight, of an unquantized model. The layer
        becomes static or dynamic as the saved one was."""
        entries = {name: state_dict.get(prefix + name) for name in ("weight", "weight_scale", "format")}
        assign = local_metadata.get("assign_to_params_buffers", False)
        on_meta = self.weight.device.type == "meta"
        device = None if assign else self.weight.device

        def read() -> tuple[tuple[QTensor, Config] | None, tuple[Tensor, Tensor] | None]:
            check_origin(state_dict, prefix)
            check_entries(state_dict, prefix, meta=assign or on_meta)
            missing = missing_entries(entries)
            missing_keys.extend(prefix + name for name in missing)
            loaded = None
            if not missing:
                loaded = read_weight(entries, like=self.weight, config=self.config, device=device)
            config = self.config if loaded is None else loaded[1]
            qparams = read_activation_qparams(state_dict, prefix, config, self._packed[3], device)
            check_loaded_bias(state_dict, prefix, self.bias)
            return loaded, qparams

        tensors = [value for value in entries.values() if isinstance(value, Tensor)]
        try:
            loaded, qparams = on_own_thread(tensors, read)
        except (ValueError, RuntimeError, TypeError) as error:
            error_msgs.append(f"QLinear {prefix.removesuffix('.')!r}: {error}")
            return

        if loaded is not None and is_float_weight(entries):
            warn_of_float_weights(error_msgs)
        if loaded is not None and on_meta and not assign and tensors[0].device.type != "meta":
            warn_of_meta(prefix + "weight")
        if loaded is not None or qparams is not None:
            weight, config = self.weight, self.config
            if loaded is not None:
                weight, config = tied.loaded(weight, loaded[0], error_msgs, assign), loaded[1]
            self._set_qparams(qparams)
            self._set_weight(weight, config)
        bias = state_dict.get(prefix + "bias")
        if bias is not None and self.bias is not None and not is_float_weight(entries):
            # As the dtype of .weight, that of the bias is the saved layer's: no bit of it is lost.
            self.bias.data = self.bias.data.to(bias.dtype)
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys.extend(key for key in unexpected if key.removeprefix(prefix) not in entries)
        self._set_weight(self.weight, self.config)
