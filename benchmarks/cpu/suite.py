"""Runs the sections and writes JSON, Markdown and the picture; what ``python -m dynquant bench`` calls."""

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
from dynquant.timing import keep_freed_memory

from . import (
    baselines,
    contention,
    encoder,
    kernels,
    linear,
    machine,
    memory,
    option_cost,
    plot,
    report,
    roofline,
    targets,
)

SECTIONS = ("linear", "avx2", "additions", "kernels", "memory", "encoder", "busy")
QUICK_LIMIT = 1 << 28  # multiply-accumulates


@dataclass(frozen=True)
class Options:
    """What to run. Every field has passed :meth:`parse`'s checks."""

    out: Path
    rows: tuple[linear.Row, ...] | None  # None: each section's own
    threads: tuple[int, ...]
    names: tuple[str, ...]  # of contenders, ours first
    sections: tuple[str, ...]
    isa: str | None
    quick: bool

    @property
    def rounds(self) -> int:
        """Samples of each contender."""
        return 3 if self.quick else 9

    @property
    def seconds(self) -> float:
        """Length of a sample."""
        return 0.002 if self.quick else 0.03

    @property
    def linear_rows(self) -> tuple[linear.Row, ...]:
        """The rows asked for, or the table; a quick run leaves out its heaviest ones."""
        if self.rows is not None:
            return self.rows
        return tuple(row for row in linear.ROWS if not self.quick or math.prod(row) < QUICK_LIMIT)

    @staticmethod
    def parse(
        *,
        out: Path,
        rows: Sequence[str] | None = None,
        threads: Sequence[str] | None = None,
        rivals: Sequence[str] | None = None,
        sections: Sequence[str] | None = None,
        isa: str | None = None,
        quick: bool = False,
    ) -> Options:
        """From the words of the command line; None stands for everything.

        Raises:
            ValueError: a sentence that names the word and what is allowed.
        """
        if isa is not None and isa not in dynquant.available_isas():
            allowed = ", ".join(dynquant.available_isas()) or "none, the reference runs"
            raise ValueError(f"expected isa to be one that this machine can run ({allowed}), got {isa!r}")
        return Options(
            out=out,
            rows=None if rows is None else tuple(_row(word) for word in rows),
            threads=tuple(_thread_count(word) for word in threads or _default_threads()),
            names=(*_ours(), *_chosen("rivals", rivals, tuple(_rivals()))),
            sections=_chosen("sections", sections, SECTIONS),
            isa=isa,
            quick=quick,
        )


def _default_threads() -> list[str]:
    """1 and 2, where there are two cores."""
    return ["1", "2"][: len(os.sched_getaffinity(0))]


def _ours() -> tuple[str, ...]:
    return tuple(baselines.OURS)


def _rivals() -> tuple[str, ...]:
    return tuple(baselines.RIVALS)


def _chosen(option: str, words: Sequence[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [word for word in words or () if word not in allowed]
    if unknown:
        raise ValueError(f"expected {option} from {', '.join(allowed)}, got {unknown[0]!r}")
    return allowed if words is None else tuple(word for word in allowed if word in words)


def _row(word: str) -> linear.Row:
    sizes = word.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"expected a row as MxKxN, such as 128x768x3072, got {word!r}")
    m, k, n = (int(size) for size in sizes)
    return m, k, n


def _thread_count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"expected threads to be whole numbers from 1 up, got {word!r}")
    return int(word)


@contextlib.contextmanager
def _forced(isa: str | None) -> Iterator[None]:
    """The CPU kernels run on this ISA inside; None changes nothing."""
    if isa is None or _extension.extension is None:
        yield
        return
    before = dynquant.isa()
    _extension.extension.set_isa(isa)
    try:
        yield
    finally:
        _extension.extension.set_isa(before)


def _tell(line: str) -> None:
    print(line, flush=True)


def run(options: Options) -> dict[str, Any]:
    """Run the sections, writing what there is after each, and return everything."""
    threads_before = torch.get_num_threads()
    logging_before = logging.root.manager.disable
    with _forced(options.isa), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # the rivals' advice and deprecation notices
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
    _tell(f"{time.perf_counter() - start:.0f} s; results in {options.out}")
    for target in targets.judge(results):
        _tell(f"{target.number}. {target.name}: {target.measured} (target {target.goal}): {target.verdict}")
    return results


def _section(section: str, options: Options) -> Any:
    """The results of one section; None where it has nothing to measure here."""
    rounds, seconds, tell = options.rounds, options.seconds, _tell
    if section == "linear":
        return linear.run(
            options.linear_rows,
            options.threads,
            options.names,
            isa=options.isa,
            rounds=rounds,
            seconds=seconds,
            tell=tell,
        )
    if section == "avx2":
        return _avx2(options)
    if section == "additions":
        rows = [row for row in option_cost.ROWS if not options.quick or math.prod(row) < QUICK_LIMIT]
        return option_cost.run(rows, rounds=rounds, seconds=seconds, tell=tell)
    if section == "kernels":
        largest = 1 << 20 if options.quick else None
        return kernels.run(
            options.threads, isa=options.isa, rounds=rounds, seconds=seconds, tell=tell, largest=largest
        )
    if section == "memory":
        return memory.run()
    if section == "encoder":
        longer = 0.01 if options.quick else 0.3
        return encoder.run(options.threads, rounds=rounds, seconds=longer, quick=options.quick, tell=tell)
    names = [name for name in contention.CONTENDERS if name in options.names]
    turns = 3 if options.quick else 40
    return contention.run(
        options.rows or contention.ROWS,
        names,
        threads=max(options.threads),
        rounds=turns,
        seconds=0.05,
        tell=tell,
    )


def _avx2(options: Options) -> list[dict[str, Any]] | None:
    """Our layers alone on AVX2, against its own limit, M >= 32, 1 thread."""
    if "avx2" not in dynquant.available_isas():
        return None
    rows = [row for row in options.linear_rows if row[0] >= 32]
    with _forced("avx2"):
        return linear.run(
            rows, [1], _ours(), isa="avx2", rounds=options.rounds, seconds=options.seconds, tell=_tell
        )


def _write(results: dict[str, Any], options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / (machine.results_stem(results["machine"]) + ("-quick" if options.quick else ""))
    report.write_json(results, stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(report.markdown(results, targets.judge(results)))
    if "linear" in results:
        try:
            plot.plot(results, stem.with_suffix(".png"))
        except ImportError as error:
            _tell(f"no picture: {error}")


__all__ = ["SECTIONS", "Options", "run"]
