"""NamedWeights: modules that hold quantized weights under the names of the float module's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import Config, rotation_block
from ..own_thread import on_own_thread
from ..qtensor import FLOAT_WORDS, QTensor, as_packed, tensors_of, to_device, with_tensor
from ..reference import FLOAT_DTYPES
from . import tied
from .module import QModule
from .state import (
    check_bias,
    check_float_weight,
    check_named_entries,
    check_named_origin,
    format_entry,
    quantized,
    read_format,
    read_named_weight,
    warn_of_float_weights,
    warn_of_meta,
    weight_entries,
)

_TENSORS = {"packed": "packed_weight", "sum": "weight_sum", "channel_scale": "channel_scale"}
"""Ends of the names of the non-persistent buffers, and the attributes of a QTensor that they are, in the
order of the op's arguments."""


def config_of_weight(config: Config, k: int) -> Config:
    """The scheme of an int8 weight with k inputs in a module whose weights have several widths: the block of
    its rotation is the largest that divides k, up to the module's own."""
    block = min(config.rotation_block, rotation_block(k)) if config.rotation_block else 0
    return replace(config, rotation_block=block, float_input=False)


class NamedWeights(QModule):
    """Quantized weights by the names of the float module's parameters, and float parameters beside them: the
    biases, and with ``config.float_input`` the weights that :meth:`_input_weight_names` lists.

    A subclass calls :meth:`_init_tensors` from its constructor and overrides :meth:`_prepare`, which runs
    whenever a weight has changed. The state_dict holds, for each int8 weight, ``NAME`` int8 [N, K, 1] and
    ``NAME_scale`` fp32 [N] or [1], the float parameters, and one ``format`` as :mod:`dynquant.nn.state`
    describes it, whose rotation block is the largest of all weights.
    """

    if TYPE_CHECKING:
        _config: Config
        _weight_names: tuple[str, ...]
        _prepared: Any

    takes_rows: ClassVar[bool] = False
    """Whether weights may be in rows (``QTensor.is_rows``), as :meth:`_init_tensors` then makes them."""

    def _init_tensors(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], config: Config
    ) -> None:
        """Quantize the float weights, copy those that stay float and the biases, which require no gradient
        until a user asks for it.

        Raises:
            ValueError: for a weight that cannot be quantized or a bias with a NaN, with its name.
        """
        self.__dict__["_config"] = config
        float_names = self._float_weight_names(config)
        self.__dict__["_weight_names"] = tuple(name for name in weights if name not in float_names)
        for name in float_names:
            _named(name, check_float_weight, weights[name])
            self.register_parameter(name, _parameter(weights[name]))
        for name, bias in biases.items():
            if bias is not None:
                _named(name, check_bias, bias)
            self.register_parameter(name, None if bias is None else _parameter(bias))
        made = {
            name: _named(
                name,
                quantized,
                weights[name],
                config_of_weight(config, weights[name].shape[1]),
                self.takes_rows,
            )
            for name in self._weight_names
        }
        self._set_weights(made)

    def _input_weight_names(self) -> tuple[str, ...]:
        """The weights that ``config.float_input`` is about."""
        return ()

    def _float_weight_names(self, config: Config | None = None) -> tuple[str, ...]:
        """The weights that stay float in a scheme, or in that of the module."""
        config = self._config if config is None else config
        return self._input_weight_names() if config.float_input else ()

    def set_float_input(self, float_input: bool) -> None:
        if float_input == self._config.float_input:
            return
        names = self._input_weight_names()
        with torch.inference_mode(False), torch.no_grad():
            if float_input:
                for name in names:
                    weight: QTensor = self.__dict__.pop(name)
                    for end in _TENSORS:
                        del self._buffers[f"{name}_{end}"]
                    zeros = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
                    self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
                self.__dict__["_weight_names"] = tuple(n for n in self._weight_names if n not in names)
                weights = {}
            else:
                weights = {name: self._int8_form(name) for name in names}
                for name in names:
                    del self._parameters[name]
                self.__dict__["_weight_names"] = (*names, *self._weight_names)
        self.__dict__["_config"] = replace(self._config, float_input=float_input)
        self._set_weights(weights)

    def _int8_form(self, name: str) -> QTensor:
        """An int8 weight, or zeros in the place of one that is float now."""
        weight: QTensor | None = self.__dict__.get(name)
        if weight is not None:
            return weight
        parameter = self._parameters[name]
        assert parameter is not None
        config = config_of_weight(self._config, parameter.shape[1])
        return quantized(torch.zeros_like(parameter), config, self.takes_rows)

    def _set_weights(self, weights: Mapping[str, QTensor]) -> None:
        """Put weights, all or some, in the place of those of the same names."""
        for name, weight in weights.items():
            present = self.__dict__.get(name)
            if present is not None and present.shape != weight.shape:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} of shape {list(present.shape)}, got "
                    f"{list(weight.shape)}"
                )
        if not self.takes_rows:
            weights = {name: as_packed(weight) for name, weight in weights.items()}
        self.__dict__.update(weights)
        # As in QLinear: sizes, broadcasts and devices of a model are read from its buffers.
        packed = {
            f"{name}_{end}": tensor
            for name in self._weight_names
            for end, tensor in zip(_TENSORS, tensors_of(self.__dict__[name]), strict=True)
        }
        others = {name: buffer for name, buffer in self._buffers.items() if name not in packed}
        self.__dict__["_buffers"] = packed | others
        self._non_persistent_buffers_set.update(packed)
        self.__dict__["_prepared"] = self._prepare()

    def _prepare(self) -> Any:
        """What ``forward`` passes to its ops, kept as ``_prepared``."""

    def _op_tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A weight as the ops take it."""
        return tensors_of(self.__dict__[name])

    def _code(self, name: str) -> int:
        """The config of a weight as the ops take it."""
        weight: QTensor = self.__dict__[name]
        return weight.config.encode(weight.shape[1])

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("_weight_names", ())
        if name in names:
            self._set_weights({name: self._as_weight(name, value)})
            return
        for weight in names:
            tensor = _TENSORS.get(name.removeprefix(f"{weight}_"))
            if tensor is not None:
                self._set_weights({weight: with_tensor(self.__dict__[weight], tensor, value)})
                return
        if names and name in self._float_weight_names() and not isinstance(value, nn.Parameter):
            present = self._parameters[name]
            self._check_is_tensor(name, value)
            value = value.dequantize() if isinstance(value, QTensor) else value
            _named(name, check_float_weight, value, present)
            value = _parameter(value)
        super().__setattr__(name, value)

    def _check_is_tensor(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{type(self).__name__}: expected a tensor for .{name}, got {type(value).__name__}"
            )

    def _as_weight(self, name: str, value: Any) -> QTensor:
        if isinstance(value, QTensor):
            return value
        self._check_is_tensor(name, value)
        present: QTensor = self.__dict__[name]
        return _named(name, quantized, value, present.config, present.is_rows)

    # ---- answers of a QModule

    @property
    def config(self) -> Config:
        return self._config

    def quantized_weights(self) -> dict[str, QTensor]:
        return {name: self.__dict__[name] for name in self._weight_names}

    @property
    def matrix_shape(self) -> tuple[int, int]:
        shapes = [weight.shape for weight in self.quantized_weights().values()]
        n, k = max(shapes, key=lambda shape: shape.numel())
        return n, k

    def fits(self, float_module: nn.Module) -> bool:
        return all(
            isinstance(weight := getattr(float_module, name, None), Tensor)
            and weight.shape == getattr(self, name).shape
            for name in (*self._weight_names, *self._float_weight_names())
        )

    # ---- devices, dtypes, copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NamedWeights:
        """Implements ``.to``, ``.cuda``, ``.half``, ``.to_empty`` …: moves all tensors, casts the biases."""

        @torch.inference_mode(False)
        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            # Memory formats are for images: a packed weight has four dimensions too.
            return out.contiguous() if out.dtype == tensor.dtype else tensor.to(out.device)

        moved: dict[str, QTensor] = {}
        for name, weight in self.quantized_weights().items():
            dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            if dtype not in FLOAT_DTYPES:
                raise TypeError(f"{type(self).__name__}: expected a cast to {FLOAT_WORDS}, got {dtype}")

            def make(weight: QTensor = weight, dtype: torch.dtype = dtype) -> QTensor:
                return to_device(weight, move, dtype)

            moved[name] = tied.replaced(weight, fn, make)
        for name in self._packed_names():
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
        finally:
            self._set_weights(moved)
        return self

    def _packed_names(self) -> list[str]:
        return [f"{name}_{end}" for name in self._weight_names for end in _TENSORS]

    def __getstate__(self) -> dict[str, Any]:
        packed = set(self._packed_names())
        buffers = {name: buffer for name, buffer in self._buffers.items() if name not in packed}
        state = {**self.__dict__, "_buffers": buffers, "_config": self._config.encode()}
        del state["_prepared"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_config"] = Config.decode(state["_config"])
        self._set_weights({})

    # ---- state_dict

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight in self.quantized_weights().items():
            destination[prefix + name], destination[f"{prefix}{name}_scale"] = weight_entries(weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dtype = self.__dict__[self._weight_names[0]].dtype
        full_range = any(weight.config.full_range for weight in self.quantized_weights().values())
        config = replace(self._config, full_range=full_range)
        destination[prefix + "format"] = format_entry(dtype, config)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads all weights or none; quantizes float weights, of an unquantized model."""
        weights = [*self._float_weight_names(), *self._weight_names]
        names = [*weights, *(f"{name}_scale" for name in weights), "format"]
        biases = [name for name, bias in self._parameters.items() if bias is not None and name not in weights]
        entries = {name: state_dict.get(prefix + name) for name in names}
        assign = local_metadata.get("assign_to_params_buffers", False)
        on_meta = self.__dict__[self._weight_names[0]].device.type == "meta"
        tensors = [value for value in entries.values() if isinstance(value, Tensor)]

        def read() -> tuple[dict[str, QTensor], Config]:
            check_named_origin(state_dict, prefix)
            check_named_entries(state_dict, prefix, [*names, *biases], meta=assign or on_meta)
            for name in biases:
                if (bias := state_dict.get(prefix + name)) is not None:
                    _named(name, _check_loaded_bias, bias, self._parameters[name])
            return self._read_weights(entries, prefix, assign, missing_keys)

        try:
            loaded, config = on_own_thread(tensors, read)
        except (ValueError, RuntimeError, TypeError) as error:
            error_msgs.append(f"{type(self).__name__} {prefix.removesuffix('.')!r}: {error}")
            return

        of_float = entries["format"] is None
        if loaded and of_float:
            warn_of_float_weights(error_msgs)
        if loaded and on_meta and not assign and tensors[0].device.type != "meta":
            warn_of_meta(prefix + self._weight_names[0])
        if loaded:
            self.set_float_input(config.float_input)
        self.__dict__["_config"] = config
        self._set_weights(
            {
                name: tied.loaded(self.__dict__[name], weight, error_msgs, assign)
                for name, weight in loaded.items()
            }
        )
        for name in (*self._float_weight_names(), *biases):
            bias, own = state_dict.get(prefix + name), self._parameters[name]
            if bias is not None and own is not None and not of_float:
                own.data = own.data.to(bias.dtype)
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys.extend(key for key in unexpected if key.removeprefix(prefix) not in entries)

    def _read_weights(
        self, entries: Mapping[str, Any], prefix: str, assign: bool, missing_keys: list[str]
    ) -> tuple[dict[str, QTensor], Config]:
        """The weights that a state_dict holds, none of them if it lacks any, and the scheme of the module."""
        format = entries["format"]
        weights = [*self._float_weight_names(), *self._weight_names]
        scales = [name for name in weights if entries[f"{name}_scale"] is not None]
        if format is None and scales:
            raise ValueError(f"the state_dict has {scales[0]}_scale, but no format")
        config, dtype = self._config, None
        if format is not None:
            _, config, dtype = read_format(format)
            if config.epilogue != "none":
                raise ValueError(f"expected epilogue 'none', got {config.epilogue!r}")
        floats = self._float_weight_names(config)
        keys = [
            key
            for name in weights
            for key in ((name,) if format is None or name in floats else (name, f"{name}_scale"))
        ]
        missing = [key for key in keys if entries[key] is None]
        if missing:
            if format is None or len(missing) == len(keys):
                # nn.Module itself reports its parameters.
                missing_keys.extend(prefix + key for key in missing if key not in self._parameters)
            else:
                raise ValueError(f"the state_dict has format, but no {' and no '.join(missing)}")
            return {}, self._config
        for name in floats:
            _named(name, check_float_weight, entries[name], getattr(self, name))
        loaded = {}
        for name in weights:
            if name in floats:
                continue
            like = self._int8_form(name)
            loaded[name] = _named(
                name,
                read_named_weight,
                entries[name],
                entries[f"{name}_scale"],
                like,
                config_of_weight(config, like.shape[1]),
                like.dtype if dtype is None else dtype,
                None if assign else like.device,
            )
        return loaded, config


def _parameter(value: Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        copy = value.detach().clone(memory_format=torch.contiguous_format)
        return nn.Parameter(copy, requires_grad=False)


def _check_loaded_bias(bias: Tensor, own: Tensor) -> None:
    check_bias(bias)
    if bias.shape != own.shape:
        raise ValueError(f"expected bias of shape {list(own.shape)}, got {list(bias.shape)}")


def _named(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with the name of the tensor before the sentence of a ValueError."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
