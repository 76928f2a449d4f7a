"""The packed weight of every device but the CPU: rows, padded with zeros to a multiple of 16 bytes.

Needs no GPU: the reference can use this layout on the CPU too, and fake tensors show the shapes of a missing
device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dynquant import QLinear, QTensor, qtensor, reference
from dynquant.config import Config
from dynquant.nn import linear
from dynquant.nn.merged import MergedGroup
from dynquant.reference import layout
from tests.support.same_bits import assert_same_bits

CUDA = torch.device("cuda")
SIZES = [(1, 1), (5, 15), (5, 16), (20, 17), (64, 100), (3, 0), (0, 7)]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU packs like CUDA, and layers run on the reference."""
    monkeypatch.setattr(layout, "packs_in_panels", lambda device: False)
    monkeypatch.setattr(qtensor, "_ops", reference)
    monkeypatch.setattr(linear, "_linear_dynamic", reference.linear_dynamic)
    monkeypatch.setattr(linear, "_linear_static", reference.linear_static)


def random_weight(n: int, k: int) -> Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


@pytest.mark.parametrize(("k", "padded"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32), (4096, 4096)])
def test_shape(k: int, padded: int) -> None:
    assert reference.packed_shape(CUDA, 7, k) == [7, padded]
    with FakeTensorMode():
        packed, weight_sum = torch.ops.dynquant.pack_weight(
            torch.empty(7, k, dtype=torch.int8, device="cuda")
        )
        assert (packed.device.type, packed.dtype, list(packed.shape)) == ("cuda", torch.int8, [7, padded])
        assert list(weight_sum.shape) == [7]
        assert list(torch.ops.dynquant.unpack_weight(packed, 7, k).shape) == [7, k]


def test_a_layer_that_moves_to_another_device_is_packed_for_it() -> None:
    layer = QLinear(20, 6).to("meta")
    assert list(layer.weight.packed_weight.shape) == [6, 32]
    assert layer(torch.ones(2, 20, device="meta")).shape == (2, 6)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_padding_beyond_k_is_zero(n: int, k: int) -> None:
    weight = random_weight(n, k)
    packed, weight_sum = reference.pack_weight(weight)
    assert list(packed.shape) == reference.packed_shape(CUDA, n, k)
    assert packed.is_contiguous()
    assert_same_bits(packed[:, :k], weight)
    assert not packed[:, k:].any()
    assert_same_bits(weight_sum, weight.sum(1, dtype=torch.int32))
    unpacked = reference.unpack_weight(packed, n, k)
    assert unpacked.is_contiguous()
    assert_same_bits(unpacked, weight)
    if packed.numel():
        assert unpacked.data_ptr() != packed.data_ptr()


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_both_layouts_give_the_same_bits(n: int, k: int, request: pytest.FixtureRequest) -> None:
    weight, x, q = random_weight(n, k), torch.randn(3, k), random_weight(3, k)
    scale, bias = torch.rand(n) + 0.1, torch.randn(n)
    qparams = (torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32))
    code = Config(epilogue="gelu").encode()

    def results() -> list[Tensor]:
        packed = reference.pack_weight(weight)
        return [
            reference.int8_mm(q, *packed),
            reference.linear_dynamic(x, *packed, scale, bias, code),
            reference.linear_static(x, *packed, scale, bias, *qparams, code),
        ]

    expected = results()
    request.getfixturevalue("rows")
    for actual, right in zip(results(), expected, strict=True):
        assert_same_bits(actual, right)


@pytest.mark.usefixtures("rows")
def test_rows_without_padding_are_refused() -> None:
    weight = random_weight(5, 20)
    weight_sum = weight.sum(1, dtype=torch.int32)
    words = r"expected packed_weight to be contiguous int8 of shape \[5, 32\] for N = 5 and K = 20, got"
    with pytest.raises(RuntimeError, match=f"linear_dynamic: {words}"):
        reference.linear_dynamic(torch.randn(2, 20), weight, weight_sum, torch.ones(5), None, 0)
    with pytest.raises(RuntimeError, match=f"int8_mm: {words}"):
        reference.int8_mm(random_weight(2, 20), weight, weight_sum)
    with pytest.raises(RuntimeError, match=f"unpack_weight: {words}"):
        reference.unpack_weight(weight, 5, 20)


@pytest.mark.parametrize("rotation", [None, 4])
def test_a_layer_shows_the_values_of_the_cpu_layout(
    rotation: int | None, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(20, 6), torch.randn(3, 20)

    def values() -> dict[str, Tensor]:
        layer = QLinear.from_float(plain, rotation=rotation)
        found = {"int_repr": layer.weight.int_repr(), "dequantized": layer.dequantize_weight()}
        return found | {"out": layer(x).detach()} | layer.state_dict()

    expected = values()
    request.getfixturevalue("rows")
    for name, value in values().items():
        assert_same_bits(value, expected[name], name)
    layer = QLinear(20, 6, rotation=rotation)
    layer.load_state_dict(expected, strict=False)
    assert list(layer.weight.packed_weight.shape) == [6, 32]
    assert_same_bits(layer(x).detach(), expected["out"])
    weight = layer.weight
    assert isinstance(weight, QTensor)
    assert_same_bits(torch.nn.functional.linear(x, weight, layer.bias).detach(), expected["out"])


@pytest.mark.usefixtures("rows")
def test_layers_of_any_width_are_contiguous() -> None:
    first, second = QLinear(20, 6), QLinear(20, 33)
    x = torch.randn(4, 20)
    expected = [first(x), second(x)]
    shared = MergedGroup([first, second])
    assert shared.merged is not None
    assert list(shared.merged.packed_weight.shape) == [39, 32]
    for layer, right in zip(shared.layers, expected, strict=True):
        assert_same_bits(layer(x).detach(), right.detach())


@pytest.mark.usefixtures("rows")
def test_the_weight_of_a_gradient_has_k_inputs() -> None:
    """Gradients and QTensor multiply by the unpacked weight, without the padding of its rows."""
    weight, _ = reference.quantize_weight(torch.randn(6, 20), Config().encode())
    packed_weight, _ = reference.pack_weight(weight)
    assert list(packed_weight.shape) == [6, 32]
    assert_same_bits(reference.unpack_weight(packed_weight, 6, 20), weight)
