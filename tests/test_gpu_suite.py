"""The GPU suite without a GPU: its stages, its verdicts, and every stage's code over the CPU's kernels."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_host import build as build_emulator
from same_bits import assert_same_bits

from benchmarks import gpu_suite
from benchmarks.gpu import (
    bits,
    build,
    ceilings,
    clock,
    contenders,
    correctness,
    cublaslt,
    environment,
    figures,
    kernels,
    plot,
    report,
    sanitized,
    sanitizer,
    worker,
)
from benchmarks.gpu.probe import Forced, Probe, padded
from benchmarks.gpu.stages import Outcome, Recorder, Stage, run
from build_backend import nvcc
from dynquant import reference

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """probe.cu and the kernels' own sources over the emulator: a 9.0 with 4 multiprocessors."""
    folder = tmp_path_factory.mktemp("probe_on_host")
    return build_emulator(folder)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of calls too small to share: on a busy machine each would wait for the other thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- stages ----


def script(text: str) -> tuple[str, ...]:
    """A stage that runs this; ``results`` is the path after --results."""
    head = "import json, os, sys, time, pathlib; results = pathlib.Path(sys.argv[2]);"
    return (sys.executable, "-c", head + text)


def run_stages(stages: list[Stage], folder: Path, budget_s: float = 60.0) -> dict[str, Outcome]:
    flushed: list[list[str]] = []
    outcomes = run(
        stages,
        budget_s=budget_s,
        folder=folder,
        environment=dict(os.environ),
        cwd=folder,
        flush=lambda so_far: flushed.append(list(so_far)),
        tell=lambda line: None,
    )
    names = [stage.name for stage in stages]
    assert flushed == [names[: i + 1] for i in range(len(names))], "after each stage"
    return outcomes


def test_a_stage_that_crashes_leaves_the_others_alone(tmp_path: Path) -> None:
    write = "results.write_text(json.dumps({'x': [1]}));"
    outcomes = run_stages(
        [
            Stage("good", script(write), 30),
            Stage("broken", script(write + "print('the reason'); sys.exit(3)"), 30),
            Stage("killed", script("os.kill(os.getpid(), 9)"), 30),
            Stage("needs broken", script(write), 30, needs=("broken",)),
            Stage("silent", script(""), 30, needs=("good",)),
        ],
        tmp_path,
    )
    statuses = [outcome["status"] for outcome in outcomes.values()]
    assert statuses == ["ok", "failed", "failed", "left out", "ok"]
    assert outcomes["good"]["results"] == outcomes["broken"]["results"] == {"x": [1]}
    assert outcomes["broken"]["reason"] == "it ended with exit code 3; its output ends: the reason"
    assert outcomes["killed"]["reason"] == "it ended with signal 9; its output ends: (nothing)"
    assert "needs the stage 'broken'" in outcomes["needs broken"]["reason"]
    assert outcomes["silent"]["results"] == {}


