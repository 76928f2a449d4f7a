"""The state_dict formats of quantized layers: entries, their loading, and checks of a layer's tensors.

Format 2: ``weight`` int8 [N, K, 1], ``weight_scale`` fp32 [N] or [1], ``bias`` [N] of any float dtype if the
layer has one, and ``format`` int64 [4]: (version, config, 1 + index in FLOAT_DTYPES of the dtype of
``.weight``, 0). A static layer has ``activation_scale`` fp32 [1] and ``activation_zero_point`` int32 [1] too.
A module with several weights has ``NAME`` and ``NAME_scale`` for each (:mod:`dynquant.nn.named_weights`); a
weight that stays float has ``NAME`` alone, [N, K].

The last dimension of ``weight`` keeps it out of float layers. Loaders that only log keys they do not know
(transformers' from_pretrained, accelerate, ``strict=False``) would copy the integers into the float weights;
with it, each of them stops at a size mismatch. Format 1 had [N, K].
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..qtensor import FLOAT_WORDS, QTensor, weight_scale, with_dtype
from ..reference import FLOAT_DTYPES
from ..reference.checks import check_finite

FORMAT_VERSION = 2


def weight_entries(weight: QTensor) -> tuple[Tensor, Tensor]:
    """The entries ``weight`` and ``weight_scale``.

    They are copies: safetensors and transformers refuse slices, and save one of several tensors that share
    memory, as those of a module with two names do.
    """
    return weight.int_repr().unsqueeze(-1), weight_scale(weight).clone()


def entries_of(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, config: Config) -> dict[str, Tensor]:
    """The entries of a layer, but its bias, from an int8 weight [N, K] and its scales."""
    return {
        "weight": weight.unsqueeze(-1),
        "weight_scale": weight_scale,
        "format": format_entry(dtype, config),
    }


def format_entry(dtype: torch.dtype, config: Config) -> Tensor:
    """The entry ``format`` of a layer whose ``.weight`` has this dtype."""
    entry = [FORMAT_VERSION, config.encode(), 1 + FLOAT_DTYPES.index(dtype), 0]
    return torch.tensor(entry, device="cpu")


def is_float_weight(entries: Mapping[str, Any]) -> bool:
    """Whether the entries are those of an unquantized layer: a float ``weight`` alone."""
    weight = entries["weight"]
    alone = entries["weight_scale"] is None and entries["format"] is None
    return weight is not None and weight.is_floating_point() and alone


def missing_entries(entries: Mapping[str, Any]) -> list[str]:
    """The names of the entries that a state_dict lacks, none of them for a float weight.

    All of them are missing for a layer that it does not hold, ``weight_scale`` alone in files of format 1 by
    safetensors' save_model, for the second name of a module.

    Raises:
        ValueError: for any other part of the entries.
    """
    missing = [name for name, value in entries.items() if value is None]
    if is_float_weight(entries):
        return []
    if missing and len(missing) < len(entries) and missing != ["weight_scale"]:
        there = " and ".join(name for name in entries if name not in missing)
        raise ValueError(f"the state_dict has {there}, but no {' and no '.join(missing)}")
    return missing


def read_weight(
    entries: Mapping[str, Any], *, like: QTensor, config: Config, device: torch.device | None
) -> tuple[QTensor, Config]:
    """The weight of a state_dict, packed on ``device`` (None: assigned, where it is), and its scheme.

    Args:
        entries: ``weight``, ``weight_scale`` and ``format``; the last two are None for a float weight.
        like, config: the weight and scheme of the layer that loads.

    Raises:
        ValueError: for entries that do not fit the layer.
    """
    weight, scale, format = entries["weight"], entries["weight_scale"], entries["format"]
    if is_float_weight(entries):
        _check_shape(weight, list(like.shape))
        weight = quantized(weight.to(device), config, like.is_rows)
        return (weight if device is None else with_dtype(weight, like.dtype)), config
    version, saved, dtype = read_format(format)
    _check_shape(weight, [*like.shape, 1] if version > 1 else list(like.shape))
    if saved.epilogue != config.epilogue:
        raise ValueError(f"expected epilogue {config.epilogue!r}, got {saved.epilogue!r}")
    weight_int8 = weight.reshape(like.shape).to(device)
    return QTensor.from_int8(weight_int8, scale.to(device), saved, dtype, like.is_rows), saved


def read_named_weight(
    weight: Tensor,
    scale: Tensor | None,
    like: QTensor,
    config: Config,
    dtype: torch.dtype,
    device: torch.device | None,
) -> QTensor:
    """One of several weights of a module, packed on ``device`` (None: assigned, where it is).

    Args:
        weight, scale: entries of a state_dict; without a scale the weight is float.
        like: the weight of the module that loads.
        config: the scheme of the one that is read. dtype: that it shows.

    Raises:
        ValueError: for entries that do not fit.
    """
    if scale is None:
        if not weight.is_floating_point():
            raise ValueError(
                f"expected float weights, since the state_dict has no format, got {weight.dtype}"
            )
        _check_shape(weight, list(like.shape))
        made = quantized(weight.to(device), config, like.is_rows)
        return made if device is None else with_dtype(made, dtype)
    _check_shape(weight, [*like.shape, 1])
    weight_int8 = weight.reshape(like.shape).to(device)
    return QTensor.from_int8(weight_int8, scale.to(device), config, dtype, like.is_rows)


def _check_shape(weight: Tensor, expected: list[int]) -> None:
    if list(weight.shape) != expected:
        raise ValueError(f"expected weight of shape {expected}, got {list(weight.shape)}")


def read_format(format: Tensor) -> tuple[int, Config, torch.dtype]:
    """Version, scheme and dtype of ``.weight`` by the entry ``format``.

    Raises:
        ValueError: for an entry that this version does not read.
    """
    if format.dtype != torch.int64 or list(format.shape) != [4]:
        raise ValueError(f"expected format to be int64 [4], got {format.dtype} {list(format.shape)}")
    if format.device.type == "meta":
        raise ValueError("expected format to have values, got it on meta")
    version, code, dtype, reserved = format.tolist()
    if not 1 <= version <= FORMAT_VERSION or reserved or not 1 <= dtype <= len(FLOAT_DTYPES):
        raise ValueError(
            f"format {format.tolist()} is not one that this dynquant reads (versions 1 to {FORMAT_VERSION}); "
            "a newer dynquant may have written it"
        )
    saved = Config.decode(code)
    if saved.encode() != code:
        raise ValueError(f"config {code} has bits that no file holds")
    return version, saved, FLOAT_DTYPES[dtype - 1]


def check_loaded_bias(state_dict: Mapping[str, Any], prefix: str, own: Tensor | None) -> None:
    """The bias of a state_dict, which may have any float dtype.

    Args:
        own: the bias of the layer.

    Raises:
        ValueError: for a bias of another dtype or shape, or with a NaN.
    """
    bias = state_dict.get(prefix + "bias")
    if bias is None or own is None:
        return
    check_bias(bias)
    if bias.shape != own.shape:
        raise ValueError(f"expected bias of shape {list(own.shape)}, got {list(bias.shape)}")


def check_origin(state_dict: Mapping[str, Any], prefix: str) -> None:
    """A ValueError for the state_dict of a layer that torch.ao quantized."""
    if any(key.startswith(f"{prefix}_packed_params") for key in state_dict):
        raise ValueError(
            "the state_dict is of a layer that torch.ao quantized (_packed_params); "
            "load_state_dict(dynquant.from_torch_ao(state_dict)) takes it, with the same int8 weights"
        )


def check_named_origin(state_dict: Mapping[str, Any], prefix: str) -> None:
    """A ValueError for the state_dict of a recurrent module that torch.ao quantized."""
    ends = ("_all_weight_values", "_packed_weight_ih", "_packed_weight_hh")
    if any(key.startswith(tuple(prefix + end for end in ends)) for key in state_dict):
        raise ValueError(
            "the state_dict is of a module that torch.ao quantized; convert the float model with "
            "dynquant.quantize_dynamic"
        )


def warn_of_meta(key: str) -> None:
    """The warning of nn.Module's own tensors for values that are loaded onto meta."""
    warnings.warn(
        f"for {key}: copying from a non-meta parameter in the checkpoint to a meta parameter in the current "
        "module, which is a no-op. (Did you mean to pass `assign=True` to assign items in the state "
        "dictionary to their corresponding key in the module instead of copying them in place?)",
        stacklevel=4,
    )


