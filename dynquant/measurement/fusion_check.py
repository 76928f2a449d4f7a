"""fuse with a sample: undoes the fusions that change the output of the model."""

from __future__ import annotations

from torch import Tensor, nn

from ..fusion.modules import ActivationFusion, BlockFusion, describe_unfused, fuse_steps
from .layers import Agreement, tensors_in
from .sample import Sample

LEAST_SQNR_DB = 30.0
"""A fused gelu or silu moves a few quantized values by one step; another function is far below this."""


def fuse_checked(model: nn.Module, sample: Sample) -> str | None:
    """:func:`dynquant.fuse`, in place, without the activations whose fusion changes the model's output.

    The whole is judged first; only where it differs is each activation judged by itself.

    Returns:
        The activations that are left as they were, or why nothing is fused, as a clause for a warning.
    """
    expected = _outputs(model, sample)
    fusions = list(fuse_steps(model))
    if not fusions or _agrees(model, sample, expected):
        return describe_unfused(model)
    for fusion in fusions:
        fusion.undo()
    apart: list[ActivationFusion | BlockFusion] = []
    for fusion in fuse_steps(model):
        if not _agrees(model, sample, expected):
            fusion.undo()
            apart.append(fusion)
    if not apart:
        return None
    return f"left apart, since the output of the model would change: {'; '.join(map(str, apart))}"


def _outputs(model: nn.Module, sample: Sample) -> list[Tensor]:
    output = sample.run(model, "the quantized model")
    return [tensor.clone() for tensor in tensors_in(output) if tensor.is_floating_point()]


def _agrees(model: nn.Module, sample: Sample, expected: list[Tensor]) -> bool:
    agreement = Agreement()
    for before, after in zip(expected, _outputs(model, sample), strict=True):
        agreement.add(before, after)
    sqnr = agreement.sqnr_db
    return sqnr is None or sqnr >= LEAST_SQNR_DB
