"""Patterns of whole transformer layers: roles of parts, order of norms, meaning of arguments.

A layer fits a pattern if all parts that the pattern names are there and no other part has a function in it:
everything else inside must be a dropout, an identity or a holder of named parts.
"""

from __future__ import annotations

from typing import NamedTuple


class TransformerLayer(NamedTuple):
    """A layer of self-attention and an MLP, each with a residual and a norm.

    Post-norm: ``h = first_norm(x + out(attention(x)))``, ``second_norm(h + mlp(h))``. Pre-norm:
    ``h = x + out(attention(first_norm(x)))``, ``h + mlp(second_norm(h))``.
    ``mlp(h) = down(activation(up(h)))``, with a gate ``down(activation(gate(h)) * up(h))``.

    Attributes:
        query, key, value, out, up, down: names of linear layers, dotted for parts of parts.
        in_proj: name of an nn.MultiheadAttention, whose own parameter projects query, key and value; the
            three names are then empty.
        activation: name of the activation, a module or a function.
        first_norm, second_norm: names of LayerNorm or RMSNorm modules, in the order of their calls; the first
            of a pre-norm layer may be an nn.Identity.
        heads: name of the attribute with the number of heads.
        gate: name of the gate's linear layer, empty if there is none.
        pre_norm: whether norms come before attention and MLP; the name of an attribute that says it.
        scale: name of the attribute with the factor of the scores; empty for 1 / sqrt(head size).
        arguments: names of forward's arguments in their order; the first is the input, [B, S, hidden].
        masks: those of them that are added to the scores, or are true where a key takes part; they broadcast
            to [B, heads, S, S].
        key_padding: that of them, [B, S], which is added to the scores, or is true where no query sees a key.
        unless: names of attributes that must be absent or false.
        batch_first: name of an attribute that says whether the input is [B, S, hidden]; else it is
            [S, B, hidden]. Empty for always.
        config: name of a transformers config, whose attention implementation must be one that computes
            softmax attention over exactly these masks.
        returns_tuple: whether forward returns (output,).
        qkv: name of one linear layer that projects query, key and value, in this order; the three names are
            then empty.
        gate_up: name of one linear layer whose first half of channels is the gate, behind the activation, and
            whose second half is ``up``; these two names are then empty.
        position_bias: name of T5's attention, which adds the argument ``position_bias`` to its scores, or
            what its ``compute_bias`` gives; forward returns (output, bias, None).
        rotary: the one of the arguments that is cosines and sines, [B, S, head size], by which query and key
            are turned.
        clamps_fp16: whether forward clamps fp16 values, which the ops do not.
    """

    query: str = ""
    key: str = ""
    value: str = ""
    out: str = ""
    up: str = ""
    down: str = ""
    activation: str = ""
    first_norm: str = ""
    second_norm: str = ""
    heads: str = ""
    in_proj: str = ""
    gate: str = ""
    pre_norm: bool | str = False
    scale: str = ""
    arguments: tuple[str, ...] = ("hidden_states", "attention_mask")
    masks: tuple[str, ...] = ("attention_mask",)
    key_padding: str = ""
    unless: tuple[str, ...] = ()
    batch_first: str = ""
    config: str = ""
    returns_tuple: bool = False
    qkv: str = ""
    gate_up: str = ""
    position_bias: str = ""
    rotary: str = ""
    clamps_fp16: bool = False

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The names of all linear layers that are modules."""
        projections = (self.query, self.key, self.value, self.qkv, self.out)
        return tuple(name for name in (*projections, self.gate, self.up, self.gate_up, self.down) if name)

    @property
    def also(self) -> tuple[str, ...]:
        """The names of other parts that need not be there."""
        return (f"{self.position_bias}.relative_attention_bias",) if self.position_bias else ()

    @property
    def norms(self) -> tuple[str, str]:
        return self.first_norm, self.second_norm

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        in_proj = (self.in_proj,) if self.in_proj else ()
        return (*self.linear_layers, *in_proj, *self.norms, self.activation)


TORCH = TransformerLayer(
    in_proj="self_attn",
    out="self_attn.out_proj",
    up="linear1",
    down="linear2",
    activation="activation",
    first_norm="norm1",
    second_norm="norm2",
    heads="self_attn.num_heads",
    pre_norm="norm_first",
    # src_mask may be causal: the layer then stays as it is.
    arguments=("src", "src_mask", "src_key_padding_mask", "is_causal"),
    masks=(),
    key_padding="src_key_padding_mask",
    unless=("self_attn.bias_k", "self_attn.bias_v", "self_attn.add_zero_attn"),
    batch_first="self_attn.batch_first",
)

BERT = TransformerLayer(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    first_norm="attention.output.LayerNorm",
    second_norm="output.LayerNorm",
    heads="attention.self.num_attention_heads",
    scale="attention.self.scaling",
    arguments=(
        "hidden_states",
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "cache",
    ),
    unless=("is_decoder", "add_cross_attention", "attention.self.is_causal", "chunk_size_feed_forward"),
    config="attention.self.config",
)

DISTILBERT = TransformerLayer(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    activation="ffn.activation",
    first_norm="sa_layer_norm",
    second_norm="output_layer_norm",
    heads="attention.n_heads",
    scale="attention.scaling",
    unless=("attention.is_causal", "ffn.chunk_size_feed_forward"),
    config="attention.config",
)

MPNET = TransformerLayer(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    first_norm="attention.LayerNorm",
    second_norm="output.LayerNorm",
    heads="attention.attn.num_attention_heads",
    arguments=("hidden_states", "attention_mask", "position_bias", "output_attentions"),
    masks=("attention_mask", "position_bias"),
    returns_tuple=True,
)

VIT = TransformerLayer(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    first_norm="layernorm_before",
    second_norm="layernorm_after",
    heads="attention.num_attention_heads",
    pre_norm=True,
    scale="attention.scaling",
    unless=("attention.is_causal",),
    config="attention.config",
)

ALBERT = TransformerLayer(
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.dense",
    up="ffn",
    down="ffn_output",
    activation="activation",
    first_norm="attention.LayerNorm",
    second_norm="full_layer_layer_norm",
    heads="attention.num_attention_heads",
    scale="attention.scaling",
    unless=("attention.is_causal", "chunk_size_feed_forward"),
    config="attention.config",
)

CLIP = TransformerLayer(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    activation="mlp.activation_fn",
    first_norm="layer_norm1",
    second_norm="layer_norm2",
    heads="self_attn.num_heads",
    pre_norm=True,
    scale="self_attn.scale",
    # Images have no mask; that of a text may be causal.
    masks=(),
    unless=("self_attn.is_causal",),
    config="self_attn.config",
)

HUBERT = TransformerLayer(
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.out_proj",
    up="feed_forward.intermediate_dense",
    down="feed_forward.output_dense",
    activation="feed_forward.intermediate_act_fn",
    first_norm="layer_norm",
    second_norm="final_layer_norm",
    heads="attention.num_heads",
    scale="attention.scaling",
    unless=("attention.is_causal", "attention.is_decoder"),
    config="attention.config",
)


_T5_ATTENTION = "layer.0.SelfAttention"
T5 = TransformerLayer(
    query=f"{_T5_ATTENTION}.q",
    key=f"{_T5_ATTENTION}.k",
    value=f"{_T5_ATTENTION}.v",
    out=f"{_T5_ATTENTION}.o",
    up="layer.1.DenseReluDense.wi",
    down="layer.1.DenseReluDense.wo",
    activation="layer.1.DenseReluDense.act",
    first_norm="layer.0.layer_norm",
    second_norm="layer.1.layer_norm",
    heads=f"{_T5_ATTENTION}.n_heads",
    pre_norm=True,
    scale=f"{_T5_ATTENTION}.scaling",
    arguments=(
        "hidden_states",
        "attention_mask",
        "position_bias",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_decoder_position_bias",
        "cache",
    ),
    unless=("is_decoder", f"{_T5_ATTENTION}.is_causal", f"{_T5_ATTENTION}.is_decoder"),
    config=f"{_T5_ATTENTION}.config",
    position_bias=_T5_ATTENTION,
    clamps_fp16=True,
)
T5_GATED = T5._replace(gate="layer.1.DenseReluDense.wi_0", up="layer.1.DenseReluDense.wi_1")

MODERNBERT = TransformerLayer(
    qkv="attn.Wqkv",
    out="attn.Wo",
    gate_up="mlp.Wi",
    down="mlp.Wo",
    activation="mlp.act",
    first_norm="attn_norm",
    second_norm="mlp_norm",
    heads="attn.config.num_attention_heads",
    pre_norm=True,
    arguments=("hidden_states", "attention_mask", "position_embeddings"),
    unless=("attn.is_causal",),
    config="attn.config",
    rotary="position_embeddings",
)


def _modeling(folder: str, name: str) -> str:
    return f"transformers.models.{folder}.modeling_{folder}.{name}"


_BERT_LAYERS = {
    "bert": "Bert",
    "camembert": "Camembert",
    "electra": "Electra",
    "ernie": "Ernie",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
}
_CLIP_LAYERS = {"clip": "CLIP", "siglip": "Siglip"}
_HUBERT_LAYERS = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2"}
_T5_LAYERS = {"mt5": "MT5", "pop2piano": "Pop2Piano", "t5": "T5", "udop": "Udop"}
_VIT_LAYERS = {"deit": "DeiT", "vit": "ViT"}

_ONE_EACH: dict[str, TransformerLayer] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": TORCH,
    **{_modeling(folder, f"{prefix}Layer"): BERT for folder, prefix in _BERT_LAYERS.items()},
    **{_modeling(folder, f"{prefix}EncoderLayer"): CLIP for folder, prefix in _CLIP_LAYERS.items()},
    **{_modeling(folder, f"{prefix}EncoderLayer"): HUBERT for folder, prefix in _HUBERT_LAYERS.items()},
    _modeling("albert", "AlbertLayer"): ALBERT,
    _modeling("distilbert", "TransformerBlock"): DISTILBERT,
    _modeling("modernbert", "ModernBertEncoderLayer"): MODERNBERT,
    _modeling("mpnet", "MPNetLayer"): MPNET,
    **{_modeling(folder, f"{prefix}Layer"): VIT for folder, prefix in _VIT_LAYERS.items()},
}
TRANSFORMER_LAYERS: dict[str, tuple[TransformerLayer, ...]] = {
    **{name: (layer,) for name, layer in _ONE_EACH.items()},
    **{_modeling(folder, f"{prefix}Block"): (T5, T5_GATED) for folder, prefix in _T5_LAYERS.items()},
}
"""By type, those of which a layer has all parts. The names are those of transformers 5, where the layers
return tensors."""

ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa", "dynquant")
"""Values of a transformers config's ``_attn_implementation`` under which masks are additive, or true where a
key takes part."""

HARMLESS = frozenset({"output_hidden_states"})
"""Arguments that layers are passed and do not use: transformers collects hidden states by hooks."""
