"""save and load: a converted model as one safetensors file that says how each module is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..freed_memory import return_freed_memory
from ..nn.module import QModule
from ..own_thread import on_own_thread
from ..patterns.activations import epilogue_of
from .contents import adopt_block, contents, merge_as_saved, remove_fused
from .hugging_face import describe, quantize_function
from .safetensors_file import DTYPES, Path, SavedFile, naming, write
from .undo import Undo


def save(model: nn.Module, path: Path) -> None:
    """Write a model to one safetensors file, without pickle: its ``state_dict()``, and in the metadata the
    scheme of each quantized module and which layers are fused or merged and which modules are blocks.

    Equal tensors, such as those of tied layers, are stored once. The file is written beside ``path``, synced
    and renamed: a full disk or a process that ends leave the older file whole.

    Raises:
        ValueError: for an entry of the state_dict that a safetensors file cannot hold, by its key.
        OSError: if the file cannot be written.
        MissingPackageError: without the package safetensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dynquant.save: expected an nn.Module, got {type(model).__name__}")
    tensors = list(model.parameters())
    with torch.no_grad():
        on_own_thread(tensors, lambda: write(path, _checked_state(model), contents(model)))


def _checked_state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            reason = f"a {type(value).__name__}; a safetensors file holds tensors alone"
        elif value.layout != torch.strided or value.is_nested or value.is_quantized:
            reason = f"a {value.layout} tensor of {value.dtype}"
        elif value.device.type == "meta":
            reason = "it on meta, without values"
        elif value.dtype not in DTYPES.values():
            reason = f"{value.dtype}"
        else:
            continue
        raise ValueError(f"dynquant.save: {key}: expected a dense tensor with values, got {reason}")
    return state


