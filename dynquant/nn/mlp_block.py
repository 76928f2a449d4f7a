"""MLPBlock: norm, MLP and residual of a transformer block as one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patterns.residual_mlps import ResidualMLP
from ..reference import FLOAT_DTYPES
from .block import Block
from .block_call import (
    BlockCall,
    CannotRun,
    NormOperands,
    Operands,
    Tensors,
    check_forward,
    check_parts,
    part_of,
    places_of,
    require,
    require_kernels,
    require_one_device,
)

_mlp = torch.ops.dynquant.mlp.default


class MLPBlock(Block):
    """A decoder layer, or the MLP of a T5 layer, whose norm, MLP (gated or not) and residual are one op.

    :func:`dynquant.fuse` makes it of a module that a pattern knows
    (:mod:`dynquant.patterns.residual_mlps`) by changing the module's class to a subclass of its own class and
    of this one: parts, parameters, hooks and ``state_dict()`` stay what they are, ``isinstance`` holds. The
    attention of a decoder layer stays the module that it is, with its cache and its interface: its calls, its
    hooks and its outputs are those of the layer's own forward.

    A call runs the layer's own forward wherever the op would do something else or leave something out:

    - in training mode, where gradients are needed (parameters require them and grad mode is on), under
      autocast, torch.func's transforms, torch.compile, torch.export and torch.jit;
    - where somebody looks inside the norm or the MLP: hooks on their parts, replaced forwards;
    - where parts have changed so that the op cannot express them (static or per_tensor inputs, other types),
      and on devices without a kernel of it.

    :meth:`why_parts` gives the reason that lies in the module itself.
    """

    @staticmethod
    def _prepare(module: nn.Module, pattern: Any, base: type[nn.Module]) -> MLPCall:
        call = MLPCall(pattern, module)
        try:
            _fill(call, module, base)
        except CannotRun as error:
            call.arguments, call.reason = None, str(error)
        return call


MLPBlock._kind = MLPBlock


class Arguments(NamedTuple):
    """Of the op, without input and residual.

    Attributes:
        layers: gate, up, down and configs.
        norm: weight and bias; 1 is added to the weight if ``has_offset``.
        eps, kind: of the norm.
        hidden: size of the input's rows.
    """

    layers: tuple[Tensors, Tensors, Tensors, list[int]]
    norm: Tensors
    has_offset: bool
    eps: float
    kind: int
    hidden: int
    device: torch.device


class MLPCall(BlockCall):
    """The op of one block, and the modules that are called before and after it."""

    def __init__(self, pattern: ResidualMLP, block: nn.Module) -> None:
        super().__init__()
        self.pattern = pattern
        modules = [part_of(block, name) for name in pattern.called]
        self.called = {id(part) for each in modules if each is not None for part in each.modules()}
        self._attention = _module(block, pattern.attention)
        self._attention_norm = _module(block, pattern.attention_norm)
        self._attention_out_norm = _module(block, pattern.attention_out_norm)
        self._out_norm = _module(block, pattern.out_norm)
        self._norm, self._whole = _module(block, pattern.norm), _module(block, pattern.mlp)
        self.watch(places_of(block, self.called))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The input, and the other arguments by their names."""
        names, arguments = self.pattern.arguments, self.arguments
        if len(args) > len(names):
            return None
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        x = given.pop(names[0], None)
        if type(x) is not Tensor or x.is_nested or x.device != arguments.device:
            return None
        if x.dim() == 0 or x.shape[-1] != arguments.hidden or x.dtype not in FLOAT_DTYPES:
            return None
        if given and self._attention is None:
            return None
        return x, given

    def run(self, *inputs: Any) -> Any:
        x, given = inputs
        if self._attention is None:
            return self._with_mlp(x)
        attended = self._attention(**{self.pattern.arguments[0]: self._attention_norm(x)}, **given)
        if not isinstance(attended, Tensor):
            attended = attended[0]
        if self._attention_out_norm is not None:
            attended = self._attention_out_norm(attended)
        h = x + attended
        if h.requires_grad and torch.is_grad_enabled():  # by a position embedding or the cache
            y = self._whole(self._norm(h))
            return h + (y if self._out_norm is None else self._out_norm(y))
        return self._with_mlp(h)

    def _with_mlp(self, h: Tensor) -> Tensor:
        a = self.arguments
        norm = [1.0 + a.norm[0].float(), None] if a.has_offset else a.norm
        residual = h if self._out_norm is None else None
        y: Tensor = _mlp(h, *a.layers, residual, norm, [], a.eps, a.kind)
        return y if self._out_norm is None else h + self._out_norm(y)


def _module(block: nn.Module, name: str) -> Any:
    return part_of(block, name) if name else None


def _fill(call: MLPCall, block: nn.Module, base: type[nn.Module]) -> None:
    pattern = call.pattern
    check_forward(block, base, pattern.arguments)
    for name in pattern.called:
        require(isinstance(part_of(block, name), nn.Module), f"it has no {name}")
    check_parts(block, base, set(pattern.roles), call.called)
    mlp, norm = Operands(block, pattern), NormOperands(block, pattern.norm)
    require_one_device((*mlp.tensors, *norm.tensors), mlp.device)
    require(not norm.has_offset or norm.tensors[0] is not None, f"{pattern.norm} has no weight")
    call.arguments = Arguments(
        layers=(mlp.gate, mlp.up, mlp.down, mlp.codes),
        norm=norm.tensors,
        has_offset=norm.has_offset,
        eps=norm.eps,
        kind=norm.kind,
        hidden=mlp.hidden,
        device=mlp.device,
    )
    call.parameters = tuple(block.parameters())
    inside = (part for part in block.modules() if part is not block and id(part) not in call.called)
    call.watch_hooks(inside)
    require_kernels(call, ["mlp"], mlp.device)
