"""Which torch a build is for: the one of the environment that the package goes into.

pip builds in an isolated process that sees only the build requirements. The interpreter is still the
environment's own, so a child process without pip's PYTHONPATH tells where its torch lies.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import NoReturn

MINIMUM = (2, 11)

_LOOK = """
import importlib.metadata, importlib.util, json, sys
found = importlib.util.find_spec("torch") is not None
version = importlib.metadata.version("torch") if found else None
print(json.dumps({"version": version, "path": sys.path}))
"""


def stop(sentence: str) -> NoReturn:
    """Ends the build with one sentence instead of a traceback."""
    raise SystemExit(f"dynquant-int8: {sentence}")


@dataclass(frozen=True)
class Environment:
    """What the target environment holds: torch's version (None: no torch) and its import path."""

    torch_version: str | None
    path: tuple[str, ...]


def builds_extension() -> bool:
    """False where DYNQUANT_BUILD=0 asks for the pure-Python package."""
    return os.environ.get("DYNQUANT_BUILD", "1") != "0"


def isolated_by_pip() -> bool:
    """True inside the temporary build environment that pip makes."""
    return "pip-build-env-" in os.environ.get("PYTHONPATH", "")


@functools.cache
def target_environment() -> Environment:
    """The environment that pip builds for, seen from a process without pip's build environment."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")  # both set by pip
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    look = subprocess.run(
        [sys.executable, "-c", _LOOK], env=variables, stdout=subprocess.PIPE, check=True, cwd="/"
    )
    seen = json.loads(look.stdout)
    return Environment(seen["version"], tuple(entry for entry in seen["path"] if entry))


def build_requirements() -> list[str]:
    """What the front end has to install before it builds the extension.

    torch is asked for only where pip builds for an environment without one. A front end that hides the
    environment in another way is stopped here, before it downloads gigabytes.
    """
    if not builds_extension():
        return []
    requirements = [] if shutil.which("ninja") else ["ninja"]
    if isolated_by_pip():
        if target_environment().torch_version is None:
            return [*requirements, _at_least_minimum()]
        check_minimum(str(target_environment().torch_version))
    elif importlib.util.find_spec("torch") is None:
        stop(
            "this front end hides the environment's torch from the build; use pip, or --no-build-isolation "
            "with torch and setuptools installed, or DYNQUANT_BUILD=0 for the pure-Python package."
        )
    return requirements


def runtime_requirement() -> str:
    """The torch that the built package asks for.

    The environment's own torch satisfies the plain bound. Where the build had to bring its own, the result is
    tied to that very version, so that pip installs the torch that the extension was built for.
    """
    bare = isolated_by_pip() and builds_extension() and target_environment().torch_version is None
    if bare and importlib.util.find_spec("torch") is not None:
        return f"torch=={importlib.metadata.version('torch')}"
    return _at_least_minimum()


def expose() -> None:
    """Puts the target environment's packages behind the build's own: `import torch` then finds its torch."""
    if isolated_by_pip():
        sys.path.extend(entry for entry in target_environment().path if entry not in sys.path)


def check_minimum(version: str) -> None:
    """Stops where the torch to build for is older than the oldest supported one."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < MINIMUM:
        stop(f"expected {_at_least_minimum()}, the environment has torch {version}; upgrade torch first.")


def _at_least_minimum() -> str:
    return f"torch>={MINIMUM[0]}.{MINIMUM[1]}"
