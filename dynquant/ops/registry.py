"""The table of the ops ``torch.ops.dynquant.*``, and their registration.

A row gives the schema, the fake kernel and whether the op has derivatives; the reference's function of the
same name is the kernel of every device without one of its own. The extension brings the kernels of the
devices (``csrc/torch/*_<device>.cpp``) and, since a Python kernel on these keys costs microseconds at every
call, autograd and autocast (``csrc/torch/autograd.cpp``); without it :mod:`dynquant.ops.autograd` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from .. import reference
from .._extension import extension
from . import autograd, fake


class Derivative(Enum):
    """What happens where a gradient of an op is asked for."""

    NONE = "its results require no gradient"
    REFUSED = "an error: the caller has another way to compute it"
    SDPA = "derivatives of torch's attention"
    STRAIGHT_THROUGH = "derivatives in x and bias; the output has autocast's dtype under autocast"


@dataclass(frozen=True)
class Op:
    """A row of the table.

    Attributes:
        schema: name, arguments and results, as torch.library.define takes them.
        fake: shape, dtype and device of the results, by the checks that the kernels make.
        derivative: see :class:`Derivative`.
        composed: its layers run as linear_dynamic ops on a device that has no kernel for the whole.
    """

    schema: str
    fake: Callable[..., Any]
    derivative: Derivative = Derivative.NONE
    composed: bool = False

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


OPS: tuple[Op, ...] = (
    Op("min_max(Tensor x, bool per_token) -> (Tensor, Tensor)", fake.min_max),
    Op("choose_qparams(Tensor lo, Tensor hi) -> (Tensor, Tensor)", fake.choose_qparams),
    Op("quantize(Tensor x, Tensor scale, Tensor zero_point) -> Tensor", fake.quantize),
    Op("rotate(Tensor x, int block, bool signs=False) -> Tensor", fake.rotate),
    Op("quantize_weight(Tensor weight, int config) -> (Tensor, Tensor)", fake.quantize_weight),
    Op("pack_weight(Tensor weight, bool full_range=False) -> (Tensor, Tensor)", fake.pack_weight),
    Op("unpack_weight(Tensor packed_weight, int n, int k) -> Tensor", fake.unpack_weight),
    Op("int8_mm(Tensor q, Tensor packed_weight, Tensor weight_sum) -> Tensor", fake.int8_mm),
    Op(
        "linear_dynamic(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, "
        "Tensor? bias, int config) -> Tensor",
        fake.linear_dynamic,
        Derivative.STRAIGHT_THROUGH,
    ),
    Op(
        "linear_static(Tensor x, Tensor packed_weight, Tensor weight_sum, Tensor weight_scale, Tensor? bias, "
        "Tensor scale, Tensor zero_point, int config) -> Tensor",
        fake.linear_static,
        Derivative.STRAIGHT_THROUGH,
    ),
    Op(
        "linear_norm(Tensor x, Tensor?[] layer, int config, Tensor? residual, Tensor?[] norm_in, "
        "Tensor?[] norm_out, float eps, int norm) -> Tensor",
        fake.linear_norm,
        Derivative.REFUSED,
        composed=True,
    ),
    Op(
        "mlp(Tensor x, Tensor?[] gate, Tensor?[] up, Tensor?[] down, int[] configs, Tensor? residual, "
        "Tensor?[] norm_in, Tensor?[] norm_out, float eps, int norm) -> Tensor",
        fake.mlp,
        Derivative.REFUSED,
        composed=True,
    ),
    Op(
        "linear_mlp(Tensor x, Tensor?[] layer, Tensor?[] gate, Tensor?[] up, Tensor?[] down, int[] configs, "
        "Tensor residual, Tensor?[] first_norm, Tensor?[] second_norm, float eps, int norm, bool pre_norm) "
        "-> Tensor",
        fake.linear_mlp,
        Derivative.REFUSED,
        composed=True,
    ),
    Op(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool is_causal=False, "
        "float? scale=None) -> Tensor",
        fake.attention,
        Derivative.SDPA,
    ),
    Op(
        "rnn(Tensor x, Tensor[] state, Tensor?[] input_layer, Tensor?[] hidden_layer, Tensor?[]? projection, "
        "int[] configs, int cell, Tensor? batch_sizes=None, bool reverse=False) -> Tensor[]",
        fake.rnn,
        Derivative.REFUSED,
        composed=True,
    ),
    Op(
        "embedding(Tensor indices, Tensor weight, Tensor weight_scale, int k, ScalarType dtype) -> Tensor",
        fake.embedding,
    ),
    Op(
        "embedding_bag(Tensor indices, Tensor offsets, Tensor weight, Tensor weight_scale, "
        "Tensor? per_sample_weights, int k, int mode, bool include_last_offset, int padding_idx, "
        "ScalarType dtype) -> Tensor",
        fake.embedding_bag,
        Derivative.REFUSED,
    ),
    Op(
        "embedding_norm(Tensor[] indices, Tensor[] tables, Tensor?[] scales, int k, Tensor?[] norm_out, "
        "float eps, int norm, ScalarType dtype) -> Tensor",
        fake.embedding_norm,
        Derivative.REFUSED,
    ),
)

library = torch.library.Library("dynquant", "DEF")


def _default_kernel(op: Op) -> Callable[..., Any]:
    definition: Callable[..., Any] = getattr(reference, op.name)
    if not op.composed:
        return definition

    def kernel(*args: Any) -> Any:
        return definition(*args, linear=torch.ops.dynquant.linear_dynamic.default)

    return kernel


def _register(op: Op) -> None:
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(op.name, _default_kernel(op), "CompositeExplicitAutograd")
    # All fake kernels in this one file: torch searches all modules for each file that registers one.
    torch.library.register_fake(f"dynquant::{op.name}", op.fake, lib=library)
    if op.derivative is Derivative.STRAIGHT_THROUGH:
        if extension is None:
            library.impl(op.name, autograd.with_derivatives(op.name), "Autograd")
            for key in ("AutocastCPU", "AutocastCUDA"):
                library.impl(op.name, autograd.with_autocast_dtype(op.name, key), key)
        return
    if op.derivative is Derivative.SDPA:
        if extension is None:
            library.impl(op.name, autograd.with_derivatives_of_sdpa(op.name), "Autograd")
        return
    refuses = op.derivative is Derivative.REFUSED
    if extension is not None:
        extension.run_below_autograd(op.name, refuses)
    else:
        library.impl(op.name, autograd.below_autograd(op.name, refuses), "Autograd")


for _op in OPS:
    _register(_op)

# For the derivatives in csrc/torch/autograd.cpp: other ops, whose derivatives have every order.
library.define("activation(Tensor y, int epilogue) -> Tensor")
library.impl("activation", autograd.activation, "CompositeImplicitAutograd")
library.define("activation_backward(Tensor grad, Tensor y, int epilogue) -> Tensor")
library.impl("activation_backward", autograd.activation_backward, "CompositeImplicitAutograd")
library.define("rotate_back(Tensor x, int block, bool signs) -> Tensor")
library.impl("rotate_back", reference.rotate_back, "CompositeImplicitAutograd")
