"""Layers that hold one weight go on holding one when they are loaded, cast or moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..qtensor import QTensor, tensors_of, with_dtype

_REPLACED = "_replaced"
"""Attribute of a QTensor: the call that replaced it in one layer, and by which weight. The call is an object
that every layer of a model is given: the function of ``_apply``, the list of errors of load_state_dict."""


def replaced(old: QTensor, call: object, make: Callable[[], QTensor]) -> QTensor:
    """``make()``, once for all layers of ``call`` that hold ``old``."""
    by, new = vars(old).get(_REPLACED, (None, None))
    if by is not call:
        new = make()
        vars(old)[_REPLACED] = call, new
    while vars(new).get(_REPLACED, (None, None))[0] is call:  # a module with two names loads twice
        new = vars(new)[_REPLACED][1]
    return new


def loaded(old: QTensor, new: QTensor, call: object, assign: bool) -> QTensor:
    """The weight of a layer that held ``old`` and loaded ``new``.

    The values go into the memory of ``old``, as those of a Parameter do: all layers that hold it have them
    then. Where they do not fit (another scheme or device) or are to be assigned, layers whose files hold the
    same values share the first one's weight.
    """
    if not assign and _overwrite(old, new):
        return with_dtype(old, new.dtype)
    first = replaced(old, call, lambda: new)
    return first if first is new or _same_values(first, new) else new


def forget(weights: Iterable[QTensor]) -> None:
    """Have weights that stay in their layers, after all, not keep those that were to replace them."""
    for weight in weights:
        vars(weight).pop(_REPLACED, None)


def _fits(a: QTensor, b: QTensor) -> bool:
    return a.config == b.config and all(
        (x.shape, x.device) == (y.shape, y.device) for x, y in zip(tensors_of(a), tensors_of(b), strict=True)
    )


def _overwrite(old: QTensor, new: QTensor) -> bool:
    if old.shape != new.shape or not _fits(old, new):
        return False
    with torch.no_grad(), torch.inference_mode(False):
        for target, source in zip(tensors_of(old), tensors_of(new), strict=True):
            target.copy_(source)
    return True


def _same_values(a: QTensor, b: QTensor) -> bool:
    if a.dtype != b.dtype or not _fits(a, b) or a.device.type == "meta":
        return False
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))
