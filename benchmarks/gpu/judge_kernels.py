"""Each kernel against the reference through the probe, bit for bit: one GEMM tile, the quantize kernel, or
whole forwards on raw pointers. One entry per shape; a fault or an error ends only its own entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from dynquant import reference
from dynquant.config import Config
from dynquant.config import rotation_block as largest_block

from .candidates import Operands
from .correctness import (
    DTYPES,
    EMPTY,
    ROW_LENGTHS,
    SHAPES,
    SMALL_SHAPES,
    Judge,
    awkward_rows,
    guarded,
    make_layer,
)
from .probe import EPILOGUES, TILES, Probe, Tile, padded
from .setting import Setting

LARGE_K = (6, 33, 70_000)  # an int32 accumulator would overflow: K is split into parts
LARGE = ((4096, 4096, 512), (384, 640, 16384))  # many tiles per block, many steps per tile


def gemm(setting: Setting) -> None:
    """The tile of the setting."""
    tile = next(tile for tile in TILES if tile.name == setting.tile)
    probe = setting.probe()
    shapes = SMALL_SHAPES if setting.small else (*SHAPES, *([] if tile.kernel == "wgmma" else [LARGE_K]))
    for shape in shapes:
        setting.judge(tile.name, list(shape), partial(_one_shape, setting, probe, tile, shape))
    for shape in () if setting.small else LARGE:
        setting.judge(tile.name, list(shape), partial(_large_shape, setting, probe, tile, shape))


def _one_shape(setting: Setting, probe: Probe, tile: Tile, shape: tuple[int, int, int], judge: Judge) -> None:
    """Accumulators of random and extreme operands; floats of every dtype, with every epilogue."""
    m, n, k = shape
    device = setting.device
    layer = make_layer(n, k, Config())
    on_device = layer.on(device)
    inputs = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.full((m, k), -128, dtype=torch.int8)
    q = [padded(rows.to(device)) for rows in inputs]
    exact = [rows.double() @ layer.weight.double().t() for rows in inputs]
    scale, zero_point = torch.rand(m) + 0.01, torch.randint(-128, 128, (m,), dtype=torch.int32)
    weight_sum = layer.weight.sum(1, dtype=torch.int32)
    compensated = exact[0] - zero_point[:, None].double() * weight_sum.double()
    assert layer.bias is not None
    plain, biased = (
        reference.dequantize(compensated, layer.weight_scale, scale, bias) for bias in (None, layer.bias)
    )
    # By epilogue and whether the bias is left out.
    expected = {(name, False): reference.apply_epilogue(biased, name) for name in EPILOGUES}
    expected["none", True] = plain
    operands = [replace(on_device, scale=scale.to(device), zero_point=zero_point.to(device))]
    operands.append(replace(operands[0], bias=None))
    for parts in (1,) if tile.kernel == "wgmma" else (1, 3):
        forced = replace(tile, parts=parts)
        for rows, sums, kind in zip(q, exact, ("random", "extreme"), strict=True):
            out, is_whole = guarded((m, n), torch.int32, device)
            call = probe.product(rows, on_device, k, out, forced)
            judge.same(call(), sums.to(torch.int32), f"{call.plan}: accumulators, {kind}")
            judge.true(is_whole(), f"{call.plan}: bytes beside the accumulators were overwritten, {kind}")
        offsets = itertools.cycle((0, 0, 1))  # outputs at aligned and at odd addresses
        for dtype, ((name, without_bias), floats) in itertools.product(DTYPES, expected.items()):
            offset = next(offsets)
            out, is_whole = guarded((m, n), dtype, device, offset)
            call = probe.product(q[0], operands[without_bias], k, out, forced, name)
            case = f"{call.plan}: {dtype}, {name}, bias={not without_bias}, output at element {offset}"
            judge.same(call(), floats.to(dtype), case)
            judge.true(is_whole(), f"{case}: bytes beside the output were overwritten")


def _large_shape(
    setting: Setting, probe: Probe, tile: Tile, shape: tuple[int, int, int], judge: Judge
) -> None:
    """Several calls, compared with an fp64 product on the card, which is exact."""
    operands = Operands(*shape, setting.device)
    for dtype, expected in ((torch.int32, operands.accumulators), (torch.bfloat16, operands.product)):
        out, is_whole = guarded(shape[:2], dtype, setting.device)
        call = probe.product(operands.q, operands.layers[0], shape[2], out, tile)
        for turn in range(3):
            out.fill_(-1)
            judge.same(call(), expected, f"{call.plan}: {dtype}, call {turn}")
        judge.true(is_whole(), f"{tile}: bytes beside the output were overwritten")


def quantize(setting: Setting) -> None:
    """q, scale and zero_point of rows of every length, with and without rotation."""
    probe = setting.probe()
    for k in (3, 64, 1025) if setting.small else ROW_LENGTHS:
        setting.judge("quantize", [11, k], partial(_rows, setting, probe, k))


def _rows(setting: Setting, probe: Probe, k: int, judge: Judge) -> None:
    m, device = 11, setting.device
    blocks = sorted({0, *(block for block in (8, largest_block(k)) if k % block == 0)})
    for dtype, block in itertools.product(DTYPES, blocks):
        inputs = {"random": torch.randn(m, k).to(dtype), "awkward": awkward_rows(m, k, dtype)}
        for kind, x in inputs.items():
            q = torch.full((m, -(-k // 16) * 16), 77, dtype=torch.int8, device=device)
            scale = torch.full((m,), -1.0, device=device)
            zero_point = torch.full((m,), 77, dtype=torch.int32, device=device)
            probe.quantize(x.to(device), q, scale, zero_point, block)
            rows = reference.rotate(x, block, signs=True) if block else x
            qparams = reference.choose_qparams(*reference.min_max(rows, True))
            case = f"{dtype}, {kind}, rotation {block}"
            judge.same(scale, qparams[0], f"scale, {case}")
            judge.same(zero_point, qparams[1], f"zero_point, {case}")
            judge.same(q[:, :k], reference.quantize(rows, *qparams), f"q, {case}")
            judge.true(not q[:, k:].any(), f"zeros beyond K, {case}")


def forward(setting: Setting) -> None:
    """Every scheme; epilogues, output dtypes and biases alternate."""
    probe = setting.probe()
    variants = itertools.cycle(itertools.product(EPILOGUES, DTYPES, (True, False)))
    for shape in SMALL_SHAPES if setting.small else (*EMPTY, *SHAPES, LARGE_K):
        setting.judge("forward", list(shape), partial(_forwards, setting, probe, shape, variants))


def _forwards(
    setting: Setting,
    probe: Probe,
    shape: tuple[int, int, int],
    variants: Iterable[tuple[str, torch.dtype, bool]],
    judge: Judge,
) -> None:
    m, n, k = shape
    schemes = itertools.product(DTYPES, ("per_token", "per_tensor", "static"), {0, largest_block(k)})
    for (dtype, scheme, block), (epilogue, out_dtype, bias) in zip(schemes, variants, strict=False):
        activations = "per_token" if scheme == "static" else scheme
        config = Config(activations=activations, rotation_block=block, epilogue=epilogue)
        layer = make_layer(n, k, config, bias=bias, static=scheme == "static")
        x = torch.randn(m, k).to(dtype) if m * k == 0 or block else awkward_rows(m, k, dtype)
        operands = layer.on(setting.device)
        expected = replace(layer, config=replace(config, out_dtype=out_dtype)).expected(x)
        for separate in (False, True):
            out, is_whole = guarded((m, n), out_dtype, setting.device)
            call = probe.forward(x.to(setting.device), operands, config.encode(), out, separate=separate)
            case = f"{call.plan}: {dtype} -> {out_dtype}, {config}, static={scheme == 'static'}"
            judge.same(call(), expected, case)
            judge.true(is_whole(), f"{case}: bytes beside the output were overwritten")
