"""Every op on every instruction set of this machine gives the bits of the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dynquant
from dynquant import _extension, reference
from dynquant.config import EPILOGUES, Config, rotation_block
from dynquant.ops.registry import OPS, Derivative
from tests.support.isas import EVERY_ISA, ISAS, forced
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant

# (M, K, N) by purpose.
SHAPES = {
    "one element": (1, 1, 1),
    "seed layer": (1, 3, 3),
    "GEMV": (1, 768, 768),
    "GEMV, ragged": (1, 77, 201),
    "two rows": (2, 96, 130),
    "deep": (3, 4099, 17),
    "shallow": (65, 2, 300),
    "tile": (6, 64, 64),
    "tile + 1": (7, 65, 65),
    "tile - 1": (5, 63, 63),
    "two tiles + 1": (13, 129, 127),
    "primes": (31, 101, 211),
    "narrow": (9, 40, 5),
    "rows in parallel": (96, 512, 640),
    "channels in parallel": (8, 1024, 2048),
    "parts of K, two rows": (2, 1025, 200),
    "parts of K, few rows": (7, 2309, 129),
    "parts of K, more rows": (11, 2309, 129),
    "no inputs": (4, 0, 9),
    "no inputs, many rows": (13, 0, 70),
    "no rows": (0, 16, 8),
    "no channels": (3, 16, 0),
}
CONFIGS = [
    Config(activations=activations, weights=weights, rotation_block=rotation)
    for activations, weights, rotation in itertools.product(
        ("per_token", "per_tensor"), ("per_channel", "per_tensor"), (0, 1)
    )
]


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rotated(config: Config, k: int) -> Config:
    """The config with its rotation, if any, by the largest block that k allows."""
    if not config.rotation_block:
        return config
    return Config(config.activations, config.weights, rotation_block(k), config.epilogue, config.out_dtype)


class Layer:
    """A random layer: its packed weight and the other arguments of the linear ops beside x."""

    def __init__(self, k: int, n: int, config: Config, bias: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(n, k, generator=generator)
        self.config = config.encode()
        q, scale = reference.quantize_weight(self.weight, self.config)
        packed, weight_sum = reference.pack_weight(q)
        bias_values = torch.randn(n, generator=generator) if bias else None
        self.arguments = (packed, weight_sum, scale.expand(n).contiguous(), bias_values)

    def check(self, x: torch.Tensor) -> None:
        expected = reference.linear_dynamic(x, *self.arguments, self.config)
        assert_same_bits(ops.linear_dynamic(x, *self.arguments, self.config), expected, "linear_dynamic")

    def check_static(self, x: torch.Tensor) -> None:
        qparams = reference.choose_qparams(*reference.min_max(torch.randn(64), False))
        expected = reference.linear_static(x, *self.arguments, *qparams, self.config)
        actual = ops.linear_static(x, *self.arguments, *qparams, self.config)
        assert_same_bits(actual, expected, "linear_static")


@pytest.mark.parametrize("name", EVERY_ISA)
def test_an_isa_is_among_those_compared_below(name: str) -> None:
    """A skipped test per ISA that this machine cannot run, for the summary."""
    if _extension.extension is None:
        pytest.skip(f"kernels not compared with the reference: {_extension.status}")
    if name not in dynquant.available_isas():
        pytest.skip(f"kernels of {name} not compared with the reference: this CPU lacks it")
    with forced(name):
        assert dynquant.isa() == name
    assert name in ISAS


def random_x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activations}-{c.weights}-{c.rotation_block}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear(isa: str, shape: tuple[int, int, int], config: Config) -> None:
    m, k, n = shape
    layer = Layer(k, n, rotated(config, k))
    layer.check(random_x(m, k))
    layer.check_static(random_x(m, k))


@pytest.mark.parametrize(
    "shape", [(96, 512, 640), (8, 1024, 2048), (49, 1030, 700), (50, 1030, 700)], ids=str
)
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_linear_threads(isa: str, threads: int, shape: tuple[int, int, int], activations: str) -> None:
    m, k, n = shape
    layer = Layer(k, n, Config(activations, rotation_block=2))
    layer.check(random_x(m, k))


@pytest.mark.parametrize("rows", [*range(1, 20), 47, 48, 49, 95, 96, 97, 145, 193])
def test_every_row_count(isa: str, rows: int) -> None:
    Layer(70, 100, Config(), bias=False).check(random_x(rows, 70))


@pytest.mark.parametrize(
    "channels", [*range(1, 50), 63, 64, 65, 79, 80, 96, 97, 111, 112, 113, 127, 128, 129]
)
def test_every_channel_tail(isa: str, channels: int) -> None:
    layer = Layer(20, channels, Config())
    for rows in (1, 2, 7):
        layer.check(random_x(rows, 20))


@pytest.mark.parametrize("k", [*range(1, 70), 127, 128, 129, 191, 255, 257])
def test_every_input_tail(isa: str, k: int) -> None:
    layer = Layer(k, 19, Config())
    for rows in (1, 3):
        layer.check(random_x(rows, k))


@pytest.mark.parametrize("signs", [False, True], ids=["", "signs"])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
def test_rotation_blocks(isa: str, block: int, signs: bool) -> None:
    for k in (block, block * 3, block * 5):
        config = Config(rotation_block=block, rotation_signs=signs)
        layer = Layer(k, 33, config)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer.check(random_x(4, k).to(dtype))
        x = random_x(3, k)
        rows = reference.rotate(x, block, signs)
        assert_same_bits(ops.rotate(x, block, signs), rows, "rotate")
        assert_same_bits(ops.rotate_back(rows, block, signs), reference.rotate_back(rows, block, signs))
        torch.testing.assert_close(reference.rotate_back(rows, block, signs) / block, x)
        expected = reference.quantize_weight(layer.weight, config.encode())
        for actual, wanted in zip(ops.quantize_weight(layer.weight, config.encode()), expected, strict=True):
            assert_same_bits(actual, wanted, "quantize_weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "out_dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_dtypes(isa: str, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    for activations in ("per_token", "per_tensor"):
        layer = Layer(45, 37, Config(activations, out_dtype=out_dtype))
        for rows in (1, 8):
            layer.check(random_x(rows, 45).to(dtype))
            layer.check_static(random_x(rows, 45).to(dtype))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_epilogues(isa: str, epilogue: str, dtype: torch.dtype) -> None:
    for n in (3, 64, 150):
        layer = Layer(96, n, Config(epilogue=epilogue))
        layer.check(random_x(9, 96).to(dtype) * 10)
        layer.check(random_x(1, 96).to(dtype))


@pytest.mark.parametrize("small_outputs", [1e-6, 3e-8, 1e-40])
def test_output_casts_round_to_nearest_even(isa: str, small_outputs: float) -> None:
    """Subnormal and overflowing outputs, which conversion instructions may flush."""
    for out_dtype in (torch.bfloat16, torch.float16):
        layer = Layer(32, 48, Config(out_dtype=out_dtype), bias=False)
        for scale in (small_outputs, 1e4, 1e38):
            layer.check(random_x(5, 32) * scale)


@pytest.mark.parametrize("k", [1, 4, 64, 1000, 33_025, 33_026, 66_311, 66_312, 70_001])
def test_all_extreme_operands(isa: str, k: int) -> None:
    """q = -128 or 127 against weights of +-127 everywhere: no saturation, no wrap-around."""
    signs = torch.tensor([[1.0], [-1.0], [1.0]])
    weight = torch.ones(3, k) * signs
    weight[2, ::2] = -1.0
    config = Config().encode()
    q, scale = reference.quantize_weight(weight, config)
    packed, weight_sum = reference.pack_weight(q)
    x = torch.stack([torch.ones(k), -torch.ones(k), torch.where(torch.arange(k) % 2 == 0, -1.0, 1.0)])
    for activations in ("per_token", "per_tensor"):
        code = Config(activations).encode()
        expected = reference.linear_dynamic(x, packed, weight_sum, scale, None, code)
        assert_same_bits(ops.linear_dynamic(x, packed, weight_sum, scale, None, code), expected)
        torch.testing.assert_close(expected, x @ weight.t(), rtol=0.01, atol=0.01 * k)
    extreme = torch.randint(0, 2, (7, k), generator=torch.Generator().manual_seed(0)) * 255 - 128
    extreme = extreme.to(torch.int8)
    assert_same_bits(ops.int8_mm(extreme, packed, weight_sum), reference.int8_mm(extreme, packed, weight_sum))


# Activations whose sums of two or four products are at or beyond the 16-bit limits for any weights: signed
# (128 of one sign) or biased by 128 (256), around zero or with a lower bound.
GROUPS = [
    (64, 64, 1, 0),
    (127, 1, -64, -64),
    (127, 2, 0, 0),
    (-128, 0, 0, -128),
    (-128, -1, 5, 5),
    (32, 32, 32, 32),
    (-32, -33, -32, -32),
    (-128, 127, 127, -128),
    (0, 0, 0, 0),
    (-128, -128, -128, -128),
    (-128, 127, -128, 127),
    (-128, 127, 1, -128),
    (-100, 100, -128, -128),
    (-64, -64, -64, -64),
    (-64, -63, -64, -64),
    (127, 127, 127, 127),
    (-1, 0, 0, 0),
    (1, 0, -128, 127),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 11, 12, 13, 40])
@pytest.mark.parametrize("k", [4, 12, 30, 36, 768, 772, 1546])
@pytest.mark.parametrize("kinds", ["all", "around zero", "cut off", "one"])
def test_products_at_their_bounds(isa: str, rows: int, k: int, kinds: str) -> None:
    """The activations decide which products are exact: each mix of groups, against weights of +-127."""
    generator = torch.Generator().manual_seed(rows * k)
    palette = torch.tensor(GROUPS, dtype=torch.int8)
    if kinds == "around zero":
        palette = palette[:9]
    elif kinds == "cut off":
        palette = palette[[9, 9, 9, 9, 10, 11, 12, 13, 14, 4]]
    groups = (k + 3) // 4
    picks = torch.randint(len(palette), (rows if kinds != "one" else 1, groups), generator=generator)
    q = palette[picks].reshape(-1, groups * 4)[:, :k].expand(rows, k).contiguous()
    weight = (torch.randint(0, 2, (200, k), generator=generator) * 254 - 127).to(torch.int8)
    weight[:6] = torch.tensor([127, -127, 1], dtype=torch.int8).repeat(2)[:, None]
    weight[3:6, ::2] *= -1
    for n in (200, 40, 5):
        packed, weight_sum = reference.pack_weight(weight[:n])
        expected = reference.int8_mm(q, packed, weight_sum)
        assert_same_bits(ops.int8_mm(q, packed, weight_sum), expected, "int8_mm")


@pytest.mark.parametrize("rows", [12, 13, 64])
@pytest.mark.parametrize("k", [64, 770, 1600])
def test_activations_of_many_kinds(isa: str, threads: int, rows: int, k: int) -> None:
    """Neighbouring rows around zero, with a lower or upper bound, with outliers, constant and not finite."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(rows, k, generator=generator)
    makers = [
        lambda row: row,
        lambda row: row.relu(),
        lambda row: torch.nn.functional.gelu(row),
        lambda row: -row.abs(),
        lambda row: torch.where(row > 2.5, row * 20, row),
        lambda row: torch.full_like(row, 3.0),
        lambda row: row * float("inf"),
    ]
    layer = Layer(k, 200, Config())
    per_tensor = Layer(k, 200, Config("per_tensor"))
    for shift in range(len(makers)):
        mixed = torch.stack([makers[(i // 2 + shift) % len(makers)](row) for i, row in enumerate(x)])
        layer.check(mixed)
        layer.check_static(mixed)
        layer.check(makers[shift](x))
        per_tensor.check(makers[shift](x))


def test_depth_beyond_int32(isa: str) -> None:
    """K = 200,000 of ones, which wraps an int32."""
    k = 200_000
    config = Config().encode()
    q, scale = reference.quantize_weight(torch.ones(2, k), config)
    packed, weight_sum = reference.pack_weight(q)
    x = torch.ones(3, k)
    out = ops.linear_dynamic(x, packed, weight_sum, scale, torch.ones(2), config)
    assert_same_bits(out, reference.linear_dynamic(x, packed, weight_sum, scale, torch.ones(2), config))
    torch.testing.assert_close(out, torch.full((3, 2), k + 1.0), rtol=1e-5, atol=0)


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("column", [0, 5, 31, 63, 64, 69])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.activations}-{c.weights}-{c.rotation_block}")
def test_non_finite_in_non_finite_out(isa: str, bad: float, column: int, config: Config) -> None:
    layer = Layer(70, 21, rotated(config, 70))
    x = random_x(8, 70)
    clean = ops.linear_dynamic(x, *layer.arguments, layer.config)
    x[3, column] = bad
    layer.check(x)
    layer.check_static(x)
    out = ops.linear_dynamic(x, *layer.arguments, layer.config)
    assert out[3].isnan().all()
    if config.activations == "per_tensor":
        assert out.isnan().all()
    else:
        others = [0, 1, 2, 4, 5, 6, 7]
        assert_same_bits(out[others], clean[others], "the other rows")


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(isa: str, scale: float) -> None:
    layer = Layer(40, 24, Config())
    x = random_x(5, 40).clamp(-1, 1) * scale
    layer.check(x)
    assert_same_bits(ops.min_max(x, True)[0], reference.min_max(x, True)[0])
    qparams = reference.choose_qparams(*reference.min_max(x, True))
    for actual, expected in zip(ops.choose_qparams(*reference.min_max(x, True)), qparams, strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(ops.quantize(x, *qparams), reference.quantize(x, *qparams))


def test_flush_to_zero_changes_nothing(isa: str) -> None:
    layer = Layer(40, 24, Config())
    x = random_x(5, 40) * 1e-39
    expected = reference.linear_dynamic(x, *layer.arguments, layer.config)
    torch.set_flush_denormal(True)
    try:
        actual = ops.linear_dynamic(x, *layer.arguments, layer.config)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(actual, expected)


def strided_views() -> dict[str, torch.Tensor]:
    base = random_x(12, 10, 48)
    return {
        "1-D": base[0, 0],
        "row slice": base[0, ::3],
        "column slice": base[0, :, 4:40],
        "every other column": base[0, :, ::2],
        "transposed": base[0].t()[:, :8],
        "3-D": base,
        "3-D permuted": base.permute(1, 0, 2),
        "expanded": base[0, :1].expand(7, 48),
        "expanded column": base[0, :, :1].expand(10, 48),
        "unaligned": base.reshape(-1)[3 : 3 + 5 * 48].reshape(5, 48),
    }


@pytest.mark.parametrize("name", strided_views().keys())
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_strides(isa: str, name: str, activations: str) -> None:
    x = strided_views()[name]
    layer = Layer(x.shape[-1], 50, Config(activations))
    layer.check(x)
    layer.check_static(x)
    qparams = reference.choose_qparams(*reference.min_max(x, activations == "per_token"))
    assert_same_bits(ops.quantize(x, *qparams), reference.quantize(x, *qparams))


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 0), (0, 3), (5, 33), (17, 64), (300, 1000), (2, 3, 7)], ids=str
)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_quantizers(
    isa: str, threads: int, shape: tuple[int, ...], per_token: bool, dtype: torch.dtype
) -> None:
    x = random_x(*shape).to(dtype)
    if x.numel() > 4:
        x.view(-1)[2], x.view(-1)[3] = -0.0, float("nan")
    ranges = reference.min_max(x, per_token)
    qparams = reference.choose_qparams(*ranges)
    for actual, expected in zip(ops.min_max(x, per_token), ranges, strict=True):
        assert_same_bits(actual, expected, "min_max")
    for actual, expected in zip(ops.choose_qparams(*ranges), qparams, strict=True):
        assert_same_bits(actual, expected, "choose_qparams")
    assert_same_bits(ops.quantize(x, *qparams), reference.quantize(x, *qparams), "quantize")
    fixed_qparams = torch.tensor([0.01]), torch.tensor([7], dtype=torch.int32)
    assert_same_bits(
        ops.quantize(x, *fixed_qparams), reference.quantize(x, *fixed_qparams), "quantize, fixed qparams"
    )


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (64, 64), (65, 3), (257, 130), (16, 0), (0, 4), (512, 768)], ids=str
)
@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights(isa: str, threads: int, shape: tuple[int, int], weights: str, dtype: torch.dtype) -> None:
    weight = random_x(*shape).to(dtype)
    if shape[0] > 2:
        weight[1] = 0.0
    code = Config(weights=weights).encode()
    q, scale = reference.quantize_weight(weight, code)
    for actual, expected in zip(ops.quantize_weight(weight, code), (q, scale), strict=True):
        assert_same_bits(actual, expected, "quantize_weight")
    packed, weight_sum = reference.pack_weight(q)
    for actual, expected in zip(ops.pack_weight(q), (packed, weight_sum), strict=True):
        assert_same_bits(actual, expected, "pack_weight")
    assert_same_bits(ops.unpack_weight(packed, *shape), q, "unpack_weight")


