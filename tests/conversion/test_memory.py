"""What a process holds after a conversion in place: int8 weights, and no holes that float ones left."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dynquant import _extension

CODE = """
import gc, torch, dynquant
from torch import nn

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096

class Layer(nn.Module):
    def __init__(self, hidden=1024, inner=2816):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

def model(layers):
    return nn.ModuleList([Layer() for _ in range(layers)])

torch.set_num_threads(2)
for size in (64, 512):  # threads, code and tables of torch
    dynquant.quantize_dynamic(nn.Linear(size, size))
gc.collect()
before = resident()
made = model(4)
count = sum(parameter.numel() for parameter in made.parameters())
made = dynquant.quantize_dynamic(made, inplace=True)
gc.collect()
print((resident() - before) / count)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is returned by glibc's malloc_trim")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident pages from /proc")
@pytest.mark.skipif(_extension.extension is None, reason=f"of the kernels: {_extension.status}")
def test_a_conversion_in_place_leaves_one_byte_a_weight() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.15
