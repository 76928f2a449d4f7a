"""The sources of the CUDA kernels, run on the CPU thread by thread in random order, against the reference."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.correctness import DTYPES, awkward_rows
from dynquant import reference
from dynquant.config import EPILOGUES, Config
from dynquant.config import rotation_block as largest_block
from tests.support.cuda_on_host import CudaOnHost, Dequantization, HostError, build
from tests.support.paths import CUDA_SOURCES, TORCH_SOURCES
from tests.support.same_bits import assert_same_bits

SMALL = [("small", (rows, 16)) for rows in (8, 16, 32)]
MMA = [("mma", (64, 64)), ("mma", (128, 128))]
WGMMA = [("wgmma", (128, columns)) for columns in (32, 64, 128, 256)]
# Groups of 32, 64 ... 512 threads hold rows up to 1024, 2048 ... 16384; longer rows are read twice.
ROW_SHAPES = [
    (5, 1),
    (11, 3),
    (9, 64),
    (3, 1000),
    (10, 1024),
    (3, 1025),
    (2, 4090),
    (2, 4097),
    (2, 8193),
    (1, 17000),
]
PRODUCT_SHAPES = [(1, 1, 16), (3, 5, 7), (17, 33, 20), (40, 70, 144), (70, 130, 273), (9, 20, 0)]
LINEAR_SHAPES = [(1, 3, 3), (4, 70, 129), (13, 40, 256), (50, 66, 100)]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda_on_host")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def host(built: Path) -> CudaOnHost:
    return CudaOnHost(built / "libcuda_on_host.so")


@pytest.fixture(autouse=True)
def _newest_device(host: CudaOnHost) -> None:
    torch.manual_seed(1)
    host.set_device(90, 4)
    host.alignment = 1


def random_int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def exact_product(q: Tensor, weight: Tensor) -> Tensor:
    return (q.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.int32)


# ---- single steps ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROW_SHAPES, (0, 5), (4, 0)])
def test_ranges_qparams_quantize(host: CudaOnHost, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cases = itertools.product((torch.randn, awkward_rows), (True, False), (1, 16))
    for make, per_token, host.alignment in cases:
        x = torch.randn(shape).to(dtype) if make is torch.randn or 0 in shape else awkward_rows(*shape, dtype)
        lo, hi = host.min_max(x, per_token)
        for actual, expected in zip((lo, hi), reference.min_max(x, per_token), strict=True):
            assert_same_bits(actual, expected, f"range, per_token={per_token}")
        scale, zero_point = host.choose_qparams(lo, hi)
        for actual, expected in zip((scale, zero_point), reference.choose_qparams(lo, hi), strict=True):
            assert_same_bits(actual, expected, f"qparams, per_token={per_token}")
        q = host.quantize(x, scale, zero_point)
        assert_same_bits(q, reference.quantize(x, scale, zero_point), f"q, per_token={per_token}")


def test_qparams_of_any_ranges(host: CudaOnHost) -> None:
    ends = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-3, 1.0, 254.9, 3e38, float("inf"), float("nan")])
    lo, hi = (-ends).repeat_interleave(len(ends)), ends.repeat(len(ends))
    for actual, expected in zip(host.choose_qparams(lo, hi), reference.choose_qparams(lo, hi), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_with_qparams_that_do_not_fit(host: CudaOnHost, dtype: torch.dtype) -> None:
    x = torch.randn(8, 40)
    x[6], x[7] = float("inf"), float("nan")
    scale = torch.tensor([1e-38, 0.004, 1e30, float("inf"), float("nan"), 0.5, 0.25, 0.25])
    zero_point = torch.tensor([0, 127, -128, 3, 0, 1_000_000_000, 5, 5], dtype=torch.int32)
    x = x.to(dtype)
    assert_same_bits(host.quantize(x, scale, zero_point), reference.quantize(x, scale, zero_point))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
def test_rotate(host: CudaOnHost, block: int, dtype: torch.dtype) -> None:
    for (m, blocks), host.alignment in itertools.product(((1, 1), (3, 5), (7, 33)), (1, 16)):
        x = torch.randn(m, block * blocks).to(dtype)
        for signs in (False, True):
            assert_same_bits(host.rotate(x, block, signs), reference.rotate(x, block, signs))


# ---- products ----


@pytest.mark.parametrize(("kernel", "tile"), [*SMALL, *MMA, *WGMMA])
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
def test_accumulators(
    host: CudaOnHost, kernel: str, tile: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    if kernel == "wgmma":
        k = max(k, 1)  # ensured by the plan
    q, weight = random_int8(m, k), random_int8(n, k)
    expected = exact_product(q, weight)
    for parts, host.alignment in itertools.product((1,) if kernel == "wgmma" else (1, 3), (1, 16)):
        assert_same_bits(host.gemm(kernel, tile, parts, q, weight), expected, f"{parts} parts")


@pytest.mark.parametrize(("kernel", "tile"), [*SMALL, *MMA, *WGMMA])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs(host: CudaOnHost, kernel: str, tile: tuple[int, int], dtype: torch.dtype) -> None:
    """Output rows at multiples of 16 bytes and at other addresses: wgmma writes them by different code."""
    m = 2 * tile[0] + 1 if kernel.startswith("small") else 150
    for n, epilogue, host.alignment in itertools.product((72, 264, 37), ("none", "relu", "gelu"), (1, 16)):
        q, weight = random_int8(m, 48), random_int8(n, 48)
        zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32)
        weight_sum = weight.sum(1, dtype=torch.int32)
        scale, weight_scale = torch.rand(m), torch.rand(n) * 1e-3
        bias = torch.randn(n) if epilogue != "relu" else None
        dequantization = Dequantization(scale, zero_point, weight_sum, weight_scale, bias, epilogue, dtype)
        acc = exact_product(q, weight) - zero_point[:, None] * weight_sum
        y = reference.dequantize(acc, weight_scale, scale, bias)
        expected = reference.apply_epilogue(y, epilogue).to(dtype)
        actual = host.gemm(kernel, tile, 1, q, weight, dequantization)
        assert_same_bits(actual, expected, f"N = {n}, {epilogue}, aligned to {host.alignment}")


@pytest.mark.parametrize("columns", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [500, 300, 70, 17])
def test_wgmma_takes_several_tiles_and_wraps_its_ring(host: CudaOnHost, rows: int, columns: int) -> None:
    """Tiles paired along M or, with an odd number along M, along N; a partial tile copies only its rows."""
    q, weight = random_int8(rows, 1152), random_int8(3 * columns + 8, 1152)
    assert_same_bits(host.gemm("wgmma", (128, columns), 1, q, weight), exact_product(q, weight))


@pytest.mark.parametrize("value", [-128, 127])
def test_accumulators_of_extremes(host: CudaOnHost, value: int) -> None:
    q, weight = torch.full((33, 512), -128, dtype=torch.int8), torch.full((40, 512), value, dtype=torch.int8)
    for kernel, tile in (SMALL[1], MMA[0], WGMMA[0]):
        assert_same_bits(host.gemm(kernel, tile, 1, q, weight), exact_product(q, weight), kernel)


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_int8_mm(host: CudaOnHost, capability: int) -> None:
    host.set_device(capability, 4)
    for m, n, k in ((1, 100, 37), (4, 16, 256), (7, 33, 100), (40, 50, 128), (260, 70, 64), (0, 5, 3)):
        q, weight = random_int8(m, k), random_int8(n, k)
        assert_same_bits(host.int8_mm(q, weight), exact_product(q, weight), f"{m, n, k}")


# ---- whole layers ----


def layer(n: int, k: int, config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, weight_sum, weight_scale [N], bias."""
    weight, scale = reference.quantize_weight(torch.randn(n, k), config.encode())
    return weight, weight.sum(1, dtype=torch.int32), scale.expand(n).contiguous(), torch.randn(n)


