"""Static quantization, dynamic's counterpart: activation qparams from sample batches instead of each input.

with dynquant.calibrate(model):
    for batch in batches:
        model(batch)
dynquant.freeze(model)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..checkpoint.hugging_face import describe
from ..config import one_of
from ..nn.module import QModule
from .observers import OBSERVERS, Observer, make_observer

_OBSERVED = "_observed_range"


@contextmanager
def calibrate(
    model: nn.Module, observer: str = "min_max", *, percentile: float = 99.99
) -> Iterator[dict[str, tuple[float, float]]]:
    """Record the input range of each QLinear layer while the model runs on representative batches.

    The layers compute as before, and keep their ranges for :func:`freeze`; a second calibration replaces
    them. If the body raises, the model does not change.

    Args:
        model: a model with QLinear layers, such as :func:`dynquant.quantize_dynamic` returns.
        observer: ``"min_max"``, the whole range; ``"percentile"``, the range of ``percentile`` percent of the
            values, with half of the others cut off at each end; ``"mse"``, the range whose 8 bits give the
            smallest squared error of the values.
        percentile: in (50, 100].

    Yields:
        A dict, empty until the end of the block: (lo, hi) of each layer that had an input, by its name.

    Raises:
        ValueError: for a model without QLinear layers, a layer that rotates its input, an observer that does
            not exist; from within the block, for an input with a NaN or an infinity, which has no range.
    """
    one_of("observer", observer, OBSERVERS)
    if not 50.0 < percentile <= 100.0:
        raise ValueError(f"dynquant.calibrate: expected percentile in (50, 100], got {percentile}")
    layers = quantized_layers("calibrate", model)
    for name, layer in layers.items():
        reason = layer.why_not_static()
        if reason is not None:
            raise ValueError(
                f"dynquant.calibrate: {_label(name)} {reason}; convert the model with rotation=None, or "
                "leave it dynamic"
            )
    observers = {name: make_observer(observer, percentile) for name in layers}
    handles = [
        layer.register_forward_pre_hook(_watch(name, observers[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    ranges: dict[str, tuple[float, float]] = {}
    try:
        yield ranges
        seen = {name: observed for name in layers if (observed := observers[name].range()) is not None}
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        vars(layer).pop(_OBSERVED, None)
        if name in seen:
            vars(layer)[_OBSERVED] = seen[name]
            ranges[name] = seen[name]


def freeze(model: nn.Module) -> nn.Module:
    """Make the calibrated QLinear layers of a model static, in place.

    They then run ``torch.ops.dynquant.linear_static`` with the qparams of their ranges; inputs beyond a range
    are clamped to it. ``state_dict()`` holds the qparams, and loading one into a dynamic model of
    the same layers makes these static. Layers without an input stay dynamic, with a warning.

    Returns:
        ``model``.

    Raises:
        ValueError: for a model without QLinear layers, or without calibrated ones.
    """
    layers = quantized_layers("freeze", model)
    observed = {name: vars(layer)[_OBSERVED] for name, layer in layers.items() if _OBSERVED in vars(layer)}
    if not observed:
        raise ValueError(
            f"dynquant.freeze: none of the {len(layers)} QLinear layers has seen a batch; run some under "
            "`with dynquant.calibrate(model):` first"
        )
    for name, layer in layers.items():
        if name in observed:
            lo, hi = (torch.tensor([end], dtype=torch.float32, device="cpu") for end in observed[name])
            scale, zero_point = torch.ops.dynquant.choose_qparams(lo, hi)
            device = next(iter(layer.int8_tensors().values())).device
            layer.set_activation_qparams(scale.to(device), zero_point.to(device))
            del vars(layer)[_OBSERVED]
    unseen = [_label(name) for name in layers if name not in observed]
    if unseen:
        warnings.warn(
            f"dynquant.freeze: no input was seen, so these stay dynamic: {', '.join(unseen)}", stacklevel=2
        )
    describe(model)
    return model


def quantized_layers(caller: str, model: nn.Module) -> dict[str, Any]:
    """The quantized modules of a model that have a static form, each once; a ValueError if there is none."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QModule) and module.has_static_form
    }
    if not layers:
        raise ValueError(
            f"dynquant.{caller}: expected a model with QLinear layers, got {type(model).__name__} with none; "
            "convert it with dynquant.quantize_dynamic first"
        )
    return layers


def _watch(name: str, observer: Observer) -> Callable[[nn.Module, Any, Any], None]:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in layer.quantized_inputs(args, kwargs).values():
            if not x.numel():
                continue
            with torch.no_grad():
                if not observer.observe(x.detach()):
                    raise ValueError(
                        f"dynquant.calibrate: the input of {_label(name)} holds a NaN or an infinity, which "
                        "has no range"
                    )

    return hook


def _label(name: str) -> str:
    return f"layer {name!r}" if name else "the model itself"
