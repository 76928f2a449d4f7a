"""Every op on the card against the reference, on the card and on the CPU, bit for bit.

Each group of cases is judged by itself, so that a fault in one hides nothing of the others. With a CPU device
the same code runs over the CPU kernels, which is how the suite is tested where no card is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant import reference
from dynquant.config import EPILOGUES, Config
from dynquant.config import rotation_block as largest_block

from .bits import difference
from .probe import Dequantization, Forced, Probe, padded
from .stages import Recorder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("per_token", "per_tensor", "static")
# M, N, K: single elements, primes, tile sizes and their neighbours, every way in which K is not a multiple of
# 16.
SHAPES = (
    (1, 1, 1),
    (1, 3, 3),
    (1, 128, 4096),
    (2, 129, 1031),
    (4, 70, 129),
    (5, 64, 64),
    (8, 33, 513),
    (16, 257, 272),
    (17, 31, 100),
    (63, 65, 127),
    (64, 64, 128),
    (65, 130, 1040),
    (128, 96, 48),
    (129, 257, 272),
    (270, 140, 272),
    (300, 520, 1152),
)
EMPTY = ((0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0), (1, 1, 0), (40, 20, 0))
# Rows that a warp, blocks of 128, 256 and 1024 threads hold, and longer ones; odd and even lengths.
ROW_SHAPES = ((5, 1), (11, 3), (9, 64), (3, 1000), (10, 1024), (3, 1025), (2, 4090), (2, 4097), (3, 17000))
LARGE = ((1, 4096, 14336), (16, 14336, 4096), (70_000, 64, 80), (1024, 4096, 4096), (4096, 4096, 4096))
SMALL_LARGE = ((1, 96, 700), (40, 64, 96))  # with a CPU device
SMALL_FORCED = ((5, 33, 80), (17, 31, 100))
FAULTS_SHOWN = 10
MAX_FUZZ_SIZES = (300, 600, 5000)


@dataclass
class Judge:
    """Counts the cases of one group and keeps what differs."""

    name: str
    cases: int = 0
    faults: list[str] = field(default_factory=list)
    error: str = ""

    def same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """One case: ``actual`` has the bits of ``expected``."""
        self.cases += 1
        found = difference(actual, expected)
        if found is not None:
            self.faults.append(f"{what}: {found}")

    def true(self, condition: bool, what: str) -> None:
        """One case that is no comparison of tensors."""
        self.cases += 1
        if not condition:
            self.faults.append(what)

    def entry(self) -> dict[str, Any]:
        return {
            "group": self.name,
            "cases": self.cases,
            "faults": len(self.faults),
            "first_faults": self.faults[:FAULTS_SHOWN],
            "error": self.error,
        }


@dataclass(frozen=True)
class Setting:
    """Where and how long.

    Attributes:
        seed: everything random is drawn from it.
        fuzz_s: seconds of random cases.
        probe: the library with the kernels one by one, None where it is not built.
    """

    device: torch.device
    seed: int
    fuzz_s: float
    probe: Path | None

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"


def run(record: Recorder, setting: Setting) -> int:
    """All groups; returns the number of those with a fault."""
    record.set("seed", setting.seed)
    bad = 0
    for name, check in GROUPS.items():
        judge = Judge(name)
        torch.manual_seed(setting.seed)
        try:
            check(judge, setting)
            if setting.on_card:
                torch.cuda.synchronize()
        except Exception:
            judge.error = traceback.format_exc()[-2000:]
        record.add("groups", judge.entry())
        bad += bool(judge.faults or judge.error)
    return bad


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


# ---- inputs ----


@dataclass(frozen=True)
class Layer:
    """A quantized weight as plain int8 [N, K], from which each device's operands are packed."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    config: Config
    qparams: tuple[Tensor, Tensor] | None

    def on(self, device: torch.device) -> tuple[Any, ...]:
        """What follows x in the arguments of the op."""
        packed_weight, weight_sum = reference.pack_weight(self.weight.to(device))
        bias = None if self.bias is None else self.bias.to(device)
        qparams = () if self.qparams is None else tuple(value.to(device) for value in self.qparams)
        return (
            packed_weight,
            weight_sum,
            self.weight_scale.to(device),
            bias,
            *qparams,
            self.config.encode(),
        )

    @property
    def op(self) -> str:
        return "linear_dynamic" if self.qparams is None else "linear_static"


