"""The GPU suite without a GPU: rehearsals of both parts over the emulator, and their handling of faults."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import build, clock, correctness, cublaslt, machine, memcheck, report, results
from benchmarks.gpu import suite as gpu_suite
from benchmarks.gpu.candidates import Comparison, Operands
from benchmarks.gpu.probe import Probe, Tile, padded
from benchmarks.gpu.processes import Runner, Stage
from benchmarks.gpu.setting import Setting
from benchmarks.shared.bits import difference
from build_backend import nvcc
from dynquant.config import Config
from tests.support.cuda_on_host import build as build_emulator
from tests.support.paths import CUDA_SOURCES, ROOT
from tests.support.same_bits import assert_same_bits

CPU = torch.device("cpu")
SUITE = Path("benchmarks", "gpu", "suite.py")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """probe.cu and the kernels' sources over the emulator: capability 9.0, 4 multiprocessors."""
    return build_emulator(tmp_path_factory.mktemp("probe_on_host"))


@pytest.fixture(scope="session")
def bare_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkout without .git and without a built extension."""
    folder = tmp_path_factory.mktemp("bare")
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in names.splitlines():
        if (ROOT / name).is_file() and name.split("/")[0] in ("benchmarks", "build_backend", "dynquant"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def rehearse(tree: Path, out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tree / SUITE), "--rehearse", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


# ---- rehearsals ----


def test_part_1_from_a_bare_copy(library: Path, bare_copy: Path, tmp_path: Path) -> None:
    done = rehearse(bare_copy, tmp_path, "--part", 1, "--probe", library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-rehearsal-part1.json", "logs.tar.gz"]
    written = json.loads((tmp_path / "cpu-rehearsal-part1.json").read_text())
    assert not any(map(results.is_bad, written["entries"]))
    assert {entry["kind"] for entry in written["entries"]} == {
        *("machine", "judged", "large", "few rows", "middle", "quantize", "eager", "launches", "layer")
    }
    judged = {entry["what"]: entry["cases"] for entry in written["entries"] if entry["kind"] == "judged"}
    assert {tile.name for tile in gpu_suite.TILES} | {"quantize", "forward", "ops, linears"} <= set(judged)
    assert all(judged.values())
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert len(archive.getnames()) == len(written["stages"])
    assert (
        done.stdout.index("## Stages") < done.stdout.index("| forward | ") < done.stdout.index("## Targets")
    )
    assert gpu_suite.main(["--report", str(tmp_path / "cpu-rehearsal-part1.json")]) == 0
    assert (tmp_path / "cpu-rehearsal.md").read_text().index("## Targets") < 1000
    assert (tmp_path / "cpu-rehearsal.png").read_bytes().startswith(b"\x89PNG")


def test_part_2_from_a_bare_copy(library: Path, bare_copy: Path, tmp_path: Path) -> None:
    variant = shutil.copy(library, tmp_path / "variant.so")
    done = rehearse(bare_copy, tmp_path / "out", "--part", 2, "--probe", library, variant)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "cpu-rehearsal-part2.json").read_text())
    names = [outcome["stage"] for outcome in written["stages"]]
    assert names[-3:-1] == ["fuzz", "first call in a capture"]
    assert names[-1].startswith("memcheck")
    assert "variant" in done.stdout


def test_without_a_device_it_stops_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / SUITE),
            "--part",
            "1",
            "--out",
            str(tmp_path),
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (gpu_suite.NOTHING_TO_RUN_ON, "")
    assert done.stderr.startswith("gpu suite: no CUDA device: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--part", "1"], "expected --part and --out, or --report"),
        (["--part", "3", "--out", "x"], "invalid choice: 3"),
        (
            ["--part", "1", "--out", "x", "--budget", "8"],
            "expected --budget to be more than 8 seconds, got 8.0",
        ),
        (["--part", "1", "--out", "x", "--probe", "absent.so"], "no such library: absent.so"),
    ],
)
def test_wrong_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(arguments)
    assert sentence in capsys.readouterr().err


# ---- processes ----


def script(name: str, text: str, limit_s: float = 30.0) -> Stage:
    """A stage that runs ``text``, in which ``add`` writes an entry."""
    head = (
        "import json, os, subprocess, sys, time; file = open(sys.argv[-1], 'a');"
        "add = lambda kind, **more: print(json.dumps({'kind': kind, **more}), file=file, flush=True);"
        "add('ready');"
    )
    return Stage(name, (sys.executable, "-c", head + text), limit_s)


def runner(folder: Path, budget_s: float = 60.0) -> Runner:
    return Runner(folder, "card", budget_s, {})


def test_a_stage_that_crashes_or_hangs_leaves_the_others_alone(tmp_path: Path) -> None:
    suite = runner(tmp_path)
    hang = "add('child', pid=subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    suite.run(
        [
            script("good", "add('x', error='')"),
            script("broken", "add('y', faults=0); print('the reason'); sys.exit(3)"),
            script("killed", "os.kill(os.getpid(), 9)"),
            script("hangs", f"{hang}; time.sleep(600)", 1.0),
        ],
        at_once=3,
    )
    suite.close()
    written = json.loads((tmp_path / "card.json").read_text())
    found = {outcome["stage"]: outcome for outcome in written["stages"]}
    assert {name: outcome["status"] for name, outcome in found.items()} == {
        "good": "ok",
        "broken": "failed",
        "killed": "failed",
        "hangs": "timed out",
    }
    assert found["broken"]["reason"] == "it ended with exit code 3; its output ends: the reason"
    assert found["killed"]["reason"].startswith("it ended with signal 9")
    assert not suite.is_good
    stages = {entry["kind"]: entry["stage"] for entry in written["entries"]}
    assert stages == {"x": "good", "y": "broken", "child": "hangs"}
    (child,) = [entry["pid"] for entry in written["entries"] if entry["kind"] == "child"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "logs.tar.gz"]


def test_results_are_on_disk_after_every_entry(tmp_path: Path) -> None:
    suite = runner(tmp_path)
    running = suite.start(script("slow", "add('first'); time.sleep(600)"))
    while not suite.results["entries"]:
        suite._pump()
    assert json.loads((tmp_path / "card.json").read_text())["entries"] == [{"kind": "first", "stage": "slow"}]
    suite.close()
    assert json.loads((tmp_path / "card.json").read_text())["stages"][0]["reason"] == "stopped with the suite"
    assert running.process.poll() is not None


def test_the_budget_is_for_all_stages(tmp_path: Path) -> None:
    suite, start = runner(tmp_path, budget_s=2.0), time.monotonic()
    suite.run([script(name, "time.sleep(600)") for name in "ab"])
    suite.close()
    assert [outcome["status"] for outcome in suite.results["stages"]] == ["timed out", "left out"]
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("faults", "is_good"), [(0, True), (1, False)])
def test_bad_entries_decide_the_exit_status(faults: int, is_good: bool, tmp_path: Path) -> None:
    suite = runner(tmp_path)
    suite.run([script("one", f"add('judged', faults={faults})")])
    suite.close()
    assert suite.is_good == is_good


# ---- judging ----


def setting_of(tmp_path: Path, library: Path | None = None) -> Setting:
    return Setting(results.Recorder(tmp_path / "x.jsonl"), CPU, (library,) if library else (), small=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_difference_judges_as_assert_same_bits(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, -3.0, 5.0]).to(dtype)
    others = [values, values.clone(), values[:3], values.to(torch.int32), values.flip(0)]
    if dtype.is_floating_point:
        for change in (-0.0, float("nan"), float("nan"), float("inf")):
            others.append(values.clone().index_fill(0, torch.tensor([0]), change))
    for actual in others:
        for expected in others:
            if difference(actual, expected) is None:
                assert_same_bits(actual, expected)
            else:
                with pytest.raises(AssertionError):
                    assert_same_bits(actual, expected)


def test_faults_are_recorded_with_their_place_and_the_run_goes_on(tmp_path: Path) -> None:
    setting = setting_of(tmp_path)

    def wrong(judge: correctness.Judge) -> None:
        judge.same(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]), "a product")
        raise ValueError("as planned")

    setting.judge("kernel", [2, 2], wrong)
    setting.judge("kernel", [1, 1], lambda judge: judge.true(True, "nothing"))
    first, second = results.new_entries(tmp_path / "x.jsonl", 0)[0]
    place = {"differ": 1, "of": 4, "at": [1, 1], "last_at": [1, 1], "actual": "4", "expected": "5"}
    assert first["first_faults"] == [{"what": "a product"} | place]
    assert (first["error"], second["faults"]) == ("ValueError: as planned", 0)
    assert [results.is_bad(entry) for entry in (first, second)] == [True, False]


def test_a_dead_card_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    setting = Setting(results.Recorder(tmp_path / "x.jsonl"), torch.device("cuda"))
    with pytest.raises(SystemExit, match="the card no longer answers in this process"):
        setting.judge("kernel", [1], lambda judge: None)
    assert "illegal memory access" in results.new_entries(tmp_path / "x.jsonl", 0)[0][0]["error"]


def test_an_incomplete_entry_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"kind": "a"}\n{"ki')
    found, offset = results.new_entries(file, 0)
    assert found == [{"kind": "a"}]
    file.write_text('{"kind": "a"}\n{"kind": "b"}\n')
    assert results.new_entries(file, offset)[0] == [{"kind": "b"}]


def test_writing_outside_of_an_output_shows() -> None:
    inside, is_whole = correctness.guarded((3, 5), torch.bfloat16, CPU, 1)
    inside.zero_()
    assert is_whole()
    inside.as_strided((1,), (1,), inside.storage_offset() - 1).zero_()
    assert not is_whole()


def test_probe_plans_and_forces(library: Path) -> None:
    probe = Probe(library)
    assert (probe.capability, probe.code) == (90, 90)
    assert {tile.kernel for tile in probe.tiles()} == {"small", "mma", "wgmma"}
    q = padded(torch.randint(-128, 128, (5, 40), dtype=torch.int8))
    layer = correctness.make_layer(20, 40, Config()).on(CPU)
    out = torch.empty(5, 20, dtype=torch.int32)
    expected = (q.double() @ layer.weight.double().t()).to(torch.int32)
    for tile, plan in ((None, "small 8x16"), (Tile("mma", 64, 64), "mma 64x64")):
        call = probe.product(q, layer, 40, out.zero_(), tile)
        assert call.plan == plan
        assert torch.equal(call(), expected)
    probe._library = type("Failing", (), {"probe_gemm": staticmethod(lambda *_: 700)})
    with pytest.raises(RuntimeError, match=r"probe_gemm: CUDA error 700 \(illegal address\)"):
        call()


def test_memcheck_tells_wrong_accumulators(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcheck, "mul", lambda a, b: a * b + 1)
    assert memcheck.main(library, [(3, 20, 40)]) == 1


# ---- timing ----


def test_a_wrong_kernel_is_not_timed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(tmp_path, library)
    monkeypatch.setattr("benchmarks.gpu.probe.Call.__call__", lambda self: self.out.zero_())
    comparison, operands = Comparison(setting), Operands(4, 8, 16, CPU)
    comparison.add("dynquant bf16", partial(operands.gemms, setting, setting.probe()), ours=True)
    comparison.add("cuBLASLt int8", operands.cublaslt_int8)
    result = comparison.run(0.1)
    assert result["faults"] == 1
    assert "gives a wrong result: {'differ': " in result["times"]["dynquant bf16"]["left_out"]
    assert "libcublasLt is not loaded" in result["times"]["cuBLASLt int8"]["left_out"]


def test_clock_interleaves() -> None:
    order: list[str] = []
    calls = {"a": [lambda: order.append("a")], "b": [lambda: order.append("b")]}
    result = clock.measure(calls, CPU, rounds=4, seconds=0.0)
    assert "".join(order) == "abba" + "ab", "3 rounds although the time is over"
    assert result["a"]["samples"] == 3
    assert clock.host_us({"a": calls["a"][0]}, CPU, rounds=3, calls=2)["a"]["us"] > 0


class FakeCublasLt:
    """Records the calls to cublasLt.h's functions and computes the product on the CPU."""

    def __init__(self, algorithms: int = 1) -> None:
        self.algorithms, self.calls = algorithms, list[tuple[str, tuple[Any, ...]]]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name.removeprefix("cublasLt"), arguments))
            if name == "cublasLtMatmulAlgoGetHeuristic":
                arguments[-1]._obj.value = self.algorithms
            if name == "cublasLtMatmul":
                weight, q = (self.matrix(arguments[i].value, 1, rows) for i, rows in ((3, 6), (5, 5)))
                self.matrix(arguments[10].value, 4, 5, 6).copy_(q.double() @ weight.double().t())
            return 0

        return call

    @staticmethod
    def matrix(address: int, size: int, rows: int, columns: int = 16) -> torch.Tensor:
        raw = (ctypes.c_char * (rows * columns * size)).from_address(address)
        return torch.frombuffer(raw, dtype=torch.int8 if size == 1 else torch.int32).view(rows, columns)

    def values(self, name: str) -> list[list[object]]:
        """The numeric arguments of all calls of this name."""
        return [
            [one.value for one in arguments if hasattr(one, "value")]
            for called, arguments in self.calls
            if called == name
        ]


