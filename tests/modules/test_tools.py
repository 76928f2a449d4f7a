"""Converted modules of every kind with every tool of PyTorch: one table.

What a tool does to a single layer in detail is in test_tooling.py.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch as safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dynquant
from dynquant import EncoderLayer, quantize_dynamic
from tests.support.same_bits import assert_same_bits


class Subject(NamedTuple):
    """A converted model.

    Attributes:
        build: makes the float model.
        convert: converts it, or one on meta.
        inputs: of a call.
        tolerance: of compiled programs, in which torch computes softmax and norms by other formulas; 0: none.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    convert: Callable[[nn.Module], nn.Module] = quantize_dynamic
    tolerance: float = 0.0


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Text(nn.Module):
    """MiniLM's parts, small, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=32,
            intermediate_size=64,
            vocab_size=50,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        self.bert = transformers.BertModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).last_hidden_state


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


SUBJECTS = {
    "QLinear": Subject(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (seeded(5, 16),)
    ),
    "QLSTM": Subject(LastStep, (seeded(3, 7, 16),), lambda model: quantize_dynamic(model, {nn.LSTM})),
    "QMultiheadAttention": Subject(SelfAttention, (seeded(2, 6, 32),), quantize_dynamic, 0.02),
    "EncoderLayer": Subject(
        encoder, (seeded(2, 6, 32),), lambda model: quantize_dynamic(model, fuse=True), 0.05
    ),
    "encoder": Subject(encoder, (seeded(2, 6, 32),), quantize_dynamic, 0.02),
    "MiniLM": Subject(
        Text,
        (torch.tensor([[5, 9, 3, 17], [11, 7, 33, 21]]),),
        lambda m: quantize_dynamic(m, fuse=True),
        0.05,
    ),
}
every_subject = pytest.mark.parametrize("name", SUBJECTS)


def converted(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SUBJECTS[name].convert(SUBJECTS[name].build().eval())


def run(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        return model(*SUBJECTS[name].inputs)


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    tolerance = SUBJECTS[name].tolerance
    if tolerance:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    else:
        assert_same_bits(actual, expected)


# ---- copies and files: the same bits


def pickled(name: str, model: nn.Module, folder: Path) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded_weights_only(name: str, model: nn.Module, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "state.pt")
    fresh = converted(name, seed=2)
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh


def loaded_by_safetensors(name: str, model: nn.Module, folder: Path) -> Any:
    safetensors.save_model(model, str(folder / "model.safetensors"))
    fresh = converted(name, seed=2)
    safetensors.load_model(fresh, str(folder / "model.safetensors"))
    return fresh


def loaded_by_dynquant(name: str, model: nn.Module, folder: Path) -> Any:
    dynquant.save(model, folder / "model.safetensors")
    return dynquant.load(SUBJECTS[name].build().eval(), folder / "model.safetensors")


def from_meta(name: str, model: nn.Module, folder: Path) -> Any:
    with torch.device("meta"):
        empty = SUBJECTS[name].build().eval()
    fresh = SUBJECTS[name].convert(empty)
    fresh.load_state_dict(model.state_dict(), assign=True)
    for (key, buffer), (_, own) in zip(fresh.named_buffers(), model.named_buffers(), strict=True):
        if buffer.device.type == "meta":  # not in the state_dict: positions, which the builder fills
            parent, _, last = key.rpartition(".")
            fresh.get_submodule(parent)._buffers[last] = own.clone()
    return fresh


COPIES: dict[str, Callable[[str, nn.Module, Path], Any]] = {
    "deepcopy": lambda name, model, folder: copy.deepcopy(model),
    "pickle": pickled,
    "weights_only": loaded_weights_only,
    "safetensors": loaded_by_safetensors,
    "dynquant.save": loaded_by_dynquant,
    "meta and assign": from_meta,
    "functional_call": lambda name, model, folder: (
        lambda *inputs: torch.func.functional_call(model, dict(model.named_parameters()), inputs)
    ),
}


@every_subject
@pytest.mark.parametrize("tool", COPIES)
def test_copies_and_files(name: str, tool: str, tmp_path: Path) -> None:
    model = converted(name)
    if name == "EncoderLayer":
        assert any(isinstance(module, EncoderLayer) for module in model.modules())
    expected = run(name, model)
    assert_same_bits(run(name, COPIES[tool](name, model, tmp_path)), expected)
    assert_same_bits(run(name, model), expected)


class Outputs(Dataset):
    """Runs the model in a worker process."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(*self.inputs)


@every_subject
def test_dataloader_workers(name: str) -> None:
    model = converted(name)
    loader = DataLoader(Outputs(model, SUBJECTS[name].inputs), num_workers=1, multiprocessing_context="fork")
    (output,) = loader
    assert_same_bits(output[0], run(name, model))


@every_subject
def test_grad_modes_and_autocast(name: str) -> None:
    model, inputs = converted(name), SUBJECTS[name].inputs
    expected = run(name, model)
    with torch.inference_mode():
        assert_same_bits(model(*inputs).clone(), expected)
    assert_close(name, model(*inputs).detach(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(name, model)
    assert (output.float() - expected).abs().max() < 0.1


@pytest.mark.parametrize("name", ["QLinear", "QLSTM"])
def test_symbolic_trace(name: str) -> None:
    """The others' float modules decide by values and shapes, which torch.fx does not trace either."""
    model = converted(name)
    assert_same_bits(run(name, torch.fx.symbolic_trace(model)), run(name, model))


# ---- compilers


@every_subject
def test_compile(name: str) -> None:
    model = converted(name)
    torch._dynamo.reset()
    assert_close(name, run(name, torch.compile(model, fullgraph=True, backend="aot_eager")), run(name, model))


@pytest.mark.parametrize(
    "name",
    ["MiniLM", *(pytest.param(name, marks=pytest.mark.long) for name in SUBJECTS if name != "MiniLM")],
)
def test_compile_by_inductor(name: str) -> None:
    model = converted(name)
    torch._dynamo.reset()
    assert_close(name, run(name, torch.compile(model, fullgraph=True)), run(name, model))


LOAD = """
import sys, torch, dynquant
for file in sys.argv[1:]:
    load = torch._inductor.aoti_load_package if file.endswith(".aoti.pt2") else None
    inputs, expected, tolerance = torch.load(file + ".tensors")
    program = load(file) if load else torch.export.load(file).module()
    with torch.no_grad():
        actual = program(*inputs)
    if tolerance:
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(actual, expected), file
print("same", len(sys.argv) - 1)
"""


def in_a_fresh_process(files: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, files)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == f"same {len(files)}", done.stderr


def exported(name: str, file: Path) -> torch.export.ExportedProgram:
    model, inputs = converted(name), SUBJECTS[name].inputs
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    torch.save((inputs, run(name, model), SUBJECTS[name].tolerance), f"{file}.tensors")
    return program


def test_exported_programs_run_in_a_fresh_process(tmp_path: Path) -> None:
    files = []
    for name in SUBJECTS:
        files.append(tmp_path / f"{name}.pt2")
        torch.export.save(exported(name, files[-1]), files[-1])
    in_a_fresh_process(files)


@pytest.mark.parametrize(
    "name",
    ["QLinear", *(pytest.param(name, marks=pytest.mark.long) for name in SUBJECTS if name != "QLinear")],
)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.aoti.pt2"
    torch._inductor.aoti_compile_and_package(exported(name, file), package_path=str(file))
    in_a_fresh_process([file])
