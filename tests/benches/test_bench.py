"""The CPU benchmarks: arithmetic, checks, files. No test asserts a speed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dynquant
from benchmarks.cpu import (
    baselines,
    contention,
    kernels,
    linear,
    machine,
    memory,
    option_cost,
    plot,
    probes,
    report,
    roofline,
    suite,
    targets,
)
from dynquant import _extension
from dynquant.measurement import timing

EXTENSION = _extension.extension


# ---- probes ----


@pytest.fixture
def loaded_probes() -> probes.Probes:
    loaded = probes.load()
    if loaded is None:
        pytest.skip("no C++ compiler on this machine: the probes were not tried")
    return loaded


@pytest.mark.usefixtures("loaded_probes")
def test_probes_measure_something_on_every_isa_that_is_here() -> None:
    if EXTENSION is not None:
        assert set(roofline.int8_isas()) == {isa for isa in dynquant.available_isas() if isa != "scalar"}
    for isa in roofline.int8_isas():
        assert roofline.int8_sampler(isa, 1, 0.001)() > 0
    for pattern in roofline.read_patterns():
        for size in (1, 1000, 1 << 16):
            assert roofline.read_sampler(pattern, size, 2, 0.001)() > 0
    assert all(value > 0 for value in roofline.peaks(1, 0.001).values())


def test_without_a_compiler_nothing_can_be_probed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "load", probes.load.__wrapped__)
    monkeypatch.setattr(probes, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -g")
    assert roofline.int8_isas() == roofline.read_patterns() == []
    assert roofline.peaks(1, 0.001) == {}
    sentence = "the machine's limits are not measured: no C++ compiler 'no-such-compiler' found"
    assert sentence in capsys.readouterr().err


def test_probes_are_compiled_once(
    loaded_probes: probes.Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = probes.build(tmp_path)
    before = library.stat().st_mtime_ns
    assert probes.build(tmp_path) == library
    assert library.stat().st_mtime_ns == before
    monkeypatch.setattr(probes, "FLAGS", (*probes.FLAGS, "--no-such-flag"))
    with pytest.raises(RuntimeError, match=r"probes\.cpp -o .* failed:(.|\n)*no-such-flag"):
        probes.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("int8", ("mmx", 0.001), r"int8: expected isa to be one this CPU has \(.*\), got 'mmx'"),
        ("fp32", (-1.0,), "fp32: expected seconds from 0 to 60, got -1"),
        ("fp32", (math.nan,), "fp32: expected seconds from 0 to 60, got nan"),
        ("read", ("sequential", 0, 0.001), "read: expected size >= 1, got 0"),
        ("read", ("random", 64, 0.001), "expected pattern to be one of sequential, prefetch, four_streams"),
    ],
)
def test_probes_refuse_in_a_sentence(
    loaded_probes: probes.Probes, name: str, arguments: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        getattr(loaded_probes, name)(*arguments)


def test_fractions_of_the_limits() -> None:
    limits = roofline.Limits(int8_gops=400.0, read_gbs=20.0)
    # 2 * 10 * 100 * 1000 operations in 10 us are 200 GOPS, 100,000 bytes in 10 us are 10 GB/s.
    assert limits.fractions(10, 100, 1000, 10.0) == pytest.approx({"int8": 0.5, "read": 0.5})
    assert limits.fractions(1, 100, 1000, 1.0)["read"] == 1.0
    assert roofline.Limits(None, None).fractions(1, 1, 1, 1.0) == {}


# ---- timing ----


def test_every_candidate_is_sampled_in_every_round_from_a_rotating_start() -> None:
    order: list[str] = []

    def record(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = timing.interleave({name: partial(record, name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert samples["a"] == [1.0, 6.0, 8.0]


def test_compare_restores_threads_and_runs_without_autograd() -> None:
    before = torch.get_num_threads()
    modes = set()

    def call() -> None:
        modes.add((torch.is_inference_mode_enabled(), torch.get_num_threads()))

    timings = timing.compare({"call": call}, threads=1, rounds=2, seconds=0.001)
    assert modes == {(True, 1)}
    assert torch.get_num_threads() == before
    assert timings["call"].median_us > 0


@pytest.mark.parametrize(("limit", "calls_a_sample"), [("LONG_SECONDS", 1), ("SLOW_SECONDS", 0)])
def test_slow_calls_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, limit: str, calls_a_sample: int
) -> None:
    monkeypatch.setattr(timing, limit, 0.001)
    calls = []

    def call() -> None:
        calls.append(time.sleep(0.002))

    sample = timing.sampler(call, threads=1, seconds=0.1)
    before = len(calls)
    assert sample() >= 2000
    assert len(calls) - before == calls_a_sample


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the state of threads is read from /proc")
def test_timing_waits_for_running_threads() -> None:
    # Runs for about a second without the GIL.
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"", b"", 3_000_000))
    thread.start()
    end = time.monotonic() + 10
    while not timing._other_threads_run():
        assert time.monotonic() < end
    start = time.monotonic()
    timing.wait_for_idle_threads(0.1)
    assert time.monotonic() - start >= 0.1, "it gave up at its limit, not before"
    thread.join()
    start = time.monotonic()
    timing.wait_for_idle_threads(10.0)
    assert time.monotonic() - start < 10, "nothing is left to wait for"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a setting to keep freed memory")
def test_freed_memory_is_kept() -> None:
    """Reused buffers cost no fresh pages, under settings that would return each to the system."""
    program = """
