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
    """The scheme of a weight with k inputs in a module whose weights have several widths: the block of its
    rotation is the largest that divides k, up to the module's own."""
    if not config.rotation_block:
        return config
    return replace(config, rotation_block=min(config.rotation_block, rotation_block(k)))


class NamedWeights(QModule):
    """Quantized weights by the names of the float module's parameters, and float biases beside them.

    A subclass calls :meth:`_init_tensors` from its constructor and overrides :meth:`_prepare`, which runs
    whenever a weight has changed. The state_dict holds, for each weight, ``NAME`` int8 [N, K, 1] and
    ``NAME_scale`` fp32 [N] or [1], the biases, and one ``format`` as :mod:`dynquant.nn.state` describes it,
    whose rotation block is the largest of all weights.
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
        """Quantize the float weights, copy the biases, which require no gradient until a user asks for it.

        Raises:
            ValueError: for a weight that cannot be quantized or a bias with a NaN, with its name.
        """
        self.__dict__["_config"], self.__dict__["_weight_names"] = config, tuple(weights)
        for name, bias in biases.items():
            if bias is None:
                self.register_parameter(name, None)
                continue
            _named(name, check_bias, bias)
            with torch.inference_mode(False):
                copy = bias.detach().clone(memory_format=torch.contiguous_format)
                self.register_parameter(name, nn.Parameter(copy, requires_grad=False))
        made = {
            name: _named(name, quantized, weight, config_of_weight(config, weight.shape[1]), self.takes_rows)
            for name, weight in weights.items()
        }
        self._set_weights(made)

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
        super().__setattr__(name, value)

    def _as_weight(self, name: str, value: Any) -> QTensor:
        if isinstance(value, QTensor):
            return value
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{type(self).__name__}: expected a tensor for .{name}, got {type(value).__name__}"
            )
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
            and weight.shape == self.__dict__[name].shape
            for name in self._weight_names
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
        names = [*self._weight_names, *(f"{name}_scale" for name in self._weight_names), "format"]
        biases = [name for name, bias in self._parameters.items() if bias is not None]
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
        self.__dict__["_config"] = config
        self._set_weights(
            {
                name: tied.loaded(self.__dict__[name], weight, error_msgs, assign)
                for name, weight in loaded.items()
            }
        )
        for name in biases:
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
        scales = [name for name in self._weight_names if entries[f"{name}_scale"] is not None]
        if format is None and scales:
            raise ValueError(f"the state_dict has {scales[0]}_scale, but no format")
        config, dtype = self._config, None
        if format is not None:
            _, config, dtype = read_format(format)
            if config.epilogue != "none":
                raise ValueError(f"expected epilogue 'none', got {config.epilogue!r}")
        missing = [
            key
            for name in self._weight_names
            for key in ((name,) if format is None else (name, f"{name}_scale"))
            if entries[key] is None
        ]
        if missing:
            if format is None or len(missing) == 2 * len(self._weight_names):
                missing_keys.extend(prefix + key for key in missing)
            else:
                raise ValueError(f"the state_dict has format, but no {' and no '.join(missing)}")
            return {}, self._config
        weights = {}
        for name in self._weight_names:
            like: QTensor = self.__dict__[name]
            weights[name] = _named(
                name,
                read_named_weight,
                entries[name],
                entries[f"{name}_scale"],
                like,
                config_of_weight(config, like.shape[1]),
                like.dtype if dtype is None else dtype,
                None if assign else like.device,
            )
        return weights, config


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
