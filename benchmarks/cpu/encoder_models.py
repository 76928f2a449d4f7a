"""The models of the encoder section: a real sentence encoder, and BERT-base and ViT-B of random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.demo import encoder
from dynquant.demo.sentences import SENTENCES

Inputs = tuple[Tensor, ...]

CALIBRATION = 12
"""Versions that need calibration see the first samples, this many."""


@dataclass(frozen=True)
class Model:
    """A float model with all that its versions are made from, timed with and judged by.

    Attributes:
        module: in eval mode; takes ``inputs`` and returns unit vectors, fp32 [batch, hidden].
        input_names, dynamic_sizes: of the inputs, for exporters; for each input the names of its sizes that
            may change, by dimension.
        workloads: by name, the inputs that are timed.
        samples: inputs for cosines and calibration, of one text or image each.
        long_samples: texts of 512 tokens; may be empty.
        fusion: name under which ONNX Runtime's graph optimizer knows the architecture.
        versions: which versions are timed, None for all.
    """

    name: str
    module: nn.Module
    input_names: tuple[str, ...]
    dynamic_sizes: dict[str, dict[int, str]]
    workloads: dict[str, Inputs]
    samples: tuple[Inputs, ...]
    long_samples: tuple[Inputs, ...]
    fusion: str
    heads: int
    hidden: int
    versions: tuple[str, ...] | None = None

    def copy(self, attention: str | None = None) -> nn.Module:
        """The float module, to be changed; ``attention`` is transformers' name of its implementation."""
        module = copy.deepcopy(self.module)
        if attention is not None:
            config_of(module)._attn_implementation = attention
        return module


def config_of(module: nn.Module) -> Any:
    """transformers' config of a model within one that returns vectors."""
    encoder: Any = module.encoder
    return encoder.config


class Pooled(nn.Module):
    """Pixels to unit vectors: a vision encoder and the mean over its patches."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values fp32 [batch, 3, height, width] -> fp32 [batch, hidden]."""
        hidden = self.encoder(pixel_values=pixel_values).last_hidden_state.float()
        return nn.functional.normalize(hidden.mean(1), dim=1)


TEXT_WORKLOADS = {"1x16": (1, 16), "1x128": (1, 128), "8x128": (8, 128), "32x64": (32, 64)}
PADDED_WORKLOADS = {"8x128 padded": (8, 128), "32x64 padded": (32, 64)}
SHORT_LIST = (
    "fp32",
    "torch.ao",
    "dynquant per_token, fused",
    "dynquant per_token, rotation, fused",
    "dynquant compiled",
    "onnxruntime",
    "openvino static",
    "openvino dynamic",
    "openvino bf16",
)


def _batch(tokenizer: Any, batch: int, tokens: int) -> Inputs:
    encoded = encoder.batch_of_tokens(tokenizer, batch, tokens)
    return encoded["input_ids"], encoded["attention_mask"]


def padded(inputs: Inputs) -> Inputs:
    """The same texts cut to lengths from 1/4 of the tokens to all of them, evenly spread, padding after."""
    ids, mask = inputs
    batch, tokens = ids.shape
    lengths = torch.linspace(tokens // 4, tokens, batch).round().to(torch.int64)
    mask = mask * (torch.arange(tokens) < lengths[:, None])
    return ids * mask, mask


def _text_model(
    name: str, module: nn.Module, tokenizer: Any, workloads: dict[str, Inputs], **details: Any
) -> Model:
    samples = []
    for sentence in SENTENCES:
        encoded = tokenizer([sentence], return_tensors="pt")
        samples.append((encoded["input_ids"], encoded["attention_mask"]))
    sizes = {0: "batch", 1: "tokens"}
    config = config_of(module)
    return Model(
        name=name,
        module=module,
        input_names=("input_ids", "attention_mask"),
        dynamic_sizes={"input_ids": sizes, "attention_mask": sizes},
        workloads=workloads,
        samples=tuple(samples),
        fusion="bert",
        heads=config.num_attention_heads,
        hidden=config.hidden_size,
        **details,
    )


def minilm(quick: bool) -> Model:
    """all-MiniLM-L6-v2, the demo's model: 6 layers of 384."""
    module, tokenizer = encoder.load()
    sizes = {"1x16": (1, 16)} if quick else TEXT_WORKLOADS
    workloads = {name: _batch(tokenizer, *size) for name, size in sizes.items()}
    if not quick:
        workloads |= {name: padded(_batch(tokenizer, *size)) for name, size in PADDED_WORKLOADS.items()}
    texts = () if quick else zip(*_batch(tokenizer, 4, 512), strict=True)
    long = tuple((ids[None], mask[None]) for ids, mask in texts)
    return _text_model("all-MiniLM-L6-v2", module, tokenizer, workloads, long_samples=long)


def bert_base(quick: bool) -> Model:
    """BERT-base of random weights: 12 layers of 768."""
    import transformers

    _, tokenizer = encoder.load()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1 if quick else 12)
    module = encoder.Embedder(transformers.BertModel(config, add_pooling_layer=False)).eval()
    names = ("1x16",) if quick else ("1x16", "1x128", "8x128")
    workloads = {name: _batch(tokenizer, *TEXT_WORKLOADS[name]) for name in names}
    return _text_model(
        "BERT-base, random", module, tokenizer, workloads, long_samples=(), versions=SHORT_LIST
    )


def vit_base(quick: bool) -> Model:
    """ViT-B/16 of random weights, pre-norm: 12 layers of 768, 197 tokens for an image of 224 x 224."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=1 if quick else 12)
    module = Pooled(transformers.ViTModel(config, add_pooling_layer=False)).eval()
    images = torch.randn(CALIBRATION, 3, 224, 224)
    batches = (1,) if quick else (1, 8)
    return Model(
        name="ViT-B/16, random",
        module=module,
        input_names=("pixel_values",),
        dynamic_sizes={"pixel_values": {0: "batch"}},
        workloads={f"{batch}x197": (images[:batch],) for batch in batches},
        samples=tuple((image[None],) for image in images),
        long_samples=(),
        fusion="vit",
        heads=config.num_attention_heads,
        hidden=config.hidden_size,
        versions=SHORT_LIST,
    )


MODELS: Sequence[Callable[[bool], Model]] = (minilm, bert_base, vit_base)
"""Each makes its model; for a quick run a small one with a single workload."""
