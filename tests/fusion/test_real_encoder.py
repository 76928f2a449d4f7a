"""all-MiniLM-L6-v2 with its own weights: how close the embeddings stay to fp32's."""

from __future__ import annotations

import copy

import pytest

import dynquant
from dynquant.demo import encoder
from dynquant.demo.sentences import SENTENCES
from dynquant.extras import MissingPackageError


def test_int8_attention_and_fused_layers_keep_the_embeddings() -> None:
    """rotation and fuse=True: lowest cosine to fp32 at least .998, at most .0005 below the layers' parts."""
    try:
        model, tokenizer = encoder.load()
    except (MissingPackageError, ImportError) as error:
        pytest.skip(f"no real encoder here: {error}")
    fused = dynquant.quantize_dynamic(copy.deepcopy(model), rotation="hadamard", fuse=True).eval()
    layers = [module for module in fused.modules() if isinstance(module, dynquant.EncoderLayer)]
    assert len(layers) == 6
    exact = encoder.embed(model, tokenizer, SENTENCES)
    cosines = (encoder.embed(fused, tokenizer, SENTENCES) * exact).sum(1)
    assert cosines.min() >= 0.998
    for layer in layers:
        layer.restore()
    parts = (encoder.embed(fused, tokenizer, SENTENCES) * exact).sum(1)
    assert cosines.min() >= parts.min() - 0.0005
    assert cosines.mean() >= parts.mean() - 0.0005
