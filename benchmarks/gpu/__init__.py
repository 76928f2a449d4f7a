"""The CUDA kernels on a card: built, proven and measured by ``python benchmarks/gpu_suite.py --out DIR``.

A room for each thing: ``environment`` (what the machine has), ``build``, ``correctness`` (judged by
``bits``), ``sanitizer`` (over ``sanitized``), ``ceilings`` and ``kernels`` (timed by ``clock``, rivals in
``contenders`` and ``cublaslt``, kernels one by one through ``probe``), ``figures`` (targets), ``report`` and
``plot``. ``stages`` runs them as processes with time limits, ``worker`` is such a process.

A machine that has torch, setuptools and nvcc alone is enough: where tqdm is absent, which dynquant imports
for its progress bar, a stand-in without one takes its place here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable
from typing import TypeVar

_T = TypeVar("_T")


def _without_progress(iterable: Iterable[_T], **_: object) -> Iterable[_T]:
    return iterable


if importlib.util.find_spec("tqdm") is None:
    _stand_in = types.ModuleType("tqdm")
    _stand_in.tqdm = _without_progress  # type: ignore[attr-defined]
    sys.modules["tqdm"] = _stand_in
