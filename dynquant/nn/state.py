"""The state_dict formats of quantized layers: entries, their loading, and checks of a layer's tensors.

Format 1: ``weight`` int8 [N, K], ``weight_scale`` fp32 [N] or [1], ``bias`` fp32 [N] if the layer has one,
and ``format`` int64 [4]: (version, config, 1 + index in FLOAT_DTYPES of the dtype of ``.weight``, 0). A
static layer has ``activation_scale`` fp32 [1] and ``activation_zero_point`` int32 [1] as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..qtensor import QTensor, shown, weight_scale
from ..reference import FLOAT_DTYPES

FORMAT_VERSION = 1


def weight_entries(weight: QTensor) -> tuple[Tensor, Tensor]:
    """The entries ``weight`` and ``weight_scale``."""
    scale = weight_scale(weight)
    if scale.untyped_storage().nbytes() != scale.nbytes:  # a slice, which safetensors' save_model refuses
        scale = scale.clone()
    return weight.int_repr(), scale


def format_entry(dtype: torch.dtype, config: Config) -> Tensor:
    """The entry ``format``, for a weight that shows ``dtype``."""
    entry = [FORMAT_VERSION, config.encode(), 1 + FLOAT_DTYPES.index(dtype), 0]
    return torch.tensor(entry, device="cpu")


def is_float_weight(entries: Mapping[str, Any]) -> bool:
    """Whether the entries are those of an unquantized layer: a float ``weight`` alone."""
    weight = entries["weight"]
    alone = entries["weight_scale"] is None and entries["format"] is None
    return weight is not None and weight.is_floating_point() and alone


def read_weight(
    entries: Mapping[str, Any],
    bias: Tensor | None,
    *,
    like: QTensor,
    config: Config,
    device: torch.device | None,
) -> tuple[QTensor, Config]:
    """The weight that a state_dict holds, packed on ``device`` (None: where it is), and its scheme.

    Args:
        entries: ``weight``, ``weight_scale`` and ``format``; the last two are None for a float weight.
        bias: of the state_dict, None if it has none.
        like, config: the weight and scheme of the layer that loads.

    Raises:
        ValueError: for entries that do not fit the layer.
    """
    weight, scale, format = entries["weight"], entries["weight_scale"], entries["format"]
    if list(weight.shape) != list(like.shape):
        raise ValueError(f"expected weight of shape {list(like.shape)}, got {list(weight.shape)}")
    if bias is not None:
        check_bias(bias)
    if scale is None or format is None:
        warnings.warn(
            "QLinear: the state_dict holds float weights, of an unquantized model: quantizing them",
            stacklevel=2,
        )
        return shown(quantized(weight.to(device), config), like.dtype), config
    if format.dtype != torch.int64 or list(format.shape) != [4]:
        raise ValueError(f"expected format to be int64 [4], got {format.dtype} {list(format.shape)}")
    version, code, dtype, reserved = format.tolist()
    if version != FORMAT_VERSION or reserved or not 1 <= dtype <= len(FLOAT_DTYPES):
        raise ValueError(
            f"format {format.tolist()} is not one that this dynquant reads (version {FORMAT_VERSION}); "
            "a newer dynquant may have written it"
        )
    saved = Config.decode(code)
    if saved.encode() != code:
        raise ValueError(f"config {code} has bits that no file holds")
    if saved.epilogue != config.epilogue:
        raise ValueError(f"expected epilogue {config.epilogue!r}, got {saved.epilogue!r}")
    if bias is not None and bias.dtype != torch.float32:
        raise ValueError(f"expected bias of dtype torch.float32, got {bias.dtype}")
    return QTensor.from_int8(weight.to(device), scale.to(device), saved, FLOAT_DTYPES[dtype - 1]), saved


def read_activation_qparams(
    state_dict: Mapping[str, Any], prefix: str, config: Config, device: torch.device | None
) -> tuple[Tensor | None, Tensor | None]:
    """Empty tensors to load the qparams of a static layer into; None for both if the saved layer is dynamic.

    Raises:
        ValueError: for qparams that are not valid or do not go with ``config``.
    """
    scale = state_dict.get(prefix + "activation_scale")
    zero_point = state_dict.get(prefix + "activation_zero_point")
    if scale is None and zero_point is None:
        return None, None
    if scale is None or zero_point is None:
        raise ValueError("expected activation_scale and activation_zero_point together, got one of them")
    check_activation_qparams(scale, zero_point)
    check_not_rotated(config)
    return torch.empty_like(scale, device=device), torch.empty_like(zero_point, device=device)


def check_not_rotated(config: Config) -> None:
    """The config of a static layer."""
    if config.rotation_block:
        raise ValueError(
            f"expected a static layer to have no rotation, got rotation=hadamard({config.rotation_block}): "
            "its qparams are of the input itself, not of the rotated one"
        )


def check_activation_qparams(scale: Tensor, zero_point: Tensor) -> None:
    """fp32 and int32 [1], finite and positive, in [-128, 127]."""
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


def quantized(weight: Tensor, config: Config) -> QTensor:
    """:meth:`QTensor.quantize` with a ValueError that does not name the op."""
    try:
        return QTensor.quantize(weight, config)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("quantize_weight: ")) from None


def check_bias(bias: Tensor) -> None:
    """A NaN in the bias is a fault; an infinity may be meant, to rule an output out."""
    if bias.device.type != "meta" and bias.isnan().any():
        raise ValueError(f"expected bias without NaN, got nan at bias{bias.isnan().nonzero()[0].tolist()}")
