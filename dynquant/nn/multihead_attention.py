"""QMultiheadAttention: nn.MultiheadAttention with int8 projections."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import ops  # noqa: F401  registers torch.ops.dynquant
from ..config import MAX_ROTATION_BLOCK, Config, layer_config
from ..own_thread import on_own_thread
from ..qtensor import QTensor, tensors_of
from ..reference import packed_shape
from .attention import is_attention_float, report_to_watcher, scaled_dot_product_attention
from .linear import QLinear
from .module import NotScriptable
from .named_weights import NamedWeights
from .state import check_bias

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Product(NamedTuple):
    """A linear_dynamic op on some of the channels of in_proj.

    Attributes:
        weight: packed_weight, weight_sum and weight_scale.
        config: the op's.
        computed: its channels, the range of in_proj's whose bias it adds.
        returned: those of its own channels that are asked for.
    """

    weight: tuple[Tensor, Tensor, Tensor]
    config: int
    computed: slice
    returned: slice

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _linear_dynamic(
            x, *self.weight, None if bias is None else bias[self.computed], self.config
        )
        return out[..., self.returned]


class QMultiheadAttention(NotScriptable, NamedWeights):
    """nn.MultiheadAttention whose projections of query, key, value and output are int8; the attention itself,
    softmax(q @ k.T) @ v, is torch's in float.

    A tensor that is query, key and value at once is quantized once and multiplied by all three projections in
    one op; one that is key and value, by theirs. Where ``embed_dim`` does not fill whole panels of the packed
    weight (multiples of 16 do), attention to another tensor multiplies by all three and drops the rest.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as nn.MultiheadAttention's.
        activations, weights, rotation: as of :class:`dynquant.QLinear`.

    Attributes:
        in_proj_weight: the :class:`dynquant.QTensor` [3 embed_dim, embed_dim]; None with ``kdim`` or ``vdim``
            other than ``embed_dim``, and then there are ``q_proj_weight``, ``k_proj_weight``,
            ``v_proj_weight``. Assigning a float tensor quantizes that one instead.
        in_proj_bias: float Parameter [3 embed_dim], or None.
        out_proj: the :class:`dynquant.QLinear`.
        bias_k, bias_v: float Parameters [1, 1, embed_dim], or None.

    Shape:
        As nn.MultiheadAttention's, with all of its arguments; a nested tensor that is query, key and value at
        once gives one of the same layout, without weights.

    Raises:
        ValueError: for scheme words that do not exist, arguments that do not go together.
        RuntimeError: for inputs and masks of other shapes, dtypes or devices.
    """

    quantized_input_names = ("query", "key", "value")
    converts_parts = True
    int8_attention = False  # by quantize_dynamic(attention="int8"), for calls without need_weights

    if TYPE_CHECKING:  # at run time torch.jit.script would read them as its own types
        embed_dim: int
        kdim: int
        vdim: int
        num_heads: int
        head_dim: int
        dropout: float
        batch_first: bool
        in_proj_weight: QTensor | None
        in_proj_bias: nn.Parameter | None
        bias_k: nn.Parameter | None
        bias_v: nn.Parameter | None
        out_proj: QLinear
        _prepared: dict[str, _Product]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        more = add_bias_kv, add_zero_attn, kdim, vdim, batch_first
        attention = nn.MultiheadAttention(embed_dim, num_heads, dropout, bias, *more, **options)
        self._init_from(attention, activations, weights, rotation)

    @classmethod
    def why_not(cls, float_module: nn.Module) -> str | None:
        out = getattr(float_module, "out_proj", None)
        if type(out) in (NonDynamicallyQuantizableLinear, nn.Linear) or isinstance(out, QLinear):
            return None
        return f"its out_proj is a {type(out).__name__}"

    @classmethod
    def from_float(
        cls,
        attention: nn.MultiheadAttention,
        *,
        activations: str = "per_token",
        weights: str = "per_channel",
        rotation: str | int | None = None,
    ) -> QMultiheadAttention:
        """Quantize an nn.MultiheadAttention, which does not change. An ``out_proj`` that is a QLinear already
        is copied as it is.

        Raises:
            TypeError: for any other type.
            ValueError: for scheme words that do not exist, a weight that is not float32, bfloat16, float16 or
                float64, a NaN or an infinity in a weight, a NaN in a bias.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(
                "QMultiheadAttention.from_float: expected an nn.MultiheadAttention, got "
                f"{type(attention).__name__}"
            )
        reason = cls.why_not(attention)
        if reason is not None:
            raise ValueError(f"QMultiheadAttention: {reason}")

        def make() -> QMultiheadAttention:
            self = cls.__new__(cls)
            nn.Module.__init__(self)
            self._init_from(attention, activations, weights, rotation)
            return self.train(attention.training)

        return on_own_thread(attention.parameters(), make)

    def _init_from(self, attention: Any, activations: str, weights: str, rotation: str | int | None) -> None:
        for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first"):
            setattr(self, name, getattr(attention, name))
        self.add_zero_attn = attention.add_zero_attn
        self._qkv_same_embed_dim = attention._qkv_same_embed_dim
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, _copied(name, getattr(attention, name)))
        out = attention.out_proj
        if isinstance(out, QLinear):
            self.out_proj = copy.deepcopy(out)
        else:
            self.out_proj = QLinear.from_float(
                out, activations=activations, weights=weights, rotation=rotation
            )
        weights_of = {name: getattr(attention, name) for name in ("in_proj_weight", *_SEPARATE)}
        self.__dict__.update({name: None for name, weight in weights_of.items() if weight is None})
        config = layer_config(MAX_ROTATION_BLOCK, activations, weights, rotation)
        self._init_tensors(
            {name: weight for name, weight in weights_of.items() if weight is not None}, {}, config
        )

    def _prepare(self) -> dict[str, _Product]:
        products: dict[str, _Product] = {}
        e, whole = self.embed_dim, slice(None)
        if self._qkv_same_embed_dim:
            weight: QTensor = self.__dict__["in_proj_weight"]
            code = self._code("in_proj_weight")
            products["qkv"] = _Product(tensors_of(weight), code, whole, whole)
            for name, first, last in (("q", 0, 1), ("k", 1, 2), ("v", 2, 3), ("kv", 1, 3)):
                products[name] = _part(weight, code, slice(first * e, last * e))
        else:
            for i, (letter, name) in enumerate(zip("qkv", _SEPARATE, strict=True)):
                channels = slice(i * e, (i + 1) * e)
                products[letter] = _Product(self._op_tensors(name), self._code(name), channels, whole)
        return products

    def to_float(self) -> nn.MultiheadAttention:
        """An nn.MultiheadAttention that computes the same without quantized activations, in the dtype of the
        weights."""
        weights = self.quantized_weights()
        dtype = next(iter(weights.values())).dtype
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj_bias is not None,
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
            dtype=dtype,
        )
        for name in weights:
            setattr(attention, name, nn.Parameter(weights[name].dequantize()))
        for name, parameter in self._parameters.items():
            if parameter is not None:
                setattr(attention, name, nn.Parameter(parameter.detach().to(dtype, copy=True)))
        out = self.out_proj.to_float()
        attention.out_proj.weight, attention.out_proj.bias = out.weight, out.bias
        return attention.train(self.training)

    def extra_repr(self) -> str:
        config: Config = self.config
        sizes = f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        if not self._qkv_same_embed_dim:
            sizes += f", kdim={self.kdim}, vdim={self.vdim}"
        return f"{sizes}, activations={config.activations}, weights={config.weights}{config.rotation_text}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's: the output, and the attention weights or None."""
        if query.is_nested or key.is_nested or value.is_nested:
            return self._of_nested(query, key, value, key_padding_mask, attn_mask), None
        _check_inputs(self, query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "QMultiheadAttention: expected attn_mask with is_causal, which says that this mask is "
                "causal, got None"
            )
        is_batched = query.dim() == 3
        q, k, v = self._projections(query, key, value)
        if not is_batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        # From here on [B, L, E], and scores [B, heads, L, S].
        if self.bias_k is not None and self.bias_v is not None:
            one = (q.shape[0], 1, self.embed_dim)
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(one)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(one)], 1)
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        keys = key.shape[1 if self.batch_first and is_batched else 0]
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else _merged_mask(attn_mask, key_padding_mask, q, keys, k.shape[2] - keys)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            # The causal hint is of the keys that were given: more of them follow with bias_k and zero_attn.
            if hint and k.shape[2] != keys:
                hint, mask = False, _merged_mask(attn_mask, None, q, keys, k.shape[2] - keys)
            if self.int8_attention and not dropout and not is_attention_float(self):
                report_to_watcher(id(self), q, k, v, mask, hint, None)
                out = scaled_dot_product_attention(q, k, v, mask, hint)
            else:
                out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hint)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not is_batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the shape of the inputs, each in one op with those that read the same tensor."""
        products, bias = self._prepared, self._parameters["in_proj_bias"]
        if query is key and key is value and "qkv" in products:
            q, k, v = products["qkv"](query, bias).chunk(3, -1)
            return q, k, v
        q = products["q"](query, bias)
        if key is value and "kv" in products:
            k, v = products["kv"](key, bias).chunk(2, -1)
            return q, k, v
        return q, products["k"](key, bias), products["v"](value, bias)

    def _of_nested(
        self, query: Any, key: Any, value: Any, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor:
        """Of a nested tensor that is all three: padded, with a mask of the padding."""
        if not (query is key and key is value) or key_padding_mask is not None or attn_mask is not None:
            raise RuntimeError(
                "QMultiheadAttention: expected a nested tensor to be query, key and value at once, without "
                "masks"
            )
        if not self.batch_first:
            raise RuntimeError(
                "QMultiheadAttention: expected batch_first=True for a nested tensor, got False"
            )
        lengths = [part.shape[0] for part in query.unbind()]
        x = query.to_padded_tensor(0.0)
        positions = torch.arange(x.shape[1], device=x.device)
        padding = positions >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self.forward(x, x, x, padding, need_weights=False)
        parts = [rows[:length] for rows, length in zip(out, lengths, strict=True)]
        if query.layout is torch.jagged:
            nested: Tensor = torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets=query.offsets())
            return nested
        return torch.nested.as_nested_tensor(parts)


def _copied(name: str, parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    try:
        check_bias(parameter)
    except ValueError as error:
        raise ValueError(str(error).replace("bias", name)) from None
    with torch.inference_mode(False):
        values = parameter.detach().clone(memory_format=torch.contiguous_format)
        return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _part(weight: QTensor, code: int, channels: slice) -> _Product:
    """The product with some channels: on a slice of the packed weight, if they fill whole panels of it."""
    packed_weight, weight_sum, weight_scale = tensors_of(weight)
    n = channels.stop - channels.start
    panel = packed_weight.shape[2] if packed_weight.dim() == 4 else 1
    rows = slice(channels.start // panel, -(-channels.stop // panel))
    part = packed_weight[rows]
    shape = packed_shape(weight.device, n, weight.shape[1])
    if packed_weight.dim() == 2:
        shape = [n, packed_weight.shape[1]]
    ends = channels.stop % panel == 0 or channels.stop == weight.shape[0]
    if channels.start % panel == 0 and ends and list(part.shape) == shape:
        return _Product((part, weight_sum[channels], weight_scale[channels]), code, channels, slice(None))
    return _Product((packed_weight, weight_sum, weight_scale), code, slice(None), channels)


def _check_inputs(module: QMultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    sizes = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    dims = [x.dim() for x in (query, key, value)]
    if query.dim() not in (2, 3) or dims.count(query.dim()) != 3:
        raise RuntimeError(
            "QMultiheadAttention: expected query, key and value all with 3 dimensions, or unbatched with 2, "
            f"got {', '.join(map(str, dims))}"
        )
    for (name, size), x in zip(sizes.items(), (query, key, value), strict=True):
        if x.shape[-1] != size:
            raise RuntimeError(f"QMultiheadAttention: expected {name}.shape[-1] == {size}, got {x.shape[-1]}")
    batch = 0 if module.batch_first else 1
    if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise RuntimeError(
            "QMultiheadAttention: expected one batch size, and key and value of one length, got shapes "
            f"{shapes}"
        )


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int, more: int
) -> Tensor | None:
    """Both masks as one that is added to scores [B, heads, L, keys + more]; all queries see the last keys."""
    batch, heads, queries, _ = q.shape
    total = None
    if attn_mask is not None:
        shape = list(attn_mask.shape)
        if shape not in ([queries, keys], [batch * heads, queries, keys]):
            raise RuntimeError(
                f"QMultiheadAttention: expected attn_mask of shape {[queries, keys]} or "
                f"{[batch * heads, queries, keys]}, got {shape}"
            )
        total = _additive("attn_mask", attn_mask, q.dtype)
        total = total if len(shape) == 2 else total.unflatten(0, (batch, heads))
    if key_padding_mask is not None:
        if list(key_padding_mask.shape) != [batch, keys]:
            raise RuntimeError(
                f"QMultiheadAttention: expected key_padding_mask of shape {[batch, keys]}, got "
                f"{list(key_padding_mask.shape)}"
            )
        padding = _additive("key_padding_mask", key_padding_mask, q.dtype)[:, None, None, :]
        total = padding if total is None else total + padding
    return total if total is None or not more else F.pad(total, (0, more))


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise RuntimeError(
            f"QMultiheadAttention: expected {name} of a float dtype or torch.bool, got {mask.dtype}"
        )
    return mask.to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """softmax(q @ k.T / sqrt(head size) + mask) @ v, and the softmax, after dropout as nn's."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1), dropout, dropout > 0.0)
    return weights @ v, weights