def check_linear(
    host: CudaOnHost, x: Tensor, n: int, config: Config, bias: bool = True, static: bool = False
) -> None:
    weight, weight_sum, weight_scale, of_bias = layer(n, x.shape[-1], config)
    qparams = (torch.tensor([0.021]), torch.tensor([-7], dtype=torch.int32)) if static else ()
    operands = (weight_sum, weight_scale, of_bias.to(x.dtype) if bias else None)
    actual = host.linear(x, weight, *operands, config, *qparams)
    function = reference.linear_static if static else reference.linear_dynamic
    expected = function(x, reference.pack_weight(weight)[0], *operands, *qparams, config.encode())
    assert_same_bits(actual, expected, f"{config}, bias={bias}, static={static}")


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_linear(host: CudaOnHost, capability: int, activations: str) -> None:
    host.set_device(capability, 4)
    for (m, n, k), dtype in itertools.product(LINEAR_SHAPES, DTYPES):
        for rotation_block in (0, largest_block(k)):
            config = Config(activations=activations, rotation_block=rotation_block)
            check_linear(host, torch.randn(m, k).to(dtype), n, config)
            if host.launches != 1:
                assert host.launches == (2 if activations == "per_token" else 3)
    check_linear(host, torch.randn(6, 64), 20, Config(activations=activations), static=True)
    assert host.launches == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_few_rows_take_one_launch(host: CudaOnHost, rows: int, dtype: torch.dtype) -> None:
    """Rows of x at multiples of 16 bytes, held in registers up to 2048 or 4096 elements."""
    host.alignment = 16
    for k, activations in itertools.product((16, 1008, 2048, 4096), ("per_token", "per_tensor")):
        for rotation_block, static in itertools.product((0, largest_block(k)), (False, True)):
            config = Config(activations=activations, rotation_block=rotation_block, epilogue="silu")
            check_linear(host, torch.randn(rows, k).to(dtype), 21, config, static=static)
            held = 4096 if rows == 1 else 1024 if rotation_block else 2048
            assert (host.launches == 1) == (k <= held)
    x = awkward_rows(rows + 12, 64, dtype)
    for start in range(0, 12, rows):
        for config in (Config(), Config(activations="per_tensor")):
            check_linear(host, x[start : start + rows], 20, config)
            check_linear(host, x[start : start + rows], 20, config, static=True)
            assert host.launches == 1


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_kernels_compiled_for_an_older_device_do_not_overlap(host: CudaOnHost, activations: str) -> None:
    """PTX of 8.0 on a 9.0 lacks the instruction that waits for the previous kernel."""
    host.set_device(90, 4, code=80)
    config = Config(activations=activations)
    for m, n, k in LINEAR_SHAPES:
        check_linear(host, torch.randn(m, k), n, config)
    x = torch.randn(9, 3000)
    for actual, expected in zip(host.min_max(x, False), reference.min_max(x, False), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_linear_by_wgmma(host: CudaOnHost, activations: str) -> None:
    assert host.plan(270, 140, 272)[0] == "wgmma"
    config = Config(activations=activations, rotation_block=16)
    for dtype, bias in zip(DTYPES, (True, False, True), strict=True):
        check_linear(host, torch.randn(270, 272).to(dtype), 140, config, bias=bias)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 4, 0), (1, 1, 1)])
