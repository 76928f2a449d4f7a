"""from_torch_ao: modules and state_dicts that torch.ao quantized, with the same int8 weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..checkpoint.hugging_face import describe
from ..config import ACTIVATIONS, Config, one_of
from ..nn.linear import QLinear
from ..nn.rnn import QGRU, QLSTM, QRecurrent
from ..nn.rnn_cells import QGRUCell, QLSTMCell, QRecurrentCell, QRNNCell
from ..nn.state import entries_of, format_entry
from ..own_thread import on_own_thread
from .swap import carry_hooks_over

_PACKED = "_packed_params._packed_params"
"""Key of torch.ao's pair of a quantized weight and a bias, behind the name of a linear layer."""

_DYNAMIC, _STATIC = "torch.ao.nn.quantized.dynamic.modules.", "torch.ao.nn.quantized.modules."
_LINEAR = {
    f"{_DYNAMIC}linear.Linear": "none",
    "torch.ao.nn.intrinsic.quantized.dynamic.modules.linear_relu.LinearReLU": "relu",
}
"""Epilogue by the type of torch.ao's linear layers."""

_RECURRENT: dict[str, type[QRecurrent | QRecurrentCell]] = {
    f"{_DYNAMIC}rnn.LSTM": QLSTM,
    f"{_DYNAMIC}rnn.GRU": QGRU,
    f"{_DYNAMIC}rnn.LSTMCell": QLSTMCell,
    f"{_DYNAMIC}rnn.GRUCell": QGRUCell,
    f"{_DYNAMIC}rnn.RNNCell": QRNNCell,
}
_OPTIONS = ("num_layers", "batch_first", "dropout", "bidirectional", "nonlinearity")

_VALUES, _CELL = "_all_weight_values.", "_packed_weight_"
"""Within the keys of torch.ao's recurrent modules and cells."""

_ROOTS = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.", "torch.ao.nn.quantizable.")
_AFFINE_EMBEDDING = (
    "its rows are uint8 with a zero point of their own, and int8 rows here are symmetric; convert the float "
    "model with dynquant.quantize_dynamic"
)
_REASONS = {
    f"{_STATIC}linear.Linear": (
        "its input is a quantized tensor, whose scale another module sets; convert the float model with "
        "dynquant.quantize_dynamic, then dynquant.calibrate and dynquant.freeze"
    ),
    f"{_STATIC}embedding_ops.Embedding": _AFFINE_EMBEDDING,
    f"{_STATIC}embedding_ops.EmbeddingBag": _AFFINE_EMBEDDING,
}
_NO_COUNTERPART = "dynquant has no module that takes its weights; convert the float model"
_FLOAT16 = (
    "its weight is float16, and there is nothing int8 in it; layer.weight() is a float tensor, which "
    "dynquant.quantize_dynamic can quantize in an nn.Linear"
)


@overload
def from_torch_ao(x: nn.Module, *, activations: str = "per_token") -> nn.Module: ...


@overload
def from_torch_ao(x: Mapping[str, Any], *, activations: str = "per_token") -> dict[str, Any]: ...


def from_torch_ao(x: Any, *, activations: str = "per_token") -> Any:
    """Take over what ``torch.ao.quantization.quantize_dynamic`` made, without quantizing weights again: the
    int8 weights are the same integers, -128 included, and the scales the same numbers in fp32.

    Args:
        x: one of torch.ao's modules, a model that holds some, or the state_dict of either; not changed.
        activations: how inputs are quantized at each call. ``"per_tensor"`` is torch.ao's scheme;
            ``"per_token"``, one scale a row, is closer to float.

    Returns:
        The dynquant module; a copy of the model with dynquant modules in the place of torch.ao's, in which
        modules without a counterpart stay as they are, with one warning that says why; a state_dict that a
        model of :func:`dynquant.quantize_dynamic` loads. Forward hooks are carried over.

    Raises:
        TypeError: for anything else.
        ValueError: for a module or an entry that has no counterpart, with the reason; for a scheme word that
            does not exist.
    """
    one_of("activations", activations, ACTIVATIONS)
    if isinstance(x, Mapping):
        return _state(x, activations)
    if not isinstance(x, nn.Module):
        raise TypeError(
            f"from_torch_ao: expected a module or a state_dict of torch.ao, got {type(x).__name__}"
        )
    with torch.inference_mode(False), torch.no_grad():
        if _is_of_torch_ao(x):
            return _layer("the module", x, activations)
        model, left = on_own_thread(_weights(x), lambda: _model(x, activations))
    if left is not None:
        warnings.warn(f"from_torch_ao: {left}", stacklevel=2)
    return model


# ---- modules


