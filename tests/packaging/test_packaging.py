"""Real installs, builds and imports in fresh environments."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import dynquant
from build_backend import nvcc, torch_location
from tests.support.paths import ROOT

SMALL_MODULE = """
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string>
#include <vector>
#include "name.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("available_isas", [] { return std::vector<std::string>{NAME}; });
  module.def("isa", [] { return std::string(NAME); });
  module.def("run_below_autograd", [](const std::string&, bool) {});
  module.def("are_in_place", [](pybind11::tuple, pybind11::tuple, pybind11::tuple) { return false; });
}
"""
REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dynquant
import torch
info = dynquant.info()
x = torch.linspace(-3, 2, 40).reshape(4, 10)
scale, zero_point = torch.ops.dynquant.choose_qparams(*torch.ops.dynquant.min_max(x, True))
print(json.dumps({
    "file": dynquant.__file__,
    "path": info.path,
    "reason": info.reason,
    "isa": dynquant.isa(),
    "available_isas": dynquant.available_isas(),
    "text": str(info),
    "warnings": [str(entry.message) for entry in caught if entry.category is RuntimeWarning],
    "q": torch.ops.dynquant.quantize(x, scale, zero_point).tolist(),
}))
"""


def run(*command: str | Path, cwd: Path, ok: bool = True, **variables: str) -> str:
    """Runs a command without this process's dynquant variables; returns its output."""
    ours = ("DYNQUANT_", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "CXX")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"DYNQUANT_CUDA": "0", **variables}
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert (done.returncode == 0) == ok, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def report(python: Path, cwd: Path, **variables: str) -> dict[str, Any]:
    """dynquant's description of itself in a new process of that interpreter."""
    result: dict[str, Any] = json.loads(run(python, "-c", REPORT, cwd=cwd, **variables).splitlines()[-1])
    return result