def test_resident_weight_takes_at_most_1_1_bytes() -> None:
    for n in range(256, 700, 7):
        for k in (128, 129, 130, 768):
            packed, _ = ops.pack_weight(torch.zeros(n, k, dtype=torch.int8))
            assert packed.numel() <= 1.1 * n * k, (n, k)
    for n in range(1, 200):
        packed, _ = ops.pack_weight(torch.zeros(n, 8, dtype=torch.int8))
        assert packed.shape[0] * packed.shape[2] - n < 16, n


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(0, 20),
    k=st.integers(0, 150),
    n=st.integers(0, 150),
    activations=st.sampled_from(["per_token", "per_tensor"]),
    weights=st.sampled_from(["per_channel", "per_tensor"]),
    rotate=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    isa_name=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1.0, 1e-3, 100.0, 1e-38]),
)
def test_drawn_cases(
    m: int,
    k: int,
    n: int,
    activations: str,
    weights: str,
    rotate: bool,
    bias: bool,
    dtype: torch.dtype,
    isa_name: str,
    seed: int,
    magnitude: float,
) -> None:
    with forced(isa_name):
        config = Config(activations, weights, rotation_block(k) if rotate else 0)
        layer = Layer(k, n, config, bias, seed)
        layer.check((random_x(m, k, seed=seed + 1) * magnitude).to(dtype))


