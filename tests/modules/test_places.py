"""Whether a block's parts are where they were: the extension's function and the one of Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from dynquant.nn import block_call

FUNCTIONS: list[Callable[..., bool]] = [block_call._are_in_place, block_call.are_in_place]


@pytest.mark.parametrize("are_in_place", FUNCTIONS, ids=["Python", "in use"])
def test_identity_decides(are_in_place: Callable[..., bool]) -> None:
    value, equal = [1], [1]
    places: dict[str, Any] = {"a": value, "none": None}
    ordered = OrderedDict(b=value)
    dicts, names = (places, places, places, ordered), ("a", "none", "absent", "b")
    values = (value, None, None, value)
    assert are_in_place(values, dicts, names)
    assert are_in_place((), (), ())
    places["a"] = equal
    assert not are_in_place(values, dicts, names)
    places["a"] = value
    places["absent"] = 0
    assert not are_in_place(values, dicts, names)
    del places["absent"]
    ordered.clear()
    assert not are_in_place(values, dicts, names)


@pytest.mark.skipif(
    block_call.are_in_place is block_call._are_in_place, reason="runs without the extension's function"
)
def test_faults() -> None:
    with pytest.raises(ValueError, match="expected tuples of one length"):
        block_call.are_in_place((None,), ({},), ())
    with pytest.raises(TypeError, match="expected dicts"):
        block_call.are_in_place((None,), ([],), ("a",))
    with pytest.raises(TypeError, match="unhashable"):
        block_call.are_in_place((None,), ({},), ([],))
