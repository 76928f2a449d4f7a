"""Patterns of the embedding stage of transformers: rows of several tables, their sum and a norm."""

from __future__ import annotations

from typing import NamedTuple


class EmbeddingStage(NamedTuple):
    """A module whose forward is ``norm(tables[0](indices[0]) + tables[1](indices[1]) + ...)``.

    Attributes:
        tables: names of embeddings, in the order in which they are added.
        indices: for each table, the name of the argument of forward with its indices. The first is required.
        norm: name of the LayerNorm or RMSNorm.
        arguments: names of forward's arguments in their order. Others than the indices and ``offset`` must be
            None in a call.
        positions: that of the indices which is a buffer's ``[:, offset : offset + S]`` where it is not given;
            the buffer has the name of the argument. Other indices that are not given are what a buffer of
            their name has at these positions, or 0 if there is none.
        offset: name of the argument with the number of earlier tokens; empty if there is none.
        counts_tokens: whether positions that are not given count the tokens that are not padding: they come
            from ``create_position_ids_from_input_ids``, a function of the type or of its module.
        follows_positions: whether other indices that are not given are taken at the positions; else at the
            first S.
    """

    tables: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()
    norm: str = ""
    arguments: tuple[str, ...] = ()
    positions: str = ""
    offset: str = ""
    counts_tokens: bool = False
    follows_positions: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        return (*self.tables, self.norm)


BERT = EmbeddingStage(
    tables=("word_embeddings", "token_type_embeddings", "position_embeddings"),
    indices=("input_ids", "token_type_ids", "position_ids"),
    norm="LayerNorm",
    arguments=("input_ids", "token_type_ids", "position_ids", "inputs_embeds", "cache_length"),
    positions="position_ids",
    offset="cache_length",
)
ROBERTA = BERT._replace(counts_tokens=True)
ALBERT = BERT._replace(arguments=BERT.arguments[:-1], offset="")
CONVBERT = ALBERT._replace(
    tables=("word_embeddings", "position_embeddings", "token_type_embeddings"),
    indices=("input_ids", "position_ids", "token_type_ids"),
    follows_positions=False,
)
ERNIE = BERT._replace(
    arguments=(
        "input_ids",
        "token_type_ids",
        "task_type_ids",
        "position_ids",
        "inputs_embeds",
        "cache_length",
    )
)
NOMIC_BERT = ALBERT._replace(tables=BERT.tables[:2], indices=BERT.indices[:2], positions="")
ROFORMER = NOMIC_BERT._replace(arguments=("input_ids", "token_type_ids", "inputs_embeds"))
DISTILBERT = EmbeddingStage(
    tables=("word_embeddings", "position_embeddings"),
    indices=("input_ids", "position_ids"),
    norm="LayerNorm",
    arguments=("input_ids", "inputs_embeds", "position_ids"),
    positions="position_ids",
)
MPNET = DISTILBERT._replace(arguments=("input_ids", "position_ids", "inputs_embeds"), counts_tokens=True)
MODERNBERT = EmbeddingStage(
    tables=("tok_embeddings",),
    indices=("input_ids",),
    norm="norm",
    arguments=("input_ids", "inputs_embeds"),
)


def _modeling(folder: str, name: str, file: str = "") -> str:
    return f"transformers.models.{folder}.modeling_{file or folder}.{name}"


_BERT = {"bert": "Bert", "electra": "Electra", "rembert": "RemBert"}
_ROBERTA = {
    "bridgetower": "BridgeTowerText",
    "camembert": "Camembert",
    "clap": "ClapText",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "xmod": "Xmod",
}
_ALBERT = {"albert": "Albert", "splinter": "Splinter"}
_NOMIC_BERT = {"jina_embeddings_v3": "JinaEmbeddingsV3", "nomic_bert": "NomicBert"}

EMBEDDING_STAGES: dict[str, EmbeddingStage] = {
    **{_modeling(folder, f"{prefix}Embeddings"): BERT for folder, prefix in _BERT.items()},
    **{_modeling(folder, f"{prefix}Embeddings"): ROBERTA for folder, prefix in _ROBERTA.items()},
    **{_modeling(folder, f"{prefix}Embeddings"): ALBERT for folder, prefix in _ALBERT.items()},
    **{_modeling(folder, f"{prefix}Embeddings"): NOMIC_BERT for folder, prefix in _NOMIC_BERT.items()},
    _modeling("convbert", "ConvBertEmbeddings"): CONVBERT,
    _modeling("data2vec", "Data2VecTextEmbeddings", "data2vec_text"): ROBERTA,
    _modeling("distilbert", "Embeddings"): DISTILBERT,
    _modeling("ernie", "ErnieEmbeddings"): ERNIE,
    _modeling("modernbert", "ModernBertEmbeddings"): MODERNBERT,
    _modeling("mpnet", "MPNetEmbeddings"): MPNET,
    _modeling("roformer", "RoFormerEmbeddings"): ROFORMER,
}
"""By type. The names are those of transformers 5."""