def load(model: nn.Module, path: Path) -> nn.Module:
    """Load a file of :func:`save` into a model, in place.

    Modules that are quantized in the file and float in the model are converted, fused and merged as the saved
    ones were, without quantizing their float weights, which may be on meta (but buffers that are not
    persistent may not, since no file has them). The file is checked first: its
    checksums, and keys, shapes, dtypes and values of all tensors. If anything does not fit, the model stays
    exactly as it was.

    Args:
        model: the float model, or a converted one. Its tensors keep their device and dtype, as
            ``load_state_dict`` has it; weights and biases of quantized modules take the dtypes of the file.

    Returns:
        ``model``; the quantized layer if the model is a float layer itself.

    Raises:
        ValueError: that names the file and the key or module, for a file that is damaged, newer than this
            version, or not of such a model.
        OSError: if the file cannot be read.
        MissingPackageError: without the package safetensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dynquant.load: expected an nn.Module, got {type(model).__name__}")
    with naming(path), torch.inference_mode(False), torch.no_grad():
        saved = SavedFile(path)
        result = on_own_thread([*model.parameters(), *model.buffers()], lambda: _load(model, saved))
    return_freed_memory(sum(torch.Size(shape).numel() for _, shape in saved.header.values()))
    return result


def _load(model: nn.Module, saved: SavedFile) -> nn.Module:
    before = Undo(model)
    try:
        devices = {name: _device(module) for name, module in model.named_modules(remove_duplicate=False)}
        result = _converted(model, saved.contents)
        _check_header(result, saved)
        state = saved.tensors(lambda key: _closest(devices, key))
        _load_state(result, state)
        _check_buffers(result)
        for name in saved.contents["encoder_layers"]:
            layer = _get(result, name)
            if layer is None:
                raise ValueError(f"{name}: the model has no such layer, which runs as a whole in the file")
            adopt_block(layer)
        _check_ties(result, before)
        describe(result)
    except BaseException:
        before.undo()
        raise
    _keep_tensors(result, before)
    return result


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _device(module: nn.Module) -> torch.device | None:
    tensors = (*module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in tensors), None)
    return None if device is None or device.type in ("cpu", "meta") else device


def _closest(devices: Mapping[str, torch.device | None], key: str) -> torch.device | None:
    """The device of the innermost module that holds a key."""
    name = key.rpartition(".")[0]
    while name and name not in devices:
        name = name.rpartition(".")[0]
    return devices.get(name)


# ---- structure: the modules of the file


def _converted(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """The model with the quantized, fused and merged modules of the file, the new ones on meta."""
    modules = dict(model.named_modules(remove_duplicate=False))
    configs = {name: _config(name, scheme) for name, scheme in saved["modules"].items()}
    for name in configs:
        if name not in modules:
            raise ValueError(f"{_label(name)} is quantized in the file, but the model has no such module")
    for name, module in modules.items():
        if isinstance(module, QModule) and name not in configs:
            raise ValueError(f"{_label(name)} is quantized in the model, but not in the file")
    new = {name for name in configs if not isinstance(modules[name], QModule)}
    if new:
        training = {name: module.training for name, module in modules.items()}
        with _on_meta([modules[name] for name in new]) as originals:
            spec = {name: configs[name] if name in new else None for name in modules}
            model = quantize_function()(model, spec, inplace=True)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, module in modules.items():
            module.training = training.get(name, module.training)
        for name in sorted(new):
            if not isinstance(modules.get(name), QModule):
                kind = type(modules.get(name)).__name__
                raise ValueError(f"{_label(name)} is quantized in the file, but in this model it is a {kind}")
            _give_back(modules[name], originals)
    for name, config in configs.items():
        layer: Any = model.get_submodule(name)
        layer.set_float_input(config.float_input)
    _fuse(model, configs, saved)
    return model


def _label(name: str) -> str:
    return f"layer {name!r}" if name else "the model itself"


def _config(name: str, scheme: Mapping[str, Any]) -> Config:
    words = {word: value for word, value in scheme.items() if word != "static"}
    try:
        return Config(**words)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix("dynquant: ").removeprefix("Config.__init__() ")
        raise ValueError(f"modules: {_label(name)}: {reason}") from None


@contextmanager
def _on_meta(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the parameters of the modules are on meta: converting them computes nothing.

    Yields:
        The parameters by the ids of those that stand in for them.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    originals: dict[int, Tensor] = {}
    held = [(part._parameters, dict(part._parameters)) for module in modules for part in module.modules()]
    for parameters, before in held:
        for name, parameter in before.items():
            if parameter is None:
                continue
            if id(parameter) not in stand_ins:
                empty = torch.empty_like(parameter, device="meta")
                stand_in = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                stand_ins[id(parameter)], originals[id(stand_in)] = stand_in, parameter
            parameters[name] = stand_ins[id(parameter)]
    try:
        yield originals
    finally:
        for parameters, before in held:
            parameters.update(before)


def _give_back(module: nn.Module, originals: Mapping[int, Tensor]) -> None:
    """Parameters that a quantized module has from the float one are the model's own again."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) in originals:
                part._parameters[name] = originals[id(parameter)]  # type: ignore[assignment]


def _fuse(model: nn.Module, configs: Mapping[str, Config], saved: Mapping[str, Any]) -> None:
    for name, config in configs.items():
        layer: Any = model.get_submodule(name)
        if layer.config.epilogue == config.epilogue:
            continue
        if not layer.takes_epilogue:
            raise ValueError(
                f"{_label(name)} ends in {config.epilogue!r} in the file, in the model in "
                f"{layer.config.epilogue!r}"
            )
        layer.set_epilogue(config.epilogue)
    for name in saved["fused"]:
        parent, _, child = name.rpartition(".")
        activation = getattr(_get(model, parent), child, None)
        if activation is None or not (isinstance(activation, nn.Identity) or epilogue_of(activation)):
            raise ValueError(
                f"fused: {name!r} is an activation that a layer has taken in, but in this model it is "
                f"{'missing' if activation is None else f'a {type(activation).__name__}'}"
            )
        remove_fused(model, name)
    for group in saved["merged"]:
        for name in group:
            if not isinstance(_get(model, name), QModule):
                raise ValueError(f"merged: {name!r} is not a quantized layer")
        merge_as_saved(model, group)


