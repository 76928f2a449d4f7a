"""Pairs of a float layer and the layer that a conversion put in its place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..config import Config
from ..conversion.plan import label
from ..nn.module import QModule
from .sample import Sample


class Pair(NamedTuple):
    """A layer of the float model and the converted layer of the same name, of any type."""

    name: str
    float_layer: nn.Module
    int8_layer: nn.Module

    @property
    def config(self) -> Config | None:
        """The scheme of the int8 layer; None if it is not a QModule."""
        return self.int8_layer.config if isinstance(self.int8_layer, QModule) else None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors [..., K] that a call quantizes; the first tensor for other layers, those that quantize
        weights alone among them."""
        if isinstance(self.int8_layer, QModule) and self.int8_layer.quantized_input_names:
            return list(self.int8_layer.quantized_inputs(args, kwargs).values())
        tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        return [tensor for tensor in tensors if tensor.dim()][:1]

    def sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sample:
        """The arguments of a call, as copies for a layer that may write to them: QModules and linear layers
        do not."""
        sample = Sample(args, kwargs)
        return sample if isinstance(self.int8_layer, QModule) else sample.fresh()

    def expected(self, sample: Sample) -> Any:
        """The float layer's output, with what fusion made a part of the int8 layer."""
        if isinstance(self.int8_layer, QModule):
            return self.int8_layer.expected(self.float_layer, *sample.args, **sample.kwargs)
        return self.float_layer.forward(*sample.args, **sample.kwargs)

    def actual(self, sample: Sample) -> Any:
        """The int8 layer's output."""
        if isinstance(self.int8_layer, QModule):
            return self.int8_layer.forward(*sample.args, **sample.kwargs)
        try:
            return self.int8_layer.forward(*sample.args, **sample.kwargs)
        except Exception as error:
            raise RuntimeError(
                f"{label(self.name)}, converted to {type(self.int8_layer).__name__}, raised "
                f"{type(error).__name__}: {error}"
            ) from error


def pair_layers(
    model: nn.Module, int8_model: nn.Module, converted: Collection[nn.Module] | None = None
) -> list[Pair]:
    """The converted layers with the float layers of the same names, each once, in the order of the model.

    Converted layers are the QModules in the place of other types, and modules of types that a user's mapping
    names.

    Args:
        converted: the float modules that were converted. None: those in whose place there is another type.

    Raises:
        ValueError: if the models are not one model before and after its conversion, with the layer's name.
    """
    floats = dict(model.named_modules(remove_duplicate=False))
    ids = None if converted is None else {id(module) for module in converted}
    pairs: list[Pair] = []
    replaced: tuple[str, ...] = ()  # prefixes of names within layers that are not QModules
    for name, layer in int8_model.named_modules():
        before = floats.get(name)
        if before is None:
            if isinstance(layer, QModule) and not name.startswith(replaced):
                raise ValueError(
                    f"dynquant.report: the int8 model has {label(name)}, the float one has not; expected the "
                    "model before and after its conversion"
                )
        elif isinstance(layer, QModule):
            if not isinstance(before, QModule):
                _check_same_size(name, before, layer)
                pairs.append(Pair(name, before, layer))
        elif (
            id(before) in ids
            if ids is not None
            else _is_another(before, layer, name.startswith(replaced), not name)
        ):
            pairs.append(Pair(name, before, layer))
            replaced = (*replaced, f"{name}." if name else "")
    return pairs


def _is_another(before: nn.Module, after: nn.Module, within: bool, is_root: bool) -> bool:
    """Whether a conversion of the user's put ``after`` in the place of a layer with weights.

    Args:
        within: whether they are parts of such a pair.
        is_root: whether they are whole models, whose types may differ for other reasons: graphs, wrappers.
    """
    if within or (is_root and next(before.children(), None) is not None):
        return False
    if isinstance(after, (type(before), nn.Identity, fx.GraphModule)):
        return False
    if type(after).forward is nn.Module.forward or type(before).forward is nn.Module.forward:
        return False  # holders of a graph's tensors, lists of modules
    return next(before.parameters(), None) is not None


def _check_same_size(name: str, before: nn.Module, after: QModule) -> None:
    if not after.fits(before):
        n, k = after.matrix_shape
        weight = getattr(before, "weight", None)
        shape = list(weight.shape) if isinstance(weight, Tensor) else None
        raise ValueError(
            f"dynquant.report: {label(name)} is {n} x {k} [N, K] in the int8 model, and in the float one "
            f"{type(before).__name__} with a weight of shape {shape}; expected the model before and after "
            "its conversion"
        )
