"""Bytes of tensors, layers and models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.module import QModule


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All tensors that a module and those in it hold, also packed ones."""
    tensors: list[Tensor] = []
    if isinstance(module, QModule):
        return [*module.int8_tensors().values(), *module.other_tensors().values()]
    for part in module.modules():
        tensors += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if type(part).__module__.startswith("torch.ao."):
            # Its packed weights are opaque; the tensors of its state_dict have their size.
            packed: dict[str, Any] = {}
            part._save_to_state_dict(packed, "", False)
            tensors += [tensor for name in packed.keys() - part._buffers for tensor in _held_by(packed[name])]
    return tensors


def _held_by(value: Any) -> Iterator[Tensor]:
    """The tensors of a value in a state_dict; those of torch's packed objects are in their own state."""
    if isinstance(value, torch.ScriptObject):
        state = getattr(value, "__getstate__", None)
        yield from () if state is None else _held_by(state())
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _held_by(part)
    elif isinstance(value, Tensor):
        yield value


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the memory of a model's tensors, each memory counted once."""
    sizes: dict[int, int] = {}
    tensors = tensors_of(model)
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            sizes[id(tensor)] = tensor.nbytes
    return sum(sizes.values())