def make_layer(n: int, k: int, config: Config, *, bias: bool = True, static: bool = False) -> Layer:
    """Random weights of N channels; made on the CPU."""
    weight, scale = reference.quantize_weight(torch.randn(n, k), config.encode())
    qparams = (torch.tensor([0.021]), torch.tensor([-7], dtype=torch.int32)) if static else None
    of_bias = torch.randn(n) if bias else None
    return Layer(weight, scale.expand(n).contiguous(), of_bias, config, qparams)


def awkward_rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows that each have something about them: one sign, constants, largest, smallest, NaN, infinities."""
    x = torch.randn(m, k)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    makers: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda row: row.abs(),
        lambda row: -row.abs(),
        torch.zeros_like,
        lambda row: torch.full_like(row, -3.25),
        lambda row: row.sign() * largest,
        lambda row: row * smallest * 2**-3,
        lambda row: row.index_fill(0, torch.tensor([k // 2]), float("nan")),
        lambda row: row.index_fill(0, torch.tensor([k - 1]), float("inf")),
        lambda row: row.index_fill(0, torch.tensor([0]), -float("inf")),
        lambda row: -torch.zeros_like(row),
    )
    for i in range(m):
        x[i] = makers[i % len(makers)](x[i])
    return x.to(dtype)


def poison(device: torch.device) -> None:
    """Leave garbage in the memory that the allocator hands out next: NaN as a float, -1 as an integer."""
    sizes = [1 << i for i in range(9, 21)] + ([1 << 24] if device.type == "cuda" else [])
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes for _ in range(3)]
    del blocks


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check_op(judge: Judge, op: str, arguments: tuple[Any, ...], what: str, setting: Setting) -> Any:
    """One call with garbage in fresh memory, against the reference here and on the CPU; returns the result.

    For ops whose arguments mean the same on both devices, which a packed weight does not.
    """
    there = [value.cpu() if isinstance(value, Tensor) else value for value in arguments]
    expected_there = as_tuple(getattr(reference, op)(*there))
    expected_here = as_tuple(getattr(reference, op)(*arguments))
    poison(setting.device)
    result = getattr(torch.ops.dynquant, op)(*arguments)
    for i, actual in enumerate(as_tuple(result)):
        judge.same(actual, expected_here[i], f"{op}[{i}] {what}, reference on {setting.device.type}")
        judge.same(actual, expected_there[i], f"{op}[{i}] {what}, reference on cpu")
    return result


def check_linear(
    judge: Judge, layer: Layer, x: Tensor, what: str, setting: Setting, *, on_cpu: bool = True
) -> None:
    """linear_dynamic or linear_static; ``x`` may be anywhere."""
    cpu = torch.device("cpu")
    here = (x.to(setting.device), *layer.on(setting.device))
    expected_here = getattr(reference, layer.op)(*here)
    poison(setting.device)
    actual = getattr(torch.ops.dynquant, layer.op)(*here)
    what = f"{layer.op} {what} {layer.config}"
    judge.same(actual, expected_here, f"{what}, reference on {setting.device.type}")
    if on_cpu:
        expected = getattr(reference, layer.op)(x.cpu(), *layer.on(cpu))
        judge.same(actual, expected, f"{what}, reference on cpu")


# ---- groups ----


def first_call_in_a_capture(judge: Judge, setting: Setting) -> None:
    """A capture must work before anything was loaded or warmed up, so this group is the first."""
    layer = make_layer(48, 96, Config())
    x = torch.randn(3, 96)
    operands = layer.on(setting.device)
    here = x.to(setting.device)
    captured = Captured(
        partial(torch.ops.dynquant.linear_dynamic, here, *operands), setting.device, warm=False
    )
    captured.replay()
    judge.same(captured.result, reference.linear_dynamic(x, *layer.on(torch.device("cpu"))), "first call")


def single_steps(judge: Judge, setting: Setting) -> None:
    for (m, k), dtype in itertools.product((*ROW_SHAPES, (0, 5), (4, 0)), DTYPES):
        inputs = [torch.randn(m, k).to(dtype)]
        if m * k:
            inputs.append(awkward_rows(m, k, dtype))
        for x, per_token in itertools.product(inputs, (True, False)):
            what = f"{[m, k]} {dtype} per_token={per_token}"
            lo, hi = check_op(judge, "min_max", (x.to(setting.device), per_token), what, setting)
            qparams = check_op(judge, "choose_qparams", (lo, hi), what, setting)
            check_op(judge, "quantize", (x.to(setting.device), *qparams), what, setting)
    for block, dtype in itertools.product((1, 2, 4, 8, 16, 32, 64, 128), DTYPES):
        for m, blocks in ((1, 1), (3, 5), (7, 33)):
            x = torch.randn(m, block * blocks).to(dtype).to(setting.device)
            check_op(judge, "rotate", (x, block), f"{[m, block * blocks]} {dtype}", setting)


def accumulators(judge: Judge, setting: Setting) -> None:
    for m, n, k in (*SHAPES, *EMPTY):
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        for name, operand in (("random", q), ("extreme", torch.full_like(q, -128))):
            operands = reference.pack_weight(weight.to(setting.device))
            poison(setting.device)
            actual = torch.ops.dynquant.int8_mm(operand.to(setting.device), *operands)
            expected = (operand.double() @ weight.double().t()).to(torch.int32)
            judge.same(actual, expected, f"int8_mm {[m, n, k]} {name}")


def linears(judge: Judge, setting: Setting) -> None:
    """Every combination of scheme and dtype over all shapes, epilogues and output dtypes taking turns."""
    turns = itertools.cycle(itertools.product(EPILOGUES, (None, *DTYPES), (True, False)))
    for (m, n, k), dtype, activations in itertools.product((*SHAPES, *EMPTY), DTYPES, ACTIVATIONS):
        static = activations == "static"
        for block in {0, largest_block(k)}:
            epilogue, out_dtype, bias = next(turns)
            config = Config(
                activations="per_token" if static else activations,
                rotation_block=block,
                epilogue=epilogue,
                out_dtype=out_dtype,
            )
            layer = make_layer(n, k, config, bias=bias, static=static)
            check_linear(judge, layer, torch.randn(m, k).to(dtype), f"{[m, n, k]} {dtype}", setting)


def awkward_linears(judge: Judge, setting: Setting) -> None:
    for dtype, static, (m, n, k) in itertools.product(DTYPES, (False, True), ((20, 24, 96), (150, 72, 528))):
        x = awkward_rows(m, k, dtype)
        for block, epilogue in itertools.product((0, 16), EPILOGUES):
            config = Config(rotation_block=block, epilogue=epilogue)
            layer = make_layer(n, k, config, static=static)
            check_linear(judge, layer, x, f"awkward {[m, n, k]} {dtype}", setting)
        if not static:
            layer = make_layer(n, k, Config(activations="per_tensor"))
            check_linear(judge, layer, x, f"awkward {[m, n, k]} {dtype}", setting)
            finite = x[x.isfinite().all(1)]
            check_linear(judge, layer, finite, f"finite {[m, n, k]} {dtype}", setting)


def layouts(judge: Judge, setting: Setting) -> None:
    """Leading dimensions, strides, storage that starts anywhere, fp64."""
    config = Config(rotation_block=8)
    layer = make_layer(40, 72, config)
    for dtype in (*DTYPES, torch.float64):

        def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape).to(dtype).to(setting.device)  # strides are made on the device

        base = made(3, 5, 74)
        inputs = {
            "1-D": base[0, 0, :72],
            "3-D": base[..., :72],
            "5-D": base[:, None, :, None, :72],
            "transposed": made(72, 9).t(),
            "every other": made(9, 144)[:, ::2],
            "expanded": made(1, 72).expand(6, 72),
            "offset by one": made(9 * 72 + 1)[1:].view(9, 72),
        }
        for name, x in inputs.items():
            check_linear(judge, layer, x, f"{name} {dtype}", setting)
    # A weight at an odd byte: no 16-byte loads of it.
    packed_weight, *rest = layer.on(setting.device)
    shifted = torch.empty(packed_weight.numel() + 1, dtype=torch.int8, device=setting.device)[1:]
    shifted = shifted.view(packed_weight.shape).copy_(packed_weight)
    for m in (1, 9, 70, 200):
        x = torch.randn(m, 72, device=setting.device)
        actual = torch.ops.dynquant.linear_dynamic(x, shifted, *rest)
        judge.same(actual, reference.linear_dynamic(x, packed_weight, *rest), f"shifted weight, M={m}")


def deep(judge: Judge, setting: Setting) -> None:
    """More k than an int32 accumulator holds."""
    k = 140_000
    weight = torch.full((5, k), 127, dtype=torch.int8)
    weight[1:3] = -127
    weight[4, ::2] = 0
    layer = Layer(weight, torch.full((5,), 0.01), None, Config(), None)
    for m in (1, 6, 20):
        x = torch.ones(m, k)
        x[-1] = -1
        check_linear(judge, layer, x, f"{[m, 5, k]}", setting)


def large(judge: Judge, setting: Setting) -> None:
    for m, n, k in LARGE if setting.on_card else SMALL_LARGE:
        for activations in ("per_token", "per_tensor"):
            layer = make_layer(n, k, Config(activations=activations, epilogue="gelu"))
            x = torch.randn(m, k, dtype=torch.bfloat16)
            check_linear(judge, layer, x, f"{[m, n, k]}", setting, on_cpu=m * n * k < 1 << 30)


def modules(judge: Judge, setting: Setting) -> None:
    """QLinear there and back: the same bits on every device, nn.Linear's values within what 8 bits allow."""
    for activations, rotation in itertools.product(("per_token", "per_tensor"), (None, "hadamard")):
        linear = nn.Linear(96, 50)
        layer = dynquant.QLinear.from_float(linear, activations=activations, rotation=rotation)
        linear.requires_grad_(False)
        x = torch.randn(7, 96)
        expected = layer(x).detach()
        there = layer.to(setting.device)
        judge.same(there(x.to(setting.device)), expected, f"QLinear {activations} {rotation}")
        judge.same(there.cpu()(x), expected, f"QLinear back on the CPU, {activations} {rotation}")
        error = (expected - linear(x)).abs().max() / expected.abs().max()
        judge.true(float(error) < 0.05, f"QLinear {activations} {rotation}: error {float(error):.3f}")


