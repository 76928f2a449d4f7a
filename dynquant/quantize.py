"""quantize_dynamic: select, convert, fuse, measure, judge, report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .checkpoint.hugging_face import describe
from .config import layer_config
from .conversion.plan import Scheme, Selected
from .conversion.select import read_spec, select, warn_of_unconverted
from .conversion.sources import default_mapping
from .conversion.swap import convert, swap
from .fusion.modules import fuse as fuse_modules
from .measurement.fusion_check import fuse_checked
from .measurement.layers import measure_layers
from .measurement.pairs import pair_layers
from .measurement.report import make_report
from .measurement.report_data import Report
from .measurement.sample import Sample, measuring
from .measurement.thresholds import below_thresholds, check_arguments
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
    fuse: bool = False,
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
    fuse: bool = False,
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
    fuse: bool = False,
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
        qconfig_spec: the modules to convert. None: every nn.Linear. A set of types and dotted names: these
            and their submodules. A dict of types and dotted names to None (leave float), a
            :class:`dynquant.Config` or one of torch.ao's QConfig objects, whose weight observer is per_tensor
            or per_channel. A name takes precedence over a type, both over the entry of the parent, a
            ``qconfig`` attribute over all.
        dtype: torch.qint8 or torch.int8; ignored if ``qconfig_spec`` is a dict, as by torch.ao.
        mapping: float type to quantized type with a ``from_float``; None for {nn.Linear: QLinear}, and
            Hugging Face's Conv1D, GPT-2's linear layer, likewise.
        inplace: swap in ``model`` itself instead of a copy. A model that is itself an nn.Linear never
            changes: use the returned one.
        activations, weights, rotation: the scheme, as of :class:`dynquant.QLinear`.
        fuse: make activation functions epilogues of the layers before them, and merge layers that read the
            same tensor, see :func:`dynquant.fuse`. With a sample, activations whose fusion changes the
            model's output stay apart, with a warning.
        sample: the arguments of a call of the model, as of :func:`dynquant.report`, for ``fuse`` and the next
            three parameters. They run the model on it, in eval mode and without gradients.
        min_speedup: keep a layer float if time of the float layer / time of the int8 layer, measured on
            its inputs from the sample, is below this; 1.0: no layer becomes slower. Layers that the sample
            does not reach are converted.
        min_sqnr: likewise if the SQNR of its output is below this, in dB; 20 is an error of a tenth.
        report: return the measurements too.

    A transformers model's config then says which layers are quantized, for ``save_pretrained`` and
    ``from_pretrained``; see :class:`dynquant.DynquantConfig`.

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
    layer_config(1, **scheme)
    check_arguments(sample, report, fuse, min_speedup, min_sqnr)
    spec = read_spec(qconfig_spec, dtype, scheme)
    if mapping is None:
        mapping = default_mapping(model)
        if qconfig_spec is None:
            spec = {**dict.fromkeys(mapping, spec[nn.Linear]), **spec}
    selected, skipped = select(model, spec, scheme, mapping)
    warn_of_unconverted(model, spec if qconfig_spec is not None else {}, selected, skipped)
    if sample is None:
        return _build(model, selected, fuse=fuse, inplace=inplace)
    result, made_report = _convert_measured(
        model,
        selected,
        Sample.of(sample),
        fuse=fuse,
        inplace=inplace,
        min_speedup=min_speedup,
        min_sqnr=min_sqnr,
        report=report,
    )
    return result if made_report is None else (result, made_report)


def _build(
    model: nn.Module,
    selected: Collection[Selected],
    *,
    fuse: bool,
    inplace: bool = False,
    shared: Iterable[Tensor] = (),
    sample: Sample | None = None,
    warn: bool = False,
) -> nn.Module:
    def build() -> nn.Module:
        with torch.inference_mode(False):
            result = swap(model, convert(selected), inplace, shared).eval()
            if fuse and sample is None:
                fuse_modules(result)
            describe(result)
            return result

    result = on_own_thread([*model.parameters(), *model.buffers()], build)
    if fuse and sample is not None:
        with measuring(result):
            fuse_checked(result, sample, warn=warn)
        describe(result)
    return result


def _convert_measured(
    model: nn.Module,
    selected: list[Selected],
    sample: Sample,
    *,
    fuse: bool,
    inplace: bool,
    min_speedup: float | None,
    min_sqnr: float | None,
    report: bool,
) -> tuple[nn.Module, Report | None]:
    """Convert the selected modules but for those that miss a threshold on the sample; report the result."""
    with measuring(model):
        # A sample that does not fit is an error before the conversion.
        sample.run(model, "the model")
        # In place, the model itself comes last, when nothing can fail any more: the measured model is a copy
        # that shares its tensors.
        shared = [*model.parameters(), *model.buffers()] if inplace else []
        result = _build(model, selected, fuse=fuse, shared=shared, sample=sample, warn=True)
        pairs = pair_layers(model, result)
        measured = measure_layers(model, pairs, sample, timed=report or min_speedup is not None)
        # A user's from_float may have converted layers that are not selected themselves; they stay int8.
        selected_ids = {id(item.module) for item in selected}
        candidates = [pair for pair in pairs if id(pair.float_layer) in selected_ids]
        rejected = below_thresholds(candidates, measured, min_speedup, min_sqnr)
        if rejected and min_speedup is not None:
            # On a busy machine any layer may look slow once: rejected layers are timed again, which decides.
            names = {item.name for item in rejected}
            candidates = [pair for pair in candidates if pair.name in names]
            measured |= measure_layers(model, candidates, sample)
            rejected = below_thresholds(candidates, measured, min_speedup, min_sqnr)
        if rejected:
            del result, pairs, candidates
            rejected_ids = {id(item.module) for item in rejected}
            selected = [item for item in selected if id(item.module) not in rejected_ids]
            result = _build(model, selected, fuse=fuse, shared=shared, sample=sample)
        made_report = None
        if report:
            made_report = make_report(model, result, sample, rejected=rejected, measured=measured)
    if inplace:
        result = _build(model, selected, fuse=fuse, inplace=True, sample=sample)
    return result, made_report