def opcheck_cases() -> dict[str, tuple[object, ...]]:
    layer = Layer(24, 10, Config(rotation_block=8))
    q, _ = reference.quantize_weight(layer.weight, layer.config)
    packed, weight_sum, weight_scale, bias = layer.arguments
    x = random_x(3, 4, 24)
    lo, hi = reference.min_max(x, True)
    s, z = reference.choose_qparams(*reference.min_max(x, False))
    square = Layer(24, 24, Config(rotation_block=8))
    wide, narrow = Layer(24, 40, Config(epilogue="gelu")), Layer(40, 24, Config())
    norm = [torch.rand(24), torch.randn(24)]
    around = (list(wide.arguments), list(wide.arguments), list(narrow.arguments))
    configs = [wide.config, wide.config, narrow.config]
    return {
        "min_max": (x, True),
        "choose_qparams": (lo, hi),
        "quantize": (x, s, z),
        "rotate": (x, 8),
        "quantize_weight": (layer.weight, layer.config),
        "pack_weight": (q,),
        "unpack_weight": (packed, 10, 24),
        "int8_mm": (q[:3], packed, weight_sum),
        "linear_dynamic": (x, packed, weight_sum, weight_scale, bias, layer.config),
        "linear_static": (x, packed, weight_sum, weight_scale, bias, s, z, layer.config),
        "linear_norm": (x, list(square.arguments), square.config, x, [], norm, 1e-5, 0),
        "mlp": (x, *around, configs, x, [norm[0], None], [], 1e-5, 1),
        "linear_mlp": (
            *(x, list(square.arguments), *around, [square.config, *configs]),
            *(x, norm, norm, 1e-5, 0, False),
        ),
        "embedding": (torch.tensor([[1, 9], [0, 3]]), q, weight_scale, 24, torch.bfloat16),
        "embedding_bag": (
            *(torch.tensor([1, 9, 3]), torch.tensor([0, 1]), q, weight_scale, torch.rand(3)),
            *(24, 0, False, -1, torch.float32),
        ),
        "embedding_norm": (
            *([torch.tensor([[1, 9], [0, 3]]), torch.tensor([[2, 0]])], [torch.randn(10, 24), q]),
            *([None, weight_scale], 24, norm, 1e-12, 0, torch.float32),
        ),
        "attention": (*(random_x(2, 4, 5, 8, seed=s) for s in range(3)), torch.rand(5, 5) < 0.5, True, 0.3),
    }


