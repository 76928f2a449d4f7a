"""The instruction sets of this machine, and a fixture that forces one; registered by conftest.py."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

import dynquant
from tests.support.paths import ISA_LIST

EVERY_ISA = re.findall(r"ISA\((\w+), k", ISA_LIST.read_text())
"""Compiled into an extension for x86-64."""

EMULATED = ("avxvnni", "avx512vl_vnni", "avx512vnni")
"""Whose intrinsics tests/kernels/emulated/intrinsics.h has as loops: tested on every x86-64 machine."""

ISAS = dynquant.available_isas() or ["reference"]


@contextlib.contextmanager
def forced(isa: str) -> Iterator[str]:
    before = dynquant.isa()
    if before == isa == "reference":
        yield isa
        return
    from dynquant import _C

    _C.set_isa(isa)
    try:
        yield isa
    finally:
        _C.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set for the duration of a test."""
    with forced(request.param):
        yield request.param
