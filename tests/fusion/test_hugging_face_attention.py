"""``attn_implementation="dynquant"``: int8 attention in transformers models, by name."""

from __future__ import annotations

import copy
import re
from unittest import mock

import pytest
import torch
from torch import Tensor

import dynquant
from dynquant._extension import extension, status
from dynquant.nn.attention import has_int8_attention, scaled_dot_product_attention
from tests.support.same_bits import assert_same_bits

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
with_kernels = pytest.mark.skipif(extension is None, reason=f"no int8 attention: {status}")


def models(config: object, kind: type) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same random weights with torch's attention and with int8 attention."""
    torch.manual_seed(0)
    plain = kind._from_config(config, attn_implementation="sdpa").eval()
    int8 = kind._from_config(config, attn_implementation="dynquant").eval()
    int8.load_state_dict(plain.state_dict())
    return plain, int8


def calls_of_the_op(model: torch.nn.Module, **inputs: Tensor) -> tuple[Tensor, int]:
    op = torch.ops.dynquant.attention
    with (
        torch.no_grad(),
        mock.patch.object(torch.ops.dynquant, "attention", mock.Mock(side_effect=op)) as spy,
    ):
        out = model(**inputs)[0]
        return out, spy.call_count


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@with_kernels
def test_an_encoder_with_padding() -> None:
    plain, int8 = models(transformers.BertConfig(**SIZES), transformers.BertModel)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([[20], [9]])).long()
    out, calls = calls_of_the_op(int8, input_ids=ids, attention_mask=mask)
    assert calls == 2
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask)[0]
    assert relative_error(out, expected) < 0.01
    changed = torch.where(mask.bool(), ids, 7)
    other, _ = calls_of_the_op(int8, input_ids=changed, attention_mask=mask)
    # The mask arrives: padding counts in the scale of its block of values, and nowhere else.
    assert relative_error(other[1, :9], out[1, :9]) < 0.01


@with_kernels
def test_a_decoder_with_shared_heads_and_a_cache() -> None:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    plain, int8 = models(config, transformers.LlamaForCausalLM)
    ids = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    out, calls = calls_of_the_op(int8, input_ids=ids)
    assert calls == 2
    with torch.no_grad():
        assert relative_error(out, plain(input_ids=ids)[0]) < 0.02
        prefix = int8(input_ids=ids[:, :20])[0]
    torch.testing.assert_close(prefix[:, :16], out[:, :16], rtol=0.05, atol=0.02)  # later tokens stay unseen
    tokens = int8.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 28)


def test_what_runs_in_int8() -> None:
    def rows(s: int, d: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, 2, s, d, dtype=dtype)

    assert has_int8_attention(rows(16), rows(65), rows(65)) == (extension is not None)
    assert has_int8_attention(rows(1), rows(64), rows(64)) == (extension is not None)
    assert not has_int8_attention(rows(15), rows(65), rows(65))  # a token or a few, and a cache
    assert not has_int8_attention(rows(16), rows(16), rows(16, d=4))
    assert not has_int8_attention(rows(16).to("meta"), rows(16).to("meta"), rows(16).to("meta"))


@pytest.mark.parametrize("s", [4, 70])
def test_masks_are_combined_with_and_without_int8(s: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 16, generator=generator) for rows in (s, 70, 70))
    mask = torch.rand(s, 70, generator=generator) < 0.8
    mask[:, 0] = True
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    seen = mask & torch.ones(s, 70, dtype=torch.bool).tril()
    assert relative_error(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)) < 0.02


BART_LIKE = {
    "vocab_size": 50,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
OWN_ATTENTION: dict[str, tuple[str, dict[str, object], str]] = {
    "sinks": (
        "GptOss",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 1, "num_experts_per_tok": 1},
        "which transformers does not run by 'sdpa' either",
    ),
    "softcap": (
        "Gemma2",
        {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
        "which transformers does not run by 'sdpa' either",
    ),
    "an encoder without is_causal": (
        "Splinter",
        {**SIZES, "question_token_id": 4},
        "which transformers does not run by 'sdpa' either",
    ),
    "a decoder whose is_causal is false": (
        "PegasusX",
        {**BART_LIKE, "block_size": 4, "num_global_tokens": 2},
        "which transformers does not run by 'sdpa' either",
    ),
    "attention without the interface": (
        "Git",
        {**SIZES, "vision_config": VISION, "bos_token_id": 1, "eos_token_id": 2},
        "which transformers does not run by 'sdpa' either",
    ),
    "a mask for sdpa alone": (
        "AXK2",
        {
            **SIZES,
            "moe_intermediate_size": 32,
            "n_routed_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "index_topk": 3,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
        "whose code asks whether it is 'sdpa'",
    ),
}


@pytest.mark.parametrize("case", OWN_ATTENTION)
def test_attention_that_is_more_than_softmax_over_masks_stays_float(case: str) -> None:
    prefix, sizes, reason = OWN_ATTENTION[case]
    kind = getattr(transformers, f"{prefix}Model", None)
    if kind is None:
        pytest.skip(f"this transformers has no {prefix}Model")
    torch.manual_seed(0)
    pads = {"pad_token_id": 0} if prefix in ("GptOss", "AXK2") else {}
    model = kind(getattr(transformers, f"{prefix}Config")(**sizes, **pads)).eval()
    inputs = {"input_ids": torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))}
    if prefix == "PegasusX":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    with pytest.warns(UserWarning, match=f"attention stays float in {prefix}.*, {re.escape(reason)}"):
        asked = dynquant.quantize_dynamic(copy.deepcopy(model), attention="int8")
    plain = dynquant.quantize_dynamic(model)
    with torch.no_grad():
        assert_same_bits(asked(**inputs)[0], plain(**inputs)[0])
        for part in plain.modules():
            if isinstance(part, transformers.PreTrainedModel):
                part.config._attn_implementation_internal = "dynquant"
        with pytest.raises(ValueError, match=f"has attention of its own, {re.escape(reason)}"):
            plain(**inputs)


@with_kernels
def test_a_decoder_compiles_whole() -> None:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    torch.manual_seed(0)
    model = dynquant.quantize_dynamic(transformers.LlamaModel(config).eval(), attention="int8")
    ids = torch.randint(0, 50, (1, 20))
    with torch.no_grad():
        expected = model(ids, use_cache=False)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same_bits(compiled(ids, use_cache=False)[0], expected)
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        assert_same_bits(exported.module()(ids, use_cache=False)[0], expected)
