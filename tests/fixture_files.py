"""Reads the files that earlier versions saved (tests/fixtures) and compares contents and outputs.

``python tests/fixture_files.py`` checks all of them on the path that DYNQUANT_ISA chooses and prints JSON:
by the name of each fixture, its fault, "" for none.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from same_bits import assert_same_bits
from torch import Tensor, nn

import dynquant
from dynquant import Config, QLinear, QTensor

FOLDER = Path(__file__).resolve().parent / "fixtures"

ARITHMETIC = 1
"""Raise it with a change that is meant to change the bits of outputs, then run ``make_fixtures.py outputs``,
which adds the new outputs beside the old ones."""

# The index, plus 1, is the third number of a state_dict's "format". Never reorder.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Fixture:
    """A file that an earlier version wrote.

    Attributes:
        kind: "state_dict", "module", "qtensor", "exported" or "traced".
        net: the entry of the manifest's "nets" that it was made of.
    """

    path: Path
    kind: str
    net: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(FOLDER))

    @property
    def manifest(self) -> dict[str, Any]:
        return manifest_of(self.path.parent)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """Type and arguments of each module of the net, by its name."""
        return self.manifest["nets"][self.net]

    def tensors(self, file: str) -> dict[str, Tensor]:
        return read_tensors(self.path.parent / file)

    def saved(self) -> dict[str, Tensor]:
        """The net's state_dict as the earlier version saved it, read by safetensors alone."""
        return self.tensors(f"{self.net}.state.safetensors")


class OtherTorchError(Exception):
    """torch itself cannot read a file that another version of it wrote."""


@cache
def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@cache
def read_tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.load_file(path)


def outputs_file(arithmetic: int = ARITHMETIC) -> str:
    return f"outputs-{arithmetic}.safetensors"


def all_fixtures() -> list[Fixture]:
    return [
        Fixture(file.parent / entry["file"], entry["kind"], entry["net"])
        for file in sorted(FOLDER.glob("*/manifest.json"))
        for entry in manifest_of(file.parent)["fixtures"]
    ]


def build(modules: dict[str, dict[str, Any]]) -> nn.Module:
    """A fresh net, dynamic and of the default scheme: what a state_dict is loaded into."""
    made = {name: _fresh(**arguments) for name, arguments in modules.items()}
    return nn.Sequential(*made.values()) if "0" in made else nn.ModuleDict(made)


def _fresh(type: str, **arguments: Any) -> nn.Module:
    return QLinear(**arguments) if type == "QLinear" else getattr(nn, type)()


def call(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, nn.ModuleDict):  # layers that read the same tensor
            return torch.cat([layer(x) for layer in model.values()], -1)
        return model(x)


def read(fixture: Fixture) -> Callable[..., Tensor]:
    """What the file holds, as something to call with the net's input.

    Raises:
        OtherTorchError: where this torch does not read a program of the torch that wrote it.
    """
    path = fixture.path
    if fixture.kind == "state_dict":
        model = build(fixture.modules).eval()
        reads = safetensors.load_file if path.suffix == ".safetensors" else _load_weights
        model.load_state_dict(reads(path))
        return model
    if fixture.kind == "module":
        return torch.load(path, weights_only=False)
    if fixture.kind == "qtensor":
        weight = torch.load(path, weights_only=False)
        return lambda x: F.linear(x, weight)
    try:
        if fixture.kind == "exported":
            return torch.export.load(path).module()
        return torch.jit.load(path)
    except Exception as error:
        wrote, runs = fixture.manifest["torch"], torch.__version__.partition("+")[0]
        if wrote != runs and "dynquant" not in str(error):
            raise OtherTorchError(f"torch {runs} does not read what torch {wrote} wrote: {error}") from error
        raise


def _load_weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def check_contents(fixture: Fixture, model: Callable[..., Tensor]) -> None:
    """The layers that were read are those that were saved. This check outlives a change of the arithmetic."""
    if fixture.kind == "qtensor":
        _check_weight(fixture, "0", torch.load(fixture.path, weights_only=False))
    # A graph, whether exported, traced or pickled, holds ops in place of the layers.
    if fixture.kind not in ("state_dict", "module") or isinstance(model, torch.fx.GraphModule):
        return
    assert isinstance(model, nn.Module)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    expected = [name for name, module in fixture.modules.items() if module["type"] == "QLinear"]
    assert list(layers) == expected, f"{fixture.name}: layers {list(layers)} != {expected}"
    saved = fixture.saved()
    for name, layer in layers.items():
        _check_weight(fixture, name, layer.weight)
        where = f"{fixture.name}, {name}"
        _, config, _, _ = saved[f"{name}.format"].tolist()
        assert layer.config == Config.decode(config), f"{where}: {layer.config}"
        assert not layer.training, f"{where}: training"
        for part in ("bias", "activation_scale", "activation_zero_point"):
            value, expected_value = getattr(layer, part), saved.get(f"{name}.{part}")
            assert (value is None) == (expected_value is None), f"{where}.{part}: {value}"
            if expected_value is not None:
                assert_same_bits(value, expected_value, f"{where}.{part}")


def _check_weight(fixture: Fixture, name: str, weight: QTensor) -> None:
    saved, where = fixture.saved(), f"{fixture.name}, {name}.weight"
    _, config, dtype, _ = saved[f"{name}.format"].tolist()
    expected = Config.decode(config)
    assert type(weight) is QTensor, f"{where}: {type(weight)}"
    assert weight.dtype == _DTYPES[dtype - 1], f"{where}: {weight.dtype}"
    assert weight.config.weights == expected.weights, f"{where}: {weight.config}"
    assert weight.config.rotation_block == expected.rotation_block, f"{where}: {weight.config}"
    assert_same_bits(weight.int_repr(), saved[f"{name}.weight"], where)
    scale = weight.q_per_channel_scales()
    assert_same_bits(scale, saved[f"{name}.weight_scale"].expand_as(scale), f"{where}_scale")


def check_output(fixture: Fixture, model: Callable[..., Tensor]) -> None:
    """The same bits as when it was made."""
    x = fixture.tensors("inputs.safetensors")[fixture.net]
    key = f"{fixture.net}.qtensor" if fixture.kind == "qtensor" else fixture.net
    file = outputs_file()
    assert (fixture.path.parent / file).exists(), (
        f"{file} is missing; tests/fixtures/make_fixtures.py adds it"
    )
    assert_same_bits(call(model, x), fixture.tensors(file)[key], f"{fixture.name} on {dynquant.isa()}")


def main() -> None:
    results: dict[str, str] = {}
    for fixture in all_fixtures():
        try:
            model = read(fixture)
            check_contents(fixture, model)
            check_output(fixture, model)
            results[fixture.name] = ""
        except OtherTorchError as error:
            results[fixture.name] = f"skip: {error}"
        except Exception:
            results[fixture.name] = traceback.format_exc()
    print(json.dumps({"isa": dynquant.isa(), "results": results}))


if __name__ == "__main__":
    main()
