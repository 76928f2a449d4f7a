"""One stage, in its own process: ``python -m benchmarks.gpu.stage NAME --entries FILE``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from .results import Recorder

# Name: module and function. Each stage imports only its own module.
STAGES = {
    "machine": "machine.describe",
    "judge gemm": "judge_kernels.gemm",
    "judge quantize": "judge_kernels.quantize",
    "judge forward": "judge_kernels.forward",
    "time large": "time_kernels.large",
    "time few rows": "time_kernels.few_rows",
    "time middle": "time_kernels.middle",
    "time quantize": "time_kernels.quantize",
    "judge ops": "judge_ops.run",
    "fuzz": "judge_ops.fuzz",
    "first call in a capture": "judge_ops.first_call_in_a_capture",
    "time layers": "time_layers.run",
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.stage", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--entries", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--probe", type=Path, nargs="*", default=[])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tile", default="")
    parser.add_argument("--distrust", nargs="*", default=[])
    options = parser.parse_args(arguments)
    record = Recorder(options.entries)
    start = time.monotonic()
    import torch

    imported = time.monotonic() - start
    if options.device == "cuda":
        torch.zeros(1, device="cuda").item()
    # The stage's time limit counts from this entry on.
    record.add("ready", import_s=round(imported, 1), ready_s=round(time.monotonic() - start, 1))
    module, _, name = STAGES[options.stage].partition(".")
    function: Callable[[object], None] = getattr(import_module(f".{module}", __package__), name)
    from .setting import Setting

    function(
        Setting(
            record,
            torch.device(options.device),
            tuple(options.probe),
            options.small,
            options.seed,
            options.tile,
            tuple(options.distrust),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
