"""The op rnn: the bits of the reference, torch's values, non-finite sequences, and errors by their words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dynquant import ops as registered
from dynquant import reference
from dynquant.config import CELLS, Config, rotation_block
from dynquant.reference import epilogue as written
from dynquant.reference.linear import linear_fp32
from dynquant.reference.rnn import GATES
from tests.support.isas import ISAS, forced
from tests.support.same_bits import assert_same_bits

ops = torch.ops.dynquant
assert registered is not None

KINDS = (*CELLS, "projected")
"""Every cell, and an LSTM with a projection."""


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layer(k: int, n: int, seed: int, bias: bool, activations: str, rotate: bool) -> tuple[list[Any], int]:
    generator = torch.Generator().manual_seed(seed)
    config = Config(activations, rotation_block=rotation_block(k) if rotate else 0)
    weight = (torch.rand(n, k, generator=generator) * 2 - 1) * 2 / max(k, 1) ** 0.5
    q, scale = reference.quantize_weight(weight, config.encode())
    packed, weight_sum = reference.pack_weight(q)
    tensors = [packed, weight_sum, scale, torch.randn(n, generator=generator) / 2 if bias else None]
    return tensors, config.encode(k)


def arguments(
    kind: str,
    steps: int,
    batch: int,
    k: int,
    hidden: int,
    *,
    sizes: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activations: str = "per_token",
    rotate: bool = False,
    reverse: bool = False,
    float_input: bool = False,
) -> dict[str, Any]:
    """The arguments of a call; ``sizes``: of a packed batch."""
    cell = "lstm" if kind == "projected" else kind
    generator = torch.Generator().manual_seed(steps + 7 * batch + 31 * k)
    out = max(1, hidden // 2) if kind == "projected" else hidden
    scheme = bias, activations, rotate
    gated = GATES[cell] * hidden
    of_input, of_hidden = layer(k, gated, 1, *scheme), layer(out, gated, 2, *scheme)
    if float_input:
        weight = torch.randn(gated, k, generator=generator) / max(k, 1) ** 0.5
        of_input = [weight.to(dtype), of_input[0][3]], Config().encode(k)
    projection = layer(hidden, out, 3, False, *scheme[1:]) if kind == "projected" else ([], 0)
    shape = (steps, batch, k) if sizes is None else (sum(sizes), k)
    state = [torch.randn(batch, out, generator=generator) / 2]
    state += [torch.randn(batch, hidden, generator=generator)] if cell == "lstm" else []
    return {
        "x": (torch.randn(shape, generator=generator) * 2).to(dtype),
        "state": [tensor.to(dtype) for tensor in state],
        "input_layer": of_input[0],
        "hidden_layer": of_hidden[0],
        "projection": projection[0],
        "configs": [of_input[1], of_hidden[1], projection[1]],
        "cell": CELLS.index(cell),
        "batch_sizes": None if sizes is None else torch.tensor(sizes),
        "reverse": reverse,
    }


def check(given: dict[str, Any]) -> list[Tensor]:
    actual, expected = ops.rnn(**given), reference.rnn(**given)
    for name, a, b in zip(("out", "h", "c"), actual, expected, strict=False):
        assert_same_bits(a, b, name)
    assert len(actual) == len(expected)
    return actual


_EXPECTED: dict[str, list[Tensor]] = {}
"""What the reference gave for a call, once for all instruction sets and threads."""


def check_call(kind: str, *shape: int, **options: Any) -> None:
    """The bits of the reference for a call of :func:`arguments`."""
    given, call = arguments(kind, *shape, **options), repr((kind, shape, options))
    if call not in _EXPECTED:
        _EXPECTED[call] = reference.rnn(**given)
    for name, a, b in zip(("out", "h", "c"), ops.rnn(**given), _EXPECTED[call], strict=False):
        assert_same_bits(a, b, name)


# (T, B, K, H): one step and one sequence, tails of vectors and panels, several chunks of time steps.
SHAPES = [(1, 1, 3, 5), (3, 2, 16, 16), (40, 1, 24, 32), (7, 9, 33, 40), (30, 13, 64, 72)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits(isa: str, kind: str, shape: tuple[int, int, int, int], reverse: bool) -> None:
    with forced(isa):
        check_call(kind, *shape, reverse=reverse)


@pytest.mark.parametrize("batch", [1, 4, 9, 16, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_threads(threads: int, kind: str, batch: int) -> None:
    check_call(kind, 12, batch, 48, 256)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", ["lstm", "gru", "projected"])
def test_threads_share_a_step(threads: int, kind: str, batch: int) -> None:
    """A weight that takes long enough to read for each step to use all threads."""
    check_call(kind, 3, batch, 20, 1060)


SIZES = [[3], [4, 4, 3, 1, 1], [9, *[7] * 30, 2, 1], [40, 33, 20, 20, 8, 7, 6, 1]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(isa: str, kind: str, sizes: list[int], reverse: bool) -> None:
    check_call(kind, 0, sizes[0], 20, 24, sizes=sizes, reverse=reverse)


@pytest.mark.parametrize("sizes", SIZES[1:], ids=len)
def test_packed_sequences_on_threads(threads: int, sizes: list[int]) -> None:
    check_call("lstm", 0, sizes[0], 64, 320, sizes=sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    given = arguments(kind, 6, 5, 24, 24, dtype=dtype)
    assert all(tensor.dtype == dtype for tensor in check(given))
    given["configs"][0] = Config(out_dtype=torch.float32).encode(24)
    assert all(tensor.dtype == torch.float32 for tensor in check(given))


@pytest.mark.parametrize("sizes", [None, [9, 9, 4, 1]])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_schemes(isa: str, kind: str, activations: str, rotate: bool, sizes: list[int] | None) -> None:
    check_call(kind, 30, 9, 40, 24, activations=activations, rotate=rotate, sizes=sizes, bias=not rotate)


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_schemes_on_threads(threads: int, activations: str) -> None:
    check_call("lstm", 8, 16, 64, 320, activations=activations)


# K and H: tails of vectors and panels, one row of a tile and whole tiles.
@pytest.mark.parametrize("sizes", [None, [9, 9, 4, 1]], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 9, 40, 64), (30, 9, 13, 23), (7, 9, 67, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float_inputs(isa: str, kind: str, shape: tuple[int, int, int, int], sizes: list[int] | None) -> None:
    if sizes is None or shape[1] == sizes[0]:
        check_call(kind, *shape, float_input=True, sizes=sizes, reverse=sizes is None, bias=shape[0] > 1)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_float_inputs_on_threads(threads: int, batch: int) -> None:
    check_call("lstm", 12, batch, 48, 256, float_input=True)
    check_call("gru", 3, batch, 20, 1060, float_input=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float_inputs_of_every_dtype(dtype: torch.dtype) -> None:
    """Weight, bias and x have any float dtype, the weight any strides; the sums are those of fp64."""
    given = arguments("lstm", 6, 5, 24, 24, dtype=dtype, float_input=True)
    assert all(tensor.dtype == dtype for tensor in check(given))
    given["configs"][0] = Config(out_dtype=torch.float32).encode(24)
    out = check(given)[0]
    weight, bias = given["input_layer"]
    for view in (weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :24], weight.float()):
        assert_same_bits(ops.rnn(**given | {"input_layer": [view, bias]})[0], out)
    x = torch.randn(7, 24)
    exact = x.double() @ weight.double().t() + bias.double()
    assert (linear_fp32(x, weight, bias) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_row_of_a_float_input(isa: str, kind: str, bad: float) -> None:
    """NaN for its own sequence from that step on, not the gates that saturate at an infinity."""
    given = arguments(kind, 5, 9, 16, 16, float_input=True)
    given["x"][2, 1, 3] = bad
    nan = check(given)[0].isnan().all(-1)
    assert nan.any(1).tolist() == [False, False, True, True, True]
    assert nan[2].tolist() == [i == 1 for i in range(9)]


def test_zeros_and_extremes_of_a_float_input(isa: str) -> None:
    given = arguments("lstm", 4, 2, 16, 16, float_input=True)
    given["x"][0] = 0
    given["x"][1] = -0.0
    given["x"][2] = 1e-42
    given["x"][3] = 3e38
    check(given)


def test_strides_do_not_matter() -> None:
    given = arguments("gru", 6, 5, 24, 16)
    x = given["x"]
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., :24], x.flip(0).flip(0)]
    for view in views:
        for a, b in zip(check(given | {"x": view}), ops.rnn(**given), strict=True):
            assert_same_bits(a, b)
    state = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in given["state"]]
    check(given | {"state": state})


@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind: str) -> None:
    no_steps = arguments(kind, 0, 3, 8, 8)
    out, *state = check(no_steps)
    assert out.shape[:2] == (0, 3)
    for actual, given in zip(state, no_steps["state"], strict=True):
        assert_same_bits(actual, given)
    assert check(arguments(kind, 4, 0, 8, 8))[0].shape[:2] == (4, 0)


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_input_rules_out_its_own_sequence(kind: str, bad: float, activations: str) -> None:
    given = arguments(kind, 5, 4, 16, 16, activations=activations)
    given["x"][2, 1, 3] = bad
    out, *state = check(given)
    if activations == "per_tensor":
        assert out.isnan().all()
        return
    nan = out.isnan().all(-1)
    assert nan[:, 1].tolist() == [False, False, True, True, True]
    assert not out[:, [0, 2, 3]].isnan().any()
    assert all(tensor.isnan().all(1).tolist() == [False, True, False, False] for tensor in state)


def test_a_non_finite_state() -> None:
    given = arguments("lstm", 2, 3, 16, 16)
    given["state"][0][1, 2] = math.inf
    given["state"][1][2, 4] = math.inf
    out, _, c = check(given)
    assert out[:, 1].isnan().all()
    assert out[:, [0, 2]].isfinite().all()
    assert c[2, 4] == math.inf or c[2, 4].isfinite()


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_gate_functions(name: str) -> None:
    """Within the bound of the epilogues, for every bf16 pattern and around the bends; exact at the ends."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([every[every.isfinite()], torch.linspace(-12, 12, 1 << 18), torch.linspace(-1, 1, 1 << 16)])
    y, exact = getattr(written, name)(x).double(), getattr(torch, name)(x.double())
    assert ((y - exact).abs() <= 2.0**-18 * exact.abs().clamp(min=2.0**-8)).all()
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    expected = {"sigmoid": [math.nan, 1.0, 0.0, 0.5, 0.5], "tanh": [math.nan, 1.0, -1.0, 0.0, 0.0]}[name]
    assert_same_bits(getattr(written, name)(special), torch.tensor(expected))


