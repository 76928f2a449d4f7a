"""What the extension and the Python files must agree on, as a hash. The build reads this file too."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

FUNCTIONS = ("are_in_place", "available_isas", "isa", "run_below_autograd", "set_isa")
"""Those of the extension that the Python files call (``csrc/torch/module.cpp``)."""


def interface_of(package: Path) -> str | None:
    """A hash of the schemas of the ops, of the code that encodes a layer's config and of the names of the
    extension's functions.

    An extension in place (``build_ext --inplace``) stays as it is while the Python files change around it.

    Args:
        package: the folder ``dynquant``.

    Returns:
        16 hexadecimal digits; None where the files cannot be read.
    """
    try:
        registry = ast.parse((package / "ops" / "registry.py").read_text())
        config = ast.parse((package / "config.py").read_text())
    except (OSError, SyntaxError):
        return None
    calls = [node for node in ast.walk(registry) if isinstance(node, ast.Call) and node.args]
    arguments = [call.args[0] for call in calls]
    constants = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
    schemas = [value for value in constants if isinstance(value, str) and "->" in value]
    code = [ast.dump(statement) for statement in config.body if not _is_text(statement)]
    return hashlib.sha256("\n".join([*sorted(schemas), *code, *FUNCTIONS]).encode()).hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring or an import."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