# ---- values


def _check_header(model: nn.Module, saved: SavedFile) -> None:
    """Keys, shapes and dtypes, by the header of the file alone."""
    expected: dict[str, Any] = model.state_dict()
    quantized = tuple(f"{name}." if name else "" for name in saved.contents["modules"])
    for key, (dtype, shape) in saved.header.items():
        own = expected.get(key)
        numel = torch.Size(shape).numel()
        if isinstance(own, Tensor):
            # One scale for a whole weight, or one a channel: the layer takes the scheme of the file.
            is_scale = key.startswith(quantized) and 1 in (own.numel(), numel)
            if tuple(own.shape) != shape and not is_scale:
                raise ValueError(f"{key}: expected shape {list(own.shape)}, got {list(shape)}")
            if own.dtype != dtype and not (own.is_floating_point() and dtype.is_floating_point):
                raise ValueError(f"{key}: expected {own.dtype}, got {dtype}")
        elif not key.startswith(quantized) or numel > 1:
            raise ValueError(f"{key}: the model has no such entry")  # but static qparams, of one element


def _load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put every tensor of the file into the model, none of which is written to."""
    try:
        keys = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        lines = [line.strip().removesuffix(". ") for line in str(error).splitlines()[1:]]
        raise ValueError("; ".join(filter(None, lines)) or str(error)) from None
    for key in keys.missing_keys:
        raise ValueError(f"{key}: the file has no such entry")
    for key in keys.unexpected_keys:
        raise ValueError(f"{key}: the model has no such entry")


def _check_buffers(model: nn.Module) -> None:
    """No buffer was left on meta: torch's functions on the CPU read such a tensor as if it had memory."""
    left = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if left:
        raise ValueError(
            f"{', '.join(left)}: on meta in the model, and not in the file, since not persistent; expected "
            "the model to have such buffers with their values"
        )


def _slots(model: nn.Module, before: Undo) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
    """Where a tensor was replaced that other code may hold: the module and the name, the old and new tensor.

    Buffers of a quantized module are its own affair.
    """
    for module in model.modules():
        buffers = {} if isinstance(module, QModule) else module._buffers
        present: dict[str, Tensor | None] = {**module._parameters, **buffers}
        for name, old in before.tensors.get(id(module), {}).items():
            new = present.get(name)
            if old is not None and new is not None and new is not old:
                yield module, name, old, new


def _check_ties(model: nn.Module, before: Undo) -> None:
    """A tensor with several places has one value in the file."""
    values: dict[int, Tensor] = {}
    for _, name, old, new in _slots(model, before):
        first = values.setdefault(id(old), new)
        if first is not new and not torch.equal(first, new):
            raise ValueError(
                f"{name}: a tensor with several places in the model has several values in the file"
            )


def _keep_tensors(model: nn.Module, before: Undo) -> None:
    """Write the loaded values into the tensors that the model had, and put these back in their places.

    New ones stay where the old ones were on meta, or made in inference mode, which cannot be written to.
    """
    kept: dict[int, Tensor] = {}
    for module, name, old, new in _slots(model, before):
        if id(old) not in kept:
            if old.device.type == "meta" or old.is_inference():
                value = new.detach().clone() if new.dtype == torch.int8 else new
                kept[id(old)] = value.to(old.dtype) if old.dtype != new.dtype else value
            elif isinstance(module, QModule) and old.dtype != new.dtype:
                kept[id(old)] = old
                old.data = new.data.to(old.device)
            else:
                kept[id(old)] = old
                old.copy_(new)
        tensor = kept[id(old)]
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = kept[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(module, name, tensor)