def streams(judge: Judge, setting: Setting) -> None:
    """Work queued on another stream behind a long kernel: launched anywhere else it would read old inputs."""
    for activations, m in itertools.product(("per_token", "per_tensor"), (1, 40, 300)):
        layer = make_layer(272, 288, Config(activations=activations))
        operands = layer.on(setting.device)
        x, new = torch.zeros(m, 288, device=setting.device), torch.randn(m, 288, device=setting.device)
        with other_stream(setting.device):
            x.copy_(new, non_blocking=True)
            actual = torch.ops.dynquant.linear_dynamic(x, *operands)
        expected = reference.linear_dynamic(new, *operands)
        judge.same(actual, expected, f"{activations}, M={m} on another stream")


def graphs(judge: Judge, setting: Setting) -> None:
    """Captured once, replayed with other inputs; split k among them, whose counters each replay needs
    anew."""
    for (m, n, k), activations in itertools.product(
        ((1, 272, 288), (1, 32, 17000), (12, 48, 17000), (40, 96, 4096), (300, 520, 1152)), ACTIVATIONS
    ):
        static = activations == "static"
        config = Config(activations="per_token" if static else activations, epilogue="silu")
        layer = make_layer(n, k, config, static=static)
        operands = layer.on(setting.device)
        x = torch.randn(m, k, device=setting.device)
        op = getattr(torch.ops.dynquant, layer.op)
        captured = Captured(partial(op, x, *operands), setting.device)
        for turn in range(3):
            x.copy_(torch.randn(m, k))
            captured.replay()
            expected = getattr(reference, layer.op)(x, *operands)
            judge.same(captured.result, expected, f"{[m, n, k]} {activations}, replay {turn}")


