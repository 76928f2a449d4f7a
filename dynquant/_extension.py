"""Loads ``dynquant._C`` if it fits the running torch; otherwise one sentence gives the reason.

An extension that was compiled for another torch crashes, or worse, computes nonsense. So the record that the
build leaves beside it (``_build.json``) is compared with the running torch first.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._interface import interface_of

_FOLDER = Path(__file__).resolve().parent
_FALLBACK = "every op runs on the PyTorch reference"
# 64-bit and little-endian, as every system with kernels: e_shoff, e_shentsize and e_shnum of the file header.
_ELF_HEADER = struct.Struct("<40xQ10xHH2x")
_REBUILD = "`pip install --force-reinstall --no-deps .` in the repository builds it again"


def read_record() -> dict[str, Any]:
    """The build record; empty if it is missing or cannot be read."""
    try:
        record = json.loads((_FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _torch_name(version: str, cuda: str | None, cxx11_abi: bool) -> str:
    old_abi = "" if cxx11_abi else ", pre-C++11 ABI"
    return f"torch {version} ({f'CUDA {cuda}' if cuda else 'no CUDA'}{old_abi})"


def _mismatch(file: Path, record: dict[str, Any]) -> str | None:
    """The reason not to load the file, or None."""
    try:
        built_for = (record["torch"], record["torch_cuda"], record["cxx11_abi"])
        built_file = record["file"]
    except KeyError:
        return f"{file.name} has no readable build record beside it, so {_FALLBACK}; {_REBUILD}"
    current = interface_of(_FOLDER)
    if current is not None and record.get("interface") != current:
        return (
            f"{file.name} was built from other sources than these Python files: its ops have other arguments "
            f"or configs, so {_FALLBACK}; {_REBUILD}"
        )
    if built_file != file.name:
        return f"the build record is of {built_file}, not of {file.name}, so {_FALLBACK}; {_REBUILD}"
    running = (torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi())
    if built_for != running:
        return (
            f"dynquant._C was built for {_torch_name(*built_for)}, but {_torch_name(*running)} is running, "
            f"so {_FALLBACK}; {_REBUILD}"
        )
    return None


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("DYNQUANT_ISA") == "reference":
        return None, f"DYNQUANT_ISA=reference is set, so {_FALLBACK}"
    files = [_FOLDER / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((candidate for candidate in files if candidate.exists()), None)
    if file is None:
        return None, f"dynquant._C is not built, so {_FALLBACK}; `pip install .` in the repository builds it"
    record = read_record()
    reason = _mismatch(file, record)
    if reason is None and is_truncated(file):
        reason = f"{file.name} is truncated, so {_FALLBACK}; {_REBUILD}"
    if reason is None:
        try:
            module = importlib.import_module("dynquant._C")
        except ImportError as error:
            reason = f"dynquant._C cannot be loaded ({error}), so {_FALLBACK}; {_REBUILD}"
        else:
            return module, f"dynquant._C is loaded, built for torch {record['torch']}{_unknown_isa(module)}"
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return None, reason


def is_truncated(file: Path) -> bool:
    """Whether an ELF file ends before its section headers, which are its last part. The dynamic linker maps
    such a file, and the process dies of SIGBUS."""
    with file.open("rb") as opened:
        header = opened.read(_ELF_HEADER.size)
    if not header.startswith(b"\x7fELF"):
        return not header
    if len(header) < _ELF_HEADER.size:
        return True
    offset, size, count = _ELF_HEADER.unpack(header)
    return bool(file.stat().st_size < offset + size * count)


def _unknown_isa(module: ModuleType) -> str:
    """A clause, after a warning, if DYNQUANT_ISA names no instruction set of this CPU: it is ignored."""
    name, available = os.environ.get("DYNQUANT_ISA"), module.available_isas()
    if not name or name in available:
        module.isa()  # reads the variable now: a later change has no effect
        return ""
    del os.environ["DYNQUANT_ISA"]
    try:
        chosen = module.isa()
    finally:
        os.environ["DYNQUANT_ISA"] = name
    sentence = (
        f"DYNQUANT_ISA={name!r}: expected reference or an instruction set that this CPU has "
        f"({', '.join(available)}), so {chosen} runs"
    )
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
    return f"; {sentence}"


extension: ModuleType | None
status: str
extension, status = _load()
