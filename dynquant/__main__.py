"""``python -m dynquant demo | bench | info``; the commands are in :mod:`dynquant.command_line`."""

from __future__ import annotations

import sys

import dynquant
from dynquant.extras import MissingPackageError, needs


def main() -> None:
    if sys.argv[1:] == ["info"]:  # fault reports must not need an extra
        print(dynquant.info())
        return
    command = sys.argv[1] if sys.argv[1:2] in (["demo"], ["bench"]) else None
    try:
        # Both have an extra of their name, which also installs the packages of the command line.
        with needs(f"python -m dynquant {command or ''}".rstrip(), extra=command or "cli"):
            from dynquant.command_line import app
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
