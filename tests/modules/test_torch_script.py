"""torch.jit.script: every kind of layer is compiled, saved and loaded, and computes the same bits."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import QLinear
from dynquant.nn.merged import MergedGroup
from tests.support.paths import ROOT
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Projections(nn.Module):
    """Two layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(24, 64), nn.Linear(24, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.key(x)


def _converted(bias: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Linear(40, 7, bias=bias))
    return dynquant.quantize_dynamic(model, **options)


def _static(**options: Any) -> nn.Module:
    model = _converted(**options)
    with dynquant.calibrate(model):
        model(sample())
    return dynquant.freeze(model)


def _merged() -> nn.Module:
    torch.manual_seed(0)
    model = dynquant.quantize_dynamic(Projections())
    model.query, model.key = MergedGroup([model.query, model.key]).layers
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "dynamic": _converted,
    "without bias": lambda: _converted(bias=False),
    "per_tensor": lambda: _converted(activations="per_tensor", weights="per_tensor"),
    "rotated": lambda: _converted(rotation="hadamard"),
    "fused": lambda: _converted(fuse=True),
    "rotated, fused": lambda: _converted(rotation="hadamard", fuse=True),
    "static": _static,
    "static, fused": lambda: _static(fuse=True),
    "merged": _merged,
    "a layer": lambda: QLinear(24, 7),
}


def sample() -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def loaded(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return VARIANTS[request.param]().eval()


def test_a_scripted_model_computes_the_same_bits(model: nn.Module) -> None:
    x, expected = sample(), model(sample()).detach()
    scripted = torch.jit.script(model)
    for version in (
        scripted,
        loaded(scripted),
        copy.deepcopy(scripted),
        torch.jit.freeze(scripted),
        torch.jit.optimize_for_inference(torch.jit.script(model)),
    ):
        for _ in range(3):  # the executor optimizes after the first calls
            assert_same_bits(version(x).detach(), expected)


def test_scripting_leaves_the_model_as_it_is(model: nn.Module) -> None:
    modules, keys = [*model.modules()], [*model.state_dict()]
    torch.jit.script(model)
    assert all(before is after for before, after in zip(modules, model.modules(), strict=True))
    assert [*model.state_dict()] == keys
    assert_same_bits(copy.deepcopy(model)(sample()).detach(), model(sample()).detach())


def test_gradients_pass_through_a_scripted_model(model: nn.Module) -> None:
    scripted = loaded(torch.jit.script(model))
    gradients = []
    for version in (model, scripted, scripted):
        x = sample().requires_grad_()
        version(x).sum().backward()
        gradients.append(x.grad)
    assert_same_bits(gradients[1], gradients[0])
    assert_same_bits(gradients[2], gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_scripted_model_takes_other_dtypes(dtype: torch.dtype) -> None:
    model = _converted().to(dtype)
    x = sample().to(dtype)
    assert_same_bits(torch.jit.script(model)(x).detach(), model(x).detach())


def test_a_wrong_input_is_named() -> None:
    scripted = torch.jit.script(_converted())
    with pytest.raises(RuntimeError, match="got 23"):
        scripted(torch.randn(5, 23))


_LOAD = """
import sys, torch, dynquant
from tests.support.same_bits import assert_same_bits
for path in sys.argv[1:]:
    x, expected = torch.load(path + ".pt")
    assert_same_bits(torch.jit.load(path)(x).detach(), expected)
print(dynquant.isa(), len(sys.argv) - 1)
"""


@pytest.mark.parametrize("path", ["extension", "reference"])
def test_another_process_loads_it_after_importing_dynquant(path: str, tmp_path: Path) -> None:
    files = []
    for name, make in VARIANTS.items():
        model = make().eval()
        files.append(str(tmp_path / name))
        torch.jit.save(torch.jit.script(model), files[-1])
        torch.save((sample(), model(sample()).detach()), files[-1] + ".pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"DYNQUANT_ISA": "reference"} if path == "reference" else {}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *files], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    isa = "reference" if path == "reference" else dynquant.isa()
    assert done.stdout == f"{isa} {len(VARIANTS)}\n"


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "sum", "padding_idx": 1}, {"mode": "max"}, {"mode": "sum", "include_last_offset": True}],
    ids=str,
)
def test_bags_of_embeddings(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = dynquant.QEmbeddingBag.from_float(nn.EmbeddingBag(50, 24, **options)).eval()
    ends = [12] if "include_last_offset" in options else []
    indices, offsets = torch.randint(0, 50, (12,)), torch.tensor([0, 3, 3, 9, *ends])
    weights = torch.rand(12) if options.get("mode") == "sum" else None
    for version in (scripted := torch.jit.script(layer), loaded(scripted)):
        assert_same_bits(version(indices, offsets, weights), layer(indices, offsets, weights))
        if not ends:
            assert_same_bits(version(indices.view(3, 4)), layer(indices.view(3, 4)))
        with pytest.raises(torch.jit.Error, match="expected offsets with an input"):
            version(indices)


@pytest.mark.parametrize(
    "layer",
    [dynquant.QLSTM(3, 4), dynquant.QGRUCell(90, 4), dynquant.QMultiheadAttention(8, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_modules_that_cannot_be_scripted_say_what_can(layer: nn.Module) -> None:
    words = f"{type(layer).__name__}: expected torch.export, torch.compile or torch.jit.trace"
    for model in (layer, nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=words):
            torch.jit.script(model)


def test_a_script_that_reads_a_weight_is_refused_by_name() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QLinear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight

    with pytest.raises(RuntimeError, match="has no attribute 'weight'"):
        torch.jit.script(Reads())
