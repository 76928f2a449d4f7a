"""QEmbedding and QEmbeddingBag: nn.Embedding and nn.EmbeddingBag with int8 tables, a scale for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from ..config import Config, one_of
from ..own_thread import on_own_thread
from ..qtensor import FUNCTIONS, QTensor, dequantize, in_original_basis, weight_scale
from ..reference.embedding import MODES
from .named_weights import NamedWeights

if TYPE_CHECKING:
    from typing_extensions import Self

_embedding = torch.ops.dynquant.embedding.default
_embedding_bag = torch.ops.dynquant.embedding_bag.default

MAX_NORM = (
    "max_norm ({}) would change rows of the table at each call, and an int8 table is read-only; renormalize "
    "the rows once and set max_norm=None"
)


def _check_max_norm(of: str, max_norm: float | None) -> None:
    if max_norm is not None:
        raise ValueError(f"{of}: {MAX_NORM.format(f'{max_norm:g}')}")


class _Table(NamedWeights):
    """What both modules have in common: a table [num_embeddings, embedding_dim], ``.weight``."""

    quantized_input_names = ()
    takes_rows = True
    float_type: type[nn.Module]

    if TYPE_CHECKING:  # at run time torch.jit.script would read them as its own types
        num_embeddings: int
        embedding_dim: int
        padding_idx: int | None
        weight: QTensor
        weight_packed: Tensor
        weight_channel_scale: Tensor
        _dtype: torch.dtype

    __jit_ignored_attributes__ = ("weight", "_prepared", "_config")

    @classmethod
    def why_not(cls, float_module: nn.Module) -> str | None:
        max_norm = getattr(float_module, "max_norm", None)
        return None if max_norm is None else MAX_NORM.format(f"{max_norm:g}")

    @classmethod
    def from_float(cls, embedding: nn.Module, *, weights: str = "per_channel") -> Self:
        """Quantize a float module, which does not change.

        Args:
            weights: ``"per_channel"`` (a scale for each row) or ``"per_tensor"``.

        Raises:
            TypeError: for any other type.
            ValueError: for another word, a module with ``max_norm``, a weight that is not float32, bfloat16,
                float16 or float64, a NaN or an infinity in it.
        """
        kind = cls.float_type.__name__
        if not isinstance(embedding, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float: expected an nn.{kind}, got {type(embedding).__name__}"
            )
        reason = cls.why_not(embedding)
        if reason is not None:
            raise ValueError(f"{cls.__name__}: {reason}")
        config = Config(weights=weights)

        def make() -> _Table:
            self = cls.__new__(cls)
            nn.Module.__init__(self)
            self._init_from(embedding, config)
            return self.train(embedding.training)

        return cast("Self", on_own_thread(embedding.parameters(), make))

    def _init_from(self, embedding: Any, config: Config) -> None:
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, embedding.norm_type
        # Both are about gradients of the table, which has none.
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, embedding.sparse
        self._init_tensors({"weight": embedding.weight}, {}, config)

    def _set_weights(self, weights: Mapping[str, QTensor]) -> None:
        for name, weight in weights.items():
            reason = self._why_not_held(weight)
            if reason is not None:
                raise ValueError(f"{type(self).__name__}: {name}: {reason}")
            # That of a linear layer, if it is tied to one.
            self.__dict__["_config"] = weight.config
        super()._set_weights(weights)

    def _why_not_held(self, weight: QTensor) -> str | None:
        """Why a weight of the right shape cannot be this one, as a clause; None if it can."""
        return None

    def shares(self, name: str, weight: QTensor) -> bool:
        return weight.shape == self.weight.shape and self._why_not_held(weight) is None

    @property
    def weight_scale(self) -> Tensor:
        return weight_scale(self.weight)

    def dequantize_weight(self) -> Tensor:
        """The values of the table: fp32 [num_embeddings, embedding_dim]."""
        return dequantize(self.weight)

    def _float(self, **options: Any) -> Any:
        """A module of the float type with the values of the table."""
        module = self.float_type(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
            **options,
        )
        module.weight = nn.Parameter(self.weight.dequantize())
        return module.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, weights={self.config.weights}"


class QEmbedding(_Table):
    """nn.Embedding with an int8 table: a row is ``float(q) * scale``, in the dtype of ``.weight``.

    Where a linear layer is tied to it, as the head of a language model is, both hold the layer's packed
    weight, which is in memory once. A row of it then takes a cache line for each 4 elements.

    Args:
        num_embeddings, embedding_dim, padding_idx, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            nn.Embedding's. The table has no gradient, so that the last two flags have no effect.
        max_norm: None; anything else is refused.
        weights: ``"per_channel"`` (a scale for each row) or ``"per_tensor"``.

    Attributes:
        weight: the :class:`dynquant.QTensor` [num_embeddings, embedding_dim]. Assigning a float tensor
            quantizes that one instead.
        weight_scale: fp32 [num_embeddings], [1] per_tensor.

    Shape:
        input of int64 or int32 [...] -> [..., embedding_dim].

    Raises:
        ValueError: for a word that does not exist, ``max_norm``.
        RuntimeError: for an index outside of [0, num_embeddings), an input of another dtype or device.
    """

    float_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        weights: str = "per_channel",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_max_norm("QEmbedding", max_norm)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        embedding = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, None, norm_type, scale_grad_by_freq, sparse, **options
        )
        self._init_from(embedding, Config(weights=weights))

    def _prepare(self) -> tuple[Tensor, Tensor, int, torch.dtype, bool]:
        weight = self.weight
        self.__dict__["_dtype"] = weight.dtype
        tensors = weight.packed_weight, weight.channel_scale
        return (*tensors, weight.shape[1], weight.dtype, weight.config.rotation_block > 0)

    def forward(self, input: Tensor) -> Tensor:
        packed_weight, scale, k, dtype, is_rotated = self._prepared
        if is_rotated or input.is_nested:
            return rows_of(self.weight, input)
        out: Tensor = _embedding(input, packed_weight, scale, k, dtype)
        return out

    def _forward_in_torch_script(self, input: Tensor) -> Tensor:
        """:meth:`forward` for torch.jit.script, which knows no subclass of Tensor."""
        return torch.ops.dynquant.embedding(
            input, self.weight_packed, self.weight_channel_scale, self.embedding_dim, self._dtype
        )

    forward.__wrapped__ = _forward_in_torch_script  # type: ignore[attr-defined]

    def to_float(self) -> nn.Embedding:
        """An nn.Embedding that computes the same, in the dtype of ``.weight``."""
        module: nn.Embedding = self._float()
        return module


class QEmbeddingBag(_Table):
    """nn.EmbeddingBag with an int8 table: sums, means or maxima of its rows, in fp32 and in order.

    Args:
        num_embeddings, embedding_dim, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset,
            padding_idx, device, dtype: as nn.EmbeddingBag's. The table has no gradient.
        max_norm: None; anything else is refused.
        weights: ``"per_channel"`` (a scale for each row) or ``"per_tensor"``.

    Attributes:
        weight, weight_scale: as of :class:`QEmbedding`.

    Shape:
        input of int64 or int32 [B, L], or [L] with ``offsets`` [B] (``include_last_offset``: [B + 1]), and
        ``per_sample_weights`` of input's shape with the mode "sum" -> [B, embedding_dim]. Gradients reach
        ``per_sample_weights``.

    Raises:
        ValueError: for words that do not exist, ``max_norm``, arguments that do not go together.
        RuntimeError: for an index out of range, offsets that decrease or exceed the input.
    """

    float_type = nn.EmbeddingBag

    if TYPE_CHECKING:
        mode: str
        include_last_offset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        weights: str = "per_channel",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_max_norm("QEmbeddingBag", max_norm)
        embedding = nn.EmbeddingBag(
            num_embeddings,
            embedding_dim,
            None,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
        self._init_from(embedding, Config(weights=weights))

    def _init_from(self, embedding: Any, config: Config) -> None:
        one_of("mode", embedding.mode, MODES)
        self.mode, self.include_last_offset = embedding.mode, embedding.include_last_offset
        super()._init_from(embedding, config)

    def _why_not_held(self, weight: QTensor) -> str | None:
        if not weight.config.rotation_block:
            return None
        return f"expected a weight without rotation, got rotation=hadamard({weight.config.rotation_block})"

    def _prepare(self) -> None:
        self.__dict__["_dtype"] = self.weight.dtype

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return bags_of(
            self.weight,
            input,
            offsets,
            per_sample_weights,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def _forward_in_torch_script(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """:meth:`forward` for torch.jit.script, which knows no subclass of Tensor."""
        indices, begins, factors = _flat_bags(input, offsets, per_sample_weights, self.include_last_offset)
        mode = 0 if self.mode == "sum" else 1 if self.mode == "mean" else 2
        padding = -1
        if self.padding_idx is not None:
            padding = self.padding_idx % self.num_embeddings
        return torch.ops.dynquant.embedding_bag(
            indices,
            begins,
            self.weight_packed,
            self.weight_channel_scale,
            factors,
            self.embedding_dim,
            mode,
            self.include_last_offset,
            padding,
            self._dtype,
        )

    forward.__wrapped__ = _forward_in_torch_script  # type: ignore[attr-defined]

    def to_float(self) -> nn.EmbeddingBag:
        """An nn.EmbeddingBag that computes the same, in the dtype of ``.weight``."""
        module: nn.EmbeddingBag = self._float(mode=self.mode, include_last_offset=self.include_last_offset)
        return module

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


# ---- calls ----


def rows_of(weight: QTensor, indices: Tensor) -> Tensor:
    """Rows of a weight, packed or not: [*indices.shape, K] in the weight's dtype."""
    if indices.is_nested:
        return _of_nested(lambda values: rows_of(weight, values), indices)
    k, config = weight.shape[1], weight.config
    dtype = torch.float32 if config.rotation_block else weight.dtype
    rows: Tensor = _embedding(indices, weight.packed_weight, weight.channel_scale, k, dtype)
    return in_original_basis(rows, config).to(weight.dtype)


