"""Recurrent layers: nn.LSTM and nn.GRU in int8 beside torch.ao's and fp32, and a pretrained model of them.

That is the speaker encoder of the package resemblyzer, of which the weights alone are read: ``pip install
--no-deps resemblyzer``. Where it is not installed it is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant.measurement.timing import compare

from ..shared.tables import table
from .target_list import Results, TargetList
from .voices import mel_power, voices

HIDDEN = (32, 256, 512, 1024)
BATCHES = (1, 4, 16)
STEPS = 100
FRAMES = 160
SPEAKER_ENCODER = "speaker encoder, 3 x LSTM"
KINDS: dict[str, Callable[[int, int], nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}

MAX_RELATIVE_ERROR = 0.05


class _Output(nn.Module):
    """A recurrent layer, without its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


class SpeakerEncoder(nn.Module):
    """Resemblyzer's network: mel spectrograms [B, frames, 40] to unit vectors [B, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        output: Tensor = torch.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return output / output.norm(dim=1, keepdim=True)


def _speaker_encoder() -> SpeakerEncoder | None:
    found = importlib.util.find_spec("resemblyzer")
    if found is None or found.origin is None:
        return None
    file = torch.load(Path(found.origin).with_name("pretrained.pt"), "cpu", weights_only=True)
    state, model = file["model_state"], SpeakerEncoder()
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
    return model


def _measure(kind: str, model: nn.Module, x: Tensor, rounds: int, seconds: float) -> dict[str, Any]:
    types = {nn.LSTM, nn.GRU, nn.Linear}
    layers = {
        "fp32": model,
        "torch.ao": torch.ao.quantization.quantize_dynamic(model, types),
        "dynquant": dynquant.quantize_dynamic(model),
    }
    with torch.inference_mode():
        expected, got = model(x), layers["dynquant"](x)
    error = ((got - expected).norm() / expected.norm()).item()
    # Over three layers and a relu the error of a model is larger than that of a layer.
    if not error < (MAX_RELATIVE_ERROR if kind in KINDS else 3 * MAX_RELATIVE_ERROR):
        raise AssertionError(f"{kind} is wrong for inputs {list(x.shape)}, relative error {error:.3g}")
    cosine = torch.cosine_similarity(got, expected, -1).min().item()
    times = compare(
        {name: partial(each, x) for name, each in layers.items()}, threads=1, rounds=rounds, seconds=seconds
    )

    def speed(baseline: str) -> float:
        """Median of the ratios within a round, in which other load slows all calls alike."""
        pairs = zip(times[baseline].samples_us, times["dynquant"].samples_us, strict=True)
        return median(us / ours for us, ours in pairs)

    return {
        "kind": kind,
        "us": {name: timing.median_us for name, timing in times.items()},
        "speed": {name: speed(name) for name in layers if name != "dynquant"},
        "error": error,
        "cosine": cosine,
    }


def run(
    *, rounds: int, seconds: float, log: Callable[[str], None], quick: bool = False
) -> list[dict[str, Any]]:
    """[{"kind", "hidden", "batch", "steps", "us": by version, "speed": by baseline, "error", "cosine"}], on 1
    thread; the error is relative, of the output in int8 to that in float, cosine that of its worst row."""
    torch.manual_seed(0)
    results = []
    batches = BATCHES[:1] if quick else BATCHES
    for kind, make in KINDS.items():
        for hidden in HIDDEN[:2] if quick else HIDDEN:
            model = _Output(make(hidden, hidden)).eval()
            for batch in batches:
                row = _measure(kind, model, torch.randn(STEPS, batch, hidden), rounds, seconds)
                results.append({**row, "hidden": hidden, "batch": batch, "steps": STEPS})
            log(f"{kind}  hidden {hidden} done")
    encoder = _speaker_encoder()
    if encoder is None:
        log("speaker encoder left out: resemblyzer is not installed")
        return results
    for batch in batches:
        row = _measure(SPEAKER_ENCODER, encoder.eval(), mel_power(voices(batch, FRAMES), 40), rounds, seconds)
        results.append({**row, "hidden": 256, "batch": batch, "steps": FRAMES})
    log("speaker encoder done")
    return results


def text(rows: Sequence[Results]) -> str:
    """The section of the report."""
    body = [
        [
            row["kind"],
            str(row["hidden"]),
            str(row["batch"]),
            *(f"{row['us'][name]:.0f}" for name in ("fp32", "torch.ao", "dynquant")),
            *(f"{row['speed'][name]:.2f}" for name in ("fp32", "torch.ao")),
            f"{100 * row['error']:.2f} %",
            f"{row['cosine']:.4f}",
        ]
        for row in rows
    ]
    heads = ("", "hidden", "batch", "fp32 µs", "torch.ao µs", "dynquant µs", "times fp32", "times torch.ao")
    title = (
        f"## Recurrent layers, {STEPS} time steps, as many inputs as hidden units, 1 thread\n\n"
        f"The speaker encoder reads {FRAMES} frames of 40 mel bands of synthetic voices; its weights are "
        "those of resemblyzer.\n\n"
    )
    return title + table((*heads, "error", "lowest cosine"), body)


def add_targets(targets: TargetList, rows: Sequence[Results]) -> None:
    """Those of LSTM: the lowest speed of all batch sizes."""
    lstm = [row for row in rows if row["kind"] == "LSTM"]
    for name, baseline, goal, of_hidden in (
        ("hidden 256 to 1024, the speed of torch.ao", "torch.ao", 1.5, lambda hidden: hidden >= 256),
        ("hidden 256 to 1024, the speed of fp32", "fp32", 2.0, lambda hidden: hidden >= 256),
        ("hidden 32, the speed of fp32", "fp32", 1.0, lambda hidden: hidden == 32),
    ):
        found = [
            (row["speed"][baseline], f"{row['hidden']}, batch {row['batch']}")
            for row in lstm
            if of_hidden(row["hidden"])
        ]
        lowest, at = min(found, default=(0.0, ""))
        targets.add(
            "10",
            f"LSTM, {name}",
            f">= {goal:.1f}",
            f"lowest {lowest:.2f} ({at})",
            lowest >= goal if found else None,
        )
    encoder = [row for row in rows if row["kind"] == SPEAKER_ENCODER]
    for name, goal, values in (
        ("the speed of torch.ao", 1.5, [row["speed"]["torch.ao"] for row in encoder]),
        ("lowest cosine", 0.99, [row["cosine"] for row in encoder]),
    ):
        lowest = min(values, default=0.0)
        met = lowest >= goal if values else None
        targets.add("10", f"speaker encoder, {name}", f">= {goal}", f"lowest {lowest:.4g}", met)
