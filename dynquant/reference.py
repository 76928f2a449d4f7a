"""The definition of every op in plain PyTorch, on any device.

All arithmetic is fp32, rounded to nearest even once for each operation that is written here; the kernels
give the same bits. Three habits keep that true on every backend: a constant divisor is a tensor on x's device
(by a Python number CUDA multiplies with the reciprocal), no op that contracts or approximates (``addcmul``,
``lerp``, ``add(alpha=)``, ``F.gelu``), and an integer product that goes through fp64, exact below 2**53.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import K_MODULUS, Config, k_modulo_16
from .reference_epilogue import gelu, gelu_tanh, relu, silu

FLT_MIN = torch.finfo(torch.float32).tiny
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PANELS = (64, 32, 16)
ROW_ALIGNMENT = 16
_EPILOGUES = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}
MAX_K_INT8_MM = (2**31 - 1) // (128 * 127)


def check(condition: bool, sentence: str) -> None:
    """RuntimeError, as torch's own ops raise, where ``condition`` does not hold."""
    if not condition:
        raise RuntimeError(sentence)


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def check_float(op: str, name: str, x: Tensor) -> None:
    """A floating-point tensor that has rows."""
    check(
        x.dtype in FLOAT_DTYPES,
        f"{op}: expected {name} of dtype float32, bfloat16, float16 or float64, got {x.dtype}",
    )
    check(x.dim() >= 1, f"{op}: expected {name} with at least 1 dimension, got 0")


def check_device(op: str, x_name: str, x: Tensor, name: str, other: Tensor) -> None:
    """``other`` is where ``x`` is."""
    check(
        other.device == x.device,
        f"{op}: expected all tensors on one device, got {x_name} on {x.device} and {name} on {other.device}",
    )


def _rows(op: str, x: Tensor, name: str = "x") -> Tensor:
    """x as fp32 [M, K]: every leading dimension is a row, a 1-D x is one row."""
    check_float(op, name, x)
    return x.to(torch.float32).reshape(x.shape[:-1].numel(), x.shape[-1])