def test_a_stage_at_its_limit_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    """Also one that does not listen to SIGTERM; what it had written by then counts."""
    child = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "results.write_text(json.dumps({'child': child.pid})); time.sleep(600)"
    )
    start = time.monotonic()
    outcome = run_stages([Stage("endless", script(child), 1.5)], tmp_path)["endless"]
    assert (outcome["status"], outcome["reason"]) == ("timed out", "stopped at its limit of 2 s")
    assert time.monotonic() - start < 30
    state = Path(f"/proc/{outcome['results']['child']}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_budget_is_for_all_stages(tmp_path: Path) -> None:
    endless = script("time.sleep(600)")
    outcomes = run_stages([Stage(name, endless, 400) for name in "abc"], tmp_path, budget_s=3.0)
    assert [outcomes[name]["status"] for name in "abc"] == ["timed out", "left out", "left out"]
    assert outcomes["c"]["reason"] == "the 3 s for all stages are used up"


def test_the_suite_ends_within_ten_minutes() -> None:
    stages = gpu_suite.stages_of(gpu_suite.NAMES)
    assert [stage.name for stage in stages] == list(gpu_suite.NAMES)
    assert sum(stage.limit_s for stage in stages) <= gpu_suite.BUDGET_S < 600 - 3
    for stage in stages:
        words = stage.command[stage.command.index("benchmarks.gpu.worker") + 1 :]
        assert words[0] in worker.STAGES
        if "--seconds" in words:
            assert float(words[words.index("--seconds") + 1]) < stage.limit_s


def test_recorder_writes_whole_files(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "stage.json")
    for i in range(3):
        record.add("rows", {"i": i})
        record.set("last", i)
        assert json.loads((tmp_path / "stage.json").read_text()) == {
            "rows": [{"i": j} for j in range(i + 1)],
            "last": i,
        }


# ---- what is missing ----


def test_without_a_device_it_stops_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == gpu_suite.NOTHING_TO_RUN_ON
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_suite: no CUDA device: torch ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.json"))


def test_each_missing_thing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: set[str] = set()
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install a CUDA build" in str(environment.missing())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert str(environment.missing()).endswith("missing, or CUDA_VISIBLE_DEVICES='7' hides it.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: None)
    assert str(environment.missing()).startswith("no nvcc (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    toolkit = nvcc.Toolkit("nvcc", (13, 0), frozenset({90}), (), ())
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: toolkit)
    assert environment.missing() is None
    absent.add("setuptools")
    assert str(environment.missing()).startswith("no setuptools")
    absent.add("torch")
    assert str(environment.missing()).startswith("no torch")


def test_a_package_that_dynquant_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> None:
        raise ModuleNotFoundError("No module named 'left'", name="left")

    monkeypatch.setattr(environment.importlib, "import_module", lacks)
    assert str(environment.missing_package()).startswith("no left: importing dynquant needs it")


def test_torch_alone_is_enough() -> None:
    """With all hidden that a bare environment lacks: every room, and a conversion with its progress bar."""
    hidden = ("tqdm", "rich", "typer", "matplotlib", "numpy", "pandas", "transformers")
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in {hidden} else find(name, *rest)
from benchmarks.gpu import environment, stand_ins, worker
from benchmarks.gpu import build, ceilings, correctness, kernels, plot, report, sanitized, sanitizer
assert environment.missing_package() is None
import dynquant, torch
print(dynquant.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(3, 3)))[0])
import rich.console, typer
try:
    rich.console.Console()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "QLinear(in_features=3" in done.stdout
    assert "rich is not installed; rich.console.Console needs it" in done.stdout


def test_architecture_of_a_card() -> None:
    known = frozenset((75, 80, 86, 89, 90, 100, 120))
    assert environment.architecture((9, 0), known) == "9.0a"
    assert environment.architecture((8, 6), known) == "8.6"
    assert environment.architecture((12, 1), known) == "12.0+PTX", "newer than this nvcc"
    for capability in ((9, 0), (8, 6), (12, 1)):
        assert nvcc.architectures(environment.architecture(capability, known), known)
    with pytest.raises(RuntimeError, match=r"capability 7\.0: dynquant's kernels need 7\.5 or newer"):
        environment.architecture((7, 0), known)


