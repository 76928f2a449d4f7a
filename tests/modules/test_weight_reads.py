"""Every way to read ``layer.weight`` gives the same compiled, exported and traced as it gives eagerly."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynquant import QLinear, QTensor
from tests.support.same_bits import assert_same_bits

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
READS = {
    "w + x": lambda w, x: w + x,
    "x + w": lambda w, x: x + w,
    "w - x": lambda w, x: w - x,
    "x - w": lambda w, x: x - w,
    "1 - w": lambda w, x: 1.0 - w,
    "w * x": lambda w, x: w * x,
    "2 * w": lambda w, x: 2.0 * w,
    "w / x": lambda w, x: w / x,
    "x / w": lambda w, x: x / w,
    "1 / w": lambda w, x: 1.0 / w,
    "w // x": lambda w, x: w // x,
    "w % x": lambda w, x: w % x,
    "x % w": lambda w, x: x % w,
    "w ** x": lambda w, x: w ** x.abs().ceil(),
    "w @ x": lambda w, x: w @ x,
    "x @ w": lambda w, x: x @ w,
    "w @ row": lambda w, x: w @ x[0],
    "row @ w": lambda w, x: x[0] @ w,
    "matmul": lambda w, x: torch.matmul(w, x),
    "mm": lambda w, x: w.mm(x),
    "w > x": lambda w, x: w > x,
    "x <= w": lambda w, x: x <= w,
    "-w": lambda w, x: -w,
    "w[1]": lambda w, x: w[1],
    "w[:, 2:5]": lambda w, x: w[:, 2:5],
    ".t()": lambda w, x: w.t(),
    ".T": lambda w, x: w.T,
    ".mH": lambda w, x: w.mH,
    "reshape": lambda w, x: w.reshape(-1),
    "view": lambda w, x: w.view(4, -1),
    "permute": lambda w, x: w.permute(1, 0),
    "chunk": lambda w, x: w.chunk(2)[1],
    "cat": lambda w, x: torch.cat([w, x]),
    "stack": lambda w, x: torch.stack([x, w]),
    "einsum": lambda w, x: torch.einsum("nk,bk->bn", w, x),
    "abs": lambda w, x: w.abs(),
    "sum": lambda w, x: w.sum(),
    "norm": lambda w, x: w.norm(),
    "where": lambda w, x: torch.where(x > 0, w, x),
    "unbind": lambda w, x: w.unbind(0)[2],
    "detach": lambda w, x: w.detach() + x,
    "clone": lambda w, x: w.clone() * x,
    "embedding": lambda w, x: F.embedding(torch.tensor([3, 1]), w),
    "linear": lambda w, x: F.linear(x, w),
    "linear .to": lambda w, x: F.linear(x, w.to(x.dtype)),
    "x.add_(w)": lambda w, x: x.clone().add_(w),
    "shape": lambda w, x: x.reshape(w.shape[0], w.size(1)) * w.stride(0),
    "is_contiguous": lambda w, x: x if w.is_contiguous() else x + 1,
}


class Reader(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = QLinear(8, 8)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer.weight, x)


def compiled(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def exported(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.export.export(module, (X,), strict=True).module()


def exported_loosely(module: nn.Module) -> nn.Module:
    return torch.export.export(module, (X,), strict=False).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def traced(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, X), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("tool", [compiled, exported, exported_loosely, traced])
@pytest.mark.parametrize("read", READS)
def test_a_read_of_the_weight(read, tool) -> None:
    module = Reader(READS[read])
    with torch.no_grad():
        assert_same_bits(tool(module)(X), module(X))


@pytest.mark.parametrize("read", READS)
def test_a_read_is_one_of_the_dequantized_values(read) -> None:
    module = Reader(READS[read])
    if "linear" in read:
        pytest.skip("F.linear runs in int8")
    assert_same_bits(module(X), READS[read](module.layer.weight.dequantize(), X))


def test_shared_memory() -> None:
    weight = QLinear(8, 8).weight
    values = weight.dequantize()
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared()
    assert weight.packed_weight.is_shared()
    assert_same_bits(weight.dequantize(), values)


@pytest.mark.parametrize("name", ["data_ptr", "storage", "untyped_storage"])
def test_a_weight_has_no_float_memory(name) -> None:
    with pytest.raises(NotImplementedError, match=f"QTensor.{name}: a quantized weight has no"):
        getattr(QLinear(8, 8).weight, name)()


def test_code_that_reads_memory_gets_an_exception() -> None:
    weight = QLinear(8, 8).weight
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(weight)
    assert_same_bits(torch.from_dlpack(weight), weight.dequantize())


@pytest.mark.parametrize("name", ["add_", "apply_", "copy_", "fill_", "resize_", "set_", "uniform_", "zero_"])
def test_a_weight_is_read_only(name) -> None:
    weight = QLinear(8, 8).weight
    with pytest.raises(RuntimeError, match=f"QTensor: {name} would write to a quantized weight"):
        getattr(weight, name)(X)
    assert isinstance(weight, QTensor)