def _of_nested(rows: Callable[[Tensor], Tensor], indices: Any) -> Tensor:
    """``rows`` of the indices of a nested tensor, nested likewise."""
    if indices.layout is torch.jagged:
        if indices.lengths() is not None:  # values between the parts are not the input's
            indices = indices.contiguous()
        out: Tensor = torch.nested.nested_tensor_from_jagged(
            rows(indices.values()), offsets=indices.offsets(), jagged_dim=indices._ragged_idx
        )
        return out
    return torch.nested.as_nested_tensor([rows(part) for part in indices.unbind()])


def _flat_bags(
    input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices [L], offsets and weights [L] of the bags, in words that torch.jit.script knows too."""
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError(
                "embedding_bag: expected no offsets with an input [B, L], whose rows are the bags; got "
                f"offsets of shape {list(offsets.shape)}"
            )
        if include_last_offset:
            raise ValueError("embedding_bag: expected an input [L] with include_last_offset, got [B, L]")
        begins = torch.arange(input.shape[0], device=input.device) * input.shape[1]
    elif input.dim() != 1:
        raise ValueError(f"embedding_bag: expected an input [B, L] or [L], got {list(input.shape)}")
    elif offsets is None:
        raise ValueError("embedding_bag: expected offsets with an input [L], got None")
    else:
        begins = offsets
    if per_sample_weights is not None:
        if per_sample_weights.shape != input.shape:
            raise ValueError(
                f"embedding_bag: expected per_sample_weights of the input's shape {list(input.shape)}, got "
                f"{list(per_sample_weights.shape)}"
            )
        per_sample_weights = per_sample_weights.flatten()
    return input.flatten(), begins, per_sample_weights


def bags_of(
    weight: QTensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    mode: str,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """F.embedding_bag of a weight without rotation, in the weight's dtype."""
    indices, offsets, per_sample_weights = _flat_bags(input, offsets, per_sample_weights, include_last_offset)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    if per_sample_weights is not None and per_sample_weights.requires_grad and torch.is_grad_enabled():
        # Torch's own ops, which have the derivative, on the rows that the bags have.
        if padding_idx is not None:
            per_sample_weights = per_sample_weights.masked_fill(indices == padding, 0.0)
        rows = rows_of(weight, indices)
        places = torch.arange(indices.shape[0], device=indices.device)
        factors = per_sample_weights.to(rows.dtype)
        return F.embedding_bag(
            places,
            rows,
            offsets.to(places.dtype),
            mode=mode,
            per_sample_weights=factors,
            include_last_offset=include_last_offset,
        )
    tensors = weight.packed_weight, weight.channel_scale
    code = MODES.index(mode)
    out: Tensor = _embedding_bag(
        indices,
        offsets,
        *tensors,
        per_sample_weights,
        weight.shape[1],
        code,
        include_last_offset,
        padding,
        weight.dtype,
    )
    return out


# ---- F.embedding and F.embedding_bag of a QTensor, for modules with a forward of their own ----


def _functional_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not isinstance(weight, QTensor):
        raise TypeError("F.embedding: expected indices as input, got a QTensor")
    _check_max_norm("F.embedding", max_norm)
    return rows_of(weight, input)


def _functional_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if not isinstance(weight, QTensor) or weight.config.rotation_block:
        weight, input = (x.dequantize() if isinstance(x, QTensor) else x for x in (weight, input))
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    _check_max_norm("F.embedding_bag", max_norm)
    one_of("mode", mode, MODES)
    return bags_of(
        weight,
        input,
        offsets,
        per_sample_weights,
        mode=mode,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


FUNCTIONS[F.embedding] = _functional_embedding
FUNCTIONS[F.embedding_bag] = _functional_embedding_bag
