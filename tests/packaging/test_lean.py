"""``import dynquant`` imports torch alone; a missing package is named at the first use of its feature."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import dynquant
from dynquant.extras import MissingPackageError, needs

OPTIONAL = ("matplotlib", "numpy", "pandas", "rich", "setuptools", "tqdm", "transformers", "typer")


HIDE = f"sys.modules.update(dict.fromkeys({OPTIONAL}))"  # None there makes an import fail


def start(code: str) -> subprocess.CompletedProcess[str]:
    """A new process that imports the same dynquant as this one."""
    folder = os.path.dirname(os.path.dirname(dynquant.__file__))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def python(code: str) -> str:
    done = start(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_dynquant_imports_nothing_but_torch() -> None:
    code = """
import json, torch
before = set(sys.modules)
import dynquant
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    new = json.loads(python(code).splitlines()[-1])
    assert "dynquant.nn.linear" in new
    packages = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
    assert packages <= {"dynquant", "torch"}
    slow = ("torch.utils.benchmark", "torch.utils.cpp_extension", "torch._dynamo", "torch._inductor")
    assert not [name for name in new if name.startswith(slow)]


def test_conversion_and_measuring_take_torch_alone() -> None:
    code = f"""
{HIDE}
import dynquant, torch
from torch import nn
model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)
quantized, report = dynquant.quantize_dynamic(
    model, sample=x, min_speedup=1e-9, min_sqnr=10.0, fuse=True, report=True
)
with dynquant.calibrate(quantized):
    quantized(x)
dynquant.freeze(quantized)
quantized.load_state_dict(quantized.state_dict())
report.to_json()
assert not [name for name in {OPTIONAL} if sys.modules.get(name)]
print(len(report.layers), quantized[0])
"""
    assert python(code).startswith("2 QLinear(in_features=8, out_features=8, bias=True, activations=static")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m dynquant`` with only torch installed."""
    return start(
        f"{HIDE}; import runpy\n"
        f"sys.argv[1:] = {list(arguments)}\n"
        "runpy.run_module('dynquant', run_name='__main__', alter_sys=True)"
    )


def test_info_needs_no_extra() -> None:
    done = command("info")
    assert done.returncode == 0, done.stderr
    threads = re.compile(r"\d+ threads")  # tests may have changed this process's number
    assert threads.sub("", done.stdout) == threads.sub("", f"{dynquant.info()}\n")


@pytest.mark.parametrize(
    ("arguments", "user", "extra"),
    [
        ([], "python -m dynquant", "cli"),
        (["--help"], "python -m dynquant", "cli"),
        (["demo"], "python -m dynquant demo", "demo"),
        (["bench", "--quick"], "python -m dynquant bench", "bench"),
    ],
)
def test_a_command_without_its_extra_says_which_it_is(arguments: list[str], user: str, extra: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (  # torch may warn about numpy before
        f"{user} needs the package typer, which is not installed; "
        f"`pip install '.[{extra}]'` in the repository installs it"
    )


def test_the_innermost_need_is_named() -> None:
    with (
        pytest.raises(MissingPackageError, match=r"the encoder needs the package no_such, .*'\.\[demo\]'"),
        needs("the command", extra="cli"),
        needs("the encoder", extra="demo"),
    ):
        import no_such.part  # noqa: F401


def test_a_missing_module_of_dynquants_own_stays_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, needs("the demo", extra="demo"):
        import dynquant.no_such  # noqa: F401
    assert not isinstance(caught.value, MissingPackageError)
