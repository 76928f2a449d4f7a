"""report: what a conversion did to each layer and to the whole, in size, closeness and time."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .conversion.plan import Skipped
from .conversion.select import select
from .conversion.sources import default_mapping
from .extras import MissingPackageError, needs
from .info import isa
from .measure import Measured, MeasuredModel, Pair, measure_layers, measure_models, pair_layers, tensors_in
from .nn.linear import QLinear
from .nn.merged import MergedLinear
from .sample import Sample, measuring

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

NOT_REACHED = "not reached by the sample"


@dataclass(frozen=True)
class LayerReport:
    """One converted layer.

    Attributes:
        name: its dotted name, the first one where it has several.
        float_type, int8_type: names of the types before and after.
        activations, weights, rotation_block, epilogue: as of :class:`dynquant.Config`; None for a layer that
            is no QLinear.
        static: whether the qparams of activations are fixed.
        shares_input: how many layers read the same tensor and run as one where a graph is compiled, this one
            among them (see :func:`dynquant.fuse`); 1: it stands alone. All figures are of each layer alone.
        n, k: out_features and in_features.
        bytes_float, bytes_int8: what the layer's tensors take, in the int8 layer as they are held: packed,
            with sums and scales.
        calls: how often the sample reaches the layer. 0: what follows is None.
        rows: the different M of its inputs [M, K], ascending.
        sqnr_db: 10 log10(energy of the float layer's output / energy of the difference), both layers on the
            same inputs. The float layer is followed by its activation where that has become an epilogue.
        cosine: of the two outputs.
        us_float, us_int8: microseconds a call, see :class:`dynquant.measure.Measured`.
    """

    name: str
    float_type: str
    int8_type: str
    activations: str | None
    weights: str | None
    rotation_block: int | None
    epilogue: str | None
    static: bool
    shares_input: int
    n: int
    k: int
    bytes_float: int
    bytes_int8: int
    calls: int
    rows: tuple[int, ...]
    sqnr_db: float | None
    cosine: float | None
    us_float: float | None
    us_int8: float | None

    @property
    def speedup(self) -> float | None:
        """Time of the float layer / time of the int8 layer."""
        return _ratio(self.us_float, self.us_int8)

    @property
    def scheme(self) -> tuple[str, ...]:
        """The scheme in words, without those that go without saying."""
        if self.activations is None or self.weights is None:
            return (self.int8_type,)
        words = ["static" if self.static else self.activations, self.weights]
        if self.rotation_block:
            words.append(f"rotation {self.rotation_block}")
        if self.epilogue != "none":
            words.append(f"then {self.epilogue}")
        if self.shares_input > 1:
            words.append(f"input shared by {self.shares_input}")
        return tuple(words)


@dataclass(frozen=True)
class SkippedLayer:
    """A module with a weight matrix that stays float, and why; ``bytes`` is what its own tensors take."""

    name: str
    type: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class ModelReport:
    """The whole model.

    Attributes:
        type: name of its type.
        bytes_float, bytes_int8: of all tensors it holds, each memory counted once.
        sqnr_db, cosine: of all its floating outputs, as of a layer; None where it has none of equal shapes.
        ms_float, ms_int8: milliseconds a call with the sample.
    """

    type: str
    bytes_float: int
    bytes_int8: int
    sqnr_db: float | None
    cosine: float | None
    ms_float: float
    ms_int8: float

    @property
    def speedup(self) -> float | None:
        """Time of the float model / time of the int8 model."""
        return _ratio(self.ms_float, self.ms_int8)


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`report` found. ``print()`` shows it as a table.

    Attributes:
        model: the whole.
        layers: those that were converted, in the order of the model.
        skipped: those that stay float, and why.
        sample: what the models were called with, in words.
        threads, isa: what the times are of.
    """

    model: ModelReport
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    sample: str
    threads: int
    isa: str

    def __repr__(self) -> str:
        return f"<Report of {self.model.type}: {len(self.layers)} layers int8, {len(self.skipped)} float>"

    def __str__(self) -> str:
        try:
            with needs("the table", extra="report"):
                from rich.console import Console
        except MissingPackageError as error:  # print() must not fail
            return f"{self.summary()}\n{self.conditions()}\n({error})"
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.width = max(console.measure(table).maximum for table in self._tables())
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(*self._tables())

    def _tables(self) -> list[Table]:
        return [self.table(), *([self.skipped_table()] if self.skipped else [])]

    def summary(self) -> str:
        """The whole model in one line."""
        model = self.model
        speed = "" if model.speedup is None else f" ({model.speedup:.2f}x)"
        return (
            f"{model.type}: {_bytes(model.bytes_float)} → {_bytes(model.bytes_int8)}, "
            f"{_number(model.ms_float)} → {_number(model.ms_int8)} ms{speed}, "
            f"SQNR {_decibel(model.sqnr_db)} dB, cosine {_cosine(model.cosine)}"
        )

    def conditions(self) -> str:
        """What was measured on, in one line."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"sample: {self.sample}; {self.isa}, {threads}"

    def table(self) -> Table:
        """One row a converted layer, the whole model above; what all schemes have in common is said once.

        Raises:
            MissingPackageError: where rich is not installed.
        """
        with needs("Report.table", extra="report"):
            from rich.markup import escape
            from rich.table import Table
        common = [
            word
            for word in (self.layers[0].scheme if self.layers else ())
            if all(word in layer.scheme for layer in self.layers)
        ]
        title = self.summary()
        if common:
            title += f"\nall layers: {', '.join(common)}"
        table = Table(title=escape(title), caption=escape(self.conditions()))
        table.add_column("layer", overflow="fold")
        for heading in ("N x K", "scheme", "calls", "M", "kB", "SQNR dB", "cosine", "µs", "speed"):
            table.add_column(heading, justify="left" if heading == "scheme" else "right")
        for layer in self.layers:
            table.add_row(
                escape(layer.name or "(the model)"),
                f"{layer.n} x {layer.k}",
                ", ".join(word for word in layer.scheme if word not in common),
                str(layer.calls),
                _rows(layer.rows) if layer.calls else NOT_REACHED,
                f"{layer.bytes_float / 1e3:.1f} → {layer.bytes_int8 / 1e3:.1f}",
                _decibel(layer.sqnr_db),
                _cosine(layer.cosine),
                _arrow(layer.us_float, layer.us_int8),
                _speed(layer.speedup),
            )
        if all(word in common for layer in self.layers for word in layer.scheme):
            table.columns = [column for column in table.columns if column.header != "scheme"]
        return table

    def skipped_table(self) -> Table:
        """One row a layer that stays float.

        Raises:
            MissingPackageError: where rich is not installed.
        """
        with needs("Report.skipped_table", extra="report"):
            from rich.markup import escape
            from rich.table import Table
        table = Table(title="Left float")
        for heading in ("layer", "type", "kB", "why"):
            table.add_column(heading, justify="right" if heading == "kB" else "left", overflow="fold")
        for layer in self.skipped:
            name = escape(layer.name or "(the model)")
            table.add_row(name, layer.type, f"{layer.bytes / 1e3:.1f}", escape(layer.reason))
        return table

    def to_dict(self) -> dict[str, Any]:
        """All of it in dicts, lists and numbers, with the speedups."""
        return {
            "model": {**asdict(self.model), "speedup": self.model.speedup},
            "layers": [
                {**asdict(layer), "rows": list(layer.rows), "speedup": layer.speedup} for layer in self.layers
            ],
            "skipped": [asdict(layer) for layer in self.skipped],
            "sample": self.sample,
            "threads": self.threads,
            "isa": self.isa,
        }

    def to_json(self, indent: int | None = 1) -> str:
        """:meth:`to_dict` as JSON. An infinite SQNR, which JSON has no number for, is null; the cosine says
        whether the outputs are equal (1) or worlds apart (0)."""
        return json.dumps(_finite(self.to_dict()), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_pandas(self) -> Any:
        """A DataFrame with one row a layer: the converted ones, then those left float, with ``reason`` set.

        Raises:
            MissingPackageError: where pandas is not installed.
        """
        with needs("Report.to_pandas", extra="report", instead="; to_dict() and to_json() do without"):
            import pandas
        parts = self.to_dict()
        rows = [{**layer, "reason": None} for layer in parts["layers"]]
        rows += [
            {
                "name": layer.name,
                "float_type": layer.type,
                "bytes_float": layer.bytes,
                "reason": layer.reason,
            }
            for layer in self.skipped
        ]
        columns = [*LayerReport.__dataclass_fields__, "speedup", "reason"]
        # Without convert_dtypes the gaps of what stays float would make floats of all counts.
        return pandas.DataFrame(rows, columns=columns).convert_dtypes()

    def save_png(self, path: str | Path) -> None:
        """A picture: for each layer its speed against float, its SQNR and its size.

        Raises:
            MissingPackageError: where matplotlib is not installed.
        """
        with needs("Report.save_png", extra="report", instead="; print(report) shows the same figures"):
            from .report_plot import plot
        plot(self, Path(path))


def report(model_fp32: nn.Module, model_int8: nn.Module, sample: Any) -> Report:
    """Measure a converted model against the float one on a sample: each layer on its own inputs, the whole.

    Both models run in eval mode without gradients and are left in the mode they were in, without hooks, and
    the random number generators of torch stand where they stood. Each layer is measured while the float model
    runs, so no inputs are collected; times are medians of float and int8 in turns
    (:func:`dynquant.timing.compare`).

    Args:
        model_fp32: the model before its conversion, of any float dtype.
        model_int8: what :func:`dynquant.quantize_dynamic` made of it. Layers that torch.ao made are measured
            too.
        sample: what the models are called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments (any mapping, such as what a tokenizer returns). Everything else is the one argument.

    Raises:
        ValueError: where a model does not take the sample, with what it said; for models that are not the
            same before and after a conversion.
        TypeError: for a sample whose keys are no names, or that cannot be copied.
    """
    if model_fp32 is model_int8:
        raise ValueError(
            "dynquant.report: expected the model before and after its conversion, got one and the same "
            f"{type(model_fp32).__name__}; keep a copy of the float model before converting it inplace"
        )
    given = Sample.of(sample)
    with measuring(model_fp32, model_int8):
        return make_report(model_fp32, model_int8, given)


def make_report(
    model: nn.Module,
    int8_model: nn.Module,
    sample: Sample,
    *,
    rejected: Sequence[Skipped] = (),
    measured: Mapping[str, Measured] | None = None,
) -> Report:
    """:func:`report` under :func:`dynquant.sample.measuring`.

    Args:
        rejected: layers that missed a threshold, and why.
        measured: of the layers, by name, where it is known already.
    """
    pairs = pair_layers(model, int8_model)
    whole = measure_models(model, int8_model, sample)
    if measured is None:
        measured = measure_layers(model, pairs, sample)
    return Report(
        _of_model(model, int8_model, whole),
        tuple(_of_layer(pair, measured[pair.name]) for pair in pairs),
        tuple(_skipped(model, int8_model, pairs, rejected)),
        str(sample),
        torch.get_num_threads(),
        isa(),
    )


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


def _of_layer(pair: Pair, seen: Measured) -> LayerReport:
    before, after = pair.float_layer, pair.int8_layer
    config = after.config if isinstance(after, QLinear) else None
    sizes: Any = after if isinstance(after, QLinear) else before
    return LayerReport(
        name=pair.name,
        float_type=type(before).__name__,
        int8_type=type(after).__name__,
        activations=config.activations if config else None,
        weights=config.weights if config else None,
        rotation_block=config.rotation_block if config else None,
        epilogue=config.epilogue if config else None,
        static=isinstance(after, QLinear) and after.activation_scale is not None,
        shares_input=_shares_input(after),
        n=sizes.out_features,
        k=sizes.in_features,
        bytes_float=_nbytes(_tensors_of(before)),
        bytes_int8=_nbytes(_tensors_of(after)),
        calls=seen.calls,
        rows=seen.rows,
        sqnr_db=seen.sqnr_db,
        cosine=seen.cosine,
        us_float=seen.us_float,
        us_int8=seen.us_int8,
    )


def _shares_input(layer: nn.Module) -> int:
    if isinstance(layer, MergedLinear) and layer.group.merged is not None:
        return len(layer.group.layers)
    return 1


def _skipped(
    model: nn.Module, int8_model: nn.Module, pairs: Iterable[Pair], rejected: Sequence[Skipped]
) -> list[SkippedLayer]:
    """What has a weight matrix and was not converted, in the order of the model."""
    # The spec that covers everything tells of each module whether it could have been converted.
    _, skipped = select(model, {nn.Module: {}}, {}, default_mapping(model))
    reasons = {id(item.module): item.reason for item in (*skipped, *rejected)}
    linear_types = tuple(default_mapping(model))
    converted = {id(pair.float_layer) for pair in pairs}
    types = {name: type(layer) for name, layer in int8_model.named_modules(remove_duplicate=False)}
    layers = []
    for name, module in model.named_modules():
        if id(module) in converted:
            continue
        if isinstance(module, QLinear):
            reason: str | None = "it was a QLinear before"
            tensors = _tensors_of(module)
        elif types.get(name) is type(module):
            reason = reasons.get(id(module))
            if reason is None and isinstance(module, linear_types):
                reason = "the spec leaves it float"
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        else:
            continue  # something else took its place, through a mapping of the user's or in a graph
        if reason is not None:
            layers.append(SkippedLayer(name, type(module).__name__, _nbytes(tensors), reason))
    return layers


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """All tensors that a module and those in it hold, also packed ones."""
    tensors: list[Tensor] = []
    for part in module.modules():
        tensors += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if isinstance(part, QLinear):
            weight = part.weight
            tensors += [weight.packed_weight, weight.weight_sum, weight.channel_scale]
        elif type(part).__module__.startswith("torch.ao."):
            # Its packed weights are opaque; what it saves has their size.
            packed: dict[str, Any] = {}
            part._save_to_state_dict(packed, "", False)
            tensors += [
                tensor for name in packed.keys() - part._buffers for tensor in tensors_in(packed[name])
            ]
    return tensors


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the memory that a model's tensors are in, each memory counted once."""
    sizes: dict[int, int] = {}
    tensors = _tensors_of(model)
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            sizes[id(tensor)] = tensor.nbytes
    return sum(sizes.values())


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or not after else before / after


def _finite(value: Any) -> Any:
    """The same with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    """Three figures or more, whatever the size."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _arrow(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{_number(before)} → {_number(after)}"


def _speed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if value >= 1 else f"[red]{value:.2f}x[/red]"


def _rows(rows: Sequence[int]) -> str:
    """The M of a layer's inputs: all of few, the ends of many."""
    if len(rows) <= 3:
        return ", ".join(map(str, rows))
    return f"{rows[0]} ... {rows[-1]}"
