"""Bad input raises the same message on all paths: the checks of the kernels and of the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynquant import reference
from dynquant._extension import extension, read_record
from dynquant.config import Config
from dynquant.reference import layout

N, K = 20, 8
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def good() -> dict[str, Tensor]:
    """Arguments of the ops by name."""
    weight, weight_scale = reference.quantize_weight(torch.randn(N, K), 0)
    packed_weight, weight_sum = reference.pack_weight(weight)
    return {
        "x": torch.randn(2, K),
        "q": torch.ones(2, K, dtype=torch.int8),
        "weight": weight,
        "packed_weight": packed_weight,
        "weight_sum": weight_sum,
        "weight_scale": weight_scale,
        "bias": torch.zeros(N),
        "lo": torch.zeros(3),
        "hi": torch.ones(3),
        "scale": torch.ones(1),
        "zero_point": torch.zeros(1, dtype=torch.int32),
    }


LINEAR = ("x", "packed_weight", "weight_sum", "weight_scale", "bias")
OPERANDS = {
    "min_max": ("x",),
    "choose_qparams": ("lo", "hi"),
    "quantize": ("x", "scale", "zero_point"),
    "rotate": ("x",),
    "int8_mm": ("q", "packed_weight", "weight_sum"),
    "linear_dynamic": LINEAR,
    "linear_static": (*LINEAR, "scale", "zero_point"),
}
LAST: dict[str, tuple[int, ...]] = {
    "min_max": (True,),
    "rotate": (1,),
    "linear_dynamic": (0,),
    "linear_static": (0,),
}

# A replaced operand and a part of the message.
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "x int8": (lambda x: x.to(torch.int8), "got torch.int8"),
    "x complex": (lambda x: x * 1j, "got torch.complex64"),
    "x scalar": (lambda x: x[0, 0], "at least 1 dimension, got 0"),
    "q float": (lambda q: q.float(), "got torch.float32 with 2"),
    "q of 3 dimensions": (lambda q: q[None], "got torch.int8 with 3"),
    "packed_weight float": (lambda w: w.float(), "got torch.float32 of shape"),
    "packed_weight strides": (lambda w: w.transpose(0, -1), "got torch.int8 of shape"),
    "weight_sum int64": (lambda s: s.long(), r"contiguous torch.int32 of shape \[20\], got torch.int64"),
    "weight_scale half": (lambda s: s.half(), "contiguous torch.float32 .* got torch.float16 of shape"),
    "weight_scale short": (lambda s: s[:5], r"of shape \[5\], got torch.int32 of shape \[20\]"),
    "bias int32": (lambda b: b.int(), r"expected bias .* got torch.int32 of shape \[20\]"),
    "bias short": (lambda b: b[:3], r"expected bias .* shape \[20\], got torch.float32 of shape \[3\]"),
    "bias of 2 dimensions": (lambda b: b[None], r"expected bias .* of shape \[1, 20\]"),
    "lo half": (lambda lo: lo.half(), r"got torch.float16 of shape \[3\] and torch.float32"),
    "hi short": (lambda hi: hi[:1], r"of shape \[3\] and torch.float32 of shape \[1\]"),
    "scale double": (lambda s: s.double(), "got torch.float64 and torch.int32"),
    "zero_point int8": (lambda z: z.to(torch.int8), "got torch.float32 and torch.int8"),
    "scale of other shape": (lambda s: s.expand(7).contiguous(), r"or \[[12]\], got \[7\] and \[1\]"),
}


def _cases() -> list[tuple[str, str]]:
    cases = []
    for op, operands in OPERANDS.items():
        cases += [(op, change) for change in CHANGES if change.split()[0] in operands]
        cases += [(op, f"{name} elsewhere") for name in operands[1:]]
    # int8_mm takes its size from either of these operands.
    return [case for case in cases if case[0] != "int8_mm" or case[1] != "weight_scale short"]


def _changed(op: str, change: str) -> tuple[list[object], str]:
    """The arguments of a case, and a part of its message."""
    operands = good()
    name = change.split()[0]
    if change.endswith("elsewhere"):
        operands[name] = operands[name].to("meta")
        first = OPERANDS[op][0]
        words = f"^{op}: expected all tensors on one device, got {first} on cpu and {name} on meta"
    else:
        make, words = CHANGES[change]
        operands[name] = make(operands[name])
    return [*(operands[operand] for operand in OPERANDS[op]), *LAST.get(op, ())], words


def _message(function: Callable[..., object], arguments: list[object], words: str) -> str:
    with pytest.raises(RuntimeError, match=words) as caught:
        function(*arguments)
    return str(caught.value).split("\n")[0]


def _kernel(op: str, keys: torch._C.DispatchKeySet) -> Callable[..., object]:
    """The kernel of one device, for arguments on any device."""
    overload = getattr(torch.ops.dynquant, op).default
    return lambda *arguments: overload.redispatch(keys, *arguments)


@pytest.mark.parametrize(("op", "change"), _cases())
def test_kernels_and_reference_say_the_same(op: str, change: str) -> None:
    arguments, words = _changed(op, change)
    expected = _message(getattr(reference, op), arguments, words)
    assert expected.startswith(f"{op}: ")
    assert _message(_kernel(op, CPU), arguments, words) == expected
    # The CUDA kernels check their arguments before they look for a device, so no GPU is needed.
    built = extension is not None and read_record()["cuda"]["built"]
    shape_of_cpu = change.startswith("packed_weight ") and not change.endswith("elsewhere")
    if built and not shape_of_cpu:
        assert _message(_kernel(op, CUDA), arguments, words) == expected


@pytest.mark.parametrize("op", ["linear_dynamic", "linear_static"])
def test_rotation_that_does_not_fit(op: str) -> None:
    arguments, _ = _changed(op, "x elsewhere")
    arguments[0] = good()["x"]
    arguments[-1] = Config(rotation_block=16).encode()
    words = rf"^{op}: expected block to be a power of two up to 128 that divides K \(8\), got 16"
    assert _message(getattr(torch.ops.dynquant, op), arguments, words) == _message(
        getattr(reference, op), arguments, words
    )


@pytest.mark.parametrize("op", ["linear_dynamic", "linear_static"])
def test_x_of_another_layer(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = good()
    config = Config().encode(in_features=K - 1)
    arguments = [*(operands[name] for name in OPERANDS[op]), config]
    words = rf"^{op}: expected x\.shape\[-1\] to be {K - 1} modulo 16, as config says, got {K}"
    expected = _message(getattr(reference, op), arguments, words)
    assert _message(_kernel(op, CPU), arguments, words) == expected
    if extension is not None and read_record()["cuda"]["built"]:
        monkeypatch.setattr(layout, "packs_in_panels", lambda device: False)
        arguments[1] = reference.pack_weight(operands["weight"])[0]
        assert _message(_kernel(op, CUDA), arguments, words) == expected


@pytest.mark.parametrize("zero_point", [-129, 128, 2**31 - 1])
def test_zero_point_that_no_int8_has(zero_point: int) -> None:
    """acc - zero_point * weight_sum would wrap."""
    operands = good() | {"zero_point": torch.tensor([zero_point], dtype=torch.int32)}
    arguments = [*(operands[name] for name in OPERANDS["linear_static"]), 0]
    words = rf"^linear_static: expected zero_point in \[-128, 127\], got {zero_point}"
    for function in (torch.ops.dynquant.linear_static, reference.linear_static):
        _message(function, arguments, words)


@pytest.mark.parametrize("op", ["linear_dynamic", "linear_static"])
@pytest.mark.parametrize("config", [-1, 17 << 12, 1 << 17, 9 << 2, 7 << 6])
def test_config_that_no_version_knows(op: str, config: int) -> None:
    operands = good()
    arguments = [*(operands[name] for name in OPERANDS[op]), config]
    for function in (getattr(torch.ops.dynquant, op), getattr(reference, op)):
        with pytest.raises(ValueError, match=rf"dynquant: config {config} has bits that this version"):
            function(*arguments)


@pytest.mark.parametrize("weight", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3) * 1j])
def test_weights_that_cannot_be_quantized(weight: Tensor) -> None:
    words = f"^quantize_weight: expected weight of dtype .* got {weight.dtype}"
    functions = (torch.ops.dynquant.quantize_weight, reference.quantize_weight)
    messages = {_message(function, [weight, 0], words) for function in functions}
    assert len(messages) == 1