_warned = threading.local()


def warn_of_float_weights(error_msgs: list[str]) -> None:
    """Warn once for each load_state_dict, which passes one list of errors to all modules."""
    if getattr(_warned, "error_msgs", None) is error_msgs:
        return
    _warned.error_msgs = error_msgs
    frame, stacklevel = sys._getframe(), 1
    while frame.f_back is not None and _package(frame) in ("dynquant", "torch"):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(
        "QLinear: the state_dict holds float weights, of an unquantized model: quantizing them",
        stacklevel=stacklevel,
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def read_activation_qparams(
    state_dict: Mapping[str, Any],
    prefix: str,
    config: Config,
    present: tuple[Tensor, Tensor] | None,
    device: torch.device | None,
) -> tuple[Tensor, Tensor] | None:
    """The qparams of a static layer, copied to ``device`` (None: as they are); None if a state_dict has none.

    Args:
        present: the layer's own ones, for a state_dict that has one of the two.

    Raises:
        ValueError: for qparams that are not valid or do not go with ``config``.
    """
    scale = state_dict.get(prefix + "activation_scale")
    zero_point = state_dict.get(prefix + "activation_zero_point")
    if scale is None and zero_point is None:
        return None
    if present is not None:
        scale = present[0] if scale is None else scale
        zero_point = present[1] if zero_point is None else zero_point
    if scale is None or zero_point is None:
        raise ValueError("expected activation_scale and activation_zero_point together, got one of them")
    check_activation_qparams(scale, zero_point)
    check_not_rotated(config)
    if device is None:
        return scale, zero_point
    return scale.to(device, copy=True), zero_point.to(device, copy=True)


def check_entries(state_dict: Mapping[str, Any], prefix: str, meta: bool) -> None:
    """Every entry that a state_dict holds for a layer is a plain tensor with values.

    Args:
        meta: whether all of them together may have none.

    Raises:
        ValueError: that names the entry.
    """
    check_named_entries(state_dict, prefix, ENTRIES, meta)


def check_named_entries(state_dict: Mapping[str, Any], prefix: str, names: Iterable[str], meta: bool) -> None:
    """:func:`check_entries` for entries of other names."""
    entries = {name: state_dict.get(prefix + name) for name in names}
    devices = {
        value.device.type for name, value in entries.items() if isinstance(value, Tensor) and name != "format"
    }
    for name, value in entries.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"expected {name} to be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested or value.is_mkldnn:
            raise ValueError(f"expected {name} to be a dense tensor, got one of layout {value.layout}")
        if value.is_quantized:
            raise ValueError(
                f"expected {name} to be a plain tensor, got one of torch's own quantized tensors"
            )
        if value.device.type == "meta" and not (meta and devices == {"meta"}):
            raise ValueError(f"expected {name} to have values, got it on meta")


ENTRIES = ("weight", "weight_scale", "format", "bias", "activation_scale", "activation_zero_point")
"""Names of all entries that a layer may have."""


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
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
        if value.dtype != dtype or list(value.shape) != [1]:
            raise ValueError(
                f"expected {name} to be {dtype} of shape [1], got {value.dtype} of shape {list(value.shape)}"
            )
    if scale.device.type != "meta":
        if not (scale.isfinite() & (scale > 0)).item():
            raise ValueError(f"expected activation_scale to be finite and positive, got {scale.item()}")
        if not -128 <= zero_point.item() <= 127:
            raise ValueError(f"expected activation_zero_point in [-128, 127], got {zero_point.item()}")


def for_autograd(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which no backward may use."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def quantized(weight: Tensor, config: Config, rows: bool = False) -> QTensor:
    """:meth:`QTensor.quantize` with a ValueError that does not name the op."""
    try:
        return QTensor.quantize(weight, config, rows)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("quantize_weight: ")) from None


def check_float_weight(weight: Tensor, like: Tensor | None = None) -> None:
    """A finite weight of a float dtype that stays float, and of the shape of ``like``."""
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"expected weight of dtype {FLOAT_WORDS}, got {weight.dtype}")
    if like is not None:
        _check_shape(weight, list(like.shape))
    if weight.device.type == "meta":
        return
    try:
        check_finite("", "weight", weight)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix(": ")) from None


def check_bias(bias: Tensor) -> None:
    """A float bias without NaN. An infinity may be meant, to rule an output out."""
    if bias.dtype not in FLOAT_DTYPES:
        raise ValueError(f"expected bias of dtype {FLOAT_WORDS}, got {bias.dtype}")
    if bias.device.type != "meta" and bias.isnan().any():
        raise ValueError(f"expected bias without NaN, got nan at bias{bias.isnan().nonzero()[0].tolist()}")
