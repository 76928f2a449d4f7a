"""Folders of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CPU_SOURCES = CSRC / "cpu"
CUDA_SOURCES = CSRC / "cuda"
ISA_LIST = CPU_SOURCES / "isa.h"

TESTS = ROOT / "tests"
FIXTURES = TESTS / "fixtures"
CUDA_HOST = TESTS / "kernels" / "cuda_host"
EMULATED_ISAS = TESTS / "kernels" / "emulated"
