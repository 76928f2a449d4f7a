"""Block: a module of several parts that runs them as few ops, and stays the module that it was."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad

from .block_call import BlockCall

_is_autocast_enabled = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


class Block(nn.Module):
    """What :class:`dynquant.EncoderLayer`, :class:`dynquant.MLPBlock` and :class:`dynquant.EmbeddingBlock`
    have in common.

    :func:`dynquant.fuse` makes one of a module that a pattern knows by changing the module's class to a
    subclass of its own class and of this one: parts, parameters, hooks and ``state_dict()`` stay what they
    are, ``isinstance`` holds.
    """

    _base: ClassVar[type[nn.Module]] = nn.Module
    _pattern: ClassVar[Any] = None
    _call: BlockCall

    @classmethod
    def adopt(cls, module: nn.Module, pattern: Any, unconditionally: bool = False) -> bool:
        """Make a block of a module, in place, if its parts can run as the block's ops.

        Args:
            pattern: of the module's type.
            unconditionally: also if they cannot at present.

        Returns:
            Whether it is one now. If not, the module did not change.
        """
        if isinstance(module, Block):
            return False
        call = cls._prepare(module, pattern, type(module))
        if call.reason is not None and not call.is_reason_of_device and not unconditionally:
            return False
        kind: Any = cls
        base: Any = type(module)
        module.__class__ = class_of(kind, base, pattern)
        return True

    @staticmethod
    def _prepare(module: nn.Module, pattern: Any, base: type[nn.Module]) -> BlockCall:
        """What a call needs.

        Args:
            base: the type whose forward the pattern describes.
        """
        raise NotImplementedError

    def restore(self) -> None:
        """Make it what it was made of again, in place."""
        self.__dict__.pop("_call", None)
        self.__class__ = self._base  # type: ignore[assignment]

    def why_parts(self) -> str | None:
        """Why every call runs the parts one by one at present, as a clause; None if calls run the ops."""
        return self._prepared().reason

    def _prepared(self) -> BlockCall:
        """What a call needs, made again if any part has changed."""
        call = self.__dict__.get("_call")
        if call is None or not call.is_current():
            call = self.__dict__["_call"] = self._prepare(self, self._pattern, self._base)
        return call

    def _get_name(self) -> str:
        return f"{self._kind.__name__}[{self._base.__name__}]"

    _kind: ClassVar[type[Block]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != "_call"}
        return new_block, (self._kind, self._base, self._pattern), state


def new_block(kind: Any, base: Any, pattern: Any) -> Block:
    """An instance without state, for copies and pickles."""
    made = class_of(kind, base, pattern)
    return made.__new__(made)


@cache
def class_of(kind: Any, base: Any, pattern: Any) -> type[Block]:
    """The subclass of ``base`` whose forward is the ops of ``kind``.

    It has the name of ``base``, by which accelerate keeps layers whole (``_no_split_modules``).
    """
    own_forward: Any = base.forward

    # torch.jit.script and signatures read the source of the forward below.
    @wraps(own_forward)
    def forward(self: Block, *args: Any, **kwargs: Any) -> Any:
        # First: what a trace sees of the preparation would become a part of it.
        if torch.compiler.is_compiling() or self.training or not _is_plain_eager():
            return own_forward(self, *args, **kwargs)
        call = self._prepared()
        if call.arguments is not None and not call.is_watched():
            inputs = call.inputs(args, kwargs)
            if inputs is not None and not call.needs_gradient(inputs):
                return call.run(*inputs)
        return own_forward(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "_base": base, "_pattern": pattern, "forward": forward}
    return type(base.__name__, (kind, base), names)


def _is_plain_eager() -> bool:
    """Whether a call is that of a plain function of its tensors: nothing traces or transforms it."""
    return (
        not _is_autocast_enabled()
        and _tracing_state() is None
        and _transforms() is None
        and forward_ad._current_level < 0
    )
