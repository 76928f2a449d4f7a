"""Patterns by the type of a module, since its forward alone decides the roles of its layers.

A module of a subclass has no pattern: its forward may be another. A type may have any number of patterns, of
several kinds; each kind is a tuple of the names of parts, and a fusion asks for the kinds that it knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

from . import hugging_face, timm, torch_nn
from .embedding_stages import EMBEDDING_STAGES, EmbeddingStage
from .residual_mlps import RESIDUAL_MLPS, ResidualMLP
from .transformer_layers import TRANSFORMER_LAYERS, TransformerLayer


class Pattern(Protocol):
    """Roles of the parts of a module: a tuple whose fields name them."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts that have a role, dotted for parts of parts (``"mlp.up"``)."""


class ActivationAfter(NamedTuple):
    """A layer whose output only an activation reads.

    Attributes:
        layer: the layer.
        activation: a module, or a function that an attribute holds.
    """

    layer: str
    activation: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self)


class SharedInput(NamedTuple):
    """Layers that are usually called with the same tensor, such as query, key and value.

    Attributes:
        layers: in the order of their calls.
    """

    layers: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.layers


KINDS: tuple[type[Pattern], ...] = (
    ActivationAfter,
    SharedInput,
    TransformerLayer,
    ResidualMLP,
    EmbeddingStage,
)
"""The kinds of patterns that fusions ask for."""

P = TypeVar("P", bound=Pattern)

PATTERNS: dict[str, list[Pattern]] = {}
"""By the dotted name of a type, such as ``"torch.nn.modules.transformer.TransformerEncoderLayer"``.
nn.Sequential needs no pattern."""

REGISTERED: set[str] = set()
"""The types whose patterns a user registered: a name in them that a module does not have is a mistake."""


def register_pattern(module_type: type | str, *patterns: Pattern) -> None:
    """Tell :func:`dynquant.fuse` the roles of the layers in a type of module.

    Fusion cannot see what a forward does with its layers. It knows nn.Sequential, torch.nn's transformer
    layers and those of many transformers models. For a module of your own, a pattern says which activation
    follows which layer, and which layers read the same tensor:

    >>> import torch, dynquant
    >>> from dynquant.patterns import ActivationAfter, SharedInput
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.key, self.value = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    ...         self.up, self.act = torch.nn.Linear(64, 256), torch.nn.GELU()
    ...         self.down = torch.nn.Linear(256, 64)
    ...     def forward(self, x):
    ...         x = self.key(x) * self.value(x)
    ...         return self.down(self.act(self.up(x)))
    >>> dynquant.register_pattern(Block, ActivationAfter("up", "act"), SharedInput(("key", "value")))
    >>> int8 = dynquant.quantize_dynamic(Block(), fuse=True)
    >>> int8.up.config.epilogue, int8.act
    ('gelu', FusedActivation())
    >>> int8.key.merged_count
    2

    Args:
        module_type: the class, or its dotted name if it is not imported yet. Its subclasses do not count.
        patterns: any number of them; they are added to those that the type has.

    Raises:
        TypeError: for anything but a class or a name, a pattern of no known kind, a part's name that is not
            a string.
        ValueError: for a SharedInput of fewer than two layers.
    """
    if not isinstance(module_type, (type, str)):
        raise TypeError(f"register_pattern: expected a class or its dotted name, got {module_type!r}")
    for pattern in patterns:
        _check(pattern)
    name = module_type if isinstance(module_type, str) else _name_of(module_type)
    known = PATTERNS.setdefault(name, [])
    known += [pattern for pattern in patterns if pattern not in known]
    REGISTERED.add(name)


def _check(pattern: Any) -> None:
    if not isinstance(pattern, KINDS):
        kinds = " or ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"register_pattern: expected patterns of type {kinds}, got {pattern!r}")
    names = pattern.parts
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"register_pattern: expected names of parts in a tuple, got {pattern!r}")
    if len(set(names)) < 2:
        raise ValueError(f"register_pattern: expected two parts or more, got {pattern!r}")


def patterns_of(module: Any, kind: type[P]) -> list[P]:
    """The patterns of one kind that a module's own type has."""
    return [pattern for pattern in PATTERNS.get(type_name(module), ()) if isinstance(pattern, kind)]


def type_name(thing: Any) -> str:
    """The dotted name of a thing's type."""
    return _name_of(type(thing))


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


for _pairs in (torch_nn.ACTIVATION_AFTER, hugging_face.ACTIVATION_AFTER, timm.ACTIVATION_AFTER):
    for _name, _pair in _pairs.items():
        PATTERNS.setdefault(_name, []).append(ActivationAfter(*_pair))
for _name, _layers in hugging_face.QKV_GROUPS.items():
    PATTERNS.setdefault(_name, []).append(SharedInput(_layers))
for _name, _layers_of_type in TRANSFORMER_LAYERS.items():
    PATTERNS.setdefault(_name, []).extend(_layers_of_type)
for _name, _mlps in RESIDUAL_MLPS.items():
    PATTERNS.setdefault(_name, []).extend(_mlps)
for _name, _stage in EMBEDDING_STAGES.items():
    PATTERNS.setdefault(_name, []).append(_stage)
