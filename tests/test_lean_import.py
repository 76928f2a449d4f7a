"""``import dynquant`` takes torch and nothing else; what else it uses is loaded where it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dynquant

OPTIONAL = ("matplotlib", "numpy", "pandas", "rich", "setuptools", "tqdm", "transformers", "typer")


def python(code: str) -> str:
    """What a new process prints that imports the very dynquant of this one."""
    folder = os.path.dirname(os.path.dirname(dynquant.__file__))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None there makes an import fail
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
