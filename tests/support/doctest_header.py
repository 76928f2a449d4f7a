"""Where doctest, the header of the C++ tests, is; run with a folder to unpack Debian's package into.

``python -m tests.support.doctest_header FOLDER`` prints the prefix for CMake: ``/usr`` if the compiler finds
the header, else FOLDER/usr, where it unpacks the package. Nothing outside FOLDER changes: apt keeps its lists
there too. Otherwise it exits with a sentence that says why the tests cannot be built.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "doctest-dev"
HEADER = Path("include") / "doctest" / "doctest.h"


def compiler_finds_it() -> bool:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    source = f'#if !__has_include("{HEADER.relative_to("include")}")\n#error\n#endif\n'
    run = subprocess.run(
        [*compiler, "-x", "c++", "-fsyntax-only", "-"], input=source, text=True, capture_output=True
    )
    return run.returncode == 0


def unpack(folder: Path) -> None:
    """Debian's package, whose signature apt checks, in ``folder``/usr."""
    state = folder / "apt"
    options = [
        f"-oDir::State::Lists={state}/lists",
        f"-oDir::Cache={state}",
        "-oAPT::Sandbox::User=",  # as the user that runs the tests
        "-oDebug::NoLocking=1",
    ]
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    for command in (
        ["apt-get", "-qq", *options, "update"],
        ["apt-get", "-qq", *options, "download", PACKAGE],
    ):
        run(command, state)
    (package,) = state.glob("*.deb")
    run(["dpkg-deb", "--extract", str(package), str(folder)], state)
    shutil.rmtree(state)


def run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if result.returncode != 0:
        raise OSError(f"{shlex.join(command)}: {(result.stderr or result.stdout).strip()}")


def prefix(folder: Path) -> Path:
    """What CMAKE_PREFIX_PATH has to be for CMake to find the header."""
    if compiler_finds_it():
        return Path("/usr")
    if not (folder / "usr" / HEADER).exists():
        missing = f"the C++ tests need doctest (on Debian: apt-get install {PACKAGE}), "
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            sys.exit(f"{missing}and there is no apt-get to download it with")
        try:
            unpack(folder)
        except (OSError, ValueError) as error:
            sys.exit(f"{missing}and its download failed: {error}")
    return folder / "usr"


if __name__ == "__main__":
    print(prefix(Path(sys.argv[1]).resolve()))
