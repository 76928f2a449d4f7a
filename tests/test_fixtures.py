"""Files that earlier versions wrote are read by this one, to the same bits. Never regenerate, add."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fixture_files
import pytest
import torch
from fixture_files import Fixture, OtherTorchError
from isas import ISAS, forced

FIXTURES = fixture_files.all_fixtures()
every_fixture = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@every_fixture
def test_it_is_read_as_it_was_saved(fixture: Fixture) -> None:
    try:
        model = fixture_files.read(fixture)
    except OtherTorchError as error:
        pytest.skip(str(error))
    fixture_files.check_contents(fixture, model)
    for isa in ISAS:
        with forced(isa):
            fixture_files.check_output(fixture, model)


@pytest.fixture(scope="module")
def on_the_reference() -> dict[str, str]:
    """The fault of each fixture by its name, found in a process without the extension."""
    script = Path(fixture_files.__file__)
    variables = os.environ | {"DYNQUANT_ISA": "reference"}
    variables["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["isa"] == "reference"
    return found["results"]


@every_fixture
def test_the_reference_reads_it_too(fixture: Fixture, on_the_reference: dict[str, str]) -> None:
    fault = on_the_reference[fixture.name]
    if fault.startswith("skip: "):
        pytest.skip(fault.removeprefix("skip: "))
    assert not fault, f"{fixture.name} on the reference: {fault}"


def test_every_file_is_in_a_manifest() -> None:
    listed = {fixture.path for fixture in FIXTURES}
    folders = {path.parent for path in listed}
    others = {"manifest.json", "inputs.safetensors"}
    files = {path for folder in folders for path in folder.iterdir() if path.name not in others}
    outputs = {folder / fixture_files.outputs_file() for folder in folders}
    assert outputs <= files
    assert {path for path in files if not path.name.startswith("outputs-")} == listed


def test_a_fault_is_reported_with_the_name_of_the_fixture() -> None:
    fixture = next(fixture for fixture in FIXTURES if fixture.path.name == "plain.module.pt")
    model = fixture_files.read(fixture)
    model[2].weight = torch.zeros(24, 70)
    for check in (fixture_files.check_contents, fixture_files.check_output):
        with pytest.raises(AssertionError, match=f"{fixture.name}.* elements differ"):
            check(fixture, model)
    model[0].bias = None
    with pytest.raises(AssertionError, match=f"{fixture.name}, 0.bias: None"):
        fixture_files.check_contents(fixture, model)