REFUSED = [op.name for op in OPS if op.derivative is Derivative.REFUSED]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", opcheck_cases().keys())
def test_opcheck(name: str, requires_grad: bool) -> None:
    if requires_grad and name in REFUSED:
        pytest.skip("this op refuses inputs that require a gradient: test_mlp.py")
    arguments = []
    for argument in opcheck_cases()[name]:
        if requires_grad and isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument = argument.clone().requires_grad_()
        arguments.append(argument)
    torch.library.opcheck(getattr(ops, name).default, tuple(arguments))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("static", [False, True])
def test_gradients(epilogue: str, static: bool) -> None:
    """grad_x = grad_out @ dequantized weight and grad_bias = sum of grad_out, epilogue included."""
    config = Config(epilogue=epilogue, rotation_block=4)
    layer = Layer(12, 7, config)
    packed, weight_sum, weight_scale, bias = layer.arguments
    x, bias = random_x(2, 5, 12).requires_grad_(), bias.clone().requires_grad_()
    qparams = reference.choose_qparams(*reference.min_max(x.detach(), False)) if static else ()
    op = ops.linear_static if static else ops.linear_dynamic
    grad_out = random_x(2, 5, 7, seed=3)
    op(x, packed, weight_sum, weight_scale, bias, *qparams, config.encode()).backward(grad_out)

    dequantized = reference.rotate_back(
        reference.unpack_weight(packed, 7, 12) * weight_scale[:, None], 4, signs=True
    )
    plain = Config(rotation_block=4).encode()
    y = op(x.detach(), packed, weight_sum, weight_scale, bias.detach(), *qparams, plain).requires_grad_()
    functions = {
        "none": lambda y: y,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    }
    functions[epilogue](y).backward(grad_out)
    torch.testing.assert_close(x.grad, y.grad @ dequantized)
    torch.testing.assert_close(bias.grad, y.grad.sum((0, 1)))