def test_tools_and_card_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path / "compute-sanitizer", "")
    program(tmp_path / "nvidia-smi", "echo '580.1, 1200, 1980, 2619, 700.00, [N/A], 33'")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.find_tool("compute-sanitizer") == str(tmp_path / "compute-sanitizer")
    assert environment.find_tool("no-such-tool-of-cuda") is None
    state = environment.card_state()
    assert (state["driver"], state["sm_clock_max_mhz"]) == ("580.1", "1980")
    assert "power_w" not in state
    header = environment.describe()
    assert header["torch"] == torch.__version__
    assert header["driver"] == "580.1"
    program(tmp_path / "nvidia-smi", "exit 9")
    assert environment.card_state() == {}
    assert environment.file_stem("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# ---- correctness ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_difference_judges_as_assert_same_bits(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, -3.0, 5.0]).to(dtype)
    others = [values.clone(), values[:3], values.to(torch.int32), values.flip(0)]
    if dtype.is_floating_point:
        for change in (-0.0, float("nan"), float("inf")):
            others.append(values.clone().index_fill(0, torch.tensor([0]), change))
        others.append(others[-2].clone())
    for actual in others:
        for expected in others:
            found = bits.difference(actual, expected)
            if found is None:
                assert_same_bits(actual, expected)
            else:
                with pytest.raises(AssertionError):
                    assert_same_bits(actual, expected)


def test_every_group_over_the_cpu(library: Path, tmp_path: Path) -> None:
    record = Recorder(tmp_path / "correctness.json")
    bad = correctness.run(record, correctness.Setting(CPU, 5, 0.5, library))
    groups = {group["group"]: group for group in record.results["groups"]}
    assert bad == 0, [group for group in groups.values() if group["faults"] or group["error"]]
    assert list(groups) == list(correctness.GROUPS)
    assert all(group["cases"] > 0 for group in groups.values()), groups
    assert record.results["seed"] == 5


def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = reference.choose_qparams

    def wrong(lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = right(lo, hi)
        return scale, zero_point + 1

    def broken(judge: correctness.Judge, setting: correctness.Setting) -> None:
        raise RuntimeError("as planned")

    monkeypatch.setattr(reference, "choose_qparams", wrong)
    groups = {"single steps": correctness.single_steps, "broken": broken}
    monkeypatch.setattr(correctness, "GROUPS", groups)
    record = Recorder(tmp_path / "correctness.json")
    bad = correctness.run(record, correctness.Setting(CPU, 5, 0.0, None))
    steps, other = record.results["groups"]
    assert bad == 2
    assert steps["faults"] > 0
    assert "elements differ, first at [0]" in steps["first_faults"][0]
    assert "as planned" in other["error"]


def test_a_missing_library_of_single_kernels_is_said(tmp_path: Path) -> None:
    for missing in (None, tmp_path / "none.so"):
        with pytest.raises(RuntimeError, match="library of single kernels is not built"):
            correctness.forced_kernels(correctness.Judge(""), correctness.Setting(CPU, 0, 0, missing))


def test_writing_outside_of_an_output_shows() -> None:
    inside, is_whole = correctness.guarded((3, 5), torch.bfloat16, CPU)
    inside.zero_()
    assert is_whole()
    inside.as_strided((1,), (1,), inside.storage_offset() - 1).zero_()
    assert not is_whole()


def test_what_the_sanitizer_runs(library: Path) -> None:
    assert sanitized.run(CPU, library) == []


# ---- kernels one by one ----


def test_probe_forces_and_plans(library: Path) -> None:
    probe = Probe(library)
    assert (probe.capability, probe.code) == (90, 90)
    assert {one.kernel for one in probe.runnable()} == {"small_dp4a", "small_mma", "mma", "wgmma"}
    q = torch.randint(-128, 128, (5, 40), dtype=torch.int8)
    weight = torch.randint(-128, 128, (20, 40), dtype=torch.int8)
    out = torch.empty(5, 20, dtype=torch.int32)
    chosen = probe.product(padded(q), weight, out)
    assert chosen.plan == ("small_mma", 8, 16, 1)
    expected = (q.double() @ weight.double().t()).to(torch.int32)
    assert torch.equal(chosen.run(), expected)
    forced = probe.product(padded(q), weight, torch.empty_like(out), None, Forced("mma", (64, 64)))
    assert forced.plan == ("mma", 64, 64, 1)
    assert torch.equal(forced.run(), expected)
    with pytest.raises(ValueError, match="expected int32 accumulators or a dequantization"):
        probe.product(padded(q), weight, out.float())
    with pytest.raises(RuntimeError, match="probe_plan: CUDA error 1"):
        Failing(library).product(q, weight, out)


class Failing(Probe):
    """Every call ends with CUDA's error 1."""

    def call(self, name: str, *arguments: object) -> None:
        if name != "probe_device":
            raise RuntimeError(f"{name}: CUDA error 1")
        super().call(name, *arguments)


@pytest.mark.parametrize("rotation_block", [0, 8])
def test_probe_quantizes(library: Path, rotation_block: int) -> None:
    x = torch.randn(7, 40).to(torch.bfloat16)
    q = torch.full((7, 48), 77, dtype=torch.int8)
    scale, zero_point = torch.empty(7), torch.empty(7, dtype=torch.int32)
    Probe(library).quantize(x, q, scale, zero_point, rotation_block)
    rows = reference.rotate(x, rotation_block) if rotation_block else x
    qparams = reference.choose_qparams(*reference.min_max(rows, True))
    assert_same_bits(scale, qparams[0])
    assert_same_bits(zero_point, qparams[1])
    assert_same_bits(q[:, :40], reference.quantize(rows, *qparams))
    assert not q[:, 40:].any()


# ---- measuring ----


def test_ceilings_over_the_cpu(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "ceilings.json")
    ceilings.run(record, CPU, small=True)
    (copied,) = record.results["copy"]
    assert copied["gbs"] == pytest.approx(2 * copied["bytes"] / copied["us"] / 1e3)
    products = {entry["name"]: entry for entry in record.results["products"]}
    assert list(products) == list(contenders.RIVALS)
    assert products["torch._int_mm"]["tops"] > 0
    assert "libcublasLt is not loaded" in products["cuBLASLt int8"]["left_out"]
    assert all("us" in entry or entry["left_out"] for entry in products.values())


def test_kernels_over_the_cpu(library: Path, tmp_path: Path) -> None:
    record = Recorder(tmp_path / "kernels.json")
    kernels.run(record, CPU, Probe(library), small=True)
    results = record.results
    assert {entry["plan"] for entry in results["small_product"]} == {"small_dp4a 1x16", "small_mma 8x16"}
    assert all(entry["of_limit"] > 0 for entry in results["small_product"])
    assert {entry["name"] for entry in results["rows"]} == {
        "quantize per_token",
        "quantize per_token, rotation 64",
        "min_max per_tensor",
        "min_max per_token",
    }
    assert all(entry["of_copy"] > 0 for entry in results["rows"])
    (product,) = results["large_product"]
    assert product["contenders"]["dynquant"]["tops"] > 0
    assert "libcublasLt" in product["contenders"]["cuBLASLt int8"]["left_out"]
    assert [figures.speed(entry) is not None for entry in results["layer"]] == [True] * 3
    assert [entry["count"] for entry in results["launches"]] == [0] * 6, "the profiler sees no card here"


def test_a_wrong_kernel_is_not_timed(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.probe.Product.run", lambda self: self.out.zero_())
    with pytest.raises(RuntimeError, match="gives a wrong product"):
        contenders.dynquant_gemm(Probe(library), contenders.Shape(4, 8, 16), CPU)


def test_clock_takes_turns_and_says_what_cannot_run() -> None:
    heard = []

    def refuse() -> None:
        raise NotImplementedError("not on this device\nat all")

    calls = {"a": [lambda: heard.append("a")], "b": [lambda: heard.append("b")]}
    result = clock.measure(calls, CPU, rounds=4, seconds=0.0)
    assert "".join(heard) == "abba" + "ab", "3 rounds although the time is over"
    assert result["a"]["samples"] == 3
    assert contenders.prepare(["fp8 torch._scaled_mm"], contenders.Shape(2, 2, 2), CPU)
    assert clock.measure({}, CPU) == {}
    with pytest.raises(NotImplementedError):
        clock.measure({"c": [refuse]}, CPU)


def test_rivals_that_are_absent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(shape: contenders.Shape, device: torch.device) -> list[clock.Call]:
        raise AttributeError("module 'torch' has no attribute '_int_mm'")

    monkeypatch.setitem(contenders.RIVALS, "torch._int_mm", absent)
    calls, left_out = contenders.prepare(["torch._int_mm", "bf16 matmul"], contenders.Shape(2, 4, 8), CPU)
    assert list(calls) == ["bf16 matmul"]
    assert left_out == {"torch._int_mm": "module 'torch' has no attribute '_int_mm'"}


class FakeCublasLt:
    """The calls of cublasLt.h that the suite makes; the product is computed on the CPU."""

    def __init__(self, algorithms: int = 1) -> None:
        self.algorithms = algorithms
        self.layouts: list[tuple[int, int, int, int]] = []

    def cublasLtCreate(self, handle: Any) -> int:
        return 0

    def cublasLtMatmulDescCreate(self, description: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (72, 10), "CUBLAS_COMPUTE_32I, CUDA_R_32I"
        return 0

    def cublasLtMatmulDescSetAttribute(self, description: Any, name: Any, value: Any, size: Any) -> int:
        assert (name.value, value._obj.value, size.value) == (3, 1, 4), "TRANSA = CUBLAS_OP_T"
        return 0

    def cublasLtMatrixLayoutCreate(self, layout: Any, dtype: Any, rows: Any, columns: Any, ld: Any) -> int:
        self.layouts.append((dtype.value, rows.value, columns.value, ld.value))
        return 0

    def cublasLtMatmulPreferenceCreate(self, preference: Any) -> int:
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, preference: Any, name: Any, value: Any, size: Any) -> int:
        assert (name.value, size.value) == (1, 8)
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference: Any) -> int:
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        *_, wanted, found, count = arguments
        assert len(arguments) == 10
        assert wanted.value == 1
        assert ctypes.sizeof(found._obj) == 96
        count._obj.value = self.algorithms
        return 0

    def cublasLtMatmul(self, *arguments: Any) -> int:
        assert len(arguments) == 16
        weight, q, out = arguments[3].value, arguments[5].value, arguments[10].value
        (_, k, n, _), (_, _, m, _), _ = self.layouts

        def matrix(address: int, rows: int, columns: int, dtype: torch.dtype, size: int) -> torch.Tensor:
            raw = (ctypes.c_char * (rows * columns * size)).from_address(address)
            return torch.frombuffer(raw, dtype=dtype).view(rows, columns)

        product = matrix(q, m, k, torch.int8, 1).double() @ matrix(weight, n, k, torch.int8, 1).double().t()
        matrix(out, m, n, torch.int32, 4).copy_(product)
        return 0


def test_cublaslt_is_called_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCublasLt()
    monkeypatch.setattr(cublaslt, "find_library", lambda: fake)
    shape = contenders.Shape(5, 6, 8)
    calls = contenders.cublaslt_int8(shape, CPU)
    assert fake.layouts == [(3, 8, 6, 8), (3, 8, 5, 8), (10, 6, 5, 6)]
    assert isinstance(calls[0](), torch.Tensor)
    monkeypatch.setattr(cublaslt, "find_library", lambda: FakeCublasLt(algorithms=0))
    with pytest.raises(RuntimeError, match="knows no int8 algorithm"):
        contenders.cublaslt_int8(shape, CPU)
    fake.cublasLtCreate = lambda handle: 1  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cublasLtCreate: cuBLAS status 1"):
        cublaslt.Int8Product(fake, 5, 6, 8, CPU)


# ---- compute-sanitizer ----


@pytest.mark.parametrize(
    ("text", "reports"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 3),
        ("Segmentation fault", None),
    ],
)
def test_reports_are_counted(text: str, reports: int | None) -> None:
    assert sanitizer.count_reports(text) == reports


def test_every_tool_runs_and_one_that_hangs_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    program(
        tool,
        'case "$*" in\n'
        "*--version*) echo 'Version 2025.3.0.0 (build 1)';;\n"
        "*racecheck*) sleep 600 & sleep 600;;\n"
        "*initcheck*) echo 'ERROR SUMMARY: 2 errors'; exit 1;;\n"
        "*benchmarks.gpu.sanitized*) echo 'ERROR SUMMARY: 0 errors';;\n"
        "esac",
    )
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: str(tool))
    record = Recorder(tmp_path / "sanitizer.json")
    sanitizer.run(record, 4.0)
    tools = {entry["name"]: entry for entry in record.results["tools"]}
    assert record.results["tool"] == "Version 2025.3.0.0"
    assert [tools[name]["reports"] for name in sanitizer.TOOLS] == [0, 0, None, 2]
    assert tools["racecheck"]["status"].startswith("stopped at its limit")
    assert tools["initcheck"]["status"] == "exit code 1"
    assert "2 errors" in tools["initcheck"]["text"]
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: None)
    record = Recorder(tmp_path / "none.json")
    sanitizer.run(record, 4.0)
    assert record.results == {"tool": None}