def _name_of_type(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_of_torch_ao(module: nn.Module) -> bool:
    return _name_of_type(module).startswith(_ROOTS) and type(module).__name__ != "LinearPackedParams"


def _weights(model: nn.Module) -> list[Tensor]:
    """Stand-ins that say how much work there is: the weights themselves are packed, and no parameters."""
    sizes = [
        getattr(module, "in_features", 0) * getattr(module, "out_features", 0) for module in model.modules()
    ]
    return [torch.empty(max(sizes, default=0), device="meta")]


def _model(model: nn.Module, activations: str) -> tuple[nn.Module, str | None]:
    """The converted copy, and what a user should know of modules that stay."""
    replaced: dict[int, Any] = {}
    reasons: dict[str, str] = {}
    inner: tuple[str, ...] = ()  # prefixes of names within torch.ao's modules
    for name, module in model.named_modules():
        if name.startswith(inner) or not _is_of_torch_ao(module):
            continue
        inner = (*inner, f"{name}.")
        try:
            replaced[id(module)] = _layer(f"layer {name!r}", module, activations)
        except ValueError as error:
            reasons[name] = str(error).removeprefix("from_torch_ao: ")
    if not replaced and not reasons:
        raise ValueError(
            "from_torch_ao: expected modules that torch.ao quantized, got a "
            f"{type(model).__name__} without any; dynquant.quantize_dynamic converts float models"
        )
    old = {id(module): module for module in model.modules()}
    memo = dict(replaced)  # deepcopy takes these in place of copies
    result = copy.deepcopy(model, memo)
    for key, layer in replaced.items():
        carry_hooks_over(old[key], layer, lambda value: copy.deepcopy(value, memo))
    describe(result)
    if not reasons:
        return result, None
    return result, f"{len(replaced)} layers converted; left as they are: {'; '.join(reasons.values())}"


def _layer(where: str, module: Any, activations: str) -> nn.Module:
    """The counterpart of one of torch.ao's modules."""
    kind = _name_of_type(module)
    if kind in _RECURRENT:
        return _recurrent(f"{where} ({type(module).__name__})", module, _RECURRENT[kind], activations)
    if kind not in _LINEAR:
        reason = _REASONS.get(kind, _NO_COUNTERPART)
        raise ValueError(f"from_torch_ao: {where} ({type(module).__name__}): {reason}")
    epilogue = _LINEAR[kind]
    weight, bias = module._weight_bias()
    entries = _linear_entries(f"{where} ({type(module).__name__})", weight, bias, activations, epilogue)
    n, k = weight.shape
    layer = QLinear(k, n, bias is not None, epilogue=epilogue, device="meta")
    layer.load_state_dict(entries, assign=True)
    return layer.eval()  # as dynquant.quantize_dynamic; torch.ao leaves new modules in training mode


def _recurrent(where: str, module: Any, kind: Any, activations: str) -> nn.Module:
    weights, biases = module.get_weight(), module.get_bias()
    options = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
    options |= {"bias": bool(module.bias), "device": "meta"}
    layer: nn.Module = kind(module.input_size, module.hidden_size, **options)
    entries = _named_entries(where, weights, biases if module.bias else {}, activations)
    layer.load_state_dict(entries, assign=True)
    return layer.eval()


# ---- state_dicts


def _state(state: Mapping[str, Any], activations: str) -> dict[str, Any]:
    linear = [key.removesuffix(_PACKED) for key in state if key.endswith(_PACKED)]
    linear += [  # version 2 of torch.ao's format has weight and bias apart
        key.removesuffix("_packed_params.weight") for key in state if key.endswith("_packed_params.weight")
    ]
    result: dict[str, Any] = {}
    for prefix in linear:
        weight, bias = state.get(prefix + _PACKED) or (
            state[f"{prefix}_packed_params.weight"],
            state.get(f"{prefix}_packed_params.bias"),
        )
        where = f"layer {prefix.removesuffix('.')!r}"
        if float(state.get(f"{prefix}scale", 1.0)) != 1.0 or int(state.get(f"{prefix}zero_point", 0)) != 0:
            raise ValueError(f"from_torch_ao: {where}: {_REASONS[f'{_STATIC}linear.Linear']}")
        entries = _linear_entries(where, weight, bias, activations, "none")
        result |= {prefix + name: value for name, value in entries.items()}
    recurrent = _recurrent_prefixes(state)
    for prefix in recurrent:
        where = f"module {prefix.removesuffix('.')!r}"
        weights, biases = _unpacked(where, state, prefix)
        entries = _named_entries(where, weights, biases, activations)
        result |= {prefix + name: value for name, value in entries.items()}
    taken = tuple(f"{prefix}_packed_params." for prefix in linear)
    taken += tuple(f"{prefix}{part}" for prefix in recurrent for part in (_VALUES, _CELL))
    constants = {prefix + name for prefix in linear for name in ("scale", "zero_point")}
    for key, value in state.items():
        if key.startswith(taken) or key in constants:
            continue
        if not isinstance(value, Tensor) or value.is_quantized:
            what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            is_embedding = key.endswith(("_packed_params._packed_weight", "_packed_params.dtype"))
            reason = _AFFINE_EMBEDDING if is_embedding else _NO_COUNTERPART
            raise ValueError(f"from_torch_ao: {key} ({what}): {reason}")
        result[key] = value
    if not linear and not recurrent:
        raise ValueError(
            "from_torch_ao: expected a state_dict that torch.ao quantized, with entries _packed_params, got "
            f"one of {len(state)} entries without any; models of dynquant.quantize_dynamic load float ones"
        )
    return result


def _recurrent_prefixes(state: Mapping[str, Any]) -> list[str]:
    prefixes: dict[str, None] = {}
    for key in state:
        for part in (_VALUES, _CELL):
            head, found, _ = key.rpartition(part)
            if found and (not head or head.endswith(".")):
                prefixes[head] = None
    return list(prefixes)


def _unpacked(where: str, state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and biases of a recurrent module or cell by nn's names."""
    if f"{prefix}{_VALUES}0.param" not in state:
        cell = {kind: _unpack(state[f"{prefix}{_CELL}{kind}"]) for kind in ("ih", "hh")}
        weights = {f"weight_{kind}": weight for kind, (weight, _) in cell.items()}
        return weights, {f"bias_{kind}": bias for kind, (_, bias) in cell.items() if bias is not None}
    parts: list[list[tuple[Tensor, Tensor | None]]] = []
    while (key := f"{prefix}{_VALUES}{len(parts)}.param") in state:
        of_dtype, _, _, _, packed = state[key].__getstate__()[0]
        if of_dtype != "quantized_dynamic":
            raise ValueError(f"from_torch_ao: {where}: {_FLOAT16}")
        parts.append([_unpack(weight) for weight in packed])
    directions = _directions(where, [ih.shape[1] for (ih, _), _ in parts], parts[0][1][0].shape[1])
    result: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for i, part in enumerate(parts):
        end = f"_l{i // directions}{'_reverse' if i % directions else ''}"
        for kind, (weight, bias) in zip(("ih", "hh"), part, strict=True):
            result[0][f"weight_{kind}{end}"] = weight
            if bias is not None:
                result[1][f"bias_{kind}{end}"] = bias
    return result


def _directions(where: str, widths: list[int], hidden: int) -> int:
    """Whether a recurrent module is bidirectional, by the widths of the inputs of its parts."""
    if len(widths) == 1 or len(widths) % 2:
        return 1
    if len(widths) == 2 and widths[0] == hidden:
        raise ValueError(
            f"from_torch_ao: {where}: the state_dict does not say whether it has two layers or two "
            "directions; pass the module itself"
        )
    return 2 if widths[1] == widths[0] and widths[1:] != [hidden] * (len(widths) - 1) else 1


def _unpack(packed: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = packed.__getstate__()[0][:2]
    return weight, bias


def _named_entries(
    where: str, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], activations: str
) -> dict[str, Tensor]:
    """The state_dict of a module with several weights."""
    entries: dict[str, Tensor] = {}
    schemes, full_range = set(), False
    for name, weight in weights.items():
        if not weight.is_quantized:
            raise ValueError(f"from_torch_ao: {where}: {_FLOAT16}")
        entries[name], entries[f"{name}_scale"], scheme = int8_weight(f"{where}, {name}", weight)
        entries[name] = entries[name].unsqueeze(-1)
        full_range = full_range or bool((entries[name] == -128).any())
        schemes.add(scheme)
    if len(schemes) > 1:
        raise ValueError(f"from_torch_ao: {where}: expected weights of one scheme, got {sorted(schemes)}")
    config = Config(activations, schemes.pop(), full_range=full_range)
    entries |= {name: bias.detach().clone() for name, bias in biases.items()}
    return {**entries, "format": format_entry(torch.float32, config)}


def _linear_entries(
    where: str, weight: Tensor, bias: Tensor | None, activations: str, epilogue: str
) -> dict[str, Tensor]:
    """The state_dict of a QLinear.

    Args:
        where: of messages.
        weight: torch's quantized tensor [N, K].
    """
    if not weight.is_quantized:
        raise ValueError(f"from_torch_ao: {where}: {_FLOAT16}")
    values, scale, scheme = int8_weight(where, weight)
    config = Config(activations, scheme, epilogue=epilogue, full_range=bool((values == -128).any()))
    entries = entries_of(values, scale, torch.float32, config)
    return entries if bias is None else {**entries, "bias": bias.detach().clone()}


def int8_weight(where: str, weight: Tensor) -> tuple[Tensor, Tensor, str]:
    """The integers, the fp32 scales ([1] or [N]) and the scheme of one of torch's quantized weights.

    Raises:
        ValueError: for other weights than symmetric int8 ones by tensor or by output channel.
    """
    if weight.dtype != torch.qint8:
        raise ValueError(f"from_torch_ao: {where}: expected a weight of torch.qint8, got {weight.dtype}")
    per_tensor = weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if per_tensor:
        scale, zero_point = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
    else:
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        if weight.q_per_channel_axis() != 0:
            raise ValueError(
                f"from_torch_ao: {where}: expected scales by output channel (axis 0), got axis "
                f"{weight.q_per_channel_axis()}"
            )
    if zero_point.any():
        first = zero_point[zero_point != 0][0].item()
        raise ValueError(
            f"from_torch_ao: {where}: expected a symmetric weight, got one with zero point {first}; "
            "convert the float model with dynquant.quantize_dynamic"
        )
    return weight.int_repr(), scale.to(torch.float32), "per_tensor" if per_tensor else "per_channel"
