"""Patterns of an MLP with its norm and residual, where the attention before it stays a module of its own."""

from __future__ import annotations

from typing import NamedTuple


class ResidualMLP(NamedTuple):
    """A module whose forward ends with ``h + out_norm(mlp(norm(h)))``,
    ``mlp(n) = down(activation(gate(n)) * up(n))``, without a gate ``down(activation(up(n)))``.

    h is the input x, or ``x + attention_out_norm(attention(attention_norm(x), ...))``.

    Attributes:
        up, down: names of linear layers, dotted for parts of parts.
        activation: name of the activation, a module or a function.
        norm: name of the LayerNorm or RMSNorm before the MLP.
        mlp: name of the module that is called with the normed rows; empty if forward calls its parts and has
            no attention.
        gate: name of the gate's linear layer, empty if there is none.
        gate_up: name of one linear layer whose first half of channels is the gate, behind the activation, and
            whose second half is ``up``; these two names are then empty.
        attention: name of the module that is called with ``attention_norm``'s output and all other arguments
            of forward, each by its name; it returns its output alone or first in a tuple. Empty if forward
            has no attention.
        attention_norm, attention_out_norm, out_norm: names of modules, called as such; the latter two may be
            empty.
        arguments: names of forward's arguments in their order; the first is the input, [..., hidden].
    """

    up: str = ""
    down: str = ""
    activation: str = ""
    norm: str = ""
    mlp: str = ""
    gate: str = ""
    gate_up: str = ""
    attention: str = ""
    attention_norm: str = ""
    attention_out_norm: str = ""
    out_norm: str = ""
    arguments: tuple[str, ...] = ("hidden_states",)

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of the parts that the op takes in."""
        names = (self.norm, self.gate, self.up, self.gate_up, self.down, self.activation)
        return tuple(name for name in names if name)

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the parts that are called as modules."""
        names = (self.attention_norm, self.attention, self.attention_out_norm, self.out_norm)
        return tuple(name for name in names if name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        return (*self.roles, *((self.mlp,) if self.mlp else ()), *self.called)


LLAMA = ResidualMLP(
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    norm="post_attention_layernorm",
    mlp="mlp",
    attention="self_attn",
    attention_norm="input_layernorm",
    arguments=(
        "hidden_states",
        "attention_mask",
        "position_ids",
        "cache",
        "use_cache",
        "position_embeddings",
    ),
)
GEMMA_3 = LLAMA._replace(
    norm="pre_feedforward_layernorm",
    attention_out_norm="post_attention_layernorm",
    out_norm="post_feedforward_layernorm",
    arguments=("hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache"),
)
PHI_3 = LLAMA._replace(gate="", up="", gate_up="mlp.gate_up_proj", activation="mlp.activation_fn")

T5_FF = ResidualMLP(
    up="DenseReluDense.wi",
    down="DenseReluDense.wo",
    activation="DenseReluDense.act",
    norm="layer_norm",
    mlp="DenseReluDense",
)
T5_FF_GATED = T5_FF._replace(gate="DenseReluDense.wi_0", up="DenseReluDense.wi_1")

LLAMA_LAYERS = {
    "cwm": "Cwm",
    "ernie4_5": "Ernie4_5",
    "eurobert": "EuroBert",
    "gemma": "Gemma",
    "llama": "Llama",
    "ministral": "Ministral",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
GEMMA_3_LAYERS = {"gemma2": "Gemma2", "gemma3": "Gemma3"}
T5_FF_LAYERS = {
    "longt5": "LongT5",
    "mt5": "MT5",
    "pop2piano": "Pop2Piano",
    "t5": "T5",
    "udop": "Udop",
    "umt5": "UMT5",
}


def _modeling(folder: str, name: str) -> str:
    return f"transformers.models.{folder}.modeling_{folder}.{name}"


RESIDUAL_MLPS: dict[str, tuple[ResidualMLP, ...]] = {
    **{_modeling(folder, f"{prefix}DecoderLayer"): (LLAMA,) for folder, prefix in LLAMA_LAYERS.items()},
    **{_modeling(folder, f"{prefix}DecoderLayer"): (GEMMA_3,) for folder, prefix in GEMMA_3_LAYERS.items()},
    _modeling("phi3", "Phi3DecoderLayer"): (PHI_3,),
    **{
        _modeling(folder, f"{prefix}LayerFF"): (T5_FF, T5_FF_GATED) for folder, prefix in T5_FF_LAYERS.items()
    },
}
"""By type, those of which a module has all parts. The names are those of transformers 5, where decoder layers
return tensors."""
