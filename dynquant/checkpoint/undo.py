"""A model as it was: undoes changes of its structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import tied
from ..nn.merged import MergedLinear
from ..nn.module import QModule


class Undo:
    """What every module of a model is and holds, taken before a change that may fail.

    It holds the tensors themselves, not copies: it undoes replacements, not writes to a tensor.

    Attributes:
        modules: by their ids.
        tensors: by the id of each module, its parameters and buffers by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module): module for module in model.modules()}
        self.tensors = {
            key: {**module._parameters, **module._buffers} for key, module in self.modules.items()
        }
        self._classes = [(module, type(module)) for module in self.modules.values()]
        objects: list[Any] = [*self.modules.values()]
        objects += [module.group for module in self.modules.values() if isinstance(module, MergedLinear)]
        # The config of a transformers model says which layers are quantized.
        objects += [vars(module).get("config") for module in self.modules.values()]
        dicts = {id(vars(thing)): vars(thing) for thing in objects if hasattr(thing, "__dict__")}
        for attributes in list(dicts.values()):
            dicts.update({id(value): value for value in attributes.values() if isinstance(value, dict)})
        self._dicts = [(attributes, dict(attributes)) for attributes in dicts.values()]

    def undo(self) -> None:
        """Give every module its class and attributes of that time again."""
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for attributes, before in self._dicts:
            attributes.clear()
            attributes.update(before)
        for module in self.modules.values():
            if isinstance(module, QModule):
                tied.forget(module.quantized_weights().values())
