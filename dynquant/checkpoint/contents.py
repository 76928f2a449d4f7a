"""The quantized, fused and merged layers of a model as values that JSON has, and models made to fit them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..nn.block import Block
from ..nn.block_call import part_of
from ..nn.embedding_block import EmbeddingBlock
from ..nn.encoder import EncoderLayer
from ..nn.fused_activation import FusedActivation, WithActivation
from ..nn.merged import MergedGroup, MergedLinear
from ..nn.mlp_block import MLPBlock
from ..nn.module import QModule
from ..patterns.activations import epilogue_of, remove_activation
from ..patterns.embedding_stages import EmbeddingStage
from ..patterns.registry import patterns_of
from ..patterns.residual_mlps import ResidualMLP
from ..patterns.transformer_layers import TransformerLayer


def contents(model: nn.Module) -> dict[str, Any]:
    """The converted layers of a model, in the words of ``DynquantConfig``."""
    layers = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, QModule)
    }
    names: dict[int, str] = {}
    for name, layer in layers.items():
        names.setdefault(id(layer), name)
    groups = {
        id(layer.group): [names.get(id(part)) for part in layer.group.layers]
        for layer in layers.values()
        if isinstance(layer, MergedLinear)
    }
    return {
        "modules": {name: layer.saved_scheme() for name, layer in layers.items()},
        "fused": list(_fused(model)),
        "merged": [group for group in groups.values() if None not in group],
        "encoder_layers": [name for name, part in model.named_modules() if isinstance(part, Block)],
    }


def _fused(model: nn.Module) -> Iterator[str]:
    """The names of the nn.Identity modules beside layers with an epilogue, which took it from them."""
    for name, parent in model.named_modules():
        children = dict(parent.named_children())
        if any(isinstance(child, QModule) and child.config.epilogue != "none" for child in children.values()):
            for child_name, child in children.items():
                if isinstance(child, nn.Identity):
                    yield f"{name}.{child_name}" if name else child_name


def remove_fused(model: nn.Module, name: str) -> None:
    """Put an identity in the place of an activation that a layer beside it has taken in."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(getattr(parent, child), nn.Identity):
        return
    epilogue = epilogue_of(getattr(parent, child))
    layers = [
        layer_name
        for layer_name, layer in parent.named_children()
        if isinstance(layer, QModule) and isinstance(layer, WithActivation)
        if layer.config.epilogue == epilogue and layer.fused_activation is None
    ]
    if len(layers) == 1:
        FusedActivation.install(parent, layers[0], parent, child, str(epilogue))
    else:
        remove_activation(parent, child)


def merge_as_saved(model: nn.Module, names: Sequence[str]) -> None:
    """Merge layers that read the same tensor; does nothing unless all of them can be merged."""
    parts = [model.get_submodule(name) for name in names]
    mergeable: list[Any] = [part for part in parts if isinstance(part, QModule) and part.is_mergeable]
    if len(mergeable) == len(names):
        for name, layer in zip(names, MergedGroup(mergeable).layers, strict=True):
            replace_module(model, name, layer)


BlockPattern = TransformerLayer | ResidualMLP | EmbeddingStage


def block_patterns(module: nn.Module) -> Iterator[tuple[type[Block], BlockPattern]]:
    """The kinds of blocks that a module may become, with the patterns of which it has all parts."""
    found: list[tuple[type[Block], BlockPattern]] = []
    found += [(EncoderLayer, pattern) for pattern in patterns_of(module, TransformerLayer)]
    found += [(MLPBlock, pattern) for pattern in patterns_of(module, ResidualMLP)]
    found += [(EmbeddingBlock, pattern) for pattern in patterns_of(module, EmbeddingStage)]
    for kind, pattern in found:
        if all(part_of(module, name) is not None for name in pattern.parts):
            yield kind, pattern


def adopt_block(module: nn.Module) -> None:
    """Make a block of a module that a pattern knows."""
    for kind, pattern in block_patterns(module):
        if kind.adopt(module, pattern, unconditionally=True):
            return


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place that has this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
