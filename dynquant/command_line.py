"""The commands of ``python -m dynquant``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import dynquant

from .extras import MissingPackageError, needs

app = typer.Typer(
    name="python -m dynquant",
    help="Dynamic int8 quantization for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fail(sentence: str, code: int = 1) -> typer.Exit:
    typer.echo(sentence, err=True)
    return typer.Exit(code)


@app.command()
def info() -> None:
    """Which path runs (extension or reference) and why, ISAs, versions."""
    typer.echo(str(dynquant.info()))


@app.command()
def demo(
    png: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; torch's default.")] = None,
    every_version: Annotated[
        bool, typer.Option("--all", help="Every version of the encoder, per_tensor and static too.")
    ] = False,
) -> None:
    """Quantize a small net and a real sentence encoder; compare with float and torch.ao."""
    try:
        with needs("demo", extra="demo"):
            from .demo import run

            run(png, threads=threads, every_version=every_version)
    except MissingPackageError as error:
        raise _fail(str(error), code=2) from error


def _benchmarks() -> ModuleType:
    """The package ``benchmarks`` of the repository, which is not part of an installed dynquant."""
    for folder in (Path(dynquant.__file__).parents[1], Path.cwd()):
        if (folder / "benchmarks" / "cpu" / "suite.py").exists():
            sys.path.insert(0, str(folder))
            return importlib.import_module("benchmarks.cpu.suite")
    raise _fail("bench: no benchmarks/ folder here; run this in a checkout of the repository")


def _items(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(item.strip() for item in text.split(",") if item.strip())


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and picture.")] = Path(
        "benchmarks/results"
    ),
    rows: Annotated[str | None, typer.Option(help="Subset of rows, e.g. 1x768x768,128x768x3072.")] = None,
    threads: Annotated[str | None, typer.Option(help="Thread counts, 1,2 by default.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option("--baselines", "--rivals", help="Subset of baselines, e.g. 'fp32,torch.ao x86'."),
    ] = None,
    sections: Annotated[
        str | None,
        typer.Option(
            help="Subset of linear, avx2, option_cost, kernels, memory, attention, recurrent, encoder, "
            "contention."
        ),
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set, e.g. avx2.")] = None,
    quick: Annotated[bool, typer.Option(help="Short samples, few rounds: a look, not a result.")] = False,
) -> None:
    """Time dynquant beside its baselines and the machine's measured limits."""
    suite = _benchmarks()
    try:
        options = suite.Options.parse(
            out=out,
            rows=_items(rows),
            threads=_items(threads),
            baselines=_items(baselines),
            sections=_items(sections),
            isa=isa,
            quick=quick,
        )
    except ValueError as error:
        raise _fail(f"bench: {error}") from error
    suite.run(options)


if __name__ == "__main__":
    app()
