"""Layers that read the same tensor: their weights are contiguous, as those of one wider layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config, recode
from ..qtensor import QTensor
from ..reference import packed_shape
from .linear import QLinear


class _Merged(NamedTuple):
    """Arguments of one op for all layers of a group, without x and bias. Each layer holds slices of them."""

    packed_weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    qparams: tuple[Tensor, Tensor] | None
    config: int


class MergedGroup:
    """Layers that read the same tensor, with their weights merged in memory.

    A graph that holds the layers (``torch.compile(backend="dynquant")``, :func:`dynquant.fuse_graph`) runs
    them as one wider op on these very weights, without a copy. A layer that is called by itself computes its
    own output only. Computing the other layers' outputs ahead would mean keeping them until those layers are
    called, and checking that they are still valid (the same x, not written to, the same bias, grad mode,
    autocast, thread) costs a call more than one quantization saves. In inference mode there is no check:
    inference tensors have no version counter.

    Attributes:
        layers: in the order of their calls.
        merged: None while the layers cannot run as one op: different schemes or devices, or widths that do
            not fill whole panels of the packed layout.
    """

    # Defaults for instances that copy or pickle creates without __init__.
    layers: list[MergedLinear] = []  # noqa: RUF012
    merged: _Merged | None = None

    def __init__(self, layers: Sequence[QLinear]) -> None:
        self.layers = [MergedLinear.adopt(layer, self) for layer in layers]
        self.merge()

    def merge(self) -> None:
        """Make the layers' tensors slices of merged ones, after any of them has changed."""
        # While a group is copied or unpickled, its layers receive their tensors one by one; each calls this.
        complete = bool(self.layers) and all("_packed" in vars(layer) for layer in self.layers)
        if complete and not self._is_merged():
            self.merged = self._merge() if self._can_merge() else None

    def _is_merged(self) -> bool:
        merged = self.merged
        if merged is None or any(layer.weight.device != merged.packed_weight.device for layer in self.layers):
            return False
        slices = _slices(merged, self.layers)
        return all(
            _without_range(layer._packed[-1]) == _without_range(merged.config)
            and _is_same_memory(layer.weight.packed_weight, packed_weight)
            and _are_same(layer._packed[3], merged.qparams)
            for layer, (packed_weight, *_) in zip(self.layers, slices, strict=True)
        )

    def _can_merge(self) -> bool:
        weights = [layer.weight for layer in self.layers]
        packed = [weight.packed_weight for weight in weights]
        schemes = {
            (_without_range(layer._packed[-1]), layer.weight.dtype, layer.bias is None)
            for layer in self.layers
        }
        if len(schemes) > 1 or len({(part.device, part.shape[1:]) for part in packed}) > 1:
            return False
        if _common_qparams(self.layers) is None and any(layer._packed[3] for layer in self.layers):
            return False
        n, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        return [sum(part.shape[0] for part in packed), *packed[0].shape[1:]] == packed_shape(
            packed[0].device, n, k
        )

    def _merge(self) -> _Merged:
        layers = self.layers
        with torch.no_grad(), torch.inference_mode(False):
            merged = _Merged(
                torch.cat([layer.weight.packed_weight for layer in layers]),
                torch.cat([layer.weight.weight_sum for layer in layers]),
                torch.cat([layer.weight.channel_scale for layer in layers]),
                _common_qparams(layers),
                recode(layers[0]._packed[-1], full_range=any(layer.config.full_range for layer in layers)),
            )
            for layer, tensors in zip(layers, _slices(merged, layers), strict=True):
                old = layer.weight
                weight = QTensor(*tensors, old.config, old.shape, old.dtype)
                QLinear._set_weight(layer, weight, Config.decode(merged.config))
        return merged

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]
        self.merge()


class MergedLinear(QLinear):
    """A QLinear of a :class:`MergedGroup`: QLinear's interface, and a slice of the merged weight."""

    if TYPE_CHECKING:  # as in QLinear
        group: MergedGroup

    @classmethod
    def adopt(cls, layer: QLinear, group: MergedGroup) -> MergedLinear:
        """A MergedLinear with the parameters and hooks of ``layer``, to take its place."""
        self = cls.__new__(cls)
        self.__dict__.update(vars(layer), group=group)
        return self

    def _set_weight(self, weight: QTensor, config: Config) -> None:
        super()._set_weight(weight, config)
        self.group.merge()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Files of version 0.1.0 name the group "shared".
        super().__setstate__({"group" if name == "shared" else name: value for name, value in state.items()})

    @property
    def merged_count(self) -> int:
        return len(self.group.layers) if self.group.merged is not None else 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input shared by {len(self.group.layers)} layers"


def _slices(merged: _Merged, layers: Sequence[QLinear]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's part of packed_weight, weight_sum and weight_scale."""
    channels = [layer.out_features for layer in layers]
    panels = [layer.weight.packed_weight.shape[0] for layer in layers]
    return list(
        zip(
            merged.packed_weight.split(panels),
            merged.weight_sum.split(channels),
            merged.weight_scale.split(channels),
            strict=True,
        )
    )


def _without_range(code: int) -> int:
    """The config of a layer without the bit of weights with -128, which merged layers have together."""
    return recode(code, full_range=False)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


def _common_qparams(layers: Sequence[QLinear]) -> tuple[Tensor, Tensor] | None:
    """The static qparams of the first layer if all layers have the same, else None."""
    first = layers[0]._packed[3]
    return first if all(_are_same(layer._packed[3], first) for layer in layers) else None


def _are_same(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(
        x.device == y.device and (x.device.type == "meta" or torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
