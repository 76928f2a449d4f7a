"""Holders of the state of quantized modules, which transformers fills before there are such modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..nn.module import QModule
from .contents import replace_module
from .hugging_face import quantize_function


class State(nn.Module):
    """Has the entries of a quantized module's state_dict as parameters on meta, and builds it of them.

    Attributes:
        module: the quantized module, on meta.
        dtype: of its weights in the model without weights.
        buffers_of: the names of the buffers that no file holds. transformers fills them by the class of the
            float module, which is there as the child ``unsaved`` for that.
    """

    def __init__(
        self, module: QModule, static: bool, children: Mapping[str, nn.Module], float_module: nn.Module
    ) -> None:
        super().__init__()
        unsaved = float_module._non_persistent_buffers_set & module._buffers.keys()
        self.buffers_of = tuple(name for name in unsaved if module._buffers[name] is not None)
        self.__dict__["module"] = module
        self.dtype = next(iter(module.quantized_weights().values())).dtype
        for size in ("in_features", "out_features"):  # which some families' _init_weights read
            if hasattr(module, size):
                setattr(self, size, getattr(module, size))
        entries: dict[str, Tensor] = {}
        module._save_to_state_dict(entries, "", False)
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in entries.items()}
        if static:
            shapes["activation_scale"] = (1,), torch.float32
            shapes["activation_zero_point"] = (1,), torch.int32
        # Float ones first: some families' _init_weights take the dtype of the first parameter for buffers.
        for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: not item[1][1].is_floating_point):
            # A file may have a bias of any float dtype: fp32 holds its values.
            kept = torch.float32 if dtype.is_floating_point else dtype
            tensor = torch.empty(shape, dtype=kept, device="meta")
            # Parameters: of nothing else can transformers split what some families' files hold as one tensor.
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for name, child in children.items():
            self.add_module(name, child)
        if self.buffers_of:
            self.add_module("unsaved", _without_parameters(float_module))

    def build(self, name: str, dtype: torch.dtype) -> QModule:
        """The module with the loaded values, and with weights of ``dtype``.

        Raises:
            ValueError: for entries that the files lack, with the name of the module.
        """
        missing = [key for key, value in self._own_entries() if not hasattr(value, "_is_hf_initialized")]
        if missing:
            raise ValueError(
                f"dynquant: config.json says that layer {name!r} is quantized, but the weights have no "
                f"{', '.join(missing)} of it"
            )
        module: QModule = self.__dict__["module"]
        filled = dict(self.named_buffers())
        for buffer in self.buffers_of:
            module._buffers[buffer] = filled[f"unsaved.{buffer}"]
        module.load_state_dict(self.state_dict(), assign=True)
        return module.to(dtype).train(self.training)

    def _own_entries(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.named_modules():
            if isinstance(part, State):
                for key, value in part._parameters.items():
                    if value is not None:
                        yield f"{name}.{key}" if name else key, value


def put_states(model: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace modules of a model without weights, by name, with the states of quantized ones.

    Args:
        schemes: as :meth:`dynquant.QModule.saved_scheme` returns them.

    Raises:
        ValueError: for a module that has no quantized form, with its name.
    """
    configs = {
        name: Config(**{word: value for word, value in scheme.items() if word != "static"})
        for name, scheme in schemes.items()
    }
    floats = {name: model.get_submodule(name) for name in configs}
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    spec = {name: configs.get(name) for name in names}
    if configs:
        quantize_function()(model, spec, inplace=True)
    states: dict[nn.Module, State] = {}
    for name in schemes:
        module = model.get_submodule(name)
        if isinstance(module, State):
            continue
        if not isinstance(module, QModule):
            raise ValueError(
                f"dynquant: config.json says that layer {name!r} is quantized, but in this model it is a "
                f"{type(floats[name]).__name__}"
            )
        module.set_float_input(configs[name].float_input)
        if module not in states:
            states[module] = _state_of(name, module, schemes, floats)
        replace_module(model, name, states[module])


def _state_of(
    name: str,
    module: QModule,
    schemes: Mapping[str, Mapping[str, Any]],
    floats: Mapping[str, nn.Module],
) -> State:
    children: dict[str, nn.Module] = {}
    for child, part in module.named_children():
        inner = f"{name}.{child}"
        children[child] = _state_of(inner, part, schemes, floats) if isinstance(part, QModule) else part
    return State(module, bool(schemes.get(name, {}).get("static")), children, floats.get(name, module))


def _without_parameters(float_module: nn.Module) -> nn.Module:
    """A module of the same class with the same buffers, and no parameter that could be missing in a file."""
    stub = copy.copy(float_module)
    stub.__dict__.update(_parameters={}, _modules={}, _buffers=dict(float_module._buffers))
    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    stub.__dict__.update(weight=weight, bias=None)
    return stub


def tie(a: nn.Module, b: nn.Module) -> None:
    """Have an embedding and a head with the same values share one weight, the packed one if there is one."""
    if not isinstance(a, QModule) or not isinstance(b, QModule):
        return
    one, other = (module.quantized_weights().get("weight") for module in (a, b))
    if one is None or other is None or one.shape != other.shape or one.config.weights != other.config.weights:
        return
    if not torch.equal(one.channel_scale, other.channel_scale):
        return
    if not torch.equal(one.int_repr(), other.int_repr()):
        return
    shared, holder = (other, a) if one.is_rows else (one, b)
    if holder.shares("weight", shared):
        holder.weight = shared
