"""The records of a report."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import MissingPackageError, needs
from . import report_table
from .report_text import cosine_text, decibel_text, number_text, size_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One converted layer.

    Attributes:
        name: its dotted name, the first one if it has several.
        float_type, int8_type: names of the types before and after.
        activations, weights, rotation_block, epilogue: as of :class:`dynquant.Config`; None for a layer that
            is not a :class:`dynquant.QModule`.
        static: whether the qparams of activations are fixed.
        shares_input: the number of layers, with this one, that read the same tensor and run as one in a
            compiled graph (see :func:`dynquant.fuse`); 1 without others. All figures are of each layer alone.
        n, k: out_features and in_features; None for a layer of a user's type that is not linear.
        bytes_float, bytes_int8: bytes of the layer's tensors; in the int8 layer packed, with sums and scales.
        calls: the number of the layer's calls with the sample. 0: the attributes below are None.
        rows: the different M of its inputs [M, K], ascending.
        sqnr_db: 10 log10(energy of the float layer's output / energy of the difference), both layers on the
            same inputs. An activation that became an epilogue is applied after the float layer too.
        cosine: of the two outputs.
        us_float, us_int8: microseconds a call, see :class:`dynquant.measurement.layers.Measured`.
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
    n: int | None
    k: int | None
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
    def shape(self) -> str:
        """N x K in words."""
        return "" if self.n is None else f"{self.n} x {self.k}"

    @property
    def scheme(self) -> tuple[str, ...]:
        """The scheme in words, without defaults."""
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
class AttentionReport:
    """The int8 attention of one module.

    Attributes:
        name, type: of the EncoderLayer or the attention module.
        calls: with the sample.
        shapes: the different [B, H, S_q, S_kv, D].
        sqnr_db, cosine: of its output to that of torch's attention, in fp32 on the same operands.
        us_float, us_int8: microseconds a call of torch's and of int8 attention.
    """

    name: str
    type: str
    calls: int
    shapes: tuple[tuple[int, ...], ...]
    sqnr_db: float | None
    cosine: float | None
    us_float: float | None
    us_int8: float | None

    @property
    def speedup(self) -> float | None:
        """Time of torch's attention / time of int8 attention."""
        return _ratio(self.us_float, self.us_int8)


@dataclass(frozen=True)
class SkippedLayer:
    """A module that stays float, with the reason: one with a weight matrix, or one whose attention was found
    inexact. ``bytes``: of its own tensors, 0 for attention."""

    name: str
    type: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class ModelReport:
    """The model as a whole.

    Attributes:
        type: name of its type.
        bytes_float, bytes_int8: of all its tensors, each memory counted once.
        sqnr_db, cosine: of all its floating outputs, as of a layer; None if it has none of equal shapes.
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
    """The result of :func:`report`. ``print()`` shows it as a table.

    Attributes:
        model: the model as a whole.
        layers: the converted layers, in the order of the model.
        skipped: the layers that stay float, with the reasons.
        sample: the arguments of the models' calls, in words.
        threads, isa: of the timed calls.
        attention: the modules with int8 attention, in the order of the model.
    """

    model: ModelReport
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    sample: str
    threads: int
    isa: str
    attention: tuple[AttentionReport, ...] = ()

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
        tables = [self.table()]
        tables += [self.attention_table()] if self.attention else []
        return tables + ([self.skipped_table()] if self.skipped else [])

    def summary(self) -> str:
        """The model in one line."""
        model = self.model
        speed = "" if model.speedup is None else f" ({model.speedup:.2f}x)"
        return (
            f"{model.type}: {size_text(model.bytes_float)} → {size_text(model.bytes_int8)}, "
            f"{number_text(model.ms_float)} → {number_text(model.ms_int8)} ms{speed}, "
            f"SQNR {decibel_text(model.sqnr_db)} dB, cosine {cosine_text(model.cosine)}"
        )

    def conditions(self) -> str:
        """Sample, instruction set and threads in one line."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"sample: {self.sample}; {self.isa}, {threads}"

    def table(self) -> Table:
        """One row a converted layer, below the model; words that all schemes have in common stand there once.

        Raises:
            MissingPackageError: if rich is not installed.
        """
        return report_table.layer_table(self)

    def attention_table(self) -> Table:
        """One row a module with int8 attention.

        Raises:
            MissingPackageError: if rich is not installed.
        """
        return report_table.attention_table(self)

    def skipped_table(self) -> Table:
        """One row a layer that stays float.

        Raises:
            MissingPackageError: if rich is not installed.
        """
        return report_table.skipped_table(self)

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists and numbers, with the speedups."""
        return {
            "model": {**asdict(self.model), "speedup": self.model.speedup},
            "layers": [
                {**asdict(layer), "rows": list(layer.rows), "speedup": layer.speedup} for layer in self.layers
            ],
            "attention": [
                {**asdict(entry), "shapes": [list(shape) for shape in entry.shapes], "speedup": entry.speedup}
                for entry in self.attention
            ],
            "skipped": [asdict(layer) for layer in self.skipped],
            "sample": self.sample,
            "threads": self.threads,
            "isa": self.isa,
        }

    def to_json(self, indent: int | None = 1) -> str:
        """:meth:`to_dict` as JSON. An infinite SQNR, which JSON has no number for, is null; the cosine says
        whether the outputs are equal (1) or unrelated (0)."""
        return json.dumps(_finite(self.to_dict()), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_pandas(self) -> Any:
        """A DataFrame with one row a layer: the converted ones, then the float ones, with ``reason`` set.

        Raises:
            MissingPackageError: if pandas is not installed.
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
        # Without convert_dtypes the missing values of float layers would turn all counts into floats.
        return pandas.DataFrame(rows, columns=columns).convert_dtypes()

    def save_png(self, path: str | Path) -> None:
        """A picture: for each layer its speed against float, its SQNR and its size.

        Raises:
            MissingPackageError: if matplotlib is not installed.
        """
        with needs("Report.save_png", extra="report", instead="; print(report) shows the same figures"):
            from .report_picture import plot
        plot(self, Path(path))


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or not after else before / after


def _finite(value: Any) -> Any:
    """``value`` with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