import resource
import sys
import torch
from dynquant.measurement.timing import keep_freed_memory

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        buffers = [torch.ones(8 << 18) for _ in range(5)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert sys.argv[1] != "kept" or keep_freed_memory()
fresh_pages()
print(fresh_pages())
"""

    def pages(how: str) -> int:
        command = [sys.executable, "-c", program, how]
        returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=returning).stdout)

    one_buffer = (8 << 20) // resource.getpagesize()
    assert pages("kept") < one_buffer < pages("as it is")


def test_timing_quantiles() -> None:
    samples = timing.Timing(tuple(float(value) for value in (5, 1, 4, 2, 3)))
    assert samples.median_us == 3
    assert (samples.quantile_us(0.0), samples.quantile_us(0.9), samples.quantile_us(1.0)) == (1, 5, 5)


# ---- candidates ----


def _prepare(name: str) -> float:
    linear_layer, x = linear.layer_and_input(4, 16, 8)
    return baselines.prepare(name, linear_layer, x, linear_layer(x).double(), 1)[1]


@pytest.mark.parametrize("name", [*baselines.OURS, "fp32", "bf16", "torch.ao x86"])
def test_a_candidate_is_close_to_float(name: str) -> None:
    assert _prepare(name) < 0.05


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.BASELINES, "fp32", lambda layer, x, threads: lambda: torch.zeros(4, 8))
    with pytest.raises(baselines.Unavailable, match="wrong result: relative error 1"):
        _prepare("fp32")
    monkeypatch.setitem(
        baselines.BASELINES, "fp32", lambda layer, x, threads: lambda: torch.full((4, 8), math.nan)
    )
    with pytest.raises(baselines.Unavailable, match="wrong result: relative error nan"):
        _prepare("fp32")


def test_a_candidate_that_fails_or_is_missing_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for name in ("onnxruntime", "torchao"):
        with pytest.raises(baselines.Unavailable, match="not installed"):
            _prepare(name)
    monkeypatch.setitem(
        baselines.BASELINES, "fp32", lambda layer, x, threads: lambda: torch.zeros(1) @ layer.weight
    )
    with pytest.raises(baselines.Unavailable, match="fails: RuntimeError: "):
        _prepare("fp32")


def test_int8_bytes_of_a_layer_are_all_found() -> None:
    layer = dynquant.QLinear.from_float(torch.nn.Linear(128, 256))
    before = sum(t.untyped_storage().nbytes() for t in memory.tensors_of(layer) if t.dtype == torch.int8)
    assert before >= 128 * 256
    layer.__dict__["hidden"] = {"copy": [torch.zeros(10, dtype=torch.int8)]}
    after = sum(t.untyped_storage().nbytes() for t in memory.tensors_of(layer) if t.dtype == torch.int8)
    assert after == before + 10
    assert memory.bytes_a_weight(128, 256) <= 1.1


def test_kernels_are_checked_and_reported() -> None:
    results = kernels.run([1], isa=None, rounds=1, seconds=0.0001, log=lambda line: None, largest=1 << 12)
    assert {entry["op"] for entry in results} == {
        f"{op} {scheme}" for op in ("min_max", "quantize") for scheme in ("per_token", "per_tensor")
    }
    assert all(entry["us"] > 0 and entry["rate"] >= 0 for entry in results)


def test_option_costs_are_checked_and_reported() -> None:
    (row,) = option_cost.run([(2, 8, 16)], rounds=1, seconds=0.0001, log=lambda line: None)
    assert (row["M"], row["K"], row["N"], row["threads"]) == (2, 8, 16, 1)
    assert row["plain_us"] > 0
    assert set(row["epilogues"]) == {"relu", "gelu", "gelu_tanh", "silu"}


def test_spinning_processes_spin_and_end() -> None:
    with contention.spinning_processes(1) as processes:
        assert processes[0].poll() is None
        pid = processes[0].pid
    assert processes[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- whole runs ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": ["1x2"]}, "expected a row as MxKxN, such as 128x768x3072, got '1x2'"),
        ({"rows": ["0x2x3"]}, "expected a row as MxKxN"),
        ({"threads": ["two"]}, "expected threads to be whole numbers from 1 up, got 'two'"),
        ({"baselines": ["numpy"]}, "expected baselines from fp32, bf16, .*, got 'numpy'"),
        ({"sections": ["all"]}, "expected sections from linear, avx2, .*, got 'all'"),
        ({"isa": "neon"}, "expected isa to be one that this machine can run .*, got 'neon'"),
    ],
)
def test_options_refuse_in_a_sentence(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        suite.Options.parse(out=tmp_path, **options)


def test_former_section_names_are_accepted(tmp_path: Path) -> None:
    options = suite.Options.parse(out=tmp_path, sections=["busy", "additions"])
    assert options.sections == ("option_cost", "contention")


def test_a_quick_run_leaves_out_the_heaviest_rows(tmp_path: Path) -> None:
    quick = suite.Options.parse(out=tmp_path, quick=True)
    assert (1, 4096, 4096) in quick.linear_rows
    assert (1024, 4096, 4096) not in quick.linear_rows
    assert suite.Options.parse(out=tmp_path).linear_rows == linear.ROWS
    asked_for = suite.Options.parse(out=tmp_path, quick=True, rows=["1024x4096x4096"])
    assert asked_for.linear_rows == ((1024, 4096, 4096),)


def test_a_tiny_run_writes_json_markdown_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = suite.Options.parse(
        out=tmp_path,
        rows=["1x3x3", "32x64x32"],
        threads=["1", "2"],
        baselines=["fp32", "torch.ao x86"],
        sections=["linear", "avx2"],
        quick=True,
    )
    threads, isa = torch.get_num_threads(), dynquant.isa()
    results = suite.run(options)
    assert (torch.get_num_threads(), dynquant.isa()) == (threads, isa)

    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert {path.stem for path in files.values()} == {machine.results_stem(results["machine"]) + "-quick"}
    assert json.loads(files[".json"].read_text()) == json.loads(json.dumps(results))
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    text = files[".md"].read_text()
    assert results["machine"]["cpu"] in text
    assert "| 32, 64, 32 |" in text
    assert "quick run" in text
    assert len(results["linear"]) == 4
    for row in results["linear"]:
        assert set(linear.times(row)) == {*baselines.OURS, "fp32", "torch.ao x86"}
    assert "against the best int8 baseline" in capsys.readouterr().out


# ---- the targets ----


def _row(
    m: int, k: int, n: int, threads: int, us: dict[str, float], int8: float, read: float
) -> dict[str, Any]:
    return {
        "M": m,
        "K": k,
        "N": n,
        "threads": threads,
        "candidates": {name: {"us": value, "error": 0.01} for name, value in us.items()},
        "limits": {"int8_gops": 1.0, "read_gbs": 1.0},
        "fractions": {name: {"int8": int8, "read": read} for name in us if name in baselines.OURS},
    }


def _results(isas: list[str]) -> dict[str, Any]:
    ours = {"dynquant per_token": 10.0, "dynquant per_tensor": 8.0}
    times = {"fp32": 9.0, "torch.ao x86": 20.0, "torch.ao onednn": 15.0, "onnxruntime": 12.5}
    return {
        "machine": {"available_isas": isas},
        "linear": [
            _row(1, 3, 3, 1, ours | times, 0.0, 0.0),
            _row(16, 4096, 4096, 1, ours | times, 0.91, 0.1),
            _row(1024, 4096, 4096, 1, ours | times, 0.92, 0.1),
            _row(16, 4096, 4096, 2, ours | times | {"onnxruntime": 9.9}, 0.84, 0.1),
        ],
        "avx2": [_row(32, 768, 3072, 1, ours, 0.75, 0.1)],
        "memory": {"layers": [{"bytes_a_weight": 1.0}, {"bytes_a_weight": 1.2}]},
        "contention": {
            "rows": [
                {
                    "M": 1,
                    "K": 3,
                    "N": 3,
                    "quiet": {"dynquant per_token": {"us": 5.0, "p90_us": 6.0, "cores": 1.0}},
                    "contended": {"dynquant per_token": {"us": 6.0, "p90_us": 7.0, "cores": 1.0}},
                    "one_thread_us": {"dynquant per_token": 5.0},
                }
            ]
        },
    }


def test_targets_are_judged_by_the_slower_scheme() -> None:
    found = {target.name: target for target in targets.evaluate(_results(["scalar", "avx2", "avx512vnni"]))}

    def outcome(words: str) -> tuple[str, str]:
        target = next(target for name, target in found.items() if words in name)
        return target.measured, target.verdict

    assert outcome("M >= 16, 1 thread") == ("lowest 0.91 (16x4096x4096 per_tensor)", "missed")
    assert outcome("the same at 2 threads")[1] == "missed"
    assert outcome("every row") == ("3 of 4; behind: 16x4096x4096 at 2 (0.99)", "missed")
    assert outcome("best int8 baseline of each row") == ("1.25 over 3 rows", "met")
    assert outcome("best torch.ao engine") == ("1.50 over 3 rows", "met")
    assert outcome("the 3x3 layer") == ("1.11", "met")
    assert outcome("AVX2") == ("lowest 0.75 (32x768x3072 per_tensor)", "met")
    assert outcome("bytes per weight") == ("1.200", "missed")
    assert outcome("calls under 50") == ("1.20 (1x3x3 per_token), 1.00 cores", "met")
    assert outcome("MiniLM 8x128") == ("-", "not measured in this run")


def test_targets_stated_for_vnni_are_not_judged_without_it() -> None:
    found = targets.evaluate(_results(["scalar", "avx2"]))
    verdicts = {target.name: target.verdict for target in found}
    means = [verdict for name, verdict in verdicts.items() if "geometric mean" in name]
    assert means == ["not measurable on this machine (no AVX512-VNNI; met by its own limits)"] * 2
    assert verdicts["the 3x3 layer, time against nn.Linear"] == "met"


def test_geometric_mean() -> None:
    assert targets.geometric_mean([1.0, 4.0, 0.25, 16.0]) == pytest.approx(2.0)


def test_report_of_every_section(tmp_path: Path) -> None:
    op = {
        "op": "min_max",
        "shape": [1, 2],
        "threads": 1,
        "us": 1.0,
        "rate": 2.0,
        "unit": "GB/s",
        "limit": None,
    }
    option_cost_row = {
        "M": 16,
        "K": 8,
        "N": 768,
        "threads": 1,
        "plain_us": 50.0,
        "rotation_us": 2.0,
        "epilogues": {"gelu": {"us": 3.0, "torch_us": 6.0}},
    }
    results = _results(["avx2"]) | {
        "machine": machine.describe() | {"available_isas": ["avx2"]},
        "command": "python -m dynquant bench",
        "peaks": {"1": {"int8 avx2 GOPS": 200.0}},
        "option_cost": [option_cost_row],
        "kernels": [op],
        "memory": {"layers": [{"K": 1, "N": 2, "bytes_a_weight": 1.0}], "process_growth_4096x4096": 1.01},
    }
    results["contention"] |= {"spinning": 2, "threads": 2}
    text = report.markdown(results, targets.evaluate(results))
    assert "1.010 bytes per weight" in text
    assert "| 16, 8, 768 | 50.0 | 2.0 (4 %) | 3.0 (6.0) |" in text
    assert "highest 0.040 (16x8x768) | met" in text
    assert "highest 0.50 (16x8x768) | not measurable" in text
    assert "| 1, 3, 3 | 5.0 → 6.0 (7.0) |" in text
    plot.plot(results, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
