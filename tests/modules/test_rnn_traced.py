"""torch.jit.trace of recurrent modules: the bits of the module, for other lengths and in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import dynquant
from dynquant import QGRU, QLSTM, QGRUCell, QLSTMCell, QModule, QRNNCell
from tests.support.paths import ROOT
from tests.support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
]

MODULES: list[tuple[type[QModule], dict[str, Any]]] = [
    (QLSTM, {"num_layers": 2, "bidirectional": True}),
    (QLSTM, {"proj_size": 8, "bias": False}),
    (QGRU, {"batch_first": True}),
    (QLSTMCell, {}),
    (QGRUCell, {"bias": False}),
    (QRNNCell, {"nonlinearity": "relu"}),
]


@pytest.fixture(params=[12, 90], ids=["float input", "int8 input"])
def width(request: pytest.FixtureRequest) -> int:
    return request.param


def make(kind: type[QModule], options: dict[str, Any], width: int) -> Any:
    torch.manual_seed(0)
    return kind(width, 20, **options).eval()


def sample(layer: Any, width: int, steps: int = 5, batch: int = 3) -> Tensor:
    shape = (steps, batch, width) if isinstance(layer, (QLSTM, QGRU)) else (batch, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize(("kind", "options"), MODULES, ids=str)
def test_a_trace(kind: type[QModule], options: dict[str, Any], width: int, tmp_path: Path) -> None:
    layer = make(kind, options, width)
    traced = torch.jit.trace(layer, sample(layer, width))
    traced.save(str(tmp_path / "layer.pt"))
    for version in (traced, torch.jit.load(tmp_path / "layer.pt"), torch.jit.freeze(traced)):
        for x in (sample(layer, width), sample(layer, width, 7, 2), sample(layer, width, 1, 1)):
            for _ in range(3):  # the executor optimizes after the first calls
                assert_same(version(x), layer(x))


def test_a_trace_with_a_state_and_in_a_model() -> None:
    layer = make(QLSTM, {}, 12)
    x, hx = sample(layer, 12), (torch.randn(1, 3, 20), torch.randn(1, 3, 20))
    assert_same(torch.jit.trace(layer, (x, hx))(x, hx), layer(x, hx))

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(12, 20), nn.Linear(20, 3)

        def forward(self, x):  # torch cannot trace string annotations
            return self.head(self.lstm(x)[0])

    model = dynquant.quantize_dynamic(Tagger().eval())
    assert_same(torch.jit.trace(model, x)(x), model(x))


_LOAD = """
import sys, torch, dynquant
from torch.utils._pytree import tree_leaves
from tests.support.same_bits import assert_same_bits
for path in sys.argv[1:]:
    x, expected = torch.load(path + ".pt")
    for a, b in zip(tree_leaves(torch.jit.load(path)(x)), expected, strict=True):
        assert_same_bits(a.detach(), b)
print(dynquant.isa(), len(sys.argv) - 1)
"""


@pytest.mark.parametrize("path", ["extension", "reference"])
def test_another_process_loads_it_after_importing_dynquant(path: str, tmp_path: Path) -> None:
    files = []
    for i, (kind, options) in enumerate(MODULES):
        layer = make(kind, options, 12 if i % 2 else 90)
        x = sample(layer, layer.input_size)
        files.append(str(tmp_path / str(i)))
        torch.jit.trace(layer, x).save(files[-1])
        torch.save((x, [tensor.detach() for tensor in tree_leaves(layer(x))]), files[-1] + ".pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"DYNQUANT_ISA": "reference"} if path == "reference" else {}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *files], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    isa = "reference" if path == "reference" else dynquant.isa()
    assert done.stdout == f"{isa} {len(MODULES)}\n"


def test_traces_that_would_be_wrong_are_refused() -> None:
    layer = make(QLSTM, {}, 12)
    x = sample(layer, 12)
    with pytest.raises(RuntimeError, match="a quantized LSTM: expected torch.no_grad"):
        torch.jit.trace(layer, x.clone().requires_grad_())
    packed = pack_sequence([x[:n, i] for i, n in enumerate((5, 3, 1))])

    def call(data, sizes):
        return layer(PackedSequence(data, sizes))[0].data

    with pytest.raises(RuntimeError, match="a quantized LSTM: .* for a PackedSequence, since"):
        torch.jit.trace(call, (packed.data, packed.batch_sizes))
