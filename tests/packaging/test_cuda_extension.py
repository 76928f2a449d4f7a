"""The extension with the CUDA part inside: it loads under any torch, registers its ops, needs no driver."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch

from dynquant import _extension, reference
from tests.support.same_bits import assert_same_bits

OPS = ("min_max", "choose_qparams", "quantize", "rotate", "int8_mm", "linear_dynamic", "linear_static")


@pytest.fixture(autouse=True)
def _has_cuda_part() -> None:
    cuda = _extension.read_record().get("cuda", {})
    if _extension.extension is None or not cuda.get("built"):
        pytest.skip(f"the CUDA part is not built: {cuda.get('reason') or 'DYNQUANT_CUDA=1 builds it'}")


@pytest.mark.parametrize("op", OPS)
def test_op_is_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dynquant::{op}", "CUDA")


def test_neither_driver_nor_shared_runtime_is_linked() -> None:
    assert _extension.extension is not None
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf on this machine: the linked libraries were not checked")
    dynamic = subprocess.run(
        [readelf, "-d", str(_extension.extension.__file__)], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "libcuda" in line], dynamic


def test_loads_without_a_visible_gpu() -> None:
    code = "import dynquant, torch; print(dynquant._extension.status); torch.ops.dynquant.linear_dynamic"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is loaded" in done.stdout


@pytest.mark.parametrize("op", OPS)
def test_cards_below_8_0_run_the_reference(op: str) -> None:
    """Their calls go to the kernel registered for all devices."""
    table = torch._C._dispatch_dump_table(f"dynquant::{op}")
    assert re.search(
        r"^Undefined: registered at \S*ops/registry\.py:\d+ \[default backend kernel\]", table, re.M
    ), table
    if op == "linear_dynamic":
        x, weight = torch.randn(3, 20), torch.randint(-127, 128, (5, 20), dtype=torch.int8)
        arguments = (x, *reference.pack_weight(weight), torch.ones(5), None, 0)
        nowhere = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
        out = torch.ops.dynquant.linear_dynamic.default.redispatch(nowhere, *arguments)
        assert_same_bits(out, reference.linear_dynamic(*arguments))
