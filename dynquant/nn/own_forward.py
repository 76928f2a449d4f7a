"""Quantized modules with the forward of a user's subclass, which calls F.linear or F.embedding itself."""

from __future__ import annotations

from functools import cache
from typing import Any

from .module import QModule


class OwnForward(QModule):
    """A quantized module whose ``forward`` is that of the float type that it was made of.

    :func:`with_own_forward` makes its classes: subclasses of the float type first, so that its methods are
    called and ``super()`` in them reaches nn.Linear's or nn.Embedding's, then of the quantized type, which
    keeps the weight, its files and its casts. F.linear and F.embedding of a :class:`dynquant.QTensor` run
    in int8. What a fixed op would take in, an epilogue or static qparams, they do not have.
    """

    has_static_form = False
    _float_type: type
    _quantized_type: type

    @property
    def takes_epilogue(self) -> bool:
        return False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        getstate: Any = getattr(self, "__getstate__", None)
        return _new, (self._quantized_type, self._float_type), getstate() if getstate else dict(vars(self))


@cache
def with_own_forward(quantized_type: Any, float_type: Any) -> type[OwnForward]:
    """The subclass of both, with the name of the float type and its forward."""
    names = {"__module__": __name__, "_float_type": float_type, "_quantized_type": quantized_type}
    return type(float_type.__name__, (OwnForward, float_type, quantized_type), names)


def _new(quantized_type: Any, float_type: Any) -> OwnForward:
    """An instance without state, for copies and pickles."""
    kind = with_own_forward(quantized_type, float_type)
    return kind.__new__(kind)