def min_max(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Range of x, widened to hold 0: lo = min(min(x), 0), hi = max(max(x), 0).

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        per_token: a range for each row (lo and hi are fp32 [M]) or one for all of x ([1]).

    Returns:
        lo <= 0 <= hi. Both are NaN where the range holds a NaN; an infinity stands in the one it belongs to.
    """
    rows = _rows("min_max", x)
    if not per_token:
        rows = rows.reshape(1, -1)
    if rows.shape[1] == 0:
        zeros = torch.zeros(rows.shape[0], dtype=torch.float32, device=x.device)
        return zeros, zeros.clone()
    # + 0.0 turns a -0.0 into 0.0, whichever of the two the reduction met first.
    return rows.amin(1).clamp(max=0.0) + 0.0, rows.amax(1).clamp(min=0.0) + 0.0


def choose_qparams(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Affine int8 qparams of the range [lo, hi] (gemmlowp's ``real = scale * (q - zero_point)``).

    Two divisions instead of one of the difference: hi - lo overflows at 3e38. FLT_MIN keeps 1/scale finite.

    Args:
        lo, hi: fp32 [M] or [1], as :func:`min_max` returns them.

    Returns:
        scale fp32 and zero_point int32 in [-128, 127]; NaN and 0 where lo or hi is not finite.
    """
    check(
        lo.dtype == hi.dtype == torch.float32 and lo.shape == hi.shape,
        f"choose_qparams: expected lo and hi of dtype float32 and one shape, got {lo.dtype} of shape "
        f"{list(lo.shape)} and {hi.dtype} of shape {list(hi.shape)}",
    )
    check_device("choose_qparams", "lo", lo, "hi", hi)
    steps = _constant(255.0, lo)
    finite = lo.isfinite() & hi.isfinite()
    scale = torch.where(finite, (hi / steps - lo / steps).clamp(min=FLT_MIN), _constant(float("nan"), lo))
    zero_point = (-128.0 - lo * _inverse(scale)).round().clamp(-128.0, 127.0)
    return scale, torch.where(finite, zero_point, 0.0).to(torch.int32)


def _inverse(scale: Tensor) -> Tensor:
    return _constant(1.0, scale) / scale


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """q = clamp(round(x * (1 / scale)) + zero_point, -128, 127); 0 where x or scale is NaN.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64.
        scale, zero_point: fp32 and int32, [1] for the whole of x or [M], one for each row.

    Returns:
        int8 of x's shape.
    """
    rows = _rows("quantize", x)
    check_qparams("quantize", rows.shape[0], scale, zero_point)
    check_device("quantize", "x", x, "scale", scale)
    check_device("quantize", "x", x, "zero_point", zero_point)
    steps = (rows * _inverse(scale)[:, None]).round() + zero_point[:, None].to(torch.float32)
    q = torch.where(steps.isnan(), 0.0, steps.clamp(-128.0, 127.0))
    return q.to(torch.int8).reshape(x.shape)


def check_qparams(op: str, m: int, scale: Tensor, zero_point: Tensor) -> None:
    """scale fp32 and zero_point int32, both [1] or both [m]."""
    check(
        scale.dtype == torch.float32 and zero_point.dtype == torch.int32,
        f"{op}: expected scale of dtype float32 and zero_point of dtype int32, got "
        f"{scale.dtype} and {zero_point.dtype}",
    )
    check(
        scale.dim() == 1 and scale.shape == zero_point.shape and scale.shape[0] in (1, m),
        f"{op}: expected scale and zero_point of shape [1] or [{m}], got {list(scale.shape)} and "
        f"{list(zero_point.shape)}",
    )


def rotate(x: Tensor, block: int) -> Tensor:
    """Unnormalized Walsh-Hadamard transform of each block of ``block`` elements along the last dimension.

    Stages of strides 1, 2, 4 ... block/2, each (a, b) -> (a + b, a - b): additions only. Applied twice it
    multiplies by ``block``.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; ``block`` is a power of two up to 128 that divides K.

    Returns:
        fp32 of x's shape.
    """
    rows = _rows("rotate", x)
    k = rows.shape[1]
    check_rotation("rotate", k, block)
    stride = 1
    while stride < block:
        a, b = rows.reshape(rows.shape[0], k // (2 * stride), 2, stride).unbind(2)
        rows = torch.stack((a + b, a - b), 2).reshape(rows.shape[0], k)
        stride *= 2
    return rows.reshape(x.shape).clone()


def check_rotation(op: str, k: int, block: int) -> None:
    """A block size that rows of k elements can be rotated by."""
    check(
        1 <= block <= 128 and block & (block - 1) == 0 and k % block == 0,
        f"{op}: expected block to be a power of two up to 128 that divides K ({k}), got {block}",
    )


def quantize_weight(weight: Tensor, config: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 weights: scale = max(max|w| / 127, FLT_MIN), 1 where all are 0; round(w / scale).

    Args:
        weight: [N, K], fp32, bf16, fp16 or fp64, finite. Rotated first where ``config`` says so.
        config: see :mod:`dynquant.config`.

    Returns:
        int8 [N, K], and weight_scale fp32 [N] (per_channel) or [1] (per_tensor).

    Raises:
        RuntimeError: for a non-finite element, with its index.
    """
    cfg = Config.decode(config)
    check(weight.dim() == 2, f"quantize_weight: expected weight with 2 dimensions [N, K], got {weight.dim()}")
    w = _rows("quantize_weight", weight, "weight")
    check_finite("quantize_weight", "weight", w)
    if cfg.rotation_block:
        check_rotation("quantize_weight", w.shape[1], cfg.rotation_block)
        w = rotate(w, cfg.rotation_block) * (1.0 / cfg.rotation_block)
        check_finite("quantize_weight", "rotated weight", w)
    groups = w if cfg.weights == "per_channel" else w.reshape(1, -1)
    largest = groups.abs().amax(1) if groups.shape[1] else groups.new_zeros(groups.shape[0])
    scale = torch.where(largest == 0, 1.0, (largest / _constant(127.0, w)).clamp(min=FLT_MIN))
    return (w / scale[:, None]).round().clamp(-127.0, 127.0).to(torch.int8), scale


def check_finite(op: str, name: str, values: Tensor) -> None:
    """RuntimeError that names the first non-finite element of a 1-D or 2-D tensor."""
    bad = ~values.isfinite()
    if bad.any():
        index = bad.nonzero()[0].tolist()
        check(
            False, f"{op}: expected {name} to be finite, got {values[tuple(index)].item()} at {name}{index}"
        )


def panel_width(n: int) -> int:
    """Output channels P of a panel: the widest of 64, 32, 16 that pads N by fewer than 16 rows."""
    return next((p for p in PANELS if -n % p < 16), PANELS[-1])


def packs_in_panels(device: torch.device) -> bool:
    """Whether packed weights on ``device`` are panels of channels; elsewhere they are padded rows."""
    return device.type == "cpu"


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The layout that the kernels read, and the sum of each row.

    Args:
        weight: int8 [N, K], in [-127, 127].

    Returns:
        packed_weight int8, on the CPU [ceil(N/P), ceil(K/4), P, 4] with P = :func:`panel_width`, elsewhere
        [N, 16 * ceil(K/16)], so that every row starts at a multiple of 16 bytes; zeros for padding.
        weight_sum int32 [N].
    """
    check(
        weight.dtype == torch.int8 and weight.dim() == 2,
        f"pack_weight: expected weight to be int8 with 2 dimensions [N, K], got "
        f"{weight.dtype} with {weight.dim()}",
    )
    if weight.device.type != "meta" and weight.numel() and int(weight.min()) == -128:
        place = (weight == -128).nonzero()[0].tolist()
        raise RuntimeError(f"pack_weight: expected weight in [-127, 127], got -128 at weight{place}")
    weight_sum = weight.sum(1, dtype=torch.int32)
    n, k = weight.shape
    if not packs_in_panels(weight.device):
        rows = weight.new_zeros(packed_shape(weight.device, n, k))
        rows[:, :k] = weight
        return rows, weight_sum
    p = panel_width(n)
    padded = torch.nn.functional.pad(weight, (0, -k % 4, 0, -n % p))
    panels = padded.reshape(padded.shape[0] // p, p, padded.shape[1] // 4, 4)
    return panels.permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format), weight_sum


def unpack_weight(packed_weight: Tensor, n: int, k: int) -> Tensor:
    """The int8 [n, k] that :func:`pack_weight` was given."""
    check_packed("unpack_weight", packed_weight, n, k)
    if packed_weight.dim() == 2:
        return packed_weight[:, :k].clone(memory_format=torch.contiguous_format)
    panels, groups, p, _ = packed_weight.shape
    rows = packed_weight.permute(0, 2, 1, 3).reshape(panels * p, groups * 4)
    return rows[:n, :k].clone(memory_format=torch.contiguous_format)


def packed_shape(device: torch.device, n: int, k: int) -> list[int]:
    """Shape of the packed weight of an [n, k] weight on ``device``."""
    if not packs_in_panels(device):
        return [n, -(-k // ROW_ALIGNMENT) * ROW_ALIGNMENT]
    p = panel_width(n)
    return [-(-n // p), -(-k // 4), p, 4]


def check_packed(op: str, packed_weight: Tensor, n: int, k: int) -> None:
    """int8, contiguous, and of the shape that [n, k] packs to."""
    shape = packed_shape(packed_weight.device, n, k)
    check(
        packed_weight.dtype == torch.int8
        and packed_weight.is_contiguous()
        and list(packed_weight.shape) == shape,
        f"{op}: expected packed_weight to be contiguous int8 of shape {shape} for N = {n} and K = {k}, got "
        f"{packed_weight.dtype} of shape {list(packed_weight.shape)}",
    )


def int8_mm(q: Tensor, packed_weight: Tensor, weight_sum: Tensor) -> Tensor:
    """The exact accumulators: sum_k q[m, k] * weight[n, k].

    Args:
        q: int8 [M, K], K <= 132,104 (beyond it an int32 could wrap).
        packed_weight, weight_sum: from :func:`pack_weight`.

    Returns:
        int32 [M, N].
    """
    check(
        q.dtype == torch.int8 and q.dim() == 2,
        f"int8_mm: expected q to be int8 with 2 dimensions [M, K], got {q.dtype} with {q.dim()}",
    )
    check_channels("int8_mm", "weight_sum", weight_sum, torch.int32, weight_sum.numel())
    k = q.shape[1]
    check(k <= MAX_K_INT8_MM, f"int8_mm: expected K <= {MAX_K_INT8_MM} so that int32 is exact, got {k}")
    check_device("int8_mm", "q", q, "packed_weight", packed_weight)
    check_device("int8_mm", "q", q, "weight_sum", weight_sum)
    check_packed("int8_mm", packed_weight, weight_sum.shape[0], k)
    weight = unpack_weight(packed_weight, weight_sum.shape[0], k)
    return _exact_mm(q, weight).to(torch.int32)


def check_channels(op: str, name: str, values: Tensor, dtype: torch.dtype, n: int) -> None:
    """A contiguous 1-D tensor with one element for each output channel."""
    check(
        values.dtype == dtype and list(values.shape) == [n] and values.is_contiguous(),
        f"{op}: expected {name} to be contiguous {dtype} of shape [{n}], got {values.dtype} of shape "
        f"{list(values.shape)}",
    )


def _exact_mm(q: Tensor, weight: Tensor) -> Tensor:
    # + 0.0: with K = 1 a product of a negative number and 0 can come out as -0.0, which no integer is.
    return q.to(torch.float64) @ weight.to(torch.float64).t() + 0.0


def check_linear(
    op: str, x: Tensor, packed_weight: Tensor, weight_sum: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """What every linear op requires of its tensors before it reads them."""
    check_operands(op, x, packed_weight, weight_sum, weight_scale, bias)
    check_packed(op, packed_weight, weight_scale.numel(), x.shape[-1])


def check_operands(
    op: str, x: Tensor, packed_weight: Tensor, weight_sum: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    """Everything of :func:`check_linear` but the shape of the packed weight."""
    check_float(op, "x", x)
    n = weight_scale.numel()
    check_channels(op, "weight_scale", weight_scale, torch.float32, n)
    check_channels(op, "weight_sum", weight_sum, torch.int32, n)
    if bias is not None:
        check_channels(op, "bias", bias, torch.float32, n)
    for name, tensor in (
        ("packed_weight", packed_weight),
        ("weight_sum", weight_sum),
        ("weight_scale", weight_scale),
        ("bias", bias),
    ):
        if tensor is not None:
            check_device(op, "x", x, name, tensor)


def check_packed_k(op: str, name: str, x: Tensor, packed_weight: Tensor, n: int) -> None:
    """The packed weight is of n channels and of as many inputs as x has, whatever its layout: on meta a layer
    keeps its own. This and :func:`check_k` together know K.
    """
    p, panels = panel_width(n), packed_weight.dim() == 4
    shape = list(packed_weight.shape)
    channels = [-(-n // p), shape[1], p, 4] if panels else [n, *shape[1:2]]
    check(
        packed_weight.dtype == torch.int8 and len(shape) in (2, 4) and shape == channels,
        f"{op}: expected packed_weight to be int8 as pack_weight makes it for N = {n}, got "
        f"{packed_weight.dtype} of shape {shape}",
    )
    k, unit = x.shape[-1], 4 if panels else ROW_ALIGNMENT
    packed = shape[1] * (unit if panels else 1)
    torch._check(
        -(-k // unit) * unit == packed,
        lambda: f"{op}: expected {name}.shape[-1] to fit packed_weight of shape {shape}, got {k}",
    )


def check_k(op: str, x: Tensor, config: int) -> None:
    """x is as long as the layer's inputs as far as ``config`` tells; check_packed tells the rest."""
    expected, k = k_modulo_16(config), x.shape[-1]
    torch._check(
        expected is None or k % K_MODULUS == expected,
        lambda: f"{op}: expected x.shape[-1] to be {expected} modulo {K_MODULUS}, as config says, got {k}",
    )


def linear_dynamic(
    x: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    config: int,
) -> Tensor:
    """x @ weight.T + bias in int8, with activation qparams from x itself.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64 (which is computed through fp32), any strides.
        packed_weight, weight_sum: from :func:`pack_weight`.
        weight_scale: fp32 [N]. bias: fp32 [N] or None.
        config: see :mod:`dynquant.config`.

    Returns:
        [..., N] in x's dtype, or the config's out dtype. A row of x with a NaN or an infinity gives NaN
        (per_tensor: any such element makes all of it NaN).
    """
    check_linear("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias)
    cfg = Config.decode(config)
    check_k("linear_dynamic", x, config)
    rows = _rotated_rows("linear_dynamic", x, cfg)
    scale, zero_point = choose_qparams(*min_max(rows, cfg.activations == "per_token"))
    return _linear(x, rows, packed_weight, weight_sum, weight_scale, bias, scale, zero_point, cfg)


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
    """As :func:`linear_dynamic`, with activation qparams that were calibrated before.

    Args:
        scale, zero_point: fp32 and int32 [1], zero_point in [-128, 127] (a CPU tensor is checked for it).

    Returns:
        [..., N]; a row of x with a NaN or an infinity gives NaN.
    """
    check_linear("linear_static", x, packed_weight, weight_sum, weight_scale, bias)
    check_qparams("linear_static", 1, scale, zero_point)
    check_device("linear_static", "x", x, "scale", scale)
    check_device("linear_static", "x", x, "zero_point", zero_point)
    if zero_point.device.type == "cpu":
        value = int(zero_point.item())
        check(-128 <= value <= 127, f"linear_static: expected zero_point in [-128, 127], got {value}")
    cfg = Config.decode(config)
    check_k("linear_static", x, config)
    rows = _rotated_rows("linear_static", x, cfg)
    finite = rows.isfinite().all(1)
    nan = _constant(float("nan"), rows)
    row_scale = torch.where(finite, scale, nan)
    row_zero_point = torch.where(finite, zero_point, torch.zeros_like(zero_point))
    return _linear(x, rows, packed_weight, weight_sum, weight_scale, bias, row_scale, row_zero_point, cfg)


def _rotated_rows(op: str, x: Tensor, cfg: Config) -> Tensor:
    rows = _rows(op, x)
    if not cfg.rotation_block:
        return rows
    check_rotation(op, rows.shape[1], cfg.rotation_block)
    return rotate(rows, cfg.rotation_block)


def _linear(
    x: Tensor,
    rows: Tensor,
    packed_weight: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    cfg: Config,
) -> Tensor:
    n, k = weight_scale.shape[0], rows.shape[1]
    weight = unpack_weight(packed_weight, n, k)
    q = quantize(rows, scale, zero_point)
    acc = _exact_mm(q, weight) - zero_point[:, None].to(torch.float64) * weight_sum.to(torch.float64)
    out = (acc.to(torch.float32) * scale[:, None]) * weight_scale
    if bias is not None:
        out = out + bias
    out = apply_epilogue(out, cfg.epilogue)
    return out.to(cfg.out_dtype or x.dtype).reshape(*x.shape[:-1], n)


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """The function that a layer applies after its bias, fp32 to fp32."""
    return y if epilogue == "none" else _EPILOGUES[epilogue](y)
