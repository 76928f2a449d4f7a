"""What a forward of a user's own does with the weight, found by one call of it on a float stand-in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import FLOAT_DTYPES

_CASTS = ("to", "float", "half", "bfloat16", "double", "detach", "contiguous", "clone")
_SAME_WEIGHT = {
    *(getattr(Tensor, name) for name in _CASTS),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
"""Functions whose result is a QTensor too."""

_READS = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point}
"""Functions that read no values."""

_INT8: dict[type, tuple[Callable[..., Any], ...]] = {
    nn.Linear: (F.linear,),
    nn.Embedding: (F.embedding,),
    nn.EmbeddingBag: (F.embedding_bag,),
}
"""By float type, the functions that run on the int8 weight itself."""


class _StandIn(Tensor):
    """A float weight that notes what is done with it.

    Attributes:
        uses: for all stand-ins of one call: the names of functions that computed with its values, and whether
            one that has an int8 form did.
    """

    uses: dict[str, bool]
    int8: tuple[Callable[..., Any], ...]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, _StandIn)]
        with torch._C.DisableTorchFunctionSubclass():
            plain = [value.as_subclass(Tensor) if isinstance(value, _StandIn) else value for value in args]
            named = {
                name: value.as_subclass(Tensor) if isinstance(value, _StandIn) else value
                for name, value in kwargs.items()
            }
            out = func(*plain, **named)
        if not weights:
            return out
        own = weights[0]
        if func in _SAME_WEIGHT and isinstance(out, Tensor) and out.dtype in FLOAT_DTYPES:
            return stand_in(out, own.uses, own.int8)
        is_attribute = getattr(func, "__name__", "") == "__get__" and not isinstance(out, Tensor)
        if func in own.int8 and (kwargs.get("weight") is own or (len(args) > 1 and args[1] is own)):
            own.uses["int8"] = True
        elif func not in _READS and not is_attribute:
            owner = getattr(func, "__self__", None) if func.__name__ == "__get__" else func
            own.uses.setdefault(getattr(owner, "__name__", str(func)), False)
        return out


def stand_in(weight: Tensor, log: dict[str, bool], int8: tuple[Callable[..., Any], ...]) -> _StandIn:
    made = weight.detach().as_subclass(_StandIn)
    made.uses, made.int8 = log, int8
    return made


def why_not_int8(module: nn.Module, base: type) -> str | None:
    """Why a module whose class has a forward of its own would not compute in int8 with an int8 weight, as a
    clause; None if it would.

    Its forward runs once, without gradients, on zeros.

    Args:
        base: nn.Linear, nn.Embedding or nn.EmbeddingBag, which the module's class derives from.
    """
    words = f"its forward is not that of {base.__name__}"
    if base not in _INT8 or type(module).train is not nn.Module.train:
        return words
    weight: Any = module.weight
    log: dict[str, bool] = {}
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: value for name, value in module._parameters.items() if name != "weight"
    }
    buffers = module._buffers.items()
    probe.__dict__["_buffers"] = {name: None if value is None else value.clone() for name, value in buffers}
    probe.__dict__["weight"] = stand_in(weight, log, _INT8[base])
    if base is nn.Linear:
        x = torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    else:
        x = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    training = {part: part.training for part in module.modules()}
    try:
        for part in (probe, *training):
            part.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            probe.forward(x)  # without its hooks, which count or change calls
    except Exception as error:
        return f"{words}, and a call of it with one input raises {type(error).__name__}"
    finally:
        for part, mode in training.items():
            part.training = mode
    others = sorted(name for name, is_int8 in log.items() if not is_int8)
    if others:
        return f"{words}, and reads the weight by {', '.join(others)}"
    function = _INT8[base][0].__name__
    return None if log else f"{words}, and calls no F.{function} with its weight"
