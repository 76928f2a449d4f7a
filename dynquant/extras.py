"""Errors for packages that ``pip install .`` does not install: they name the extra that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("", "benchmarks", "dynquant")


class MissingPackageError(ModuleNotFoundError):
    """One sentence: the missing package, its user, and the extra of pyproject.toml that installs it."""

    def __init__(self, user: str, package: str, extra: str, instead: str = "") -> None:
        super().__init__(
            f"{user} needs the package {package}, which is not installed; "
            f"`pip install '.[{extra}]'` in the repository installs it{instead}",
            name=package,
        )


@contextmanager
def needs(user: str, *, extra: str, instead: str = "") -> Iterator[None]:
    """Turn a failed import within the block into one sentence.

    Args:
        user: the function or command that needs the package, such as "Report.to_pandas".
        instead: the end of the sentence, such as functions that do without the package.

    Raises:
        MissingPackageError: if a package is not installed. A missing module of dynquant's own is a fault, and
            keeps its traceback.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OURS:
            raise
        raise MissingPackageError(user, package, extra, instead) from error
