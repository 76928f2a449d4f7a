"""What needs a package that ``pip install .`` does not bring names the extra that does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("", "benchmarks", "dynquant")


class MissingPackageError(ModuleNotFoundError):
    """One sentence: what is missing, for what, and the extra of pyproject.toml that brings it."""

    def __init__(self, user: str, package: str, extra: str, instead: str = "") -> None:
        super().__init__(
            f"{user} needs the package {package}, which is not installed; "
            f"`pip install '.[{extra}]'` in the repository installs it{instead}",
            name=package,
        )


@contextmanager
def needs(user: str, *, extra: str, instead: str = "") -> Iterator[None]:
    """Makes a failed import within it a sentence.

    Args:
        user: what needs the package, such as "Report.to_pandas".
        instead: the end of the sentence, such as what does without.

    Raises:
        MissingPackageError: where a package is not installed. Modules of dynquant's own that cannot be found
            are a fault, whose traceback stays.
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
