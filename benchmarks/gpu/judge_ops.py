"""The ops of the extension on the card against the reference on the CPU, bit for bit; one entry per group."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant import _extension, reference
from dynquant.config import EPILOGUES, Config
from dynquant.config import rotation_block as largest_block

from .correctness import (
    DTYPES,
    EMPTY,
    ROW_LENGTHS,
    SHAPES,
    SMALL_SHAPES,
    Int8Layer,
    Judge,
    awkward_rows,
    make_layer,
)
from .setting import Setting

SCHEMES = ("per_token", "per_tensor", "static")
GRAPHS = ((1, 272, 288), (1, 32, 17000), (12, 48, 17000), (40, 96, 4096), (300, 520, 1152))
FUZZED = (300, 600, 5000)  # largest M, N, K
FUZZ_S = 25.0
_ops = torch.ops.dynquant


def run(setting: Setting) -> None:
    """All groups except the fuzzer and the first call in a capture."""
    _require_extension(setting)
    groups = (single_steps, int8_mm, linears, layouts, large_k, modules, other_stream, graphs, errors)
    for group in groups:
        setting.judge(f"ops, {group.__name__}", [], partial(group, setting))


def fuzz(setting: Setting) -> None:
    _require_extension(setting)
    setting.judge("ops, fuzz", [], partial(random_cases, setting))


def first_call_in_a_capture(setting: Setting) -> None:
    """A capture must work in a fresh process, with no kernel loaded or warmed up."""
    _require_extension(setting)
    setting.judge("ops, first call in a capture", [], partial(captured_first, setting))


def _require_extension(setting: Setting) -> None:
    if setting.on_card and _extension.extension is None:
        raise SystemExit(_extension.status)


def check(judge: Judge, setting: Setting, layer: Int8Layer, x: Tensor, case: str) -> None:
    """One linear; ``x`` on any device."""
    poison(setting.device)
    actual = getattr(_ops, layer.op)(x.to(setting.device), *layer.arguments(setting.device))
    judge.same(actual, layer.expected(x), f"{layer.op} {case} {layer.config}")


def poison(device: torch.device) -> None:
    """Fill blocks of the allocator's cache with garbage."""
    blocks = [torch.full((1 << i,), 0xFF, dtype=torch.uint8, device=device) for i in range(9, 21)]
    del blocks


def scheme_of(scheme: str, **more: Any) -> tuple[Config, bool]:
    """The Config, and whether the layer is static."""
    return Config(activations="per_token" if scheme == "static" else scheme, **more), scheme == "static"


# ---- groups ----


def single_steps(setting: Setting, judge: Judge) -> None:
    device = setting.device
    lengths = (3, 64, 1025) if setting.small else ROW_LENGTHS
    for k, dtype, per_token in itertools.product(lengths, DTYPES, (True, False)):
        for x in (torch.randn(11, k).to(dtype), awkward_rows(11, k, dtype), torch.randn(0, k).to(dtype)):
            case = f"{list(x.shape)} {dtype} per_token={per_token}"
            expected = reference.min_max(x, per_token)
            ranges = _ops.min_max(x.to(device), per_token)
            for name, actual, right in zip(("lo", "hi"), ranges, expected, strict=True):
                judge.same(actual, right, f"{name} {case}")
            qparams = reference.choose_qparams(*expected)
            chosen = _ops.choose_qparams(*[value.to(device) for value in expected])
            for name, actual, right in zip(("scale", "zero_point"), chosen, qparams, strict=True):
                judge.same(actual, right, f"{name} {case}")
            q = _ops.quantize(x.to(device), *[value.to(device) for value in qparams])
            judge.same(q, reference.quantize(x, *qparams), f"quantize {case}")
    for block, dtype in itertools.product((1, 2, 4, 8, 16, 32, 64, 128), DTYPES):
        x = torch.randn(7, block * 33).to(dtype)
        for signs in (False, True):
            rotated = _ops.rotate(x.to(device), block, signs)
            judge.same(rotated, reference.rotate(x, block, signs), f"rotate {block} {signs} {dtype}")


