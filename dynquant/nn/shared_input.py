"""Layers that read the same tensor: it is quantized once, and one wider layer computes for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..qtensor import QTensor
from ..reference import packed_shape
from .linear import QLinear

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_static = torch.ops.dynquant.linear_static.default


class _Wide(NamedTuple):
    """What the ops take for all layers at once but the bias. The layers' own tensors are slices of these."""

    packed_weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    qparams: tuple[Tensor, Tensor] | None
    config: int


class SharedInput:
    """What layers that read the same tensor have in common.

    The first layer computes for all and keeps the others' outputs until they are called with the very same
    tensor; called with another one, a layer computes for itself. The bits are the same either way: qparams of
    activations depend on the input alone, and an output on its own weight row.

    Attributes:
        layers: in the order in which they are called.
        wide: None where they cannot run as one at the moment: different schemes or devices, or widths that
            are no whole panels of the packed layout.
    """

    # A copy in the making has nothing of its own yet.
    layers: list[SharingLinear] = []  # noqa: RUF012
    wide: _Wide | None = None
    waiting: list[Any] | None = None

    def __init__(self, layers: Sequence[QLinear]) -> None:
        self.layers = [SharingLinear.adopt(layer, self, i) for i, layer in enumerate(layers)]
        self.join()

    def join(self) -> None:
        """Make the layers' tensors slices of wide ones, after any of them has changed."""
        # In a copy in the making the layers get their tensors one by one, and each of them comes here.
        complete = bool(self.layers) and all("_packed" in vars(layer) for layer in self.layers)
        if complete and not self._is_joined():
            self.waiting = None
            self.wide = self._join() if self._fit_together() else None

    def _is_joined(self) -> bool:
        wide = self.wide
        if wide is None or any(layer.weight.device != wide.packed_weight.device for layer in self.layers):
            return False
        slices = _slices(wide, self.layers)
        return all(
            layer._packed[-1] == wide.config
            and _is_same_memory(layer.weight.packed_weight, packed_weight)
            and _are_same(layer._packed[3], wide.qparams)
            for layer, (packed_weight, *_) in zip(self.layers, slices, strict=True)
        )

    def _fit_together(self) -> bool:
        weights = [layer.weight for layer in self.layers]
        packed = [weight.packed_weight for weight in weights]
        schemes = {(layer._packed[-1], layer.weight.dtype, layer.bias is None) for layer in self.layers}
        if len(schemes) > 1 or len({(part.device, part.shape[1:]) for part in packed}) > 1:
            return False
        if packed[0].device.type == "meta":
            return False
        if _common_qparams(self.layers) is None and any(layer._packed[3] for layer in self.layers):
            return False
        n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        return [sum(part.shape[0] for part in packed), *packed[0].shape[1:]] == packed_shape(
            packed[0].device, n, k
        )

    def _join(self) -> _Wide:
        layers = self.layers
        with torch.no_grad(), torch.inference_mode(False):
            wide = _Wide(
                torch.cat([layer.weight.packed_weight for layer in layers]),
                torch.cat([layer.weight.weight_sum for layer in layers]),
                torch.cat([layer.weight.channel_scale for layer in layers]),
                _common_qparams(layers),
                layers[0]._packed[-1],
            )
            for layer, tensors in zip(layers, _slices(wide, layers), strict=True):
                old = layer.weight
                weight = QTensor(*tensors, old.config, old.shape, old.dtype)
                QLinear._set_weight(layer, weight, Config.decode(wide.config))
        return wide

    def outputs(self, x: Tensor) -> list[Tensor] | None:
        """The outputs of all layers, or None where each has to compute its own."""
        wide = self.wide
        if wide is None:
            return None
        biases = [layer._parameters["bias"] for layer in self.layers]
        bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        if wide.qparams is None:
            y = _linear_dynamic(x, *wide[:3], bias, wide.config)
        else:
            y = _linear_static(x, *wide[:3], bias, *wide.qparams, wide.config)
        # Not split: what is done in place to one of its views, autograd refuses.
        ends = list(accumulate(layer.out_features for layer in self.layers))
        return [
            y.narrow(-1, end - layer.out_features, layer.out_features)
            for layer, end in zip(self.layers, ends, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self.join()


class SharingLinear(QLinear):
    """A QLinear whose input other layers read too: see :class:`SharedInput`. Its interface is QLinear's, its
    weight a slice of what they hold together."""

    shared: SharedInput
    position: int

    @classmethod
    def adopt(cls, layer: QLinear, shared: SharedInput, position: int) -> SharingLinear:
        """One that takes the place of ``layer``, with its parameters and hooks."""
        self = cls.__new__(cls)
        self.__dict__.update(vars(layer), shared=shared, position=position)
        return self

    def _set_weight(self, weight: QTensor, config: Config) -> None:
        super()._set_weight(weight, config)
        self.shared.join()

    def forward(self, x: Tensor) -> Tensor:
        shared, position = self.shared, self.position
        if position == 0:
            fits = isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == self.in_features
            outputs = shared.outputs(x) if fits else None
            if outputs is None:
                return super().forward(x)
            shared.waiting = [x, *outputs[1:]]
            return outputs[0]
        waiting = shared.waiting
        if waiting is None or waiting[0] is not x or waiting[position] is None:
            return super().forward(x)
        y: Tensor = waiting[position]
        waiting[position] = None
        if all(output is None for output in waiting[1:]):
            shared.waiting = None
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input shared by {len(self.shared.layers)} layers"


def _slices(wide: _Wide, layers: Sequence[QLinear]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's part of packed_weight, weight_sum and weight_scale."""
    channels = [layer.out_features for layer in layers]
    panels = [layer.weight.packed_weight.shape[0] for layer in layers]
    return list(
        zip(
            wide.packed_weight.split(panels),
            wide.weight_sum.split(channels),
            wide.weight_scale.split(channels),
            strict=True,
        )
    )


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


def _common_qparams(layers: Sequence[QLinear]) -> tuple[Tensor, Tensor] | None:
    """The static qparams of the first layer where all have the same, else None."""
    first = layers[0]._packed[3]
    return first if all(_are_same(layer._packed[3], first) for layer in layers) else None


def _are_same(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(x.device == y.device and torch.equal(x, y) for x, y in zip(a, b, strict=True))
