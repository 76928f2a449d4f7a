"""One stage in a process of its own: ``python -m benchmarks.gpu.worker STAGE --results FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import environment
from .stages import Recorder


@dataclass(frozen=True)
class Options:
    """What a stage is told.

    Attributes:
        device: "cuda"; "cpu" runs the stage's code over the CPU kernels.
        small: sizes for a look at the code.
        seconds: for the stages that fill their time.
        seed: None draws a fresh one.
        probe: the library with the kernels one by one.
    """

    device: str
    small: bool
    seconds: float
    seed: int | None
    probe: Path | None


def look(record: Recorder, options: Options) -> int:
    sentence = environment.missing()
    record.set("missing", sentence)
    record.set("header", environment.describe() if sentence is None else {})
    return 0


def build(record: Recorder, options: Options) -> int:
    from . import build as room

    room.run(record)
    return 0


def correctness(record: Recorder, options: Options) -> int:
    import torch

    from . import correctness as room

    seed = room.fresh_seed() if options.seed is None else options.seed
    setting = room.Setting(torch.device(options.device), seed, options.seconds, options.probe)
    bad = room.run(record, setting)
    print(f"{bad} groups with faults", flush=True)
    return 0


def sanitizer(record: Recorder, options: Options) -> int:
    from . import sanitizer as room

    room.run(record, options.seconds)
    return 0


def ceilings(record: Recorder, options: Options) -> int:
    import torch

    from . import ceilings as room

    room.run(record, torch.device(options.device), small=options.small)
    return 0


def kernels(record: Recorder, options: Options) -> int:
    import torch

    from . import kernels as room
    from .probe import Probe

    if options.probe is None:
        raise RuntimeError("the stage needs --probe, the library of single kernels")
    room.run(record, torch.device(options.device), Probe(options.probe), small=options.small)
    return 0


STAGES: dict[str, Callable[[Recorder, Options], int]] = {
    "look": look,
    "build": build,
    "correctness": correctness,
    "sanitizer": sanitizer,
    "ceilings": ceilings,
    "kernels": kernels,
}


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--probe", type=Path)
    given = parser.parse_args(words)
    options = Options(given.device, given.small, given.seconds, given.seed, given.probe)
    return STAGES[given.stage](Recorder(given.results), options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
