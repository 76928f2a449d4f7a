"""Folders of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNEL_SOURCES = CSRC / "kernels"
TORCH_SOURCES = CSRC / "torch"
CPU_SOURCES = KERNEL_SOURCES / "cpu"
CUDA_SOURCES = KERNEL_SOURCES / "cuda"
ISA_LIST = CPU_SOURCES / "isa" / "isa.h"

TESTS = ROOT / "tests"
FIXTURES = TESTS / "fixtures"
CUDA_HOST = TESTS / "kernels" / "cuda_host"
EMULATED_ISAS = TESTS / "kernels" / "emulated"
