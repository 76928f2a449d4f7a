"""fuse: activation functions become epilogues of the layers before them, layers with one input are merged.

Fusions follow the patterns of :mod:`dynquant.patterns.registry`, by the type of the layers' parent module.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from ..checkpoint.contents import block_patterns
from ..checkpoint.hugging_face import describe
from ..nn.block import Block
from ..nn.embedding_block import EmbeddingBlock
from ..nn.encoder import EncoderLayer
from ..nn.fused_activation import FusedActivation
from ..nn.merged import MergedGroup
from ..nn.mlp_block import MLPBlock
from ..nn.module import QModule
from ..patterns.activations import epilogue_of
from ..patterns.registry import (
    PATTERNS,
    REGISTERED,
    ActivationAfter,
    SharedInput,
    patterns_of,
    type_name,
)
from ..patterns.whole_calls import whole_sequentials


def fuse(model: nn.Module) -> nn.Module:
    """Fuse the QLinear layers of a model in place, where nn.Sequential or a pattern allows it, see
    :func:`dynquant.register_pattern`.

    An activation function moves into the QLinear before it (``epilogue=``); an identity takes its place, and
    brings it back where a hook is registered on either or either is replaced
    (:class:`dynquant.nn.fused_activation.FusedActivation`).
    relu gives the same bits; gelu and silu become those of :mod:`dynquant.reference.epilogue`, within 2^-18
    of the exact function, and computed in fp32 before the one cast to the output's dtype: for bf16 and fp16
    closer to exact than an activation of the rounded output. The weights of layers that read the same tensor
    become contiguous, so that these layers run as one in a compiled model, with the same bits
    (``torch.compile(model, backend="dynquant")``). Bidirectional transformer layers that a pattern knows
    become :class:`dynquant.EncoderLayer`, with int8 attention; norm, MLP and residual of decoder layers
    become one op (:class:`dynquant.MLPBlock`), and so do embeddings with their norm
    (:class:`dynquant.EmbeddingBlock`). ``state_dict()`` keeps its names. Layers and activations with hooks,
    those with several places in the model, and those in an nn.Sequential whose parts are called one by one do
    not change; a warning says so if nothing does.

    Returns:
        ``model``.
    """
    for _ in fuse_steps(model):
        pass
    describe(model)
    reason = describe_unfused(model)
    if reason is not None:
        warnings.warn(f"dynquant.fuse: {reason}", stacklevel=2)
    return model


def fuse_steps(model: nn.Module) -> Iterator[ActivationFusion | BlockFusion]:
    """Fuse a model in place, one activation and then one transformer layer after the other, which the caller
    may undo."""
    uses = _uses(model)
    names = {id(module): name for name, module in model.named_modules()}
    whole = whole_sequentials(model)
    for parent in list(model.modules()):
        _warn_of_missing_parts(names[id(parent)], parent)
        for layer_name, activation_name in _activation_pairs(parent, whole):
            fusion = _fuse_activation(parent, layer_name, activation_name, uses)
            if fusion is not None:
                yield replace(fusion, parent_name=names[id(parent)])
        for pattern in patterns_of(parent, SharedInput):
            _merge(parent, pattern.layers, uses)
    inside: set[int] = set()  # a block's parts stay what they are
    for parent in list(model.modules()):
        if id(parent) in inside:
            continue
        for kind, roles in block_patterns(parent):
            if kind.adopt(parent, roles):
                yield BlockFusion(parent, names[id(parent)], kind)
                break
        if isinstance(parent, Block):
            inside |= {id(part) for part in parent.modules()}


def planned_epilogues(model: nn.Module, layers: Mapping[int, nn.Module]) -> dict[int, str]:
    """The epilogues that a fusion would give the layers once they are in the model.

    Args:
        model: the float model.
        layers: by the id of a float layer, the one that will take its place.

    Returns:
        By the id of the float layer.
    """
    uses = _uses(model)
    whole = whole_sequentials(model)
    found = {}
    for parent in model.modules():
        for layer_name, activation_name in _activation_pairs(parent, whole):
            float_layer, activation = part_of(parent, layer_name), part_of(parent, activation_name)
            layer = layers.get(id(float_layer))
            epilogue = _fusible(layer, activation)
            if epilogue is not None and uses[id(float_layer)] == 1 and not has_hooks(float_layer):
                found[id(float_layer)] = epilogue
    return found


def describe_unfused(model: nn.Module) -> str | None:
    """Why a fused model is as it was, as a clause; None if any layer of it is fused."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QModule)}
    if not layers:
        return "nothing was fused: the model has no quantized layers"
    if any(layer.is_fused for layer in layers.values()) or any(
        isinstance(module, Block) for module in model.modules()
    ):
        return None
    parents = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in layers if name}
    types = f" ({', '.join(sorted(parents)[:3])})" if parents else ""
    return (
        f"nothing was fused: none of the {len(layers)} quantized layers is followed by an activation with an "
        "epilogue, or shares its input with others, in an nn.Sequential that is called as a whole or by a "
        f"known pattern of the modules around them{types}; dynquant.register_pattern adds patterns"
    )


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def _activation_pairs(parent: nn.Module, whole: set[int]) -> Iterator[tuple[str, str]]:
    """Names of layers and of the activations that alone read their outputs."""
    if id(parent) in whole:
        yield from pairwise(tuple(parent._modules))
    yield from patterns_of(parent, ActivationAfter)


