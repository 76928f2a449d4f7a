"""report: size, accuracy and time of each layer and of the model, before and after its conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion.plan import SPEC_LEAVES_FLOAT, Plan, Request, type_text
from ..conversion.select import select
from ..conversion.sources import default_mapping
from ..environment import isa
from ..nn.module import QModule
from ..patterns.hugging_face import CONV1D
from ..patterns.registry import type_name
from .attention import MeasuredAttention, measure_attention
from .layers import Measured, MeasuredModel, measure_layers, measure_models
from .pairs import Pair, pair_layers
from .report_data import AttentionReport, LayerReport, ModelReport, Report, SkippedLayer
from .sample import Sample, measuring
from .sizes import model_bytes, nbytes_of, tensors_of


def report(model_fp32: nn.Module, model_int8: nn.Module, sample: Any) -> Report:
    """Measure a converted model against the float one on a sample: whole, and each layer on its own inputs.

    Both models run in eval mode without gradients. Afterwards their modes, their hooks and the states of
    torch's random number generators are as before. Each layer is measured while the float model runs, so no
    inputs are collected; times are medians of interleaved samples of float and int8
    (:func:`dynquant.measurement.timing.compare`).

    Args:
        model_fp32: the model before its conversion, of any float dtype.
        model_int8: the model from :func:`dynquant.quantize_dynamic`. Layers that torch.ao converted are
            measured too.
        sample: the arguments of a call of the models: a tensor, a tuple of arguments, or a dict of keyword
            arguments (any mapping, such as the output of a tokenizer). Any other value is one argument.

    Raises:
        ValueError: if a model does not accept the sample, with its message; for models that are not one model
            before and after its conversion.
        TypeError: for a sample whose keys are not names, or that cannot be copied.
    """
    if model_fp32 is model_int8:
        raise ValueError(
            "dynquant.report: expected the model before and after its conversion, got one and the same "
            f"{type(model_fp32).__name__}; keep a copy of the float model before converting it inplace"
        )
    arguments = Sample.of(sample)
    mapping = default_mapping(model_fp32)
    # A spec that covers all modules: the reason of each that cannot be converted.
    plan = select(model_fp32, {nn.Module: Request({})}, {}, mapping)
    with measuring(model_fp32, model_int8):
        return make_report(model_fp32, model_int8, arguments, plan, pair_layers(model_fp32, model_int8))


def make_report(
    model: nn.Module,
    int8_model: nn.Module,
    sample: Sample,
    plan: Plan,
    pairs: Sequence[Pair],
    measured: Mapping[str, Measured] | None = None,
    float_attention: Mapping[str, str] | None = None,
) -> Report:
    """:func:`report` under :func:`dynquant.measurement.sample.measuring`.

    Args:
        plan: with the reasons of the modules that stay float.
        pairs: the converted layers.
        measured: measurements by the names of layers, where there are any already.
        float_attention: by name, why the attention of a module stays float.
    """
    whole = measure_models(model, int8_model, sample)
    known = dict(measured or {})
    unmeasured = [pair for pair in pairs if pair.name not in known]
    if unmeasured:
        known |= measure_layers(model, unmeasured, sample)
    return Report(
        _of_model(model, int8_model, whole),
        tuple(_of_layer(pair, known[pair.name]) for pair in pairs),
        (*_left_float(int8_model, plan, pairs), *_float_attention(int8_model, float_attention or {})),
        str(sample),
        torch.get_num_threads(),
        isa(),
        tuple(_of_attention(*item) for item in measure_attention(int8_model, sample, timed=True).items()),
    )


def _of_attention(name: str, measured: MeasuredAttention) -> AttentionReport:
    return AttentionReport(
        name=name,
        type=type(measured.module).__name__,
        calls=measured.calls,
        shapes=tuple(measured.shapes),
        sqnr_db=measured.agreement.sqnr_db,
        cosine=measured.agreement.cosine,
        us_float=measured.us_float,
        us_int8=measured.us_int8,
    )


def _float_attention(int8_model: nn.Module, reasons: Mapping[str, str]) -> Iterator[SkippedLayer]:
    for name, reason in reasons.items():
        yield SkippedLayer(name, type_text(int8_model.get_submodule(name)), 0, reason)


def _of_model(model: nn.Module, int8_model: nn.Module, whole: MeasuredModel) -> ModelReport:
    return ModelReport(
        type(model).__name__,
        model_bytes(model),
        model_bytes(int8_model),
        whole.sqnr_db,
        whole.cosine,
        whole.ms_float,
        whole.ms_int8,
    )


def _of_layer(pair: Pair, layer: Measured) -> LayerReport:
    before, after = pair.float_layer, pair.int8_layer
    module = after if isinstance(after, QModule) else None
    config = pair.config
    n, k = _float_shape(before) if module is None else module.matrix_shape
    return LayerReport(
        name=pair.name,
        float_type=type(before).__name__,
        int8_type=type(after).__name__,
        activations=config.activations if config else None,
        weights=config.weights if config else None,
        rotation_block=config.rotation_block if config else None,
        epilogue=config.epilogue if config else None,
        static=module is not None and module.is_static,
        shares_input=1 if module is None else module.merged_count,
        n=n,
        k=k,
        bytes_float=nbytes_of(tensors_of(before)),
        bytes_int8=nbytes_of(tensors_of(after)),
        calls=layer.calls,
        rows=layer.rows,
        sqnr_db=layer.sqnr_db,
        cosine=layer.cosine,
        us_float=layer.us_float,
        us_int8=layer.us_int8,
    )


def _float_shape(layer: Any) -> tuple[int | None, int | None]:
    """N and K of a float layer; None for one that is not linear."""
    if type_name(layer) == CONV1D:
        k, n = layer.weight.shape
        return n, k
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else (None, None)


def _left_float(int8_model: nn.Module, plan: Plan, pairs: Sequence[Pair]) -> Iterator[SkippedLayer]:
    """The modules with a weight matrix that were not converted, in the order of the model."""
    converted = {id(pair.float_layer) for pair in pairs}
    types = {name: type(layer) for name, layer in int8_model.named_modules(remove_duplicate=False)}
    for decision in plan.decisions:
        name, module = decision.name, decision.module
        if id(module) in converted or types.get(name) is not type(module):
            continue  # in a graph, another type may take the place of a layer that is not converted
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        is_whole = not own or isinstance(module, (QModule, torch.jit.ScriptModule))
        tensors = tensors_of(module) if is_whole else own
        reason = decision.reason or SPEC_LEAVES_FLOAT
        yield SkippedLayer(name, type_text(module), nbytes_of(tensors), reason)
