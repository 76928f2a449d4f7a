"""Stand-ins for packages that dynquant imports and that measuring its kernels does not need.

A machine with torch, setuptools and nvcc alone can then import dynquant. Where a package is there it is used;
where it is not, its classes and functions can be imported, and say what is missing when they are called. tqdm
alone does something: it becomes a loop without a progress bar.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from typing import Any, TypeVar

PACKAGES = ("tqdm", "rich", "typer")
_T = TypeVar("_T")


def install() -> tuple[str, ...]:
    """Stand-ins for those of PACKAGES that are absent; returns their names."""
    absent = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)
    if absent:
        sys.meta_path.append(_Finder(absent))
    return absent


def _without_progress(iterable: Iterable[_T], **_: object) -> Iterable[_T]:
    return iterable


class _StandIn(types.ModuleType):
    """A package of which every name is a class that cannot be made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package = self.__name__.split(".")[0]

        def refuse(*_: object, **__: object) -> None:
            raise ImportError(f"{package} is not installed; {self.__name__}.{name} needs it", name=package)

        return type(name, (), {"__init__": refuse})


class _Finder:
    """Asked last, when nobody else has found the package."""

    def __init__(self, absent: Sequence[str]) -> None:
        self._absent = absent

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] not in self._absent:
            return None
        return ModuleSpec(name, _Loader(), is_package=True)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "tqdm":
            module.tqdm = _without_progress  # type: ignore[attr-defined]
