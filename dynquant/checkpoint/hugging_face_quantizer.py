"""``DynquantConfig`` and the quantizer with which transformers loads converted models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import MAX_ROTATION_BLOCK, Config, layer_config
from ..nn.module import QModule
from ..nn.state import FORMAT_VERSION
from ..patterns.hugging_face import CONV1D
from ..patterns.registry import type_name
from .contents import adopt_block, contents, merge_as_saved, remove_fused, replace_module
from .hugging_face import METHOD, describe, quantize_function
from .hugging_face_state import State, put_states, tie

_SCHEME = ("activations", "weights", "rotation", "fuse", "modules_to_not_convert", "embeddings")
_LAYOUT = ("modules", "fused", "merged", "encoder_layers")
_TYPES = (
    *(nn.Linear, nn.MultiheadAttention),
    *(nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
)
"""What is quantized beside Conv1D, of types that torch has."""


class DynquantConfig(QuantizationConfigMixin):
    """How transformers is to quantize a model, or which layers of a saved one are quantized.

    ``AutoModel.from_pretrained(path, quantization_config=dynquant.DynquantConfig())`` loads float weights and
    gives what ``dynquant.quantize_dynamic`` makes of the model. :func:`dynquant.quantize_dynamic` itself, and
    :func:`dynquant.fuse` and :func:`dynquant.freeze`, write a DynquantConfig with ``modules`` into the
    ``config`` of a transformers model: ``save_pretrained`` and ``from_pretrained`` need nothing more.

    Args:
        activations, weights, rotation, fuse, embeddings: as of :func:`dynquant.quantize_dynamic`.
        modules_to_not_convert: modules that stay float, by dotted names or their last parts: ``"lm_head"``,
            ``"layers.0"``.
        modules: by the name of each quantized layer where its scheme differs from ``dynquant.Config()``;
            ``"static": True`` besides for one that is. None: nothing is quantized yet.
        fused: names of the activations that layers have taken in.
        merged: groups of layers that read the same tensor.
        encoder_layers: names of the blocks: :class:`dynquant.EncoderLayer`, :class:`dynquant.MLPBlock` and
            :class:`dynquant.EmbeddingBlock`.
        format: version of the state_dict's format.

    Raises:
        ValueError: for a scheme word that does not exist, the format of a newer version.
        TypeError: for an argument that no version has.
    """

    def __init__(
        self,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
        fuse: bool = False,
        modules_to_not_convert: Collection[str] | None = None,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        fused: Sequence[str] = (),
        merged: Sequence[Sequence[str]] = (),
        encoder_layers: Sequence[str] = (),
        embeddings: bool = False,
        format: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if format > FORMAT_VERSION:
            raise ValueError(
                f"dynquant: the model was saved in format {format} by a newer dynquant; this one reads up to "
                f"{FORMAT_VERSION}"
            )
        layer_config(1, activations, weights, rotation)
        self.quant_method: Any = METHOD
        self.activations, self.weights, self.rotation, self.fuse = activations, weights, rotation, fuse
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.modules = None if modules is None else {name: dict(scheme) for name, scheme in modules.items()}
        self.fused, self.merged = list(fused), [list(group) for group in merged]
        self.encoder_layers, self.embeddings = list(encoder_layers), embeddings
        self.format = format

    @classmethod
    def of(cls, model: nn.Module) -> DynquantConfig:
        """What conversion writes: for a ``model.config`` whose model was converted part by part."""
        return cls(**contents(model))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """From the entry of a ``config.json``; a ValueError if a newer version wrote it."""
        unknown = sorted(config_dict.keys() - {"quant_method", "format", *_SCHEME, *_LAYOUT})
        if unknown:
            raise ValueError(
                f"dynquant: this version does not know {', '.join(unknown)} in a quantization_config; "
                "a newer dynquant may have written it"
            )
        return super().from_dict(config_dict, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """For ``config.json``: the scheme that is to come, or the layers of a converted model."""
        names = _SCHEME if self.modules is None else _LAYOUT
        entries = {name: getattr(self, name) for name in names}
        for name in ("encoder_layers", "embeddings"):
            if not getattr(self, name):
                entries.pop(name, None)  # versions that do not know it read all other files
        return {"quant_method": METHOD, "format": self.format} | entries


class DynquantHfQuantizer(HfQuantizer):
    """Loads a saved converted model, or converts a float model once it is loaded."""

    quantization_config: DynquantConfig
    _tied: Sequence[tuple[str, str]] = ()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        _check_one_device(device_map)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        schemes = {
            found: scheme
            for name, scheme in (self.quantization_config.modules or {}).items()
            if (found := _find(model, name)) is not None
        }
        tied = dict(model.all_tied_weights_keys)
        put_states(model, schemes)
        self._tied = [
            names for names in tied.items() if any(isinstance(_owner(model, key), State) for key in names)
        ]
        for target, _ in self._tied:
            del model.all_tied_weights_keys[target]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        _check_one_device(getattr(model, "hf_device_map", None))
        if config.modules is None:
            self._quantize(model)
        else:
            self._build(model)
        describe(model)
        self.quantization_config = model.config.quantization_config
        return model

    def _quantize(self, model: Any) -> None:
        config = self.quantization_config
        block = MAX_ROTATION_BLOCK if config.rotation == "hadamard" else int(config.rotation or 0)
        modules = dict(model.named_modules(remove_duplicate=False))
        types = {*_TYPES, *(type(module) for module in modules.values() if type_name(module) == CONV1D)}
        spec: dict[Any, Config | None] = dict.fromkeys(
            types, Config(config.activations, config.weights, block)
        )
        for end in config.modules_to_not_convert or ():
            roots = [name for name in modules if f".{name}".endswith(f".{end}")]
            if not roots:
                raise ValueError(
                    f"dynquant: modules_to_not_convert names {end!r}, which the model does not have"
                )
            below = tuple(f"{root}." for root in roots)
            spec.update(dict.fromkeys(name for name in modules if f"{name}.".startswith(below)))
        quantize_function()(model, spec, inplace=True, fuse=config.fuse, embeddings=config.embeddings)

    def _build(self, model: Any) -> None:
        """Make quantized modules of the loaded states, and fuse the model as the saved one was."""
        config = self.quantization_config
        modules: dict[nn.Module, QModule] = {}
        built: tuple[str, ...] = ()  # prefixes of names within modules that are built as a whole
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, State) and not name.startswith(built):
                if module not in modules:
                    key = f"{name}.{next(iter(module._parameters))}"
                    modules[module] = module.build(name, _dtype_of(model, key, module.dtype))
                replace_module(model, name, modules[module])
                built = (*built, f"{name}.")
        for target, source in self._tied:
            tie(_owner(model, target), _owner(model, source))
        for name in config.fused:
            parent, _, child = name.rpartition(".")
            found = _find(model, parent)
            if found is not None:
                remove_fused(model, f"{found}.{child}" if found else child)
        for group in config.merged:
            names = [found for name in group if (found := _find(model, name)) is not None]
            if len(names) == len(group):
                merge_as_saved(model, names)
        for name in config.encoder_layers:
            found = _find(model, name)
            if found is not None:
                adopt_block(model.get_submodule(found))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _dtype_of(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in a model that is loaded with ``dtype``: some families keep a few in fp32."""
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), key):
            return cast(torch.dtype, kept)
    return dtype


def _check_one_device(device_map: Any) -> None:
    places = sorted({str(place) for place in device_map.values()}) if isinstance(device_map, dict) else []
    if len(places) > 1 or "disk" in places:
        raise ValueError(
            f"dynquant: expected device_map to put the model on one device, got it on {', '.join(places)}; "
            "quantized layers stay where they are loaded"
        )


def _find(model: Any, name: str) -> str | None:
    """The name that a layer has in this model: with or without the name of the part that holds the body."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _owner(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])


if int(transformers.__version__.partition(".")[0]) >= 5:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, DynquantConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, DynquantHfQuantizer)