def _warn_of_missing_parts(name: str, parent: nn.Module) -> None:
    if type_name(parent) not in REGISTERED:
        return
    for pattern in PATTERNS[type_name(parent)]:
        missing = [part for part in pattern.parts if part_of(parent, part) is None]
        if missing:
            warnings.warn(
                f"dynquant.fuse: {pattern} is registered for {type(parent).__name__}, but "
                f"{name or 'the model'} has no {', '.join(missing)}",
                stacklevel=4,
            )


@dataclass(frozen=True)
class ActivationFusion:
    """An activation that became the epilogue of a layer."""

    fused: FusedActivation
    layer_name: str
    activation_name: str
    parent_name: str = ""

    def __str__(self) -> str:
        prefix = f"{self.parent_name}." if self.parent_name else ""
        return f"{prefix}{self.layer_name} and {prefix}{self.activation_name}"

    def undo(self) -> None:
        self.fused.dissolve()


_PARTS: dict[type[Block], str] = {
    EncoderLayer: "attention and MLP",
    MLPBlock: "norm, MLP and residual",
    EmbeddingBlock: "sum and norm",
}


@dataclass(frozen=True)
class BlockFusion:
    """A module that became a block."""

    layer: Any
    name: str
    kind: type[Block]

    def __str__(self) -> str:
        return f"{_PARTS[self.kind]} of {self.name or 'the model'}"

    def undo(self) -> None:
        self.layer.restore()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _fuse_activation(
    parent: nn.Module, layer_name: str, activation_name: str, uses: Counter[int]
) -> ActivationFusion | None:
    layer, activation = part_of(parent, layer_name), part_of(parent, activation_name)
    epilogue = _fusible(layer, activation)
    if epilogue is None or uses[id(layer)] > 1 or has_hooks(layer):
        return None
    places = owner_of(parent, layer_name), owner_of(parent, activation_name)
    fused = FusedActivation.install(*places[0], *places[1], epilogue)
    return ActivationFusion(fused, layer_name, activation_name)


def _fusible(layer: Any, activation: Any) -> str | None:
    """The epilogue that a layer may take from an activation."""
    if not isinstance(layer, QModule) or not layer.takes_epilogue or has_hooks(activation):
        return None
    return epilogue_of(activation)


def _merge(parent: nn.Module, names: tuple[str, ...], uses: Counter[int]) -> None:
    found = [part_of(parent, name) for name in names]
    layers: list[Any] = [layer for layer in found if isinstance(layer, QModule) and layer.is_mergeable]
    if len(layers) < len(names) or any(uses[id(layer)] > 1 for layer in layers):
        return
    group = MergedGroup(layers)
    if group.merged is not None:
        for name, before, layer in zip(names, layers, group.layers, strict=True):
            setattr(*owner_of(parent, name), layer)
            if before.fused_activation is not None:
                before.fused_activation.follow(layer)


def owner_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds a part with a dotted name, and the part's name in it."""
    path, _, last = name.rpartition(".")
    return part_of(module, path), last


def part_of(module: nn.Module, name: str) -> Any:
    """A part of a module, or of its parts, by its dotted name; None if there is none."""
    part: Any = module
    for step in name.split(".") if name else ():
        part = getattr(part, step, None)
    return part


def has_hooks(thing: Any) -> bool:
    """Whether a call of a module or function runs hooks, which a fusion would skip."""
    return any(getattr(thing, hooks, None) for hooks in _HOOKS)
