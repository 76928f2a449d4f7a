"""QLinear: nn.Linear with int8 weights and activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MAX_ROTATION_BLOCK, Config, rotation_block
from ..qtensor import FLOAT_WORDS, QTensor, dequantize, moved, shown, weight_scale
from ..reference import FLOAT_DTYPES

FORMAT_VERSION = 1

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_static = torch.ops.dynquant.linear_static.default


def layer_config(
    in_features: int, activations: str, weights: str, rotation: str | int | None, epilogue: str = "none"
) -> Config:
    """The Config of a layer from the words that users write.

    Args:
        rotation: None, ``"hadamard"`` or a block size; the block becomes the largest power of two that
            divides ``in_features`` and is at most that size (128 for ``"hadamard"``).

    Raises:
        ValueError: for a word or a block size that is not among these.
    """
    sizes = [1 << i for i in range(MAX_ROTATION_BLOCK.bit_length())]
    if rotation is None:
        block = 0
    elif rotation == "hadamard":
        block = rotation_block(in_features)
    elif type(rotation) is int and rotation in sizes:
        block = min(rotation, rotation_block(in_features))
    else:
        raise ValueError(
            f"dynquant: expected rotation to be None, 'hadamard' or one of {sizes}, got {rotation!r}"
        )
    return Config(activations, weights, block, epilogue)


class QLinear(nn.Module):
    """nn.Linear in int8: y = epilogue(x @ weight.T + bias), weights quantized once, x at each call.

    A fresh layer is initialised as nn.Linear would be. Casts (``.half()``, ``.to(dtype)``) change the dtype
    that ``.weight`` shows and nothing else: scales and bias stay fp32, and an input of any float dtype is
    welcome.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        activations: ``"per_token"`` (qparams for each row of x) or ``"per_tensor"``.
        weights: ``"per_channel"`` (a scale for each output) or ``"per_tensor"``.
        rotation: None, ``"hadamard"`` or a block size, see :func:`layer_config`.
        epilogue: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Attributes:
        weight: the :class:`dynquant.QTensor` [N, K]. Assigning a float tensor quantizes that one instead.
        weight_scale: fp32 [N], [1] per_tensor.
        bias: fp32 Parameter [N], or None.
        activation_scale, activation_zero_point: fp32 and int32 [1], the qparams of every input where the
            layer is static (see :func:`dynquant.freeze`), else None: qparams come from each input.
        config: the :class:`dynquant.Config` that runs.

    Shape:
        x [..., K] of float32, bfloat16, float16 or float64 -> [..., N] of the same dtype (under autocast: of
        the autocast dtype).

    Raises:
        ValueError: for scheme words that do not exist.
        RuntimeError: for an input of another shape, dtype or device.
    """

    in_features: int
    out_features: int
    weight: QTensor
    bias: nn.Parameter | None
    activation_scale: Tensor | None
    activation_zero_point: Tensor | None
    _packed: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, int]

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
        """Quantize an nn.Linear, which stays as it is.

        Raises:
            TypeError: where ``linear`` is no nn.Linear.
            ValueError: for scheme words that do not exist, a weight that is not float32, bfloat16, float16 or
                float64, a NaN or an infinity in the weight, a NaN in the bias.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QLinear.from_float: expected an nn.Linear, got {type(linear).__name__}")
        if linear.bias is not None:
            _check_bias(linear.bias)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init_from(linear, layer_config(linear.in_features, activations, weights, rotation, epilogue))
        return layer.train(linear.training)

    def _init_from(self, linear: nn.Linear, config: Config) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = linear.bias
        if bias is not None:
            with torch.inference_mode(False):
                copy = bias.detach().to(torch.float32, copy=True)
                bias = nn.Parameter(copy, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)
        self.register_buffer("activation_scale", None)
        self.register_buffer("activation_zero_point", None)
        self._set_weight(_quantized(linear.weight, config), config)

    def _set_weight(self, weight: QTensor, config: Config) -> None:
        expected = (self.out_features, self.in_features)
        if weight.shape != expected:
            got = list(weight.shape)
            raise ValueError(f"QLinear: expected a weight of shape {list(expected)}, got {got}")
        scale, zero_point = self.activation_scale, self.activation_zero_point
        qparams = None if scale is None or zero_point is None else (scale, zero_point)
        if qparams is not None:
            _check_not_rotated(config)
        # All that the op takes in one tuple: the forward call looks up one thing.
        self.__dict__["weight"] = weight
        self.__dict__["_packed"] = (
            weight.packed_weight,
            weight.weight_sum,
            weight.channel_scale,
            qparams,
            config.encode(self.in_features),
        )

    def set_activation_qparams(self, scale: Tensor | None, zero_point: Tensor | None) -> None:
        """Make the layer static, with these qparams for every input; None for both: dynamic again.

        Args:
            scale, zero_point: fp32 and int32 [1], on the layer's device.

        Raises:
            ValueError: for another shape or dtype, a scale that is not finite and positive, a zero_point
                beyond [-128, 127], a layer that rotates its input.
        """
        if scale is not None and zero_point is not None:
            _check_activation_qparams(scale, zero_point)
            _check_not_rotated(self.config)
        elif scale is not None or zero_point is not None:
            raise ValueError("QLinear: expected both of scale and zero_point or none of them")
        self.activation_scale, self.activation_zero_point = scale, zero_point
        self._set_weight(self.weight, self.config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, QTensor):
            config = value.config
            config = replace(self.config, weights=config.weights, rotation_block=config.rotation_block)
            self._set_weight(value, config)
        elif isinstance(value, Tensor):
            self._set_weight(_quantized(value, self.config), self.config)
        else:
            raise TypeError(f"QLinear: expected a tensor for .weight, got {type(value).__name__}")

    def forward(self, x: Tensor) -> Tensor:
        packed_weight, weight_sum, weight_scale, qparams, config = self._packed
        try:
            # bias is looked up where torch.func.functional_call and the like replace it.
            bias = self._parameters["bias"]
            if qparams is None:
                return _linear_dynamic(x, packed_weight, weight_sum, weight_scale, bias, config)
            return _linear_static(x, packed_weight, weight_sum, weight_scale, bias, *qparams, config)
        except (AttributeError, RuntimeError) as error:  # the reference reads attributes before it checks
            raise self._explain(x, error) from None

    def _explain(self, x: Tensor, error: Exception) -> Exception:
        """The error of the op in the words of the layer, where x is at fault."""
        if not isinstance(x, Tensor):
            return TypeError(f"QLinear: expected input to be a tensor, got {type(x).__name__}")
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
    def weight_scale(self) -> Tensor:
        return weight_scale(self.weight)

    def dequantize_weight(self) -> Tensor:
        """The weight that is computed with: fp32 [N, K], in the original basis where the config rotates."""
        return dequantize(self.weight)

    def to_float(self) -> nn.Linear:
        """An nn.Linear that computes the same without quantized activations, in the dtype of ``.weight``.

        Raises:
            RuntimeError: where the layer ends in an epilogue, which nn.Linear has no place for.
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
        if config.rotation_block:
            scheme += f", rotation=hadamard({config.rotation_block})"
        if config.epilogue != "none":
            scheme += f", epilogue={config.epilogue}"
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """What ``.to``, ``.cuda``, ``.half``, ``.to_empty`` … end in: moves everything, casts nothing."""

        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"QLinear: expected a cast to {FLOAT_WORDS}, got {dtype}")
        super()._apply(move, recurse)
        self._set_weight(moved(self.weight, move, dtype), self.config)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": self.config.encode()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_weight(self.weight, Config.decode(state["_packed"]))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Format 1: ``weight`` int8 [N, K], ``weight_scale`` fp32 [N] or [1], ``bias`` fp32 [N] if any, and
        ``format`` int64 [4]: (version, config, 1 + index in FLOAT_DTYPES of the dtype of ``.weight``, 0). A
        static layer has ``activation_scale`` fp32 [1] and ``activation_zero_point`` int32 [1] besides."""
        destination[prefix + "weight"] = self.weight.int_repr()
        scale = self.weight_scale
        if scale.untyped_storage().nbytes() != scale.nbytes:  # a slice, which safetensors' save_model refuses
            scale = scale.clone()
        destination[prefix + "weight_scale"] = scale
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dtype = 1 + FLOAT_DTYPES.index(self.weight.dtype)
        scheme = [FORMAT_VERSION, self.config.encode(), dtype, 0]
        destination[prefix + "format"] = torch.tensor(scheme, device="cpu")

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
        """The weight is loaded whole or not at all; a float one, of an unquantized model, is quantized. The
        layer becomes static or dynamic as the one was that is loaded."""
        own: dict[str, Any] = {
            name: state_dict.get(prefix + name) for name in ("weight", "weight_scale", "format")
        }
        missing = [name for name, value in own.items() if value is None]
        of_float_model = own["weight"] is not None and own["weight"].is_floating_point() and len(missing) == 2
        loaded: tuple[QTensor, Config] | None = None
        if missing and not of_float_model:
            missing_keys.extend(prefix + name for name in missing)
        else:
            try:
                assign = local_metadata.get("assign_to_params_buffers", False)
                device = None if assign else self.weight.device
                loaded = self._read(**own, bias=state_dict.get(prefix + "bias"), device=device)
                qparams = self._read_qparams(state_dict, prefix, loaded[1], device)
            except ValueError as error:
                error_msgs.append(f"QLinear {prefix.removesuffix('.')!r}: {error}")
                return

        if loaded is not None:
            self.activation_scale, self.activation_zero_point = qparams
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys.extend(key for key in unexpected if key.removeprefix(prefix) not in own)
        if loaded is not None:
            self._set_weight(*loaded)

    def _read(
        self,
        weight: Tensor,
        weight_scale: Tensor | None,
        format: Tensor | None,
        bias: Tensor | None,
        device: torch.device | None,
    ) -> tuple[QTensor, Config]:
        """The weight that a state_dict holds, packed on ``device`` (None: where it is), and the scheme.

        ValueError in words for what does not fit this layer.
        """
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected:
            raise ValueError(f"expected weight of shape {expected}, got {list(weight.shape)}")
        if bias is not None:
            _check_bias(bias)
        if weight_scale is None or format is None:
            warnings.warn(
                "QLinear: the state_dict holds float weights, of an unquantized model: quantizing them",
                stacklevel=2,
            )
            return shown(_quantized(weight.to(device), self.config), self.weight.dtype), self.config
        if format.dtype != torch.int64 or list(format.shape) != [4]:
            raise ValueError(f"expected format to be int64 [4], got {format.dtype} {list(format.shape)}")
        version, code, dtype, reserved = format.tolist()
        if version != FORMAT_VERSION or reserved or not 1 <= dtype <= len(FLOAT_DTYPES):
            raise ValueError(
                f"format {format.tolist()} is not one that this dynquant reads (version {FORMAT_VERSION}); "
                "a newer dynquant may have written it"
            )
        config = Config.decode(code)
        if config.encode() != code:
            raise ValueError(f"config {code} has bits that no file holds")
        if config.epilogue != self.config.epilogue:
            raise ValueError(f"expected epilogue {self.config.epilogue!r}, got {config.epilogue!r}")
        if bias is not None and bias.dtype != torch.float32:
            raise ValueError(f"expected bias of dtype torch.float32, got {bias.dtype}")
        weight, weight_scale = weight.to(device), weight_scale.to(device)
        return QTensor.from_int8(weight, weight_scale, config, FLOAT_DTYPES[dtype - 1]), config

    def _read_qparams(
        self, state_dict: dict[str, Any], prefix: str, config: Config, device: torch.device | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Room for the qparams of a static layer where a state_dict holds them, which must be sound."""
        scale = state_dict.get(prefix + "activation_scale")
        zero_point = state_dict.get(prefix + "activation_zero_point")
        if scale is None and zero_point is None:
            return None, None
        if scale is None or zero_point is None:
            raise ValueError("expected activation_scale and activation_zero_point together, got one of them")
        _check_activation_qparams(scale, zero_point)
        _check_not_rotated(config)
        return torch.empty_like(scale, device=device), torch.empty_like(zero_point, device=device)


def _check_not_rotated(config: Config) -> None:
    if config.rotation_block:
        raise ValueError(
            f"expected a static layer to have no rotation, got rotation=hadamard({config.rotation_block}): "
            "its qparams are of the input itself, not of the rotated one"
        )


def _check_activation_qparams(scale: Tensor, zero_point: Tensor) -> None:
    for name, value, dtype in (
        ("activation_scale", scale, torch.float32),
        ("activation_zero_point", zero_point, torch.int32),
    ):
        if value.dtype != dtype or list(value.shape) != [1]:
            raise ValueError(
                f"expected {name} to be {dtype} of shape [1], got {value.dtype} of shape {list(value.shape)}"
            )
    if scale.device.type != "meta":
        if not (scale.isfinite() & (scale > 0)).item():
            raise ValueError(f"expected activation_scale to be finite and positive, got {scale.item()}")
        if not -128 <= zero_point.item() <= 127:
            raise ValueError(f"expected activation_zero_point in [-128, 127], got {zero_point.item()}")


def _quantized(weight: Tensor, config: Config) -> QTensor:
    try:
        return QTensor.quantize(weight, config)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("quantize_weight: ")) from None


def _check_bias(bias: Tensor) -> None:
    """A NaN in the bias is a fault; an infinity may be meant, to rule an output out."""
    if bias.device.type != "meta" and bias.isnan().any():
        raise ValueError(f"expected bias without NaN, got nan at bias{bias.isnan().nonzero()[0].tolist()}")