def test_cublaslt_is_called_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCublasLt()
    monkeypatch.setattr(cublaslt, "find_library", lambda: fake)
    operands = Operands(5, 6, 16, CPU)
    assert isinstance(operands.cublaslt_int8()[0](), torch.Tensor)
    assert fake.values("MatmulDescCreate") == [[72, 10]], "CUBLAS_COMPUTE_32I, CUDA_R_32I"
    assert fake.values("MatmulDescSetAttribute") == [[None, 3, 4]], "TRANSA, of 4 bytes"
    assert fake.values("MatmulPreferenceSetAttribute") == [[None, 1, 8]]
    assert fake.values("MatrixLayoutCreate") == [[3, 16, 6, 16], [3, 16, 5, 16], [10, 6, 5, 6]]
    counts = {name: len(arguments) for name, arguments in fake.calls}
    assert (counts["MatmulAlgoGetHeuristic"], counts["Matmul"]) == (10, 16)
    assert ctypes.sizeof(cublaslt._Heuristic) == 96
    monkeypatch.setattr(cublaslt, "find_library", lambda: FakeCublasLt(algorithms=0))
    with pytest.raises(RuntimeError, match="knows no int8 algorithm"):
        operands.cublaslt_int8()


# ---- build and report ----


def test_the_probe_is_built_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\nfor last; do :; done\n: > "$last"\n')
    compiler.chmod(0o755)
    toolkit = nvcc.Toolkit(str(compiler), (13, 0), frozenset({80, 90}), ("/include",), ())
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: toolkit)
    build.main(["--probe", str(tmp_path / "out" / "probe.so")])
    *compiled, linked = (tmp_path / "words").read_text().splitlines()
    assert len(compiled) == len(list(CUDA_SOURCES.glob("*.cu")))
    assert {"-shared", "-cudart=static", str(build.PROBE)} <= set(linked.split())
    assert all("-gencode=arch=compute_90a,code=sm_90a" in line for line in (*compiled, linked))
    code = "import sys, benchmarks.gpu.build, benchmarks.gpu.memcheck; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def example(ours: float) -> dict[str, Any]:
    """Results in which ours takes this time and its baselines about 100."""

    def entry(kind: str, m: int = 1, n: int = 4096, more: Any = (), **us: float) -> dict[str, Any]:
        times = {name.replace("__", " "): {"us": value} for name, value in us.items()}
        return {
            "kind": kind,
            "stage": kind,
            "M": m,
            "N": n,
            "K": n,
            "times": times,
            "error": "",
            **dict(more),
        }

    large = entry("large", 8192, 8192, dynquant__bf16=ours)
    large["times"]["dynquant bf16"]["tops"] = 120_000 / ours
    large["times"] |= {name: {"us": 100.0} for name in ("cuBLASLt int8", "torch._int_mm + dequantization")}
    found = [
        large,
        *(entry("layer", m, bf16__linear=150.0, dynquant__per_token=ours) for m in (1, 1024)),
        entry("few rows", more={"weight_read_us": 100.0}, dynquant__bf16=ours),
        entry("quantize", more={"dtype": "bfloat16", "rotation": 0}, dynquant=ours, copy=100.0),
        *(
            entry("launches", more={"activations": name, "count": ours / 50})
            for name in ("per_token", "per_tensor")
        ),
    ]
    outcome = {"stage": "time large", "status": "timed out", "reason": "a | b\nc", "seconds": 1.0}
    head = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "command": "python x", "part": 1}
    return head | {"stages": [outcome], "entries": found}


