"""The plan of a conversion: one decision for each module, made once and handed from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

Scheme = dict[str, Any]
"""The scheme of a layer as arguments of ``from_float``: activations, weights, rotation and so on."""

SPEC_LEAVES_FLOAT = "the spec leaves it float"
NO_INT8_VERSION = "there is no int8 version of it"
NOT_ASKED_FOR = "embeddings are converted by embeddings=True, or where the spec has their type or name"


class Request(NamedTuple):
    """What a spec asks for a module.

    Attributes:
        scheme: of dynquant's own modules.
        qconfig: torch.ao's QConfig, if the spec has one, for the ``from_float`` of other classes.
        dtype: of the weights that the qconfig asks for.
        is_float_qparams: whether the scales and zero points of the qconfig's weights are floats.
    """

    scheme: Scheme
    qconfig: Any = None
    dtype: torch.dtype = torch.qint8
    is_float_qparams: bool = False

    @property
    def is_int8(self) -> bool:
        return self.dtype in (torch.qint8, torch.int8)

    @property
    def has_float_qparams(self) -> bool:
        """Whether the qconfig is torch.ao's for embeddings, ``float_qparams_weight_only_qconfig``."""
        return self.qconfig is not None and self.dtype == torch.quint8 and self.is_float_qparams


class Decision(NamedTuple):
    """What becomes of one float module.

    Attributes:
        name: its first dotted name in the model that the spec covers.
        target: a type with a ``from_float``, which makes its counterpart; None: it stays float.
        request: what the spec asks for it; None if nothing.
        reason: why it stays float.
        is_notable: whether a user who wrote the spec expects it to be converted.
    """

    name: str
    module: nn.Module
    target: Any = None
    request: Request | None = None
    reason: str | None = None
    is_notable: bool = False


class Plan(NamedTuple):
    """The decisions about all modules that are converted or hold a weight matrix, in the model's order.

    ``select`` makes it, ``convert`` follows it, thresholds change it (:meth:`without`), and the warning and
    the report read it.
    """

    decisions: tuple[Decision, ...]

    @property
    def converted(self) -> tuple[Decision, ...]:
        return tuple(decision for decision in self.decisions if decision.target is not None)

    @property
    def left_float(self) -> tuple[Decision, ...]:
        return tuple(decision for decision in self.decisions if decision.target is None)

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """The plan with some modules left float, by their names, with the reasons."""
        return Plan(tuple(self._revised(reasons)))

    def _revised(self, reasons: Mapping[str, str]) -> Iterator[Decision]:
        for decision in self.decisions:
            if decision.name in reasons and decision.target is not None:
                yield decision._replace(target=None, reason=reasons[decision.name])
            else:
                yield decision


def label(key: type | str) -> str:
    """A key of a spec or the name of a layer, in the words of messages."""
    if isinstance(key, type):
        return key.__name__
    return f"layer {key!r}" if key else "the model itself"


def type_text(module: nn.Module) -> str:
    """The name of a module's type; of a ScriptModule the one of the module that it was made of."""
    return str(getattr(module, "original_name", None) or type(module).__name__)
