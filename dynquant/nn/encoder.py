"""EncoderLayer: a transformer layer whose parts are quantized, run as three ops."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..patterns.transformer_layers import TransformerLayer
from .encoder_call import EncoderCall, prepare

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


class EncoderLayer(nn.Module):
    """A post- or pre-norm transformer layer as three ops: query, key and value in one product; attention;
    output projection and MLP with their residuals and norms.

    :func:`dynquant.fuse` makes it of a layer that a pattern knows
    (:mod:`dynquant.patterns.transformer_layers`) by changing the layer's class to a subclass of its own class
    and of this one: parts, parameters, hooks and ``state_dict()`` stay what they are, ``isinstance`` holds.
    Attention is int8 too, where the device has a kernel for it.

    A call runs the layer's own forward on its parts wherever three ops would do something else or leave
    something out:

    - in training mode, where gradients are needed (parameters require them and grad mode is on), under
      autocast, torch.func's transforms, torch.compile, torch.export and torch.jit;
    - where somebody looks inside: hooks on parts, ``output_attentions``, replaced forwards;
    - for arguments other than the input and a padding mask, for inputs that are not [B, S, hidden];
    - where parts have changed so that the ops cannot express them (static or per_tensor inputs, other types),
      and on devices without kernels of these ops.

    :meth:`why_parts` gives the reason that lies in the layer itself.

    In nn.TransformerEncoderLayer the float ``in_proj_weight`` of nn.MultiheadAttention is quantized in the
    scheme of ``linear1``, and again after it has changed; ``state_dict()`` holds the float one. A change of a
    few of its elements through ``.data`` leaves no trace: write them under ``torch.no_grad()`` instead.
    """

    _base: ClassVar[type[nn.Module]] = nn.Module
    _pattern: ClassVar[TransformerLayer] = TransformerLayer()
    _call: EncoderCall

    @staticmethod
    def adopt(layer: nn.Module, pattern: TransformerLayer, unconditionally: bool = False) -> bool:
        """Make an EncoderLayer of a layer, in place, if its parts can run as three ops.

        Args:
            pattern: of the layer's type.
            unconditionally: also if they cannot at present.

        Returns:
            Whether it is one now. If not, the layer did not change.
        """
        if isinstance(layer, EncoderLayer):
            return False
        call = prepare(layer, pattern, type(layer))
        if call.reason is not None and not call.is_reason_of_device and not unconditionally:
            return False
        base: Any = type(layer)
        layer.__class__ = _class_of(base, pattern)
        return True

    def restore(self) -> None:
        """Make it what it was made of again, in place."""
        self.__dict__.pop("_call", None)
        self.__class__ = self._base  # type: ignore[assignment]

    def why_parts(self) -> str | None:
        """Why every call runs the layer's parts at present, as a clause; None if calls run three ops."""
        return self._prepared().reason

    def _prepared(self) -> EncoderCall:
        """What a call needs, made again if any part has changed."""
        call = self.__dict__.get("_call")
        if call is None or not call.is_current():
            call = self.__dict__["_call"] = prepare(self, self._pattern, self._base)
        return call

    def _get_name(self) -> str:
        return f"EncoderLayer[{self._base.__name__}]"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_call"}
        return _new, (self._base, self._pattern), state


def _new(base: Any, pattern: TransformerLayer) -> EncoderLayer:
    """An instance without state, for copies and pickles."""
    kind = _class_of(base, pattern)
    return kind.__new__(kind)


@cache
def _class_of(base: Any, pattern: TransformerLayer) -> type[EncoderLayer]:
    """The subclass of ``base`` whose forward is three ops.

    It has the name of ``base``, by which accelerate keeps layers whole (``_no_split_modules``).
    """
    own_forward: Any = base.forward

    # torch.jit.script and signatures read the source of the forward below.
    @wraps(own_forward)
    def forward(self: EncoderLayer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.training:
            return own_forward(self, *args, **kwargs)
        call = self._prepared()
        if call.arguments is not None and not call.is_watched():
            inputs = call.inputs(args, kwargs)
            if inputs is not None and _is_plain_eager() and not _needs_gradient(call, inputs):
                return call.run(*inputs)
        return own_forward(self, *args, **kwargs)

    names = {"__module__": __name__, "_base": base, "_pattern": pattern, "forward": forward}
    return type(base.__name__, (EncoderLayer, base), names)


def _is_plain_eager() -> bool:
    """Whether a call is that of a plain function of its tensors: nothing traces or transforms it."""
    return (
        not _is_autocast_enabled()
        and _tracing_state() is None
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def _needs_gradient(call: EncoderCall, inputs: tuple[Tensor, Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (*inputs, *call.parameters))
