"""Layers that read the same tensor: their weights lie side by side, as those of one wider layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..qtensor import QTensor
from ..reference import packed_shape
from .linear import QLinear


class _Wide(NamedTuple):
    """What the ops take for all layers at once but the bias. The layers' own tensors are slices of these."""

    packed_weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    qparams: tuple[Tensor, Tensor] | None
    config: int


class SharedInput:
    """What layers that read the same tensor have in common.

    A graph in which they do (``torch.compile(backend="dynquant")``, :func:`dynquant.fuse_graph`) runs them as
    one wider op on these very weights, without a copy. A layer that is called by itself computes for itself:
    an output computed ahead would have to be kept until the next layer is called, and finding out whether it
    still holds (the same x, not written to, the same bias, grad mode, autocast, thread) costs a call more
    than one quantization saves. In inference mode it cannot be found out: such tensors count no versions.

    Attributes:
        layers: in the order in which they are called.
        wide: None where they cannot run as one at the moment: different schemes or devices, or widths that
            are no whole panels of the packed layout.
    """

    # A copy in the making has nothing of its own yet.
    layers: list[SharingLinear] = []  # noqa: RUF012
    wide: _Wide | None = None

    def __init__(self, layers: Sequence[QLinear]) -> None:
        self.layers = [SharingLinear.adopt(layer, self) for layer in layers]
        self.join()

    def join(self) -> None:
        """Make the layers' tensors slices of wide ones, after any of them has changed."""
        # In a copy in the making the layers get their tensors one by one, and each of them comes here.
        complete = bool(self.layers) and all("_packed" in vars(layer) for layer in self.layers)
        if complete and not self._is_joined():
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

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self.join()


class SharingLinear(QLinear):
    """A QLinear whose input other layers read too: see :class:`SharedInput`. Its interface is QLinear's, its
    weight a slice of what they hold together."""

    shared: SharedInput

    @classmethod
    def adopt(cls, layer: QLinear, shared: SharedInput) -> SharingLinear:
        """One that takes the place of ``layer``, with its parameters and hooks."""
        self = cls.__new__(cls)
        self.__dict__.update(vars(layer), shared=shared)
        return self

    def _set_weight(self, weight: QTensor, config: Config) -> None:
        super()._set_weight(weight, config)
        self.shared.join()

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