def int8_mm(setting: Setting, judge: Judge) -> None:
    for m, n, k in (*SHAPES, *EMPTY):
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        operands = reference.pack_weight(weight.to(setting.device))
        for q in (
            torch.randint(-128, 128, (m, k), dtype=torch.int8),
            torch.full((m, k), -128).to(torch.int8),
        ):
            poison(setting.device)
            expected = (q.double() @ weight.double().t()).to(torch.int32)
            judge.same(_ops.int8_mm(q.to(setting.device), *operands), expected, f"int8_mm {[m, n, k]}")


def linears(setting: Setting, judge: Judge) -> None:
    """Every scheme and dtype over all shapes; epilogues, output dtypes and biases alternate."""
    variants = itertools.cycle(itertools.product(EPILOGUES, (None, *DTYPES, torch.float64), (True, False)))
    shapes = SMALL_SHAPES if setting.small else (*SHAPES, *EMPTY)
    for (m, n, k), dtype, scheme in itertools.product(shapes, DTYPES, SCHEMES):
        for block in {0, largest_block(k)}:
            epilogue, out_dtype, bias = next(variants)
            config, static = scheme_of(scheme, rotation_block=block, epilogue=epilogue, out_dtype=out_dtype)
            layer = make_layer(n, k, config, bias=bias, static=static)
            if layer.bias is not None:
                layer = replace(layer, bias=layer.bias.to(dtype))
            for x in (torch.randn(m, k).to(dtype), *([awkward_rows(m, k, dtype)] if m * k else [])):
                check(judge, setting, layer, x, f"{[m, n, k]} {dtype}")


def layouts(setting: Setting, judge: Judge) -> None:
    """Leading dimensions, strides, storage offsets, fp64."""
    layer = make_layer(40, 72, Config(rotation_block=8))
    for dtype in (*DTYPES, torch.float64):
        randn = partial(torch.randn, dtype=dtype, device=setting.device)
        base = randn(3, 5, 74)
        inputs = {
            "1-D": base[0, 0, :72],
            "5-D": base[:, None, :, None, :72],
            "transposed": randn(72, 9).t(),
            "every other": randn(9, 144)[:, ::2],
            "expanded": randn(1, 72).expand(6, 72),
            "offset by one": randn(3 * 72 + 1)[1:].view(3, 72),
        }
        for name, x in inputs.items():
            check(judge, setting, layer, x, f"{name} {dtype}")


def large_k(setting: Setting, judge: Judge) -> None:
    """K at which an int32 accumulator would overflow."""
    k = 140_000
    weight = torch.full((5, k), 127, dtype=torch.int8)
    weight[1:3] = -127
    weight[4, ::2] = 0
    layer = Int8Layer(weight, torch.full((5,), 0.01), None, Config(), None)
    for m in (1, 6, 20, 200):
        x = torch.ones(m, k)
        x[-1] = -1
        check(judge, setting, layer, x, f"{[m, 5, k]}")


def modules(setting: Setting, judge: Judge) -> None:
    """QLinear moved to the card and back: the same bits on both devices, near nn.Linear's values."""
    for activations, rotation, k in itertools.product(SCHEMES[:2], (None, "hadamard"), (96, 100)):
        linear = nn.Linear(k, 50).requires_grad_(False)
        layer = dynquant.QLinear.from_float(linear, activations=activations, rotation=rotation)
        x, case = torch.randn(7, k), f"QLinear {k} {activations} {rotation}"
        expected = layer(x).detach()
        on_device = layer.to(setting.device)
        judge.same(on_device(x.to(setting.device)).detach(), expected, case)
        judge.same(on_device.cpu()(x).detach(), expected, f"{case}, back on the CPU")
        error = float((expected - linear(x)).abs().max() / expected.abs().max())
        judge.true(error < 0.05, f"{case}: error {error:.3f}")


def other_stream(setting: Setting, judge: Judge) -> None:
    """Calls on another stream behind a long kernel; a launch on the default stream would read old inputs."""
    for scheme, m in itertools.product(SCHEMES[:2], (1, 40, 300)):
        layer = make_layer(272, 288, Config(activations=scheme))
        operands = layer.arguments(setting.device)
        x, new = torch.zeros(m, 288, device=setting.device), torch.randn(m, 288)
        new_on_device = new.to(setting.device)
        if setting.on_card:
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                x.copy_(new_on_device)
                actual = _ops.linear_dynamic(x, *operands)
            stream.synchronize()
        else:
            actual = _ops.linear_dynamic(new_on_device, *operands)
        judge.same(actual, layer.expected(new), f"{scheme}, M={m} on another stream")


