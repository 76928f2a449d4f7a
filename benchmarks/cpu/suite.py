"""Runs the sections and writes JSON, Markdown and a picture; called by ``python -m dynquant bench``."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dynquant
from dynquant import _extension
from dynquant.measurement.timing import keep_freed_memory

from . import (
    attention,
    contention,
    encoder,
    encoder_plot,
    kernels,
    linear,
    machine,
    memory,
    option_cost,
    plot,
    recurrent,
    report,
    roofline,
    targets,
)
from .baselines import BASELINES, OURS

SECTIONS = (
    "linear",
    "avx2",
    "option_cost",
    "kernels",
    "memory",
    "attention",
    "recurrent",
    "encoder",
    "contention",
)
FORMER_SECTIONS = {"additions": "option_cost", "busy": "contention"}  # old names, still accepted
QUICK_LIMIT = 1 << 28  # multiply-accumulates


@dataclass(frozen=True)
class Options:
    """The selected measurements, checked by :meth:`parse`."""

    out: Path
    rows: tuple[linear.Row, ...] | None  # None: the default rows of each section
    threads: tuple[int, ...]
    names: tuple[str, ...]  # of candidates, ours first
    sections: tuple[str, ...]
    isa: str | None
    quick: bool

    @property
    def rounds(self) -> int:
        """Samples of each candidate."""
        return 3 if self.quick else 9

    @property
    def seconds(self) -> float:
        """Length of a sample."""
        return 0.002 if self.quick else 0.03

    @property
    def linear_rows(self) -> tuple[linear.Row, ...]:
        """The selected rows or the whole table, in a quick run without its heaviest rows."""
        if self.rows is not None:
            return self.rows
        return tuple(row for row in linear.ROWS if not self.quick or math.prod(row) < QUICK_LIMIT)

    @staticmethod
    def parse(
        *,
        out: Path,
        rows: Sequence[str] | None = None,
        threads: Sequence[str] | None = None,
        baselines: Sequence[str] | None = None,
        sections: Sequence[str] | None = None,
        isa: str | None = None,
        quick: bool = False,
    ) -> Options:
        """From the options of the command line; None selects everything.

        Raises:
            ValueError: names the wrong value and the allowed ones.
        """
        if isa is not None and isa not in dynquant.available_isas():
            allowed = ", ".join(dynquant.available_isas()) or "none, the reference runs"
            raise ValueError(f"expected isa to be one that this machine can run ({allowed}), got {isa!r}")
        return Options(
            out=out,
            rows=None if rows is None else tuple(_row(row) for row in rows),
            threads=tuple(_thread_count(count) for count in threads or _default_threads()),
            names=(
                *OURS,
                *_selected("baselines", baselines, tuple(BASELINES)),
            ),
            sections=_selected("sections", _current_names(sections), SECTIONS),
            isa=isa,
            quick=quick,
        )


def _default_threads() -> list[str]:
    """1 and 2; on a single core only 1."""
    return ["1", "2"][: len(os.sched_getaffinity(0))]


def _current_names(sections: Sequence[str] | None) -> Sequence[str] | None:
    return None if sections is None else [FORMER_SECTIONS.get(name, name) for name in sections]


def _selected(option: str, values: Sequence[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [value for value in values or () if value not in allowed]
    if unknown:
        raise ValueError(f"expected {option} from {', '.join(allowed)}, got {unknown[0]!r}")
    return allowed if values is None else tuple(value for value in allowed if value in values)


def _row(text: str) -> linear.Row:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"expected a row as MxKxN, such as 128x768x3072, got {text!r}")
    m, k, n = (int(size) for size in sizes)
    return m, k, n


def _thread_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"expected threads to be whole numbers from 1 up, got {text!r}")
    return int(text)


@contextlib.contextmanager
def _forced(isa: str | None) -> Iterator[None]:
    """Forces the CPU kernels to this ISA inside the context; None changes nothing."""
    if isa is None or _extension.extension is None:
        yield
        return
    before = dynquant.isa()
    _extension.extension.set_isa(isa)
    try:
        yield
    finally:
        _extension.extension.set_isa(before)


def _log(line: str) -> None:
    print(line, flush=True)


def run(options: Options) -> dict[str, Any]:
    """Run the sections, write the results after each, and return them."""
    threads_before = torch.get_num_threads()
    logging_before = logging.root.manager.disable
    with _forced(options.isa), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # advice and deprecation notices of the baselines
        try:
            return _run(options)
        finally:
            logging.disable(logging_before)
            torch.set_num_threads(threads_before)


def _run(options: Options) -> dict[str, Any]:
    start = time.perf_counter()
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "command": shlex.join(["python", "-m", "dynquant", "bench", *sys.argv[2:]]),
        "quick": options.quick,
        "keeps_freed_memory": keep_freed_memory(),
        "peaks": {str(count): roofline.peaks(count) for count in options.threads},
    }
    for section in options.sections:
        result = _section(section, options)
        if result is not None:
            results[section] = result
        _write(results, options)
    _log(f"{time.perf_counter() - start:.0f} s; results in {options.out}")
    for target in targets.evaluate(results):
        _log(f"{target.number}. {target.name}: {target.measured} (target {target.goal}): {target.verdict}")
    return results


def _section(section: str, options: Options) -> Any:
    """The results of one section; None if this machine cannot run it."""
    rounds, seconds = options.rounds, options.seconds
    if section == "linear":
        return linear.run(
            options.linear_rows,
            options.threads,
            options.names,
            isa=options.isa,
            rounds=rounds,
            seconds=seconds,
            log=_log,
        )
    if section == "avx2":
        return _avx2(options)
    if section == "option_cost":
        rows = [row for row in option_cost.ROWS if not options.quick or math.prod(row) < QUICK_LIMIT]
        return option_cost.run(rows, rounds=rounds, seconds=seconds, log=_log)
    if section == "kernels":
        largest = 1 << 20 if options.quick else None
        return kernels.run(
            options.threads, isa=options.isa, rounds=rounds, seconds=seconds, log=_log, largest=largest
        )
    if section == "memory":
        return memory.run()
    if section == "attention":
        shapes = attention.SHAPES[-1:] if options.quick else attention.SHAPES
        return attention.run(options.threads, rounds=rounds, seconds=seconds, log=_log, shapes=shapes)
    if section == "recurrent":
        return recurrent.run(rounds=rounds, seconds=seconds, log=_log, quick=options.quick)
    if section == "encoder":
        # Three models in up to 15 versions: shorter than the other sections, and 10 minutes all the same.
        rounds, seconds = min(rounds, 7), 0.01 if options.quick else 0.15
        return encoder.run(options.threads, rounds=rounds, seconds=seconds, quick=options.quick, log=_log)
    names = [name for name in contention.CANDIDATES if name in options.names]
    contention_rounds = 3 if options.quick else 40
    return contention.run(
        options.rows or contention.ROWS,
        names,
        threads=max(options.threads),
        rounds=contention_rounds,
        seconds=0.05,
        log=_log,
    )


def _avx2(options: Options) -> list[dict[str, Any]] | None:
    """Our layers without baselines, forced to AVX2, M >= 32, 1 thread."""
    if "avx2" not in dynquant.available_isas():
        return None
    rows = [row for row in options.linear_rows if row[0] >= 32]
    with _forced("avx2"):
        return linear.run(
            rows,
            [1],
            tuple(OURS),
            isa="avx2",
            rounds=options.rounds,
            seconds=options.seconds,
            log=_log,
        )


def _write(results: dict[str, Any], options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / (machine.results_stem(results["machine"]) + ("-quick" if options.quick else ""))
    report.write_json(results, stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(report.markdown(results, targets.evaluate(results)))
    pictures = {"linear": (plot.plot, ".png"), "encoder": (encoder_plot.plot, "-encoder.png")}
    for section, (draw, ending) in pictures.items():
        if section not in results or "left_out" in results[section]:
            continue
        try:
            draw(results, stem.with_name(stem.name + ending))
        except ImportError as error:
            _log(f"no picture: {error}")


__all__ = ["SECTIONS", "Options", "run"]
