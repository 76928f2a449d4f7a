"""The demo's sentence encoder, timed longer, with bf16 as a further version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dynquant.demo import encoder
from dynquant.demo.sentences import SENTENCES


def run(
    threads: Sequence[int], *, rounds: int, seconds: float, quick: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """{"sentences", "threads": {count: [results by version]}}, or {"left_out": reason}."""
    versions = dict(encoder.VERSIONS)
    workloads = dict(encoder.WORKLOADS)
    if quick:
        workloads = {"1x16": workloads["1x16"]}
    else:
        versions["bf16"] = lambda model, tokenize: model.bfloat16()
    by_threads = {}
    for count in threads:
        try:
            results = encoder.run(
                versions=versions, workloads=workloads, threads=count, rounds=rounds, seconds=seconds
            )
        except ImportError as error:
            return {"left_out": str(error)}
        by_threads[str(count)] = [asdict(result) for result in results]
        log(f"threads {count}  encoder done")
    return {"sentences": len(SENTENCES), "threads": by_threads}