def test_gate_functions_of_extreme_products(isa: str) -> None:
    """The bias alone, over every exponent: what no product of a test reaches."""
    bits = torch.arange(-(2**15), 2**15, 8, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    bits = bits[: bits.shape[0] // 4 * 4]
    hidden = bits.shape[0] // 4
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        gated = GATES[kind] * hidden
        nothing = torch.zeros(gated, 0, dtype=torch.int8)
        of_input = [*reference.pack_weight(nothing), torch.ones(gated), bits[:gated].contiguous()]
        weight = torch.zeros(gated, hidden, dtype=torch.int8)
        of_hidden = [*reference.pack_weight(weight), torch.ones(gated), bits[-gated:].flip(0).contiguous()]
        state = [torch.zeros(2, hidden)] * (2 if kind == "lstm" else 1)
        configs = [Config().encode(0), Config().encode(hidden), 0]
        given = (torch.zeros(1, 2, 0), state, of_input, of_hidden, [], configs, CELLS.index(kind))
        for actual, expected in zip(ops.rnn(*given), reference.rnn(*given), strict=True):
            assert_same_bits(actual, expected, f"{isa} {kind}")


def changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: given | changes


def without(name: str, index: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: given | {name: given[name][:index] + given[name][index + 1 :]}


FAULTS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (changed(cell=4), "rnn: expected cell in [0, 3], got 4"),
    (changed(configs=[0, 0]), "rnn: expected a config of each layer and the projection, got 2 configs"),
    (changed(x=torch.zeros(3, 8)), "rnn: expected x with 3 dimensions [T, B, K], got 2"),
    (changed(x=torch.zeros(3, 2, 8, dtype=torch.int8)), "rnn: expected x of dtype float32, bfloat16"),
    (
        changed(x=torch.zeros(3, 2, 7)),
        "rnn, input_layer: expected x.shape[-1] to be 8 modulo 16, as config says, got 7",
    ),
    (changed(x=torch.zeros(3, 5, 8)), "rnn: expected h of shape [5, 6], got [2, 6]"),
    (without("state", 1), "rnn: expected 2 tensors of state for lstm, got 1"),
    (changed(cell=1), "rnn: expected 1 tensor of state for gru, got 2"),
    (changed(state=[torch.zeros(2, 6), torch.zeros(2, 7)]), "rnn: expected c of shape [2, 6], got [2, 7]"),
    (changed(state=[torch.zeros(2, 6).int(), torch.zeros(2, 6)]), "rnn: expected h of dtype float32"),
    (
        without("input_layer", 3),
        "rnn, input_layer: expected packed_weight, weight_sum, weight_scale and bias",
    ),
    (
        lambda given: given | {"input_layer": layer(8, 20, 1, True, "per_token", False)[0]},
        "rnn: expected input_layer and hidden_layer with 4 gates of one size, got 20 and 24 channels",
    ),
    (
        lambda given: given | {"configs": [given["configs"][0], Config(epilogue="relu").encode(6), 0]},
        "rnn: expected no epilogue in the configs, got [36864, 28736, 0]",
    ),
    (
        changed(batch_sizes=torch.tensor([2, 1]), x=torch.zeros(4, 8)),
        "rnn: expected batch_sizes to add up to x.shape[0] (4), got 3",
    ),
    (
        changed(batch_sizes=torch.tensor([1, 2]), x=torch.zeros(3, 8)),
        "rnn: expected batch_sizes to fall from B (2) and to be positive, got [1, 2]",
    ),
    (
        changed(batch_sizes=torch.tensor([2, 1, 0]), x=torch.zeros(3, 8)),
        "rnn: expected batch_sizes to fall from B (2) and to be positive, got [2, 1, 0]",
    ),
    (
        changed(batch_sizes=torch.tensor([2, 2**62, -(2**62)]), x=torch.zeros(2, 8)),
        "rnn: expected batch_sizes to fall from B (2)",
    ),
    (
        changed(batch_sizes=torch.tensor([2, 1], dtype=torch.int32), x=torch.zeros(3, 8)),
        "rnn: expected batch_sizes to be int64 of 1 dimension on the CPU, got torch.int32 of shape [2]",
    ),
    (
        changed(batch_sizes=torch.tensor([2, 1])),
        "rnn: expected packed x with 2 dimensions [sum of batch_sizes, K], got 3",
    ),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=[words[:60] for _, words in FAULTS])
def test_errors_have_the_same_words_on_every_path(
    fault: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    given = fault(arguments("lstm", 3, 2, 8, 6))
    sentences = []
    for function in (ops.rnn, reference.rnn):
        with pytest.raises((RuntimeError, ValueError), match=re.escape(words)) as raised:
            function(**given)
        sentences.append(str(raised.value).split("\n")[0])
    assert sentences[0] == sentences[1]


FLOAT_FAULTS: list[tuple[list[Any], int, str]] = [
    ([None, None], 0, "rnn, input_layer: expected a float weight, got None"),
    ([torch.zeros(24, 8).int(), None], 0, "rnn, input_layer: expected weight of dtype float32, bfloat16"),
    ([torch.zeros(24, 7), None], 0, "rnn, input_layer: expected weight of shape [N, 8], got [24, 7]"),
    ([torch.zeros(24), None], 0, "rnn, input_layer: expected weight of shape [N, 8], got [24]"),
    (
        [torch.zeros(20, 8), None],
        0,
        "rnn: expected input_layer and hidden_layer with 4 gates of one size, got",
    ),
    ([torch.zeros(24, 8), torch.zeros(3)], 0, "rnn, input_layer: expected bias of dtype float32, bfloat16"),
    (
        [torch.zeros(24, 8), None],
        Config(rotation_block=8).encode(),
        "rnn, input_layer: expected no rotation in config with a float weight, got block 8",
    ),
    (
        [torch.zeros(24, 8), None],
        Config().encode(7),
        "rnn, input_layer: expected x.shape[-1] to be 7 modulo 16, as config says, got 8",
    ),
]


@pytest.mark.parametrize(("layer", "config", "words"), FLOAT_FAULTS, ids=[f[2][17:80] for f in FLOAT_FAULTS])
def test_errors_of_float_inputs(layer: list[Any], config: int, words: str) -> None:
    given = arguments("lstm", 3, 2, 8, 6, float_input=True)
    given |= {"input_layer": layer, "configs": [config, *given["configs"][1:]]}
    sentences = []
    for function in (ops.rnn, reference.rnn):
        with pytest.raises(RuntimeError, match=re.escape(words)) as raised:
            function(**given)
        sentences.append(str(raised.value).split("\n")[0])
    assert sentences[0] == sentences[1]


def test_a_projection_belongs_to_an_lstm() -> None:
    given = arguments("gru", 3, 2, 8, 6) | {"projection": layer(6, 4, 1, False, "per_token", False)[0]}
    for function in (ops.rnn, reference.rnn):
        with pytest.raises(RuntimeError, match="rnn: expected no projection of a cell of kind gru"):
            function(**given)


def test_gradients_are_refused() -> None:
    given = arguments("lstm", 3, 2, 8, 6)
    given["state"][1].requires_grad_()
    with pytest.raises(NotImplementedError, match="rnn: expected inputs that require no gradient"):
        ops.rnn(**given)
    with torch.no_grad():
        assert not ops.rnn(**given)[0].requires_grad


@pytest.mark.parametrize("float_input", [False, True])
@pytest.mark.parametrize("sizes", [None, [4, 2, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, sizes: list[int] | None, float_input: bool) -> None:
    given = arguments(kind, 3, 4, 8, 6, sizes=sizes, float_input=float_input)
    torch.library.opcheck(ops.rnn.default, (), given)
