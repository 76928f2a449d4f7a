"""Reads of a tensor subclass that torch.jit.trace or torch.compile records, and the methods of Tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .after_import import after_import

BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
REFLECTED = {f"__r{name}__": getattr(operator, name) for name in BINARY} | {"__rdiv__": operator.truediv}
# Of the reflected operators the commutative alone: Python asks a subclass for these before the left operand.
OPERATORS = {
    *(
        f"__{name}__"
        for name in (*BINARY, "radd", "rmul", "and", "or", "xor", "lshift", "rshift", "neg", "pos")
    ),
    *("__abs__", "__invert__", "__getitem__", "__iter__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
}
# Methods that read no values: those of the wrapper are right.
WITHOUT_VALUES = {
    *("as_subclass", "backward", "dim_order", "get_device", "is_coalesced", "is_complex", "is_conj"),
    *("is_distributed", "is_inference", "is_neg", "is_pinned", "is_same_size", "is_set_to", "is_signed"),
    *("ndimension", "nelement", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_"),
    *("retain_grad", "type"),
}


def untraced(get: Callable[..., Any], *args: Any) -> Any:
    """An attribute of the wrapper, such as its shape; torch.jit.trace would record a read of its memory."""
    set_state: Callable[[Any], None] = vars(torch._C)["_set_tracing_state"]  # its stubs lack it
    tracing_state = torch._C._get_tracing_state()
    if tracing_state is not None:
        set_state(None)
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return get(*args)
    finally:
        if tracing_state is not None:
            set_state(tracing_state)


def _give_matmul_its_reflected_form(builtin: Any) -> None:
    """torch.compile hands ``w @ x`` to __torch_function__ as the arguments (x, w) of the reflected method;
    its table lacks that of matmul, and ``x @ w`` would be computed."""
    getattr(builtin, "BUILTIN_TO_TENSOR_RFN_MAP", {}).setdefault(operator.matmul, Tensor.__rmatmul__)


after_import("torch._dynamo.variables.builtin", _give_matmul_its_reflected_form)