# ---- build ----


def test_build_is_for_this_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit = nvcc.Toolkit("/cuda/bin/nvcc", (13, 0), frozenset({80, 90}), ("/cuda/include",), ())
    commands: list[tuple[list[str], dict[str, str]]] = []
    objects: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: toolkit)
    monkeypatch.setattr(build, "_run", lambda command, given: commands.append((command, given)))
    monkeypatch.setattr(build, "_objects", lambda: tmp_path)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "gpu" / "library.so")
    monkeypatch.setattr(nvcc, "compile_objects", lambda *args: objects.append(args) or ["a.o"])
    found = {"status": "loaded", "loaded": True, "cuda": {"built": True}}
    monkeypatch.setattr(build, "look", lambda given: found)
    record = Recorder(tmp_path / "build.json")
    build.run(record)
    (setup, environment_of_setup), (link, _) = commands
    assert setup[1:] == ["setup.py", "build_ext", "--inplace"]
    assert environment_of_setup["DYNQUANT_CUDA"] == "1"
    assert environment_of_setup["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert link[0] == "/cuda/bin/nvcc"
    assert {"-shared", "a.o", "-gencode=arch=compute_90a,code=sm_90a"} <= set(link)
    assert [str(one) for one in objects[0][3]] == ["9.0a"]
    found["loaded"] = False
    with pytest.raises(RuntimeError, match="was built but is not used"):
        build.run(record)


def test_a_build_step_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ended with exit code 1"):
        build._run([sys.executable, "-c", "raise SystemExit(1)"], dict(os.environ))
    found = build.look(dict(os.environ))
    assert set(found) == {"status", "loaded", "cuda"}


# ---- results ----


def example() -> dict[str, Any]:
    """A whole result, every figure met."""

    def timing(us: float) -> dict[str, float]:
        return {"us": us, "p10_us": us, "p90_us": us, "samples": 9}

    def product(size: int, us: float) -> dict[str, Any]:
        shape = contenders.Shape(size, size, size)
        rivals = {
            "cuBLASLt int8": us,
            "torch._int_mm": us,
            "torch._int_mm + dequantization": 2 * us,
            "bf16 matmul": 2 * us,
        }
        ours = {"dynquant": timing(us) | {"tops": shape.tops(us)}}
        others = {name: timing(value) | {"tops": shape.tops(value)} for name, value in rivals.items()}
        return {"M": size, "N": size, "K": size, "plan": "wgmma 128x256", "contenders": ours | others}

    def layer(m: int) -> dict[str, Any]:
        times = {"bf16 nn.Linear": timing(20.0), "per_token": timing(10.0), "per_tensor": timing(11.0)}
        return {"M": m, "N": 4096, "K": 4096, "contenders": times}

    stage = {"status": "ok", "reason": "", "seconds": 1.0, "limit_s": 9.0, "results": {}}
    group = {"group": "linear", "cases": 7, "faults": 0, "first_faults": [], "error": ""}
    tool = {"reports": 0, "status": "ok", "seconds": 1.0, "text": ""}
    row = {"M": 8192, "K": 4096, "dtype": "bfloat16", "us": 50.0, "copy_us": 48.0, "gbs": 3000.0}
    small = {"N": 4096, "K": 4096, "plan": "small_dp4a 1x16", "us": 6.0, "weight_read_us": 5.0}
    copied = {"bytes": 64 << 20, "gbs": 2800.0} | timing(48.0)
    launch = {"M": 1, "limit": 3, "names": ["quantize_kernel", "gemm_kernel"]}
    return {
        "header": {
            "device": "NVIDIA H100 80GB HBM3",
            "torch": "2.11.0+cu130",
            "cuda": "13.0",
            "nvcc": "13.0",
            "date": "2026-01-01",
            "sm_clock_mhz": "1980",
        },
        "command": "python benchmarks/gpu_suite.py --out out",
        "seconds": 400.0,
        "stages": {
            "build": dict(stage),
            "correctness": stage | {"results": {"seed": 1, "groups": [group]}},
            "sanitizer": stage
            | {"results": {"tool": "Version 1", "tools": [{"name": t} | tool for t in sanitizer.TOOLS]}},
            "ceilings": stage
            | {
                "results": {
                    "copy": [copied],
                    "products": [
                        {"name": "bf16 matmul", "M": 64, "N": 64, "K": 64, "tops": 1.0} | timing(1.0),
                        {"name": "fp8 torch._scaled_mm", "M": 64, "N": 64, "K": 64, "left_out": "no fp8"},
                    ],
                }
            },
            "kernels": stage
            | {
                "results": {
                    "large_product": [product(4096, 100.0), product(8192, 800.0)],
                    "rows": [
                        row | {"name": name, "of_copy": 1.04}
                        for name in ("quantize per_token", "min_max per_tensor")
                    ],
                    "small_product": [small | {"M": m, "of_limit": 1.2} for m in (1, 16)],
                    "layer": [layer(m) for m in (1, 16, 1024)],
                    "launches": [
                        launch | {"activations": name, "count": 2} for name in ("per_token", "per_tensor")
                    ],
                    "card_after": {"sm_clock_mhz": "1755"},
                }
            },
        },
    }


def verdicts(results: dict[str, Any]) -> dict[str, str]:
    """The worst verdict of each number."""
    found: dict[str, str] = {}
    for figure in figures.judge(results):
        if found.get(figure.number, "met") == "met":
            found[figure.number] = figure.verdict
    return found


NUMBERS = ("1a", "1b", "1c", "2a", "2b", "3a", "3b", "4", "5", "6", "7")


def test_every_figure_can_be_met() -> None:
    assert verdicts(example()) == dict.fromkeys(NUMBERS, "met")


def test_nothing_measured_is_no_verdict() -> None:
    nothing = example() | {"stages": {}}
    assert verdicts(nothing) == dict.fromkeys(NUMBERS, figures.NOT_MEASURED)
    assert "not measured" in report.markdown(nothing, figures.judge(nothing))


def _slower(results: dict[str, Any], number: str) -> None:
    """Spoil what this figure is judged by."""
    stages = results["stages"]
    of_kernels = stages["kernels"]["results"]
    if number in ("1a", "1b", "1c"):
        times = of_kernels["large_product"][1]["contenders"]
        name = {"1a": "cuBLASLt int8", "1b": "torch._int_mm + dequantization", "1c": "dynquant"}[number]
        times[name] |= {"tops": 1199.0} if number == "1c" else {"us": 700.0}
    elif number in ("2a", "2b"):
        of_kernels["rows"][int(number == "2b")]["of_copy"] = 1.16
    elif number == "3a":
        of_kernels["small_product"][1]["of_limit"] = 1.31
    elif number in ("3b", "4"):
        of_kernels["layer"][0 if number == "3b" else 2]["contenders"]["per_token"]["us"] = 15.0
    elif number == "5":
        of_kernels["launches"][0]["count"] = 3
    elif number == "6":
        stages["sanitizer"]["results"]["tools"][2]["reports"] = 1
    else:
        stages["correctness"]["results"]["groups"][0]["faults"] = 1


@pytest.mark.parametrize("number", NUMBERS)
def test_each_figure_can_be_missed(number: str) -> None:
    results = example()
    _slower(results, number)
    assert verdicts(results) == dict.fromkeys(NUMBERS, "met") | {number: "not met"}


def test_what_was_cut_short_is_not_called_clean() -> None:
    results = example()
    stages = results["stages"]
    stages["correctness"]["status"] = "timed out"
    stages["sanitizer"]["results"]["tools"][3] |= {"reports": None, "status": "stopped at its limit of 9 s"}
    assert {number: verdict for number, verdict in verdicts(results).items() if verdict != "met"} == {
        "6": figures.NOT_MEASURED,
        "7": figures.NOT_MEASURED,
    }
    stages["correctness"]["results"]["groups"][0]["error"] = "Traceback"
    assert verdicts(results)["7"] == "not met"
    stages["sanitizer"]["results"] = {"tool": None}
    words = [figure.measured for figure in figures.judge(results) if figure.number == "6"]
    assert words == ["the tool was not found"]


def test_report_names_device_targets_and_reasons() -> None:
    results = example()
    results["stages"]["build"] |= {"status": "failed", "reason": "a reason | of\ntwo lines"}
    text = report.markdown(results, figures.judge(results))
    for words in (
        "# NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, CUDA 13.0",
        "before: SM 1980 MHz",
        "after: SM 1755 MHz",
        "`python benchmarks/gpu_suite.py --out out`, 400 s",
        "| 1c | GEMM with epilogue, 8192³ | ≥ 1200 TOPS | 1374 TOPS | met |",
        "a reason / of two lines",
        "no fp8",
        "dynquant (wgmma 128x256), with epilogue",
        "| 16, 4096, 4096 | small_dp4a 1x16 | 6.0 | 5.0 | 1.20 x |",
        "| 1, 4096, 4096 | 20.0 | 10.0 | 11.0 | 2.00 x | 1.82 x |",
        "quantize_kernel, gemm_kernel",
    ):
        assert words in text, words
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(sections) == 10


def test_results_are_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = tmp_path / "results" / "nvidia-h100-80gb-hbm3"
    for results in (example() | {"stages": {}}, example()):
        gpu_suite.write(results, stem)
        written = json.loads(Path(f"{stem}.json").read_text())
        assert written["header"]["device"] == "NVIDIA H100 80GB HBM3"
        assert {figure["number"] for figure in written["figures"]} == set(NUMBERS)
        gpu_suite.draw(results, stem)
        assert Path(f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    told: list[str] = []

    def without_matplotlib(*_: object) -> None:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(plot, "plot", without_matplotlib)
    monkeypatch.setattr(gpu_suite, "tell", told.append)
    gpu_suite.draw(example(), stem)
    assert told == ["no picture: No module named 'matplotlib'"]


def test_the_whole_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage a small script: the results are there after it, the last stage fails, the code says so."""
    stages = example()["stages"]
    look = {"missing": None, "header": example()["header"]}

    def small(name: str, limit_s: float, needs: tuple[str, ...], *words: str) -> Stage:
        content = look if name == "look" else stages[name]["results"]
        (tmp_path / f"{name}.txt").write_text(json.dumps(content))
        text = f"results.write_text(pathlib.Path({str(tmp_path / f'{name}.txt')!r}).read_text());"
        return Stage(name, script(text + ("sys.exit(4)" if name == "kernels" else "")), limit_s, needs)

    monkeypatch.setattr(gpu_suite, "_stage", small)
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--budget", "60"]) == 1
    told = capsys.readouterr().out
    written = json.loads((out / "nvidia-h100-80gb-hbm3.json").read_text())
    assert [stage["status"] for stage in written["stages"].values()] == ["ok"] * 4 + ["failed"]
    assert written["command"] == f"python benchmarks/gpu_suite.py --out {out} --budget 60"
    assert "1c. GEMM with epilogue, 8192³: 1374 TOPS (target ≥ 1200 TOPS): met" in told
    assert (out / "nvidia-h100-80gb-hbm3.png").exists()
    assert gpu_suite.main(["--out", str(out), "--stages", "build", "ceilings"]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--budget", "0"], "expected --budget to be more than 0 seconds, got 0.0"),
        (["--out", "x", "--stages", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_wrong_words(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(words)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["look", "correctness", "ceilings", "kernels", "sanitizer"])
def test_worker_runs_each_stage(
    stage: str, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "GROUPS", {"K beyond int32": correctness.deep})
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: None)
    results = tmp_path / "results.json"
    words = [stage, "--results", str(results), "--device", "cpu", "--small", "--seconds", "0.1"]
    assert worker.main([*words, "--probe", str(library)]) == 0
    assert json.loads(results.read_text())
    if stage == "kernels":
        with pytest.raises(RuntimeError, match="needs --probe"):
            worker.main(words)


def test_worker_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run", lambda record: record.set("extension", {}))
    assert worker.main(["build", "--results", str(tmp_path / "build.json")]) == 0
    assert json.loads((tmp_path / "build.json").read_text()) == {"extension": {}}
