"""EmbeddingBlock: the embedding stage of a transformer, rows of several tables and a norm, as one op."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..patterns.embedding_stages import EmbeddingStage
from .block import Block
from .block_call import (
    BlockCall,
    CannotRun,
    NormOperands,
    Place,
    check_forward,
    check_parts,
    part_of,
    places_of,
    require,
    require_kernels,
    require_one_device,
)
from .embedding import QEmbedding

_embedding_norm = torch.ops.dynquant.embedding_norm.default
_INDEX_DTYPES = (torch.int64, torch.int32)
_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COUNT_TOKENS = "create_position_ids_from_input_ids"


class EmbeddingBlock(Block):
    """The embedding stage of a transformer: word, token type and position embeddings, float or int8, their
    sum in fp32 and its norm are one op.

    :func:`dynquant.fuse` makes it of a module that a pattern knows
    (:mod:`dynquant.patterns.embedding_stages`) by changing the module's class to a subclass of its own class
    and of this one: parts, parameters, hooks and ``state_dict()`` stay what they are, ``isinstance`` holds.

    A call runs the module's own forward wherever the op would do something else or leave something out: as
    :class:`dynquant.EncoderLayer`'s do, and for ``inputs_embeds``, indices of other dtypes, and tables of
    fp64 or of several dtypes.

    :meth:`why_parts` gives the reason that lies in the module itself.
    """

    @staticmethod
    def _prepare(module: nn.Module, pattern: Any, base: type[nn.Module]) -> EmbeddingCall:
        call = EmbeddingCall(pattern)
        call.watch((*places_of(module), *_places(module, pattern)))
        try:
            _fill(call, module, base)
        except CannotRun as error:
            call.arguments, call.reason = None, str(error)
        return call


EmbeddingBlock._kind = EmbeddingBlock


class EmbeddingCall(BlockCall):
    """The op of one embedding stage.

    Attributes:
        arguments: the op's behind the indices.
    """

    def __init__(self, pattern: EmbeddingStage) -> None:
        super().__init__()
        self.pattern = pattern
        self.device = torch.device("cpu")
        self.buffers: dict[str, Tensor] = {}  # of indices that are not given
        self.count_tokens: Any = None
        self.zero: Any = None  # the index 0
        self._kinds: list[tuple[Tensor, tuple[Any, ...]]] = []

    def watch_kind(self, parameter: Tensor) -> None:
        """Have a change of dtype, device or strides end the validity: ``to()`` and ``.data =`` keep the
        object."""
        self._kinds.append((parameter, _kind_of(parameter)))

    def is_current(self) -> bool:
        return super().is_current() and all(_kind_of(each) == kind for each, kind in self._kinds)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The indices of each table."""
        pattern = self.pattern
        if len(args) > len(pattern.arguments):
            return None
        given = dict(zip(pattern.arguments, args, strict=False))
        given.update(kwargs)
        indices = {name: given.pop(name, None) for name in pattern.indices}
        first = indices[pattern.indices[0]]
        offset = given.pop(pattern.offset, 0)
        if not isinstance(first, Tensor) or first.dim() == 0 or type(offset) is not int:
            return None
        if any(value is not None for value in given.values()):
            return None
        self._fill_in(indices, first, offset)
        for index in indices.values():
            if type(index) is not Tensor or index.is_nested or index.dtype not in _INDEX_DTYPES:
                return None
            if index.device != self.device:
                return None
        return (list(indices.values()),)

    def _fill_in(self, indices: dict[str, Any], first: Tensor, offset: int) -> None:
        """Indices in the place of those that are None."""
        name, span = self.pattern.positions, slice(offset, offset + first.shape[-1])
        positions = indices.get(name)
        if name and positions is None:
            counted = self.count_tokens
            positions = self.buffers[name][:, span] if counted is None else counted(first, offset)
            indices[name] = positions
        for other, index in indices.items():
            if index is not None:
                continue
            buffer = self.buffers.get(other)
            if buffer is None:
                indices[other] = self.zero
            elif self.pattern.follows_positions and positions is not None:
                indices[other] = buffer.expand(positions.shape[0], -1).gather(1, positions)
            else:
                indices[other] = buffer[:, span]

    def run(self, *inputs: Any) -> Any:
        return _embedding_norm(inputs[0], *self.arguments)


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.stride()