def repetitions(judge: Judge, setting: Setting) -> None:
    """The same call many times, whatever order blocks finish in."""
    for m, n, k in ((1, 32, 17000), (12, 48, 33000), (40, 96, 8192), (300, 520, 1152)):
        operands = make_layer(n, k, Config(activations="per_tensor")).on(setting.device)
        x = torch.randn(m, k, device=setting.device)
        first = torch.ops.dynquant.linear_dynamic(x, *operands)
        for turn in range(20):
            poison(setting.device)
            judge.same(torch.ops.dynquant.linear_dynamic(x, *operands), first, f"{[m, n, k]}, call {turn}")


def forced_kernels(judge: Judge, setting: Setting) -> None:
    """Every GEMM kernel and tile that this card can run, over shapes that the plan may give to others;
    garbage in the output and around it."""
    if setting.probe is None or not setting.probe.exists():
        raise RuntimeError("the library of single kernels is not built")
    probe = Probe(setting.probe)
    shapes = SHAPES if setting.on_card else SMALL_FORCED
    for one, (m, n, k) in itertools.product(probe.runnable(), shapes):
        if one.kernel == "wgmma":
            k = max(k // 16 * 16, 16)  # it takes aligned rows alone; the plan sees to that
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        layer = make_layer(n, k, Config(epilogue="gelu_tanh"))
        for parts in (1,) if one.kernel == "wgmma" else (1, 3):
            force_one(judge, probe, replace(one, parts=parts), q, layer, setting)


def force_one(judge: Judge, probe: Probe, forced: Forced, q: Tensor, layer: Layer, setting: Setting) -> None:
    """Accumulators and floats of one kernel."""
    device = setting.device
    (m, _), n = q.shape, layer.weight.shape[0]
    scale, zero_point = torch.rand(m) + 0.01, torch.randint(-128, 128, (m,), dtype=torch.int32)
    weight = layer.weight.to(device)
    weight_sum = weight.sum(1, dtype=torch.int32)
    what = f"{forced} {[m, n, q.shape[1]]}"
    exact = q.double() @ layer.weight.double().t()

    out, is_whole = guarded((m, n), torch.int32, device)
    probe.product(padded(q.to(device)), weight, out, None, forced).run()
    judge.same(out, exact.to(torch.int32), f"{what} accumulators")
    judge.true(is_whole(), f"{what}: something was written outside the accumulators")

    bias = None if layer.bias is None else layer.bias.to(device)
    values = Dequantization(
        scale.to(device),
        zero_point.to(device),
        layer.weight_scale.to(device),
        weight_sum,
        bias,
        layer.config.epilogue,
    )
    compensated = exact - zero_point[:, None].double() * weight_sum.cpu().double()
    y = (compensated.to(torch.float32) * scale[:, None]) * layer.weight_scale
    y = reference.apply_epilogue(y if layer.bias is None else y + layer.bias, layer.config.epilogue)
    for dtype in DTYPES:
        out, is_whole = guarded((m, n), dtype, device)
        probe.product(padded(q.to(device)), weight, out, values, forced).run()
        judge.same(out, y.to(dtype), f"{what} {dtype}")
        judge.true(is_whole(), f"{what} {dtype}: something was written outside the output")


def errors(judge: Judge, setting: Setting) -> None:
    """Bad input gets the reference's sentence, and no answer."""
    device = setting.device
    layer = make_layer(20, 8, Config())
    good = (torch.randn(2, 8, device=device), *layer.on(device))
    q = torch.ones(2, 8, dtype=torch.int8, device=device)
    x = good[0]
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("linear_dynamic", (x.to(torch.int8), *good[1:])),
        ("linear_dynamic", (x * 1j, *good[1:])),
        ("linear_dynamic", (x[0, 0], *good[1:])),
        ("linear_dynamic", (torch.randn(2, 16, device=device), *good[1:])),
        ("linear_dynamic", (*good[:2], good[2].long(), *good[3:])),
        ("linear_dynamic", (*good[:4], good[4][:3], *good[5:])),
        ("linear_dynamic", (*good[:-1], 1 << 12)),
        ("linear_dynamic", (*good[:-1], Config(rotation_block=16).encode())),
        ("min_max", (q, True)),
        ("quantize", (x, torch.ones(7, device=device), torch.zeros(7, dtype=torch.int32, device=device))),
        ("choose_qparams", (torch.zeros(3, device=device), torch.zeros(2, device=device))),
        ("rotate", (x, 3)),
        ("int8_mm", (x, good[1], good[2])),
        ("int8_mm", (torch.ones(1, 140_000, dtype=torch.int8, device=device), good[1], good[2])),
    ]
    if setting.on_card:
        for i, name in enumerate(("x", "packed_weight", "weight_sum", "weight_scale", "bias")):
            moved = list(good)
            moved[i] = good[i].cpu()
            if name != "x":
                cases.append(("linear_dynamic", tuple(moved)))
        cases.append(("int8_mm", (q, good[1], good[2].cpu())))
        cases.append(("quantize", (x, torch.ones(1), torch.zeros(1, dtype=torch.int32, device=device))))
        cases.append(("choose_qparams", (torch.zeros(3, device=device), torch.zeros(3))))
    for op, arguments in cases:
        kernel = sentence_of(partial(getattr(torch.ops.dynquant, op), *arguments))
        expected = sentence_of(partial(getattr(reference, op), *arguments))
        judge.true(
            kernel == expected and bool(kernel),
            f"{op}: the kernel says {kernel!r}, the reference {expected!r}",
        )