def wrong_arguments() -> dict[str, tuple[str, tuple[object, ...], str]]:
    packed, weight_sum, weight_scale, bias = Layer(8, 20, Config()).arguments
    good = (random_x(2, 8), packed, weight_sum, weight_scale, bias)
    nan_weight = random_x(3, 4)
    nan_weight[1, 2] = float("nan")
    return {
        "inner size": ("linear_dynamic", (random_x(2, 16), *good[1:], 0), r"for N = 20 and K = 16"),
        "integers": (
            "linear_dynamic",
            (torch.ones(2, 8, dtype=torch.int64), *good[1:], 0),
            "expected x of dtype",
        ),
        "complex": ("linear_dynamic", (torch.ones(2, 8) * 1j, *good[1:], 0), "expected x of dtype"),
        "scalar": ("linear_dynamic", (torch.tensor(1.0), *good[1:], 0), "at least 1 dimension"),
        "config": ("linear_dynamic", (*good, 1 << 17), "config 131072 has bits"),
        "negative config": ("linear_dynamic", (*good, -1), "config -1 has bits"),
        "rotation": (
            "linear_dynamic",
            (*good, Config(rotation_block=16).encode()),
            r"divides K \(8\), got 16",
        ),
        "bias": (
            "linear_dynamic",
            (*good[:4], torch.ones(3), 0),
            r"expected bias of dtype .* and shape \[20\], got torch.float32 of shape \[3\]",
        ),
        "scale size": (
            "linear_dynamic",
            (*good[:3], torch.ones(5), bias, 0),
            r"weight_sum .* of shape \[5\]",
        ),
        "sum dtype": ("linear_dynamic", (*good[:2], torch.ones(20), *good[3:], 0), "expected weight_sum"),
        "packed dtype": ("linear_dynamic", (good[0], packed.float(), *good[2:], 0), "expected packed_weight"),
        "packed strides": (
            "linear_dynamic",
            (good[0], packed.transpose(2, 3), *good[2:], 0),
            "expected packed_weight",
        ),
        "static scale": (
            "linear_static",
            (*good, torch.ones(2), torch.zeros(2, dtype=torch.int32), 0),
            r"shape \[1\] or \[1\]",
        ),
        "nan weight": ("quantize_weight", (nan_weight, 0), r"got nan at weight\[1, 2\]"),
        "deep accumulators": (
            "int8_mm",
            (torch.ones(1, 140_000, dtype=torch.int8), packed, weight_sum),
            "expected K <= 131071",
        ),
        "rotate block": ("rotate", (random_x(2, 6), 4), r"divides K \(6\), got 4"),
        "float weight": (
            "pack_weight",
            (random_x(2, 6),),
            "expected weight to be int8 with 2 dimensions .* got torch.float32 with 2",
        ),
        "lowest weight": (
            "pack_weight",
            (torch.tensor([[1, 2], [3, -128]], dtype=torch.int8),),
            r"expected weight in \[-127, 127\], got -128 at weight\[1, 1\]",
        ),
    }