def test_linear_of_empty_shapes(host: CudaOnHost, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for activations, static in itertools.product(("per_token", "per_tensor"), (False, True)):
        check_linear(host, torch.randn(m, k), n, Config(activations=activations), static=static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_awkward_rows(host: CudaOnHost, dtype: torch.dtype, static: bool) -> None:
    x = awkward_rows(20, 96, dtype)
    for rotation_block, epilogue in itertools.product((0, 32), EPILOGUES):
        check_linear(host, x, 24, Config(rotation_block=rotation_block, epilogue=epilogue), static=static)
    finite = x[x.isfinite().all(1)]
    check_linear(host, finite, 24, Config(activations="per_tensor"))
    check_linear(host, x, 24, Config(activations="per_tensor"))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_linear_epilogues_and_output_types(host: CudaOnHost, epilogue: str) -> None:
    for dtype, out_dtype, bias in itertools.product(DTYPES, (None, *DTYPES), (True, False)):
        config = Config(epilogue=epilogue, out_dtype=out_dtype)
        check_linear(host, torch.randn(18, 48).to(dtype) * 300, 21, config, bias=bias)


def test_linear_of_one_input_and_a_weight_of_zero(host: CudaOnHost) -> None:
    """An accumulator of 0 has no sign: the output is +0."""
    weight, ones = torch.zeros(3, 1, dtype=torch.int8), torch.ones(3)
    operands = (torch.zeros(3, dtype=torch.int32), ones, None)
    x = torch.full((2, 1), -5.0)
    expected = reference.linear_dynamic(x, reference.pack_weight(weight)[0], *operands, 0)
    assert_same_bits(expected, torch.zeros(2, 3))
    assert_same_bits(host.linear(x, weight, *operands, Config()), expected)


def test_linear_of_more_k_than_an_int32_holds(host: CudaOnHost) -> None:
    k = 140_000
    weight = torch.full((5, k), 127, dtype=torch.int8)
    weight[1:3] = -127
    weight[4, ::2] = 0
    weight_sum, weight_scale = weight.sum(1, dtype=torch.int32), torch.full((5,), 0.01)
    for m, capability in ((1, 80), (2, 90), (20, 90)):
        host.set_device(capability, 4)
        x = torch.ones(m, k)
        x[-1] = -1
        config = Config()
        expected = reference.linear_dynamic(
            x, reference.pack_weight(weight)[0], weight_sum, weight_scale, None, config.encode()
        )
        assert expected.abs().max() > 1000
        assert_same_bits(host.linear(x, weight, weight_sum, weight_scale, None, config), expected)


# ---- choices and addresses ----


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_plan_can_run(host: CudaOnHost, capability: int) -> None:
    host.set_device(capability, 132)
    sizes = (0, 1, 4, 5, 16, 17, 128, 129, 1000, 4096, 70_000, 2_000_000)
    for m, n, k in itertools.product(sizes, sizes, (0, 1, 16, 100, 4096, 14336, 65_536, 65_552, 200_000)):
        kernel, tile_m, tile_n, parts, k_of_part = host.plan(m, n, k)
        assert parts * k_of_part >= k > (parts - 1) * k_of_part or (k == 0 and parts == 1)
        assert k_of_part % 256 == 0
        assert k_of_part <= 65_536
        if kernel == "wgmma":
            assert capability == 90
            assert parts == 1
        if m * n < 2**40:  # outputs up to the memory of a device
            assert -(-m // tile_m) * -(-n // tile_n) < 2**31, "blocks along x"
        assert parts <= 65_535, "blocks along y"


def test_plans_for_a_card_with_132_multiprocessors(host: CudaOnHost) -> None:
    host.set_device(90, 132)
    assert host.plan(1, 4096, 4096)[:4] == ("small", 8, 16, 1)
    assert host.plan(8, 4096, 4096)[:4] == ("small", 8, 16, 1)
    assert host.plan(16, 4096, 4096)[:4] == ("small", 16, 16, 1)
    assert host.plan(16, 14336, 4096)[:3] == ("wgmma", 128, 128)
    assert host.plan(17, 4096, 4096)[:4] == ("small", 32, 16, 1)
    assert host.plan(64, 4096, 4096)[:3] == ("wgmma", 128, 32)
    assert host.plan(256, 4096, 4096)[:3] == ("wgmma", 128, 64)
    assert host.plan(512, 4096, 4096)[:3] == ("wgmma", 128, 128)
    assert host.plan(4096, 4096, 4096)[:3] == ("wgmma", 128, 256)
    assert host.plan(4096, 4096, 4100)[:3] == ("wgmma", 128, 256)


def test_tiles_are_each_taken_once(host: CudaOnHost) -> None:
    for tiles_m, tiles_n, band in itertools.product((1, 2, 7, 16, 17), (1, 3, 8), (1, 4, 8)):
        taken = {host.tile_at(index, tiles_m, tiles_n, band) for index in range(tiles_m * tiles_n)}
        assert taken == set(itertools.product(range(tiles_m), range(tiles_n)))


def test_swizzle_of_rows_of_64_bytes(host: CudaOnHost) -> None:
    offsets = [host.offset_in_rows_of_64(row, chunk) for row in range(128) for chunk in range(4)]
    assert sorted(offsets) == list(range(0, 128 * 64, 16))
    for first_row, chunk in itertools.product(range(0, 128, 8), range(4)):
        # The eight rows of one ldmatrix read cover all 32 banks.
        columns = {host.offset_in_rows_of_64(first_row + i, chunk) % 128 for i in range(8)}
        assert len(columns) == 8


def test_wgmma_descriptor(host: CudaOnHost) -> None:
    for address in (0, 1024, 1024 + 32, 196_608 + 96):
        descriptor = host.descriptor_of_rows_of_128(address)
        assert descriptor & 0x3FFF == address >> 4
        assert descriptor >> 32 & 0x3FFF == 64, "8 rows of 128 bytes further, in units of 16"
        assert descriptor >> 62 == 1, "swizzle of 128 bytes"
        assert descriptor >> 49 & 7 == 0, "groups of 8 rows start at multiples of 1024"
    first, further = host.descriptor_of_rows_of_128(2048), host.descriptor_of_rows_of_128(2048 + 64)
    assert further == first + 4, "the kernel adds to the descriptor itself"


def test_only_calls_that_a_graph_capture_allows() -> None:
    """The CUDA part never allocates, never waits for the device, never copies to or from the host."""
    allowed = {
        "cudaDeviceGetAttribute",
        "cudaFuncGetAttributes",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetDriverEntryPointByVersion",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaLaunchKernelEx",
        "cudaMemcpy2DAsync",
        "cudaMemset2DAsync",
        "cudaMemsetAsync",
        "cudaSetDevice",
    }
    bindings = TORCH_SOURCES.glob("*cuda*")
    text = "\n".join(path.read_text() for path in [*CUDA_SOURCES.iterdir(), *bindings])
    assert set(re.findall(r"\bcuda[A-Z]\w+(?=\()", text)) == allowed
    assert "<<<" not in text
    assert set(re.findall(r"\bcudaMemcpy[A-Z]\w+(?=,)", text)) == {"cudaMemcpyDeviceToDevice"}


# ---- the emulator must find planted faults ----

PLANTED = {
    "mma reads a stage that has not arrived": (
        "gemm_mma.cu",
        "__syncthreads();  // the stage has arrived",
        "// the stage has arrived",
    ),
    "mma waits for one group of copies too few": (
        "gemm_mma.cu",
        "copy_async_wait<kStages - 2>",
        "copy_async_wait<kStages - 1>",
    ),
    "mma does not wait for the quantized rows": ("gemm_mma.cu", "ptx::wait_for_previous_kernel();", ""),
    "small does not wait for the columns": (
        "gemm_small.cuh",
        "ptx::copy_async_wait<0>();\n  __syncthreads();  // all warps",
        "__syncthreads();  // all warps",
    ),
    "wgmma's warps do not wait for each other's columns": (
        "gemm_wgmma_sm90.cu",
        "ptx::barrier_of_threads(1 + warpgroup, kWarpgroup);",
        "",
    ),
    "a block reads q before all of it is there": (
        "linear_small.cu",
        "__syncthreads();  // q is there",
        "// q is there",
    ),
    "mma overwrites stages with sums too early": (
        "gemm_mma.cu",
        "ptx::copy_async_wait<0>();\n  __syncthreads();",
        "ptx::copy_async_wait<0>();",
    ),
    "small adds up sums that are not there": (
        "gemm_small.cuh",
        "__syncthreads();  // all warps have stored",
        "// all warps have stored",
    ),
    "kernels overlap that cannot wait": ("kernels.h", "device.code >= 90", "device.capability >= 90"),
    "parts are added before all are stored": ("epilogue.cuh", "== parts - 1", "== parts - 2"),
    "wgmma fills a stage that is still read": (
        "gemm_wgmma_sm90.cu",
        "ptx::barrier_wait(emptied + ring.stage, ring.parity ^ 1);",
        "",
    ),
    "wgmma releases a stage too early": ("gemm_wgmma_sm90.cu", "wgmma_wait<1>", "wgmma_wait<2>"),
    "wgmma's lanes reuse their slice too early": (
        "gemm_wgmma_sm90.cu",
        "__syncwarp();  // the slice has been read\n    }\n  }\n};\n\n// Two",
        "}\n  }\n};\n\n// Two",
    ),
    "wgmma's lanes reuse their rows too early": (
        "gemm_wgmma_sm90.cu",
        "__syncwarp();  // the slice has been read\n    }\n  }\n\n  static",
        "}\n  }\n\n  static",
    ),
    "the range of a row is reduced over old values": (
        "row_chunk.cuh",
        "__syncthreads();  // the ranges of the previous call",
        "// the ranges of the previous call",
    ),
}


def exercise(host: CudaOnHost, file: str, times: int = 1) -> None:
    """Calls the kernels of a file, in a new random order each time."""
    for _ in range(times):
        exercise_once(host, file)


def exercise_once(host: CudaOnHost, file: str) -> None:
    host.set_device(90, 2)
    if file == "kernels.h":
        host.set_device(90, 2, code=80)
        check_linear(host, torch.randn(8, 64), 20, Config())
        return
    if file == "linear_small.cu":
        host.alignment = 16
        check_linear(host, torch.randn(4, 512), 40, Config())
        return
    if file == "row_chunk.cuh":
        x = torch.randn(40, 1100) * torch.logspace(-3, 3, 40)[:, None]
        for actual, expected in zip(host.min_max(x, True), reference.min_max(x, True), strict=True):
            assert_same_bits(actual, expected)
        return
    kernel, tile = WGMMA[2] if "wgmma" in file else MMA[0] if "mma" in file else SMALL[0]
    if kernel == "mma":
        host.set_device(100, 2)  # kernels overlap; no wgmma
    q, weight = random_int8(70, 1152), random_int8(140, 1152)
    for parts, host.alignment in itertools.product((1,) if kernel == "wgmma" else (1, 2), (1, 16)):
        assert_same_bits(host.gemm(kernel, tile, parts, q, weight), exact_product(q, weight), kernel)
    if kernel == "wgmma":
        check_linear(host, torch.randn(300, 1152), 70, Config())
    else:
        check_linear(host, torch.randn(70 if kernel == "mma" else 8, 1152), 70, Config())


@pytest.mark.parametrize("file", sorted({file for file, _, _ in PLANTED.values()}))
def test_without_a_planted_fault_all_is_well(host: CudaOnHost, file: str) -> None:
    exercise(host, file)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, built: Path, tmp_path: Path) -> None:
    file, original, faulty = PLANTED[fault]
    sources = tmp_path / "cuda"
    shutil.copytree(CUDA_SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(original) == 1, f"{file} no longer says {original!r}"
    (sources / file).write_text(text.replace(original, faulty))
    host = CudaOnHost(build(tmp_path, sources, built))
    with pytest.raises((HostError, AssertionError)):
        exercise(host, file, times=8)