def graphs(setting: Setting, judge: Judge) -> None:
    """Captured once, replayed with other inputs; with K in parts, each replay must reset their counters."""
    for (m, n, k), scheme in itertools.product(GRAPHS[:1] if setting.small else GRAPHS, SCHEMES):
        config, static = scheme_of(scheme, epilogue="silu")
        layer = make_layer(n, k, config, static=static)
        x = torch.randn(m, k, device=setting.device)
        replay = captured(setting, partial(getattr(_ops, layer.op), x, *layer.arguments(setting.device)))
        for turn in range(3):
            new = torch.randn(m, k)
            x.copy_(new)
            judge.same(replay(), layer.expected(new), f"{[m, n, k]} {scheme}, replay {turn}")


def errors(setting: Setting, judge: Judge) -> None:
    """Bad input raises the reference's message."""
    device = setting.device
    x, *operands = torch.randn(2, 8, device=device), *make_layer(20, 8, Config()).arguments(device)
    good = (x, *operands)
    q = torch.ones(2, 8, dtype=torch.int8, device=device)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("linear_dynamic", (q, *operands)),
        ("linear_dynamic", (x[0, 0], *operands)),
        ("linear_dynamic", (torch.randn(2, 16, device=device), *operands)),
        ("linear_dynamic", (*good[:2], good[2].long(), *good[3:])),
        ("linear_dynamic", (*good[:4], good[4][:3], *good[5:])),
        ("linear_dynamic", (*good[:-1], Config(rotation_block=16).encode())),
        ("min_max", (q, True)),
        ("quantize", (x, torch.ones(7, device=device), torch.zeros(7, dtype=torch.int32, device=device))),
        ("rotate", (x, 3)),
        ("int8_mm", (x, good[1], good[2])),
    ]
    for i, tensor in enumerate(good[1:5] if setting.on_card else [], 1):
        cases.append(("linear_dynamic", (*good[:i], tensor.cpu(), *good[i + 1 :])))
    for op, arguments in cases:
        ours, right = (message_of(partial(getattr(of, op), *arguments)) for of in (_ops, reference))
        judge.true(ours == right and bool(ours), f"{op}: the kernel raises {ours!r}, the reference {right!r}")


def random_cases(setting: Setting, judge: Judge) -> None:
    """Random shapes, schemes and inputs until the time is up."""
    rng = random.Random(setting.seed)
    deadline = time.monotonic() + (0.5 if setting.small else FUZZ_S)
    while time.monotonic() < deadline:
        m, n, k = (max(int(size ** rng.random()), 1) for size in FUZZED)
        dtype = rng.choice(DTYPES)
        config = Config(
            activations=rng.choice(("per_token", "per_tensor")),
            weights=rng.choice(("per_channel", "per_tensor")),
            rotation_block=rng.choice((0, largest_block(k))),
            epilogue=rng.choice(EPILOGUES),
            out_dtype=rng.choice((None, *DTYPES, torch.float64)),
        )
        x = (torch.randn(m, k) * 10 ** rng.uniform(-4, 4)).to(dtype)
        x = awkward_rows(m, k, dtype) if rng.random() < 0.3 else x
        layer = make_layer(n, k, config, bias=rng.random() < 0.7, static=rng.random() < 0.2)
        check(judge, setting, layer, x, f"{[m, n, k]} {dtype}")


def captured_first(setting: Setting, judge: Judge) -> None:
    layer = make_layer(48, 96, Config())
    x = torch.randn(3, 96)
    call = partial(_ops.linear_dynamic, x.to(setting.device), *layer.arguments(setting.device))
    judge.same(captured(setting, call, warm=False)(), layer.expected(x), "first call")


def captured(setting: Setting, call: Callable[[], Tensor], *, warm: bool = True) -> Callable[[], Tensor]:
    """A function that replays ``call`` as a CUDA graph and returns its result; on a CPU ``call`` itself."""
    if not setting.on_card:
        return call
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if warm:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay(operands: object = call) -> Tensor:  # keeps them alive: the graph holds only addresses
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


def message_of(call: Callable[[], object]) -> str:
    """The first line of the exception of ``call``; empty without one."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error).split("\n")[0]
    return ""
