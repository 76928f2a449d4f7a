"""The instruction sets of this machine and how a test forces one; conftest.py makes the fixture known."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynquant

_LIST = Path(__file__).resolve().parents[1] / "csrc" / "cpu" / "isa.h"
EVERY_ISA = re.findall(r"ISA\((\w+), k", _LIST.read_text())
"""Compiled into an extension for x86-64."""

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
    """Forces one instruction set for the length of a test."""
    with forced(request.param):
        yield request.param
