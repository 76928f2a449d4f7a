"""The table of the ops ``torch.ops.dynquant.*``: names and schemas, with the reference as default kernel.

The extension overrides it for each device (``csrc/torch/*_<device>.cpp``), and brings autograd and autocast
in C++ (a Python kernel on those keys costs microseconds at every call); without it the same formulas are
registered here and in :mod:`dynquant.ops.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import reference
from .._extension import extension

SCHEMAS: dict[str, str] = {
    "min_max": "(Tensor x, bool per_token) -> (Tensor, Tensor)",
    "choose_qparams": "(Tensor lo, Tensor hi) -> (Tensor, Tensor)",
    "quantize": "(Tensor x, Tensor scale, Tensor zero_point) -> Tensor",
    "rotate": "(Tensor x, int block) -> Tensor",
    "quantize_weight": "(Tensor weight, int config) -> (Tensor, Tensor)",
    "pack_weight": "(Tensor weight) -> (Tensor, Tensor)",
    "unpack_weight": "(Tensor packed_weight, int n, int k) -> Tensor",
    "int8_mm": "(Tensor q, Tensor packed_weight, Tensor weight_sum) -> Tensor",
    "linear_dynamic": "(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, "
    "Tensor? bias, int config) -> Tensor",
    "linear_static": "(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias, "
    "Tensor scale, Tensor zero_point, int config) -> Tensor",
}
DIFFERENTIABLE = ("linear_dynamic", "linear_static")

library = torch.library.Library("dynquant", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for the fake kernel of an op."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        # Called in this one file, since torch searches all modules for each file that registers kernels.
        return torch.library.register_fake(f"dynquant::{name}", kernel, lib=library)

    return register


def _without_autograd(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.dynquant, name).default(*args)

    return kernel


if extension is None:
    for _name in SCHEMAS.keys() - set(DIFFERENTIABLE):
        library.impl(_name, _without_autograd(_name), "Autograd")
