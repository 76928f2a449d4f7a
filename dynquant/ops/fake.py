"""Fake kernels: shapes, dtypes and devices of each op's results, by the checks that the kernels make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Config
from ..reference import packed_shape
from ..reference.attention import check_attention
from ..reference.checks import (
    check_float,
    check_int8_matrix,
    check_k,
    check_qparams,
    check_ranges,
    check_rotation,
    check_weight,
)
from ..reference.embedding import check_embedding, check_embedding_bag
from ..reference.embedding_norm import check_embedding_norm
from ..reference.layout import check_packed_k
from ..reference.linear import check_int8_mm, check_operands
from ..reference.mlp import Tensors, channels, check_linear_mlp, check_linear_norm, check_mlp
from ..reference.rnn import check_rnn

# ---- rows of x ----


def min_max(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    check_float("min_max", "x", x)
    m = x.shape[:-1].numel() if per_token else 1
    return x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.float32)


def choose_qparams(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    check_ranges("choose_qparams", lo, hi)
    return torch.empty_like(lo), torch.empty_like(lo, dtype=torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    check_float("quantize", "x", x)
    check_qparams("quantize", x, x.shape[:-1].numel(), scale, zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


def rotate(x: Tensor, block: int, signs: bool = False) -> Tensor:
    check_float("rotate", "x", x)
    check_rotation("rotate", x.shape[-1], block)
    return x.new_empty(x.shape, dtype=torch.float32)


# ---- weights ----


def quantize_weight(weight: Tensor, config: int) -> tuple[Tensor, Tensor]:
    cfg = Config.decode(config)
    check_weight("quantize_weight", weight, cfg.rotation_block)
    scales = weight.shape[0] if cfg.weights == "per_channel" else 1
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(scales, dtype=torch.float32)


def pack_weight(weight: Tensor, full_range: bool = False) -> tuple[Tensor, Tensor]:
    check_int8_matrix("pack_weight", "weight", weight, "[N, K]")
    n, k = weight.shape
    packed = weight.new_empty(packed_shape(weight.device, n, k), dtype=torch.int8)
    return packed, weight.new_empty(n, dtype=torch.int32)


def unpack_weight(packed_weight: Tensor, n: int, k: int) -> Tensor:
    check_packed_k("unpack_weight", "k", k, packed_weight, n)
    return packed_weight.new_empty(n, k)


# ---- products ----


def int8_mm(q: Tensor, packed_weight: Tensor, weight_sum: Tensor) -> Tensor:
    check_int8_mm(q, packed_weight, weight_sum)
    check_packed_k("int8_mm", "q.shape[-1]", q.shape[1], packed_weight, weight_sum.shape[0])
    return q.new_empty(q.shape[0], weight_sum.shape[0], dtype=torch.int32)


def _fake_output(
    op: str,
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    cfg = Config.decode(config)
    check_operands(op, x, packed_weight, weight_sum, weight_scale, bias)
    check_packed_k(op, "x.shape[-1]", x.shape[-1], packed_weight, weight_scale.shape[0])
    check_k(op, x.shape[-1], config)
    if cfg.rotation_block:
        check_rotation(op, x.shape[-1], cfg.rotation_block)
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0], dtype=cfg.out_dtype or x.dtype)


def linear_dynamic(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    return _fake_output("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, config)


def linear_static(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    config: int,
) -> Tensor:
    check_qparams("linear_static", x, 1, scale, zero_point)
    return _fake_output("linear_static", x, packed_weight, weight_sum, weight_scale, bias, config)


# ---- layers with residual and norm ----


def _like(x: Tensor, n: int, config: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n, dtype=Config.decode(config).out_dtype or x.dtype)


def linear_norm(
    x: Tensor,
    layer: Tensors,
    config: int,
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    eps: float,
    norm: int,
) -> Tensor:
    check_linear_norm(x, layer, config, residual, norm_in, norm_out, norm)
    return _like(x, channels(layer), config)


def mlp(
    x: Tensor,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor | None,
    norm_in: Tensors,
    norm_out: Tensors,
    eps: float,
    norm: int,
) -> Tensor:
    check_mlp(x, gate, up, down, configs, residual, norm_in, norm_out, norm)
    return _like(x, channels(down), configs[2])


def linear_mlp(
    x: Tensor,
    layer: Tensors,
    gate: Tensors,
    up: Tensors,
    down: Tensors,
    configs: Sequence[int],
    residual: Tensor,
    first_norm: Tensors,
    second_norm: Tensors,
    eps: float,
    norm: int,
    pre_norm: bool,
) -> Tensor:
    check_linear_mlp(x, layer, gate, up, down, configs, residual, first_norm, second_norm, norm, pre_norm)
    return _like(x, channels(down), configs[3])


# ---- attention ----


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    check_attention(q, k, v, mask, scale)
    batch, heads, s_q, head_size = q.shape
    return q.new_empty(batch, s_q, heads, head_size).transpose(1, 2)


# ---- recurrent layers ----


def rnn(
    x: Tensor,
    state: Sequence[Tensor],
    input_layer: Tensors,
    hidden_layer: Tensors,
    projection: Tensors | None,
    configs: Sequence[int],
    cell: int,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> list[Tensor]:
    shape = check_rnn(x, state, input_layer, hidden_layer, projection, configs, cell, batch_sizes)
    like_output = _like(x, shape.out, configs[0])
    return [like_output, *(like_output.new_empty(tensor.shape) for tensor in state)]


# ---- embeddings ----


def embedding(indices: Tensor, weight: Tensor, weight_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    check_embedding("embedding", indices, weight, weight_scale, k, dtype)
    return weight.new_empty(*indices.shape, k, dtype=dtype)


def embedding_bag(
    indices: Tensor,
    offsets: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    per_sample_weights: Tensor | None,
    k: int,
    mode: int,
    include_last_offset: bool,
    padding_idx: int,
    dtype: torch.dtype,
) -> Tensor:
    check_embedding_bag(
        indices, offsets, weight, weight_scale, per_sample_weights, k, mode, include_last_offset, dtype
    )
    return weight.new_empty(offsets.shape[0] - int(include_last_offset), k, dtype=dtype)


def embedding_norm(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    k: int,
    norm_out: Sequence[Tensor | None],
    eps: float,
    norm: int,
    dtype: torch.dtype,
) -> Tensor:
    check_embedding_norm(indices, tables, scales, k, norm_out, norm, dtype)
    return tables[0].new_empty(*indices[0].shape, k, dtype=dtype)
