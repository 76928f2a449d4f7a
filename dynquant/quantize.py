"""quantize_dynamic: select, convert, fuse, measure, judge, report."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .checkpoint.hugging_face import describe
from .config import AUTO_ROTATION, Config, layer_config
from .conversion.left_float import describe_left_float
from .conversion.plan import Plan, Scheme
from .conversion.select import select
from .conversion.sources import EMBEDDINGS, default_mapping
from .conversion.spec import read_spec
from .conversion.swap import Converted, convert, swap
from .freed_memory import return_freed_memory
from .fusion.hugging_face_attention import use_int8_attention
from .fusion.modules import describe_unfused, fuse_steps, planned_epilogues
from .measurement.attention import judge_attention
from .measurement.fusion_check import fuse_checked
from .measurement.layers import Measured
from .measurement.pairs import Pair, pair_layers
from .measurement.report import make_report
from .measurement.report_data import Report
from .measurement.rotation import choose_rotations
from .measurement.sample import Sample, measuring
from .measurement.thresholds import check_arguments, judge
from .nn.attention import check_attention_choice, keep_attention_float
from .nn.module import QModule
from .own_thread import on_own_thread

Spec = Mapping[type | str, Any] | Collection[type | str] | None


@overload
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    embeddings: bool = False,
    fuse: bool = False,
    attention: str | None = None,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: Literal[False] = False,
) -> nn.Module: ...


@overload
def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    embeddings: bool = False,
    fuse: bool = False,
    attention: str | None = None,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: Literal[True],
) -> tuple[nn.Module, Report]: ...


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[type, Any] | None = None,
    inplace: bool = False,
    *,
    activations: str = "per_token",
    weights: str = "per_channel",
    rotation: str | int | None = None,
    embeddings: bool = False,
    fuse: bool = False,
    attention: str | None = None,
    sample: Any = None,
    min_speedup: float | None = None,
    min_sqnr: float | None = None,
    report: bool = False,
) -> nn.Module | tuple[nn.Module, Report]:
    """Swap the nn.Linear layers of a model for :class:`dynquant.QLinear`; torch.ao's function of that name.

    Subclasses of nn.Linear are swapped if they run nn.Linear's own forward, the model itself if it is an
    nn.Linear. A module with several places is converted once, and layers that share a weight still share it.
    Forward and backward hooks are carried over. Other modules do not change, nor does the model if the
    conversion fails. The result is in eval mode, as torch.ao's.

    Args:
        model: any module on any device.
        qconfig_spec: the modules to convert. None: every nn.Linear and nn.MultiheadAttention. A set of types
            and dotted names: these and their submodules, but embeddings only where their own type or name is
            in it. A dict of types and dotted names to None (leave float), a :class:`dynquant.Config` or one
            of torch.ao's QConfig objects, whose weight observer is per_tensor or per_channel. A name takes
            precedence over a type, both over the entry of the parent, a ``qconfig`` attribute over all.
        dtype: torch.qint8 or torch.int8; ignored if ``qconfig_spec`` is a dict, as by torch.ao.
        mapping: float type to quantized type with a ``from_float``; None for dynquant's own: {nn.Linear:
            QLinear, nn.MultiheadAttention: QMultiheadAttention, nn.Embedding: QEmbedding, nn.EmbeddingBag:
            QEmbeddingBag}, and Hugging Face's Conv1D, GPT-2's linear layer, to QLinear. torch.ao's classes
            and its whole default mapping may be in it: for the call of ``from_float`` a layer has the
            ``qconfig`` that they read. What becomes of other types is measured, judged and reported as the
            rest.
        inplace: swap in ``model`` itself instead of a copy. A model that is itself an nn.Linear never
            changes: use the returned one.
        activations, weights, rotation: the scheme, as of :class:`dynquant.QLinear`. ``rotation="auto"``
            rotates the layers whose SQNR on the sample gains by it; without a sample, and where the sample
            does not reach a layer, all but those that are known to read an activation function's output.
        embeddings: convert nn.Embedding and nn.EmbeddingBag too, to int8 tables with a scale a row. A table
            that is also the weight of a converted linear layer is held once, in the layer's layout.
        fuse: make activation functions epilogues of the layers before them, and merge layers that read the
            same tensor, see :func:`dynquant.fuse`. With a sample, activations whose fusion changes the
            model's output stay apart, with a warning.
        attention: None, or ``"int8"``: int8 attention (:func:`dynquant.reference.attention`) also where
            ``fuse`` does not choose it, in decoders and causal use: in transformers models by the name of
            their attention implementation, of which one warning says where it cannot be. v is quantized in
            blocks of keys, so that a token's output depends a little on the size of later values in its
            block. ``min_sqnr`` and the report judge the attention of each module as well.
        sample: the arguments of a call of the model, as of :func:`dynquant.report`, for
            ``rotation="auto"``, ``fuse`` and the next three parameters. They run the model on it, in eval
            mode and without gradients.
        min_speedup: keep a layer float if time of the float layer / time of the int8 layer, measured on
            its inputs from the sample, is below this; 1.0: no layer becomes slower. Layers that the sample
            does not reach are converted.
        min_sqnr: likewise if the SQNR of its output is below this, in dB; 20 is an error of a tenth.
        report: return the measurements too.

    A transformers model's config then says which layers are quantized, for ``save_pretrained`` and
    ``from_pretrained``; see :class:`dynquant.DynquantConfig`.

    One warning names what a user may expect to be converted or fused and is not, with counts and reasons.

    Returns:
        The converted model; with ``report=True`` the pair of it and a :class:`dynquant.Report`.

    Raises:
        ValueError: for a name that the model does not have, a scheme word, dtype or qconfig that is not for
            int8, a NaN or an infinity in a weight, with the name of the layer; for a sample that the model
            does not accept, ``min_speedup``, ``min_sqnr`` or ``report`` without a sample.
        TypeError: for a ``qconfig_spec`` or a key or value in it of another kind, a minimum that is
            not a number.
    """
    scheme: Scheme = {"activations": activations, "weights": weights, "rotation": rotation}
    layer_config(1, activations, weights, None if rotation == AUTO_ROTATION else rotation)
    check_attention_choice("quantize_dynamic: expected attention", attention)
    check_arguments(sample, report, fuse or rotation == AUTO_ROTATION, min_speedup, min_sqnr)
    if mapping is None:
        mapping = default_mapping(model)
    elif embeddings:
        mapping = {**EMBEDDINGS, **mapping}
    spec = read_spec(model, qconfig_spec, dtype, scheme, mapping, embeddings)
    plan = select(model, spec, scheme, mapping, covers_all=qconfig_spec is None)
    unusual = describe_left_float(model, {} if qconfig_spec is None else spec, plan)
    if sample is None:
        plan = choose_rotations(model, plan, None, partial(_convert, model))
        result, unfused = _build(model, _convert(model, plan), fuse=fuse, inplace=inplace)
        unchanged = use_int8_attention(result) if attention else None
        made_report = None
    else:
        limits = {"min_speedup": min_speedup, "min_sqnr": min_sqnr}
        result, unfused, unchanged, made_report = _measured(
            model,
            plan,
            Sample.of(sample),
            fuse=fuse,
            attention=attention,
            inplace=inplace,
            report=report,
            **limits,
        )
    _warn(unusual, unfused if plan.converted else None, unchanged)
    # The plan holds the float modules: without it those of a model that was converted in place are freed.
    size = sum(weight.numel() for layer in result.modules() for weight in _quantized_weights(layer))
    del plan
    return_freed_memory(size)
    return result if made_report is None else (result, made_report)


def _quantized_weights(module: nn.Module) -> Iterable[Tensor]:
    return module.quantized_weights().values() if isinstance(module, QModule) else ()


def _convert(model: nn.Module, plan: Plan) -> list[Converted]:
    with torch.inference_mode(False):
        return on_own_thread([*model.parameters(), *model.buffers()], lambda: convert(plan))


def _build(
    model: nn.Module,
    converted: list[Converted],
    *,
    fuse: bool,
    inplace: bool,
    shared: Iterable[Tensor] = (),
    sample: Sample | None = None,
) -> tuple[nn.Module, str | None]:
    """The model, or a copy, with the converted layers, fused; and what a user should know of the fusion."""
    reason = None

    def build() -> nn.Module:
        result = swap(model, converted, inplace, shared).eval()
        if fuse and sample is None:
            for _ in fuse_steps(result):
                pass
        return result

    with torch.inference_mode(False):
        result = on_own_thread([*model.parameters(), *model.buffers()], build)
        if fuse and sample is not None:
            with measuring(result):
                reason = fuse_checked(result, sample)
        elif fuse:
            reason = describe_unfused(result)
        describe(result)
    return result, reason


def _measured(
    model: nn.Module,
    plan: Plan,
    sample: Sample,
    *,
    fuse: bool,
    attention: str | None,
    inplace: bool,
    report: bool,
    min_speedup: float | None,
    min_sqnr: float | None,
) -> tuple[nn.Module, str | None, str | None, Report | None]:
    """Convert, leave float the layers that miss a threshold on the sample, build a copy, report it. In place,
    the model itself is built last, when nothing can fail any more."""
    with measuring(model):
        # A sample that does not fit is an error before the conversion.
        sample.run(model, "the model")
        plan = choose_rotations(model, plan, sample, partial(_convert, model))
        converted = _convert(model, plan)
        measured: dict[tuple[str, Config | None], Measured] = {}
        if min_speedup is not None or min_sqnr is not None:
            layers = [layer for _, layer in converted]
            with _fused_as_planned(model, converted if fuse else ()), measuring(*layers):
                pairs = [Pair(decision.name, decision.module, layer) for decision, layer in converted]
                reasons, figures = judge(
                    model, pairs, sample, timed=report, min_speedup=min_speedup, min_sqnr=min_sqnr
                )
                measured = {(pair.name, pair.config): figures[pair.name] for pair in pairs}
            plan = plan.without(reasons)
            converted = [item for item in converted if item.decision.name not in reasons]
        # The copy shares the tensors of a model that is converted in place.
        shared = [*model.parameters(), *model.buffers()] if inplace else []
        result, unfused = _build(model, converted, fuse=fuse, inplace=False, shared=shared, sample=sample)
        unchanged = use_int8_attention(result) if attention else None
        float_attention: dict[str, str] = {}
        if min_sqnr is not None:
            with measuring(result):
                float_attention = judge_attention(result, sample, min_sqnr)
        made_report = None
        if report:
            pairs = pair_layers(model, result, [decision.module for decision in plan.converted])
            known = {
                pair.name: measured[key] for pair in pairs if (key := (pair.name, pair.config)) in measured
            }
            made_report = make_report(model, result, sample, plan, pairs, known, float_attention)
    if inplace:
        del converted, result
        result, _ = _build(model, _convert(model, plan), fuse=fuse, inplace=True, sample=sample)
        if attention:
            use_int8_attention(result)
        for name in float_attention:
            keep_attention_float(result.get_submodule(name))
    return result, unfused, unchanged, made_report


@contextmanager
def _fused_as_planned(model: nn.Module, converted: Collection[Converted]) -> Iterator[None]:
    """Within the block, converted layers, which are not in the model yet, have the epilogues that fusion
    would give them."""
    epilogues = planned_epilogues(model, {id(decision.module): layer for decision, layer in converted})
    changed = [
        (layer, epilogues[id(decision.module)])
        for decision, layer in converted
        if isinstance(layer, QModule) and id(decision.module) in epilogues
    ]
    for layer, epilogue in changed:
        layer.set_epilogue(epilogue)
    try:
        yield
    finally:
        for layer, _ in changed:
            layer.set_epilogue("none")


def _warn(left_float: str | None, unfused: str | None, unchanged: str | None) -> None:
    parts = [] if left_float is None else [f"quantize_dynamic: {left_float}"]
    parts += [] if unfused is None else [f"fuse: {unfused}"]
    parts += [] if unchanged is None else [f"attention='int8': {unchanged}"]
    if parts:
        warnings.warn(". ".join(parts), stacklevel=3)
