"""Files of dynquant.save with damage of every kind: each is refused with a sentence, and the model stays."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynquant
from dynquant import quantize_dynamic
from tests.support.nets import assert_unchanged, state
from tests.support.same_bits import assert_same_bits

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.LayerNorm(4))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


# ---- damage


def flipped_bits(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut_off(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def longer(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.choice([1, 2, 8, 64])) + data[at:]


def overwritten(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data)), chance.choice([1, 4, 8, 32])
    filling = chance.choice([b"\0" * size, b"\xff" * size, chance.randbytes(size)])
    return (data[:at] + filling + data[at + size :])[: len(data)]


def another_header_size(data: bytes, chance: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    sizes = [
        0,
        1,
        size - 1,
        size + 1,
        len(data),
        1 << 31,
        (1 << 63) - 1,
        (1 << 64) - 1,
        chance.randrange(size),
    ]
    return chance.choice(sizes).to_bytes(8, "little") + data[8:]


def another_entry(data: bytes, chance: random.Random) -> bytes:
    """A change of one tensor in the header, which is whole JSON afterwards."""
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    key = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    sizes = [-1, 0, 1, 7, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1, 1.5, "8", None, [], True]
    change = chance.randrange(7)
    if change == 0:
        entry["dtype"] = chance.choice(["F64", "F32", "BF16", "I8", "U8", "F8_E4M3", "I4", "", 3])
    elif change == 1 and entry["shape"]:
        entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice(sizes)
    elif change == 2:
        entry["shape"] = chance.choice([[], [1, *entry["shape"]], [*entry["shape"][::-1], 2], None, 3])
    elif change == 3:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(sizes)
    elif change == 4:
        header[chance.choice(["", "0", "x.y", "__metadata__", "0.weight"])] = header.pop(key)
    elif change == 5:
        del header[key]
    else:
        other = chance.choice([name for name in header if name not in (key, "__metadata__")])
        header[key], header[other] = header[other], header[key]
    return _with_header(data, size, header)


def another_metadata(data: bytes, chance: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    contents = json.loads(metadata["dynquant"])
    key = chance.choice(list(contents))
    contents[key] = chance.choice([None, 0, -1, 1e300, "", [], {}, {"0": {}}, [[]], {"0.weight": "2.weight"}])
    metadata["dynquant"] = json.dumps(contents)
    if chance.random() < 0.3:
        metadata[chance.choice(["dynquant", "dynquant_checksum"])] = chance.choice(
            ["", "{}", "[" * 5000, "0"]
        )
    return _with_header(data, size, header)


def _with_header(data: bytes, size: int, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped_bits,
    cut_off,
    longer,
    overwritten,
    another_header_size,
    another_entry,
    another_metadata,
)


def check(damage: Callable[[bytes, random.Random], bytes], seeds: range, folder: Path) -> None:
    whole, path = folder / "whole.safetensors", folder / "damaged.safetensors"
    dynquant.save(quantize_dynamic(net(), fuse=True), whole)
    data = whole.read_bytes()
    for model in (net().eval(), quantize_dynamic(net())):
        expected, before = run(model), state(model)
        for seed in seeds:
            changed = damage(data, random.Random(seed))
            if _is_same(changed, data):
                continue
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"^dynquant\.load: .*damaged\.safetensors: .") as caught:
                dynquant.load(model, path)
            assert "\n" not in str(caught.value), f"seed {seed}"
        assert_unchanged(model, before)
        assert_same_bits(run(model), expected)
    assert_same_bits(run(dynquant.load(model, whole)), run(quantize_dynamic(net(), fuse=True)))


def _is_same(changed: bytes, data: bytes) -> bool:
    """Whether the damage left every value as it was, such as a space more in the header."""
    parts = []
    for file in (changed, data):
        size = int.from_bytes(file[:8], "little")
        try:
            parts.append((json.loads(file[8 : 8 + size]), file[8 + size :]))
        except (ValueError, RecursionError):
            return False
    return parts[0] == parts[1]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused(damage: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    check(damage, range(60), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_many_damaged_files(damage: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    check(damage, range(1000, 6000), tmp_path)