def pip_install(python: Path, *arguments: str | Path, cwd: Path, ok: bool = True, **variables: str) -> str:
    return run(
        sys.executable, "-m", "pip", "--python", python, "install", *arguments, cwd=cwd, ok=ok, **variables
    )


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to this environment's packages except dynquant, for other environments."""
    folder = tmp_path_factory.mktemp("torch_folder")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if "dynquant" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new, empty environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def with_torch(folder: Path, torch_folder: Path) -> Path:
    """The interpreter of a new environment that sees torch."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch_folder.pth").write_text(f"{torch_folder}\n")
    return folder / "bin" / "python"


def packages_of(python: Path) -> set[str]:
    """The packages in an environment's folder."""
    (folder,) = python.parents[1].glob("lib/python*/site-packages")
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build here touches the checkout's."""
    folder = tmp_path_factory.mktemp("source") / "dynquant"
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("build_backend", "csrc", "dynquant"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for pattern in ("*.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def small_source(source: Path, tmp_path: Path) -> Path:
    """A copy with an extension that compiles in seconds."""
    folder = tmp_path / "small"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("build", "csrc", "*.egg-info"))
    (folder / "csrc").mkdir()
    (folder / "csrc" / "module.cpp").write_text(SMALL_MODULE)
    (folder / "csrc" / "name.h").write_text('#define NAME "first"\n')
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, torch_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with torch, after `pip install .`."""
    python = with_torch(tmp_path_factory.mktemp("installed"), torch_folder)
    output = pip_install(python, ".", cwd=source)
    assert "Successfully installed dynquant-int8" in output
    assert "ollecting torch" not in output
    return python


@pytest.fixture
def package(installed: Path, tmp_path: Path) -> Path:
    """An importable copy of the installed package, for tests that modify it."""
    (original,) = installed.parents[1].glob("lib/python*/site-packages/dynquant")
    shutil.copytree(original, tmp_path / "dynquant")
    return tmp_path / "dynquant"


def test_pip_install_builds_against_the_environments_torch(installed: Path, tmp_path: Path) -> None:
    assert not any(name.startswith("torch") for name in packages_of(installed) - {"torch_folder.pth"})
    seen = report(installed, tmp_path)
    assert Path(seen["file"]).is_relative_to(installed.parents[1])
    assert seen["path"] == "extension"
    assert seen["reason"] == f"dynquant._C is loaded, built for torch {torch.__version__}"
    assert seen["warnings"] == []
    assert seen["isa"] == seen["available_isas"][-1]
    assert seen["q"] == report(installed, tmp_path, DYNQUANT_ISA="reference")["q"]
    record = json.loads((Path(seen["file"]).parent / "_build.json").read_text())
    assert (record["torch"], record["torch_cuda"]) == (torch.__version__, torch.version.cuda)


def test_threads_are_those_of_torchs_own_openmp(installed: Path, tmp_path: Path) -> None:
    code = """
import re
def runtimes():
    return set(re.findall(r"/\\S*lib[gi]?omp[^/\\s]*", open("/proc/self/maps").read()))
import torch
before = runtimes()
import dynquant
print(before == runtimes(), len(before), dynquant._extension.extension.__file__)
"""
    same, count, file = run(installed, "-c", code, cwd=tmp_path).split()[-3:]
    assert (same, count) == ("True", "1")
    assert re.search(rb"GOMP_parallel|__kmpc_fork_call", Path(file).read_bytes()), "compiled without OpenMP"


def test_isa_is_lowered_by_the_environment_variable(installed: Path, tmp_path: Path) -> None:
    for isa in report(installed, tmp_path)["available_isas"]:
        assert report(installed, tmp_path, DYNQUANT_ISA=isa)["isa"] == isa
    seen = report(installed, tmp_path, DYNQUANT_ISA="reference")
    assert (seen["path"], seen["isa"], seen["available_isas"]) == ("reference", "reference", [])
    assert seen["reason"] == "DYNQUANT_ISA=reference is set, so every op runs on the PyTorch reference"
    assert seen["warnings"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.11.0+cu130"}, "built for torch 2.11.0+cu130"),
        ({"torch_cuda": "12.6"}, "(CUDA 12.6)"),
        ({"cxx11_abi": False}, "pre-C++11 ABI"),
        ({"file": "_C.other.so"}, "the build record is of _C.other.so"),
        ({"interface": "0123456789abcdef"}, "was built from other sources than these Python files"),
        (None, "no readable build record"),
    ],
)
def test_mismatch_is_recognised_before_loading(
    installed: Path, package: Path, change: dict[str, Any] | None, words: str
) -> None:
    (file,) = package.glob("_C.*.so")
    file.write_bytes(b"loading this would end in another sentence")
    record = package / "_build.json"
    record.write_text("" if change is None else json.dumps(json.loads(record.read_text()) | change))
    seen = report(installed, package.parent)
    assert Path(seen["file"]).parent == package
    assert seen["path"] == "reference"
    assert words in seen["reason"]
    assert seen["reason"].endswith("in the repository builds it again")
    assert seen["reason"] in seen["text"]
    assert seen["warnings"] == [seen["reason"]]


def test_extension_that_cannot_be_loaded_is_reported(installed: Path, package: Path) -> None:
    (file,) = package.glob("_C.*.so")
    file.write_bytes(b"no shared object")
    seen = report(installed, package.parent)
    assert seen["path"] == "reference"
    assert seen["reason"].startswith("dynquant._C cannot be loaded (")
    assert seen["warnings"] == [seen["reason"]]


def test_build_0_gives_the_pure_python_package(source: Path, torch_folder: Path, tmp_path: Path) -> None:
    python = with_torch(tmp_path / "pure", torch_folder)
    pip_install(python, ".", cwd=source, DYNQUANT_BUILD="0", CXX="no-such-compiler")
    seen = report(python, tmp_path)
    folder = Path(seen["file"]).parent
    assert folder.is_relative_to(tmp_path)
    assert not list(folder.glob("_C*")) + list(folder.glob("_build.json"))
    (wheel,) = folder.parent.glob("dynquant_int8-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    assert (seen["path"], seen["warnings"]) == ("reference", [])
    assert seen["reason"].startswith("dynquant._C is not built")


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pure-Python wheel and the sdist of a whole checkout."""
    folder = tmp_path_factory.mktemp("distributions") / "checkout"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    for command in ("bdist_wheel", "sdist"):
        run(sys.executable, "setup.py", "--quiet", command, cwd=folder, DYNQUANT_BUILD="0")
    return folder / "dist"


def test_tests_and_fixtures_stay_out_of_wheels_and_sdists(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    (sdist,) = distributions.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name.split("/")[0] for name in archive.namelist()}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    version = dynquant.__version__
    assert in_wheel == {"dynquant", f"dynquant_int8-{version}.dist-info"}
    assert {"dynquant", "csrc", "build_backend"} <= in_sdist
    assert not in_sdist & {"tests", "benchmarks"}


def required(extra: str, requirements: list[Requirement]) -> set[str]:
    """Names of the packages that an extra requires, directly or through other extras; "": a plain install."""
    names: set[str] = set()
    for requirement in requirements:
        marker = requirement.marker
        applies = marker is None or marker.evaluate({"extra": extra})
        always = marker is None or marker.evaluate({"extra": ""})
        if not applies or (always and extra):
            continue
        if requirement.name == "dynquant-int8":
            names = names.union(*(required(other, requirements) for other in requirement.extras))
        else:
            names.add(requirement.name)
    return names


def test_a_plain_install_asks_for_torch_and_tqdm_alone(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    requirements = [Requirement(line) for line in lines]
    assert required("", requirements) == {"torch", "tqdm"}
    assert required("cli", requirements) == {"rich", "typer"}
    assert required("report", requirements) == {"matplotlib", "pandas", "rich"}
    # The extras that make installs, each possibly into an empty environment.
    for extra in ("demo", "bench", "test", "lint"):
        assert required(extra, requirements) >= {"rich", "typer"}, extra
    for extra in ("demo", "bench", "test"):
        assert required(extra, requirements) >= {"matplotlib", "transformers"}, extra


def test_editable_install_and_rebuild_after_a_header_changed(
    small_source: Path, torch_folder: Path, tmp_path: Path
) -> None:
    python = with_torch(tmp_path / "developer", torch_folder)
    pip_install(python, "--no-build-isolation", "--no-deps", "--editable", ".", cwd=small_source)
    seen = report(python, tmp_path)
    assert Path(seen["file"]).is_relative_to(small_source)
    assert (seen["path"], seen["isa"]) == ("extension", "first")
    (small_source / "csrc" / "name.h").write_text('#define NAME "second"\n')
    build = (python, "setup.py", "--quiet", "build_ext", "--inplace")
    assert run(*build, cwd=small_source) == "[1/1] csrc/module.cpp\n"
    assert report(python, tmp_path)["isa"] == "second"
    (small_source / "csrc" / "name.h").write_text("#define NAME no_such_name\n")
    output = run(*build, cwd=small_source, ok=False)
    assert re.search(r"FAILED: .*module\.o.*\n.*-fPIC.* -c .*csrc/module\.cpp", output)
    assert re.search(r"error: .*no_such_name", output)


def test_missing_compiler_gives_one_line(small_source: Path, torch_folder: Path, tmp_path: Path) -> None:
    python = with_torch(tmp_path / "environment", torch_folder)
    options = ("--no-build-isolation", "--no-deps", ".")
    output = pip_install(python, *options, cwd=small_source, ok=False, CXX="no-such-compiler")
    assert "dynquant-int8: no C++ compiler 'no-such-compiler' found; install one" in output
    assert "DYNQUANT_BUILD=0" in output
    assert "Traceback" not in output


def test_setup_py_without_torch_says_so(source: Path, bare_python: Path, tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("def setup(**arguments): pass\n")
    output = run(bare_python, "setup.py", "build_ext", cwd=source, ok=False, PYTHONPATH=str(tmp_path))
    assert output == (
        "dynquant-int8: building the extension needs torch; install it first, or set DYNQUANT_BUILD=0.\n"
    )


def location(python: Path, expression: str, ok: bool = True, **variables: str) -> str:
    """Evaluates an expression of build_backend.torch_location in another interpreter."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from build_backend.torch_location import *; "
    return run(
        python, "-c", f"{code}print({expression})", cwd=ROOT.parent, ok=ok, PATH="", **variables
    ).strip()


def test_backend_requires_torch_only_if_it_is_missing(
    bare_python: Path, torch_folder: Path, tmp_path: Path
) -> None:
    python = with_torch(tmp_path / "environment", torch_folder)
    isolated = {"PYTHONPATH": "/tmp/pip-build-env-test/site", "PYTHONNOUSERSITE": "1"}
    minimum = ".".join(map(str, torch_location.MINIMUM))
    assert location(bare_python, "build_requirements()", **isolated) == f"['ninja', 'torch>={minimum}']"
    assert location(python, "build_requirements()", **isolated) == "['ninja']"
    assert location(bare_python, "build_requirements()", DYNQUANT_BUILD="0", **isolated) == "[]"


def test_result_is_tied_to_the_torch_that_the_build_brought(
    bare_python: Path, torch_folder: Path, tmp_path: Path
) -> None:
    python = with_torch(tmp_path / "environment", torch_folder)
    brought = {"PYTHONPATH": f"/tmp/pip-build-env-test/site:{torch_folder}", "PYTHONNOUSERSITE": "1"}
    minimum = ".".join(map(str, torch_location.MINIMUM))
    assert location(bare_python, "runtime_requirement()", **brought) == f"torch=={torch.__version__}"
    assert location(python, "runtime_requirement()", **brought) == f"torch>={minimum}"
    assert location(python, "runtime_requirement()") == f"torch>={minimum}"
    assert location(bare_python, "runtime_requirement()", DYNQUANT_BUILD="0") == f"torch>={minimum}"


def test_backend_stops_if_another_front_end_hides_torch(bare_python: Path) -> None:
    output = location(bare_python, "build_requirements()", ok=False)
    assert output.startswith(
        "dynquant-int8: this front end hides the environment's torch from the build; use pip, or"
    )
    assert "--no-build-isolation" in output
    assert len(output.splitlines()) == 1


def test_older_torch_is_refused() -> None:
    torch_location.check_minimum("2.11.0+cu130")
    with pytest.raises(
        SystemExit, match=r"expected torch>=2\.11, the environment has torch 2\.9\.1; upgrade"
    ):
        torch_location.check_minimum("2.9.1")


def names(architectures: list[nvcc.Architecture]) -> list[str]:
    return [str(architecture) for architecture in architectures]


def test_cuda_architectures() -> None:
    of_nvcc_13 = frozenset((75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121))
    of_nvcc_12_4 = frozenset((50, 70, 75, 80, 86, 87, 89, 90))
    default = nvcc.architectures(None, of_nvcc_13)
    assert names(default) == ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
    assert names(nvcc.architectures(None, of_nvcc_12_4)) == ["8.0", "8.6", "8.9", "9.0a"]
    assert names(nvcc.architectures("7.5;8.0 9.0+PTX", of_nvcc_13)) == ["8.0", "9.0a+PTX"]
    assert nvcc.architectures("9.0+PTX", of_nvcc_13)[0].gencode() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert names(nvcc.architectures_of(Path("gemm_wgmma_sm90.cu"), default)) == ["9.0a"]
    assert names(nvcc.architectures_of(Path("gemm_wgmma_sm90.cu"), default[:1])) == ["9.0a"]
    assert nvcc.architectures_of(Path("quantize.cu"), default) == default
    with pytest.raises(SystemExit, match=r"'7\.5': expected architectures from 8\.0 that nvcc .* got none"):
        nvcc.architectures("7.5", of_nvcc_13)
    with pytest.raises(SystemExit, match=r"got \['12\.0'\]"):
        nvcc.architectures("12.0", of_nvcc_12_4)
    with pytest.raises(SystemExit, match=r"expected entries such as 8\.0, 9\.0a or 12\.0\+PTX, got 'Hopper'"):
        nvcc.architectures("Hopper", of_nvcc_13)


def test_missing_nvcc_gives_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from build_backend import extension

    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "kernel.cu").touch()
    monkeypatch.setattr(extension, "CSRC", tmp_path)
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("DYNQUANT_CUDA", raising=False)
    toolkit, reason = extension.cuda_toolkit()
    assert toolkit is None
    assert reason.startswith("no nvcc found (")
    assert "install the CUDA toolkit 13.0, set CUDA_HOME and build again" in reason
    monkeypatch.setenv("DYNQUANT_CUDA", "1")
    with pytest.raises(SystemExit, match="DYNQUANT_CUDA=1: no nvcc found"):
        extension.cuda_toolkit()
    monkeypatch.setenv("DYNQUANT_CUDA", "yes")
    with pytest.raises(SystemExit, match="DYNQUANT_CUDA: expected 0, 1 or nothing, got 'yes'"):
        extension.cuda_toolkit()
    monkeypatch.setenv("DYNQUANT_CUDA", "0")
    assert extension.cuda_toolkit() == (None, "")

    old = nvcc.Toolkit("/toolkit/bin/nvcc", (12, 4), frozenset((80, 90)), (), ())
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: old)
    monkeypatch.delenv("DYNQUANT_CUDA")
    assert "/toolkit/bin/nvcc is of CUDA 12.4, torch of CUDA 13.0" in extension.cuda_toolkit()[1]
    monkeypatch.setenv("DYNQUANT_CUDA", "1")
    assert extension.cuda_toolkit() == (old, "")


def test_toolkit_is_read_through_a_wrapper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n"
        "--list-gpu-arch) echo compute_80; echo compute_90 ;;\n"
        """*) echo '#$ INCLUDES="-I/toolkit/bin/../include"  '\n"""
        """   echo '#$ LIBRARIES=  "-L/toolkit/lib64"' ;;\n"""
        "esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find_toolkit() == nvcc.Toolkit(
        str(script), (13, 0), frozenset((80, 90)), ("/toolkit/include",), ("/toolkit/lib64",)
    )


def test_cuda_objects_are_compiled_again_only_after_a_change(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = tmp_path / "nvcc"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {log}\ntouch "$last"\n')
    compiler.chmod(0o755)
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("a.cu", "b_sm90.cu", "shared.cuh"):
        (folder / name).touch()
    toolkit = nvcc.Toolkit(str(compiler), (13, 0), frozenset((80, 90)), (), ())

    def compiled(wanted: str) -> list[str]:
        log.write_text("")
        architectures = nvcc.architectures(wanted, toolkit.supported)
        objects = nvcc.compile_objects(toolkit, folder, tmp_path / "objects", architectures, jobs=2)
        assert [Path(path).name for path in objects] == ["a.o", "b_sm90.o"]
        return sorted(Path(line).name for line in log.read_text().split())

    def change(name: str) -> None:
        now = time.time()
        for path in folder.iterdir():
            os.utime(path, (now - 300, now - 300))
        for path in (tmp_path / "objects").iterdir():
            os.utime(path, (now - 200, now - 200))
        os.utime(folder / name, (now - 100, now - 100))

    assert compiled("8.0;9.0") == ["a.o", "b_sm90.o"]
    assert compiled("8.0;9.0") == []
    assert compiled("8.0") == ["a.o"]  # other flags for a.cu alone
    change("a.cu")
    assert compiled("8.0") == ["a.o"]
    change("shared.cuh")
    assert compiled("8.0") == ["a.o", "b_sm90.o"]


def test_info_names_cards_that_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    info = importlib.import_module("dynquant.environment")
    built = {"built": True, "reason": "", "architectures": ["8.0", "9.0a"], "nvcc": "13.0"}
    cards = {"NVIDIA H100": (9, 0), "Tesla T4": (7, 5), "Tesla V100": (7, 0)}
    monkeypatch.setattr(dynquant._extension, "read_record", lambda: {"cuda": built})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: list(cards)[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: list(cards.values())[i])
    text = "built with nvcc 13.0 for 8.0, 9.0a"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._cuda_sentence(loaded=True) == f"{text}; no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert info._cuda_sentence(loaded=True) == text
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert info._cuda_sentence(loaded=True) == (
        f"{text}; they need compute capability 8.0 or newer: "
        "on Tesla T4 (7.5), Tesla V100 (7.0) the reference runs"
    )


def test_public_names() -> None:
    for name in dynquant.__all__:
        assert hasattr(dynquant, name), name
    assert (Path(dynquant.__file__).parent / "py.typed").exists()
    assert dynquant.isa() in [*dynquant.available_isas(), "reference"]
    assert str(dynquant.info()).startswith(f"dynquant     {dynquant.__version__}\npath ")