def _places(module: nn.Module, pattern: EmbeddingStage) -> Iterator[Place]:
    """Those of tables and buffers, beside the places that every block has."""
    for name in pattern.tables:
        table = part_of(module, name)
        if table is not None:
            yield vars(table), "max_norm"
            yield vars(table), "_prepared"
    for name in pattern.indices[1:]:
        yield module._buffers, name
    yield vars(module), "padding_idx"


def _fill(call: EmbeddingCall, module: Any, base: type[nn.Module]) -> None:
    pattern = call.pattern
    check_forward(module, base, pattern.arguments)
    for name in pattern.parts:
        require(part_of(module, name) is not None, f"it has no {name}")
    check_parts(module, base, set(pattern.parts))
    for parameter in module.parameters():
        call.watch_kind(parameter)
    tables, scales, k, dtype = _tables(module, pattern)
    norm = NormOperands(module, pattern.norm)
    require(not norm.has_offset, f"{pattern.norm} adds 1 to its weight")
    for tensor in norm.tensors:
        require(tensor is None or tensor.dtype == dtype, f"{pattern.norm} has another dtype than the tables")
        require(tensor is None or tensor.numel() == k, f"{pattern.norm} is not over {k} elements")
    call.device = tables[0].device
    require_one_device((*tables, *scales, *norm.tensors), call.device)
    for name in pattern.indices[1:]:
        buffer = module._buffers.get(name)
        if buffer is not None:
            require(buffer.dim() == 2, f"its buffer {name} has {buffer.dim()} dimensions")
            require(buffer.device == call.device, f"its buffer {name} is on {buffer.device}")
            call.buffers[name] = buffer
    if pattern.counts_tokens:
        call.count_tokens = _counting_function(module, base)
    elif pattern.positions:
        require(pattern.positions in call.buffers, f"it has no buffer {pattern.positions}")
    call.zero = torch.zeros(1, dtype=torch.int64, device=call.device)
    call.arguments = (tables, scales, k, norm.tensors, norm.eps, norm.kind, dtype)
    call.parameters = tuple(module.parameters())
    call.watch_hooks(part for part in module.modules() if part is not module)
    require_kernels(call, ["embedding_norm"], call.device)


def _counting_function(module: Any, base: type[nn.Module]) -> Any:
    """(ids, offset) -> positions."""
    function: Any = getattr(base, _COUNT_TOKENS, None)
    if function is None:
        function = getattr(sys.modules[base.__module__], _COUNT_TOKENS, None)
    padding = getattr(module, "padding_idx", None)
    require(function is not None and type(padding) is int, f"it has no {_COUNT_TOKENS}")
    return lambda ids, offset: function(ids, padding, *((offset,) if offset else ()))


def _tables(
    module: nn.Module, pattern: EmbeddingStage
) -> tuple[list[Tensor], list[Tensor | None], int, torch.dtype]:
    """Tables and scales as the op takes them, the size of a row, and the dtype of the result."""
    tables: list[Tensor] = []
    scales: list[Tensor | None] = []
    found: list[tuple[int, torch.dtype]] = []
    for name in pattern.tables:
        table: Any = part_of(module, name)
        if type(table) is QEmbedding:
            packed_weight, scale, k, dtype, is_rotated = table._prepared
            require(not is_rotated, f"{name} is rotated")
            tables.append(packed_weight)
            scales.append(scale)
        else:
            require(type(table) is nn.Embedding, f"{name} is a {type(table).__name__}")
            require(table.max_norm is None, f"{name} has a max_norm")
            weight = table.weight
            require(type(weight) is nn.Parameter, f"{name}'s weight is a {type(weight).__name__}")
            require(weight.stride(1) == 1 or weight.shape[1] == 1, f"{name}'s rows are strided")
            tables.append(weight)
            scales.append(None)
            k, dtype = weight.shape[1], weight.dtype
        found.append((k, dtype))
    k, dtype = found[0]
    require(all(each == (k, dtype) for each in found), "its tables differ in width or dtype")
    require(dtype in _TABLE_DTYPES, f"its tables are of {dtype}")
    return tables, scales, k, dtype
