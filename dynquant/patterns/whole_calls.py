"""Which nn.Sequential modules are called as a whole, read from the source of the modules that hold them.

``self.net(x)`` runs nn.Sequential's forward, in which each module's output goes to the next and nowhere else.
A module that calls the parts one by one (``self.net[1](self.net[0](x) + c)``) may do anything between them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

# Methods that prepare a module and call none of its parts.
_PREPARATION = {"__init__", "__setstate__", "extra_repr", "init_weights", "_init_weights", "reset_parameters"}
# Ways to reach a part without its name.
_NAMELESS = {
    "_modules",
    "children",
    "named_children",
    "modules",
    "named_modules",
    "__dict__",
    "get_submodule",
}


def whole_sequentials(model: nn.Module) -> set[int]:
    """The ids of the nn.Sequential modules in ``model`` that are only ever called as a whole, as far as the
    source tells. The model itself counts as one."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    reached_into = {name for kind in kinds for name in _names_reached_into(kind)}
    whole = {id(model)} if is_sequential(model) else set()
    for parent in model.modules():
        kind: Any = type(parent)
        for name, child in parent._modules.items():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                if name not in reached_into and _is_called(kind, name, in_list=True):
                    whole |= {id(part) for part in child.children() if is_sequential(part)}
            elif child is None or not is_sequential(child):
                continue
            elif is_sequential(parent):
                if id(parent) in whole:
                    whole.add(id(child))
            elif name not in reached_into and _is_called(kind, name, in_list=False):
                whole.add(id(child))
    return whole


def is_sequential(module: nn.Module) -> bool:
    """Whether a module's forward is nn.Sequential's."""
    return type(module).forward is nn.Sequential.forward


@cache
def _functions(kind: type) -> tuple[ast.FunctionDef, ...] | None:
    """The methods of a module's type and of its bases; None where the source is not to be had."""
    functions: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            return None
        if not isinstance(tree, ast.ClassDef):
            return None
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name not in _PREPARATION:
                functions.setdefault(node.name, node)
    return tuple(functions.values())


@cache
def _is_called(kind: type, name: str, in_list: bool) -> bool:
    """Whether all that the methods of ``kind`` do with ``self.<name>`` (or with each module in that list) is
    to call it."""
    functions = _functions(kind)
    if functions is None:
        return False
    calls = 0
    for function in functions:
        for use in _uses(function, name, in_list):
            if not use:
                return False
            calls += 1
    return calls > 0


def _uses(function: ast.FunctionDef, name: str, in_list: bool) -> Iterator[bool]:
    """For each use of ``self.<name>`` in a function whether it is a call of the whole; no test for None."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}

    def is_function_of_call(node: ast.AST) -> bool:
        call = parents[node]
        return isinstance(call, ast.Call) and call.func is node

    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _looks_up(node, name):
            yield False
        if not (isinstance(node, ast.Attribute) and _is_self(node.value)):
            continue
        if node.attr in _NAMELESS:
            yield False
        if node.attr != name:
            continue
        parent = parents[node]
        if isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops):
            continue
        if not in_list:
            yield is_function_of_call(node)
        elif isinstance(parent, ast.Subscript):
            yield is_function_of_call(parent)
        else:
            yield _is_loop_of_calls(node, parents)


def _looks_up(call: ast.Call, name: str) -> bool:
    """``vars(self)``, or ``getattr(self, key)`` with a key that may be ``name``."""
    if not (isinstance(call.func, ast.Name) and call.func.id in ("getattr", "vars") and call.args):
        return False
    key = call.args[1] if len(call.args) > 1 else None
    return _is_self(call.args[0]) and not (isinstance(key, ast.Constant) and key.value != name)


def _is_loop_of_calls(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """``for layer in self.layers``, with or without ``enumerate``, in which the layer is only called."""
    parent = parents[node]
    position = 0
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "enumerate":
        node, parent, position = parent, parents[parent], 1
    if not isinstance(parent, (ast.For, ast.comprehension)) or parent.iter is not node:
        return False
    target = parent.target
    if position and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        target = target.elts[1]
    elif position:
        return False
    if not isinstance(target, ast.Name):
        return False
    scope = parent if isinstance(parent, ast.For) else parents[parent]
    uses = [
        use
        for use in ast.walk(scope)
        if isinstance(use, ast.Name) and use.id == target.id and isinstance(use.ctx, ast.Load)
    ]
    return bool(uses) and all(
        isinstance(parents[use], ast.Call) and parents[use].func is use  # type: ignore[attr-defined]
        for use in uses
    )


@cache
def _names_reached_into(kind: type) -> frozenset[str]:
    """Names of parts of other modules that the methods of ``kind`` index or go over: ``block.net[0]``."""
    names = set()
    for function in _functions(kind) or ():
        for node in ast.walk(function):
            inner = node.value if isinstance(node, ast.Subscript) else getattr(node, "iter", None)
            if isinstance(inner, ast.Attribute) and not _is_self(inner.value):
                names.add(inner.attr)
    return frozenset(names)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
