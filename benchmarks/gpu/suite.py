"""Judges and times the CUDA kernels on this machine's card.

    python benchmarks/gpu/suite.py --part 1 --out DIR [--probe LIBRARY ...]
    python benchmarks/gpu/suite.py --report DIR/CARD-part1.json DIR/CARD-part2.json

Part 1 judges every kernel and times it beside the libraries, then the ops of the extension, which is built
meanwhile. Part 2 compares several builds of the kernels and whole layers; its riskiest stages come last. DIR
receives CARD-partN.json, complete after every entry, and logs.tar.gz. The exit status is 0 for success, 1
after a wrong result or a failed stage, 2 on a machine without a CUDA device. --report writes CARD.json,
CARD.md and CARD.png beside the first result file; it needs no card.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Python puts this folder first on the path; its modules are benchmarks.gpu.*, not top-level ones.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.gpu import machine, report  # noqa: E402
from benchmarks.gpu.probe import TILES  # noqa: E402
from benchmarks.gpu.processes import Runner, Stage  # noqa: E402
from benchmarks.shared.file_names import file_stem  # noqa: E402

BUDGET_S = {1: 270.0, 2: 250.0}
RESERVE_S = 8.0  # of the budget, for stopping stages and writing
NOTHING_TO_RUN_ON = 2  # exit status
JUDGED_AT_ONCE = 4


class Suite:
    """The stages of both parts; an empty ``arch`` is a rehearsal."""

    def __init__(self, runner: Runner, probes: list[Path], arch: str) -> None:
        self._runner, self._probes, self._arch = runner, probes, arch
        self._rehearse = not arch
        self._distrusted: list[str] = []

    def stage(self, name: str, limit_s: float, *arguments: str, label: str = "") -> Stage:
        """A stage of benchmarks.gpu.stage."""
        command = [sys.executable, "-m", "benchmarks.gpu.stage", name, *arguments]
        command += ["--seed", str(self._runner.results["seed"]), "--probe", *map(str, self._probes)]
        if self._distrusted:
            command += ["--distrust", *self._distrusted]
        if self._rehearse:
            command += ["--device", "cpu", "--small"]
        return Stage(label or name, tuple(command), limit_s)

    def part_1(self) -> None:
        build = self._start_building()
        self._get_ready()
        self._judge_kernels()
        for name, limit_s in (("large", 40.0), ("few rows", 40.0), ("middle", 50.0), ("quantize", 20.0)):
            self._runner.run([self.stage(f"time {name}", limit_s)])
            self._note_card()
        if build is None or self._runner.wait(build):
            self._runner.run([self.stage("judge ops", 60.0), self.stage("time layers", 45.0)])

    def part_2(self) -> None:
        build = self._start_building()
        self._get_ready()
        if len(self._probes) > 1:
            for name in ("large", "few rows", "middle", "quantize"):
                self._runner.run([self.stage(f"time {name}", 30.0)])
            self._note_card()
        if build is None or self._runner.wait(build):
            self._runner.run([self.stage("time layers", 60.0), self.stage("fuzz", 40.0)])
            self._runner.run([self.stage("first call in a capture", 20.0)])
        self._memcheck()

    def _start_building(self) -> Any:
        """The extension, in the background; None in a rehearsal, which uses the present build."""
        if self._rehearse:
            return None
        jobs = str(max(len(os.sched_getaffinity(0)) - JUDGED_AT_ONCE, 1))
        environment = (("DYNQUANT_CUDA", "1"), ("TORCH_CUDA_ARCH_LIST", self._arch), ("MAX_JOBS", jobs))
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        return self._runner.start(Stage("build extension", command, 600.0, False, environment))

    def _get_ready(self) -> None:
        """Build a missing probe; import torch once in a process of its own, so that the disk cache is warm.

        Raises:
            SystemExit: torch does not reach the card, or the probe cannot be built.
        """
        warm = self._runner.start(self.stage("machine", 60.0))
        if not self._probes:
            self._probes = [ROOT / "build" / "gpu" / "dynquant_probe.so"]
            build = ["benchmarks.gpu.build", "--probe", str(self._probes[0]), "--arch", self._arch]
            command = (sys.executable, "-m", *build)
            if not self._runner.wait(self._runner.start(Stage("build probe", command, 150.0, False))):
                raise SystemExit(1)
        if not self._runner.wait(warm) and (warm.outcome or {}).get("ready_s") is None:
            raise SystemExit(1)

    def _judge_kernels(self) -> None:
        """Each kernel and tile in its own process, wgmma last; a tile that hangs or crashes is not timed."""
        gemms = {
            tile.name: self.stage("judge gemm", 25.0, "--tile", tile.name, label=f"judge {tile.name}")
            for tile in TILES
        }
        wgmma = [stage for name, stage in gemms.items() if name.startswith("wgmma")]
        others = [stage for stage in gemms.values() if stage not in wgmma]
        self._runner.run([*others, self.stage("judge quantize", 25.0)], JUDGED_AT_ONCE)
        self._runner.run([*wgmma, self.stage("judge forward", 25.0)], JUDGED_AT_ONCE)
        bad = [outcome["stage"] for outcome in self._runner.results["stages"] if outcome["status"] != "ok"]
        self._distrusted = [name for name, stage in gemms.items() if stage.name in bad]

    def _memcheck(self) -> None:
        """compute-sanitizer over every kernel, in a program without torch."""
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        folders = [os.environ.get("PATH", os.defpath), str(Path(nvcc).resolve().parent)]
        tool = shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))
        program = [sys.executable, "-m", "benchmarks.gpu.memcheck", str(self._probes[0])]
        program += ["--small"] if self._rehearse else []
        with_tool = [tool, "--tool", "memcheck", "--error-exitcode", "9"] if tool else []
        name = "memcheck" if tool else "memcheck without compute-sanitizer, which is not installed"
        self._runner.run([Stage(name, (*with_tool, *program), 60.0, False)])

    def _note_card(self) -> None:
        """Clocks, power and temperature after a stage that kept the card busy."""
        self._runner.results["card_after"] = machine.card_state()


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if options.report:
        for path in report.write(options.report):
            print(path)
        return 0
    try:
        card, arch = ("cpu rehearsal", "") if options.rehearse else machine.card()
    except RuntimeError as error:
        print(f"gpu suite: {error}", file=sys.stderr)
        return NOTHING_TO_RUN_ON
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the finally clause below runs
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "4")  # several processes at once, beside a build
    shown = [
        "DIR" if before == "--out" else argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]
    head = {
        "card": card,
        "part": options.part,
        "command": shlex.join(["python", "benchmarks/gpu/suite.py", *shown]),
        "date": datetime.date.today().isoformat(),
        "seed": int(time.time()) if options.seed is None else options.seed,
        "card_before": machine.card_state(),
    }
    stem = f"{file_stem(card)}-part{options.part}"
    start = time.monotonic()
    runner = Runner(options.out, stem, options.budget - RESERVE_S, head)
    suite = Suite(runner, options.probe, arch)
    try:
        suite.part_1() if options.part == 1 else suite.part_2()
    except SystemExit:
        runner.results["error"] = "the suite was stopped or could not continue"
    finally:
        runner.close()
    print(report.markdown(runner.results, last_first=True))
    is_good = runner.is_good and "error" not in runner.results
    print(f"{time.monotonic() - start:.0f} s; {'all right' if is_good else 'NOT all right'}; {stem}.json")
    return 0 if is_good else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2))
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--probe",
        type=Path,
        nargs="+",
        default=[],
        help="libraries of benchmarks.gpu.build, the product first",
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for everything (270 for part 1, 250 for part 2)"
    )
    parser.add_argument("--seed", type=int, help="of all random inputs (default: a fresh one)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a probe over the emulator")
    parser.add_argument("--report", type=Path, nargs="+", help="result files to report on")
    options = parser.parse_args(arguments)
    if not options.report and (options.part is None or options.out is None):
        parser.error("expected --part and --out, or --report")
    if options.part and options.budget is None:
        options.budget = BUDGET_S[options.part]
    if options.part and not options.budget > RESERVE_S:
        parser.error(f"expected --budget to be more than {RESERVE_S:.0f} seconds, got {options.budget}")
    missing = [str(path) for path in options.probe if not path.exists()]
    if missing:
        parser.error(f"no such library: {', '.join(missing)}")
    options.probe = [path.resolve() for path in options.probe]
    options.out = options.out and options.out.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