def test_targets_are_met_and_missed(tmp_path: Path) -> None:
    for results_of, verdict in ((example(90.0), "met"), (example(160.0), "NOT met")):
        assert {target.verdict for target in report.targets(results_of)} == {verdict}
    assert {target.met for target in report.targets({"entries": []})} == {None}
    files = [tmp_path / f"card-part{part}.json" for part in (1, 2)]
    for file in files:
        file.write_text(json.dumps(example(90.0)))
    assert report.write(files) == [tmp_path / f"card.{ending}" for ending in ("json", "md", "png")]
    text = (tmp_path / "card.md").read_text()
    assert (
        "| quantize, time against a copy | ≤ 1.15 | 0.9 (1, 4096, 4096, bfloat16, 0; the worst of 2) | met |"
        in text
    )
    assert "| time large | timed out | 1.0 | - | a / b c |" in text


@pytest.mark.parametrize(("n", "judged"), [(4096, "NOT met"), (4095, "met")])
def test_small_weights_are_not_judged_by_their_bytes(n: int, judged: str) -> None:
    results_of = example(90.0)
    slow = {"kind": "few rows", "M": 1, "N": n, "K": 4096, "weight_read_us": 1.0, "error": ""}
    results_of["entries"].append(slow | {"times": {"dynquant bf16": {"us": 5.0}}})
    (found,) = [target for target in report.targets(results_of) if "weights from 16 MiB" in target.name]
    assert found.verdict == judged
    assert "weight at a copy's speed 1.00 µs" in report.markdown(results_of)


def test_card_state_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.card_state() == {}
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '580.1, 1200 MHz, 1980 MHz, 2619 MHz, 700 W, 90 W, 33'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.card_state()["sm_clock_mhz"] == "1200 MHz"