# The fake kernels see no values, and on meta a packed weight keeps the layout of either device.
OF_VALUES = ("nan weight", "lowest weight")
FAKE_WORDS = {"inner size": r"expected x.shape\[-1\] to fit packed_weight of shape .* got 16"}


@pytest.mark.parametrize("through", ["op", "reference", "fake"])
@pytest.mark.parametrize("name", wrong_arguments().keys())
def test_errors_are_sentences(name: str, through: str) -> None:
    op, arguments, words = wrong_arguments()[name]
    function = getattr(reference if through == "reference" else ops, op)
    if through != "fake":
        with pytest.raises((RuntimeError, ValueError), match=words):
            function(*arguments)
    elif name not in OF_VALUES:
        with (
            FakeTensorMode() as mode,
            pytest.raises((RuntimeError, ValueError), match=FAKE_WORDS.get(name, words)),
        ):
            function(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))


def test_every_row_of_the_table_is_registered() -> None:
    """The reference for every device, a kernel of the CPU in C++, autograd, and autocast where it counts."""
    own_file = {"rnn"}  # test_rnn.py
    cases = opcheck_cases().keys() | own_file
    assert {op.name for op in OPS} == cases, "a case for opcheck for each op, and no other"
    for op in OPS:
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"dynquant::{op.name}")
        assert has("CompositeExplicitAutograd"), op.name
        assert has("Autograd"), op.name
        in_autocast = op.derivative is Derivative.STRAIGHT_THROUGH
        assert has("AutocastCPU") == has("AutocastCUDA") == in_autocast, op.name
        assert has("CPU") == (_extension.extension is not None), op.name


def test_an_unavailable_isa() -> None:
    if dynquant.isa() == "reference":
        pytest.skip(f"no kernels to choose from: {_extension.status}")
    with pytest.raises(ValueError, match="expected an instruction set that this CPU has .*got 'avx3'"):
        dynquant._C.set_isa("avx3")