def fuzz(judge: Judge, setting: Setting) -> None:
    """Shapes, schemes and inputs by chance until the time is up."""
    chance = random.Random(setting.seed)
    deadline = time.monotonic() + setting.fuzz_s
    while time.monotonic() < deadline:
        m, n, k = (max(int(size ** chance.random()), 1) for size in MAX_FUZZ_SIZES)
        static = chance.random() < 0.2
        config = Config(
            activations=chance.choice(("per_token", "per_tensor")),
            weights=chance.choice(("per_channel", "per_tensor")),
            rotation_block=chance.choice((0, largest_block(k))),
            epilogue=chance.choice(EPILOGUES),
            out_dtype=chance.choice((None, *DTYPES, torch.float64)),
        )
        dtype = chance.choice(DTYPES)
        awkward = chance.random() < 0.3
        x = (
            awkward_rows(m, k, dtype)
            if awkward
            else (torch.randn(m, k) * 10 ** chance.uniform(-4, 4)).to(dtype)
        )
        layer = make_layer(n, k, config, bias=chance.random() < 0.7, static=static)
        check_linear(judge, layer, x, f"{[m, n, k]} {dtype} awkward={awkward}", setting)


GROUPS: dict[str, Callable[[Judge, Setting], None]] = {
    "first call in a capture": first_call_in_a_capture,
    "single steps": single_steps,
    "accumulators": accumulators,
    "linear": linears,
    "extreme and non-finite rows": awkward_linears,
    "layouts": layouts,
    "K beyond int32": deep,
    "modules": modules,
    "other stream": streams,
    "graph replays": graphs,
    "repetitions": repetitions,
    "each kernel forced": forced_kernels,
    "errors": errors,
    "large shapes": large,
    "random cases": fuzz,
}


