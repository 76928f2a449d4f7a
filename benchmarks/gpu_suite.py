"""Builds the CUDA kernels for this card, proves them, and measures them against the card's limits.

    python benchmarks/gpu_suite.py --out DIR

Needs an NVIDIA GPU, a CUDA build of torch, setuptools and nvcc; no network. Within 10 minutes it leaves
DIR/CARD.json, .md and (with matplotlib) .png, the first of them written anew after every stage, and each
stage's output in DIR/stages.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder, which Python puts first, holds files with names such as report.py that are no modules of their
# own.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.gpu import environment, figures, plot, report, stages  # noqa: E402
from benchmarks.gpu.build import LIBRARY  # noqa: E402

BUDGET_S = 585.0
NOTHING_TO_RUN_ON = 2  # exit code
LOOK_S = 60.0
BUILD = ("build",)


def stages_of(names: Sequence[str]) -> list[stages.Stage]:
    """The named stages in their order. Their limits leave a margin in the budget; a stage that fills its time
    is told to end before its limit."""
    timed = {"sanitizer": 110.0, "correctness": 105.0}
    every = [
        _stage("build", 180.0, ()),
        _stage("correctness", timed["correctness"], BUILD, "--seconds", "25", "--probe", str(LIBRARY)),
        _stage("sanitizer", timed["sanitizer"], BUILD, "--seconds", str(timed["sanitizer"] - 6)),
        _stage("ceilings", 50.0, ()),
        _stage("kernels", 125.0, BUILD, "--probe", str(LIBRARY)),
    ]
    return [stage for stage in every if stage.name in names]


NAMES = ("build", "correctness", "sanitizer", "ceilings", "kernels")


def _stage(name: str, limit_s: float, needs: tuple[str, ...], *words: str) -> stages.Stage:
    return stages.Stage(name, (sys.executable, "-m", "benchmarks.gpu.worker", name, *words), limit_s, needs)


def main(words: Sequence[str]) -> int:
    """Returns 0 where every stage ran to its end, 1 where one did not, 2 where there is nothing to run on."""
    options = _parse(words)
    start = time.monotonic()
    out: Path = options.out
    child = os.environ | {"PYTHONPATH": str(ROOT)}
    look = stages.run(
        [_stage("look", LOOK_S, ())],
        budget_s=LOOK_S,
        folder=out / "stages",
        environment=child,
        cwd=ROOT,
        flush=lambda outcomes: None,
        tell=lambda line: None,
    )["look"]
    if look["status"] != "ok" or look["results"].get("missing"):
        sentence = look["results"].get("missing") or f"looking at the device: {look['reason']}"
        print(f"gpu_suite: {sentence}", file=sys.stderr)
        return NOTHING_TO_RUN_ON

    results: dict[str, Any] = {
        "header": look["results"]["header"],
        "command": shlex.join(["python", "benchmarks/gpu_suite.py", *words]),
        "seconds": 0.0,
        "stages": {},
    }
    stem = out / environment.file_stem(results["header"]["device"])

    def flush(outcomes: dict[str, stages.Outcome]) -> None:
        results["stages"] = outcomes
        results["seconds"] = round(time.monotonic() - start, 1)
        write(results, stem)

    outcomes = stages.run(
        stages_of(options.stages),
        budget_s=options.budget - (time.monotonic() - start),
        folder=out / "stages",
        environment=child,
        cwd=ROOT,
        flush=flush,
        tell=tell,
    )
    draw(results, stem)
    for figure in figures.judge(results):
        tell(f"{figure.number}. {figure.what}: {figure.measured} (target {figure.target}): {figure.verdict}")
    tell(f"{time.monotonic() - start:.0f} s; results in {stem}.json and .md")
    return 0 if all(outcome["status"] == "ok" for outcome in outcomes.values()) else 1


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for everything (default: %(default)s)"
    )
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=NAMES, help="these alone")
    options = parser.parse_args(words)
    if not options.budget > 0:
        parser.error(f"expected --budget to be more than 0 seconds, got {options.budget}")
    return options


def write(results: dict[str, Any], stem: Path) -> None:
    """JSON and Markdown of what there is."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    judged = figures.judge(results)
    entries = [
        {"number": f.number, "what": f.what, "target": f.target, "measured": f.measured, "verdict": f.verdict}
        for f in judged
    ]
    text = json.dumps(results | {"figures": entries}, indent=1, ensure_ascii=False)
    stem.with_name(stem.name + ".json").write_text(text + "\n")
    stem.with_name(stem.name + ".md").write_text(report.markdown(results, judged))


def draw(results: dict[str, Any], stem: Path) -> None:
    """The picture, where matplotlib is there."""
    try:
        plot.plot(results, figures.judge(results), stem.with_name(stem.name + ".png"))
    except ImportError as error:
        tell(f"no picture: {error}")


def tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