# ---- helpers of the groups ----


def sentence_of(call: Callable[[], object]) -> str:
    """The first line of the error that ``call`` raises; empty where it raises none."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error).split("\n")[0]
    return ""


def guarded(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Callable[[], bool]]:
    """Garbage of this shape amid more of it, and whether what is around it is still untouched."""
    guard = 1024
    size = shape[0] * shape[1] * torch.empty(0, dtype=dtype).element_size()
    memory = torch.full((size + 2 * guard,), 0x5A, dtype=torch.uint8, device=device)
    inside = memory[guard : guard + size].view(dtype).view(shape)

    def is_whole() -> bool:
        around = torch.cat((memory[:guard], memory[guard + size :]))
        return bool((around == 0x5A).all())

    return inside, is_whole


@contextlib.contextmanager
def other_stream(device: torch.device) -> Iterator[None]:
    """A stream that is busy when the body starts, and done when the body is left; on a CPU nothing of it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        yield
    stream.synchronize()


class Captured:
    """A call as a CUDA graph; on a CPU it is simply called again.

    Attributes:
        result: of the last replay.
    """

    def __init__(self, call: Callable[[], Tensor], device: torch.device, *, warm: bool = True) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if warm:
                call()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self.result = call()

    def replay(self) -> None:
        if self._graph is None:
            self.result = self._call()
            return
        self._graph.replay()
        torch.cuda.synchronize()
