"""Measures a converted model against the float one on a sample: each layer on its own inputs, and the model.

Each layer is measured while the float model runs, so no inputs are stored.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..progress import layer_bar
from .pairs import Pair
from .sample import Sample
from .timing import compare

LAYER_ROUNDS, LAYER_SECONDS = 5, 0.001
SLOW_LAYER_ROUNDS, SLOW_LAYER_SECONDS = 3, 0.02
"""Rounds for a layer whose float and int8 call take at least SLOW_LAYER_SECONDS together."""
MODEL_ROUNDS, MODEL_SECONDS = 3, 0.02
TIMED_SHAPES = 8
"""Time at most this many distinct row counts per layer, in order of appearance."""
_CHUNK = 1 << 22


class Agreement:
    """How close values are to the expected ones, summed in float64 over any number of tensors.

    Elements whose expected value is not finite do not count; in any other a NaN or an infinity is an infinite
    error.
    """

    def __init__(self) -> None:
        self.signal = self.noise = self.product = self.energy = 0.0
        self.values = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Two floating tensors of one shape."""
        parts = zip(expected.flatten().split(_CHUNK), actual.flatten().split(_CHUNK), strict=True)
        for part, other in parts:
            y, z = part.double(), other.double()
            signal, energy = y.dot(y).item(), z.dot(z).item()
            if not math.isfinite(signal + energy):
                counts = y.isfinite()
                y, z = y[counts], z[counts].nan_to_num(math.inf, math.inf, math.inf)
                signal, energy = y.dot(y).item(), z.dot(z).item()
            self.values += y.numel()
            self.signal += signal
            self.energy += energy
            self.product += y.dot(z).item()
            difference = y.sub_(z)
            self.noise += difference.dot(difference).item()

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); infinite for equal values, None without values."""
        if not self.values and not self.noise:
            return None
        if not self.noise:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between all expected and all actual values; two zero vectors are equal."""
        if not self.values:
            return None
        if not self.signal or not self.energy:
            return float(self.signal == self.energy)
        cosine = self.product / math.sqrt(self.signal) / math.sqrt(self.energy)
        return min(cosine, 1.0) if math.isfinite(cosine) else 0.0


@dataclass(frozen=True)
class Measured:
    """The measurements of one pair.

    Attributes:
        calls: how often the float model called the layer.
        rows: the different M of its inputs [M, K], ascending.
        sqnr_db, cosine: of the int8 layer's outputs to the float layer's, over all calls; None without
            outputs.
        us_float, us_int8: microseconds a call, the mean over the calls of the medians for their shapes; None
            without times.
    """

    calls: int
    rows: tuple[int, ...]
    sqnr_db: float | None
    cosine: float | None
    us_float: float | None
    us_int8: float | None

    @property
    def speedup(self) -> float | None:
        if self.us_float is None or not self.us_int8:
            return None
        return self.us_float / self.us_int8


@dataclass(frozen=True)
class MeasuredModel:
    """Both models on the sample: agreement of their float outputs (None if none can be compared) and
    milliseconds a call."""

    sqnr_db: float | None
    cosine: float | None
    ms_float: float
    ms_int8: float


def measure_layers(
    model: nn.Module, pairs: Sequence[Pair], sample: Sample, *, timed: bool = True
) -> dict[str, Measured]:
    """Run the float model on the sample and measure each pair at the inputs of its float layer.

    Args:
        model: the float model, under :func:`dynquant.measurement.sample.measuring`.
        timed: whether to measure times.

    Returns:
        By name. Layers that the sample does not reach have 0 calls.
    """
    with layer_bar("measuring", len(pairs)) as advance:
        meters = {pair.name: _Meter(pair, advance, timed) for pair in pairs}
        with _watching(model, meters):
            sample.run(model, "the float model")
    return {name: meter.measured() for name, meter in meters.items()}


def measure_models(model: nn.Module, int8_model: nn.Module, sample: Sample) -> MeasuredModel:
    """Both models on the sample, under :func:`dynquant.measurement.sample.measuring`.

    Raises:
        ValueError: if one of them does not accept the sample.
    """
    agreement = Agreement()
    outputs = sample.run(model, "the float model"), sample.run(int8_model, "the int8 model")
    add_outputs(agreement, *outputs)
    del outputs
    tensors = [*model.parameters(), *model.buffers()]
    cuda = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    arguments = sample.fresh()
    times = compare(
        {"float": _call(model, arguments, cuda), "int8": _call(int8_model, arguments.fresh(), cuda)},
        threads=torch.get_num_threads(),
        rounds=MODEL_ROUNDS,
        seconds=MODEL_SECONDS,
    )
    return MeasuredModel(
        agreement.sqnr_db, agreement.cosine, times["float"].median_us / 1e3, times["int8"].median_us / 1e3
    )


def add_outputs(agreement: Agreement, expected: Any, actual: Any) -> bool:
    """Add the float tensors of two outputs, pair by pair, where their shapes are equal; whether all are."""
    floats = [filter(_has_floats, tensors_in(output)) for output in (expected, actual)]
    pairs = list(zip_longest(*floats))
    comparable = [(one, other) for one, other in pairs if one is not None and other is not None]
    comparable = [(one, other) for one, other in comparable if one.shape == other.shape]
    for one, other in comparable:
        agreement.add(one, other)
    return len(comparable) == len(pairs)


def _has_floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested


def _call(model: nn.Module, sample: Sample, cuda: torch.device | None) -> Callable[[], None]:
    def call() -> None:
        # As in measuring(): tensors that a model keeps of a call must not be inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            sample.call(model)
        if cuda is not None:
            torch.cuda.synchronize(cuda)

    return call


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in order: in tuples, lists, mappings and dataclasses, at any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))


class _Meter:
    """Measures one pair whenever its float layer is called."""

    def __init__(self, pair: Pair, advance: Callable[[], object], timed: bool) -> None:
        self.pair = pair
        self.advance = advance
        self.timed = timed
        self.calls = 0
        self.rows: set[int] = set()
        self.agreement = Agreement()
        self.times: dict[tuple[Any, ...], tuple[float, float]] = {}
        self.timed_calls = 0
        self.us_float = self.us_int8 = 0.0

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Both layers on the arguments of a call of the float layer."""
        if not self.calls:
            self.advance()
        self.calls += 1
        inputs = self.pair.inputs(args, kwargs)
        if not inputs:
            return
        rows = tuple(math.prod(x.shape[:-1] if x.is_floating_point() else x.shape) for x in inputs)
        self.rows.add(rows[0])
        if not all(x.numel() for x in inputs):
            return
        samples = self.pair.sample(args, kwargs), self.pair.sample(args, kwargs)
        start = time.perf_counter()
        outputs = self.pair.expected(samples[0]), self.pair.actual(samples[1])
        seconds = time.perf_counter() - start
        if not add_outputs(self.agreement, *outputs):
            self.agreement.noise = math.inf
        del outputs
        if self.timed:
            rounds = LAYER_ROUNDS if seconds < SLOW_LAYER_SECONDS else SLOW_LAYER_ROUNDS
            self._time((*rows, *(x.dtype for x in inputs)), samples, rounds)

    def _time(self, key: tuple[Any, ...], samples: tuple[Sample, Sample], rounds: int) -> None:
        if key not in self.times:
            if len(self.times) == TIMED_SHAPES:
                return
            self.times[key] = self._compare(*samples, rounds)
        us_float, us_int8 = self.times[key]
        self.timed_calls += 1
        self.us_float += us_float
        self.us_int8 += us_int8

    def _compare(self, one: Sample, other: Sample, rounds: int) -> tuple[float, float]:
        """Microseconds of the float and the int8 layer."""
        times = compare(
            {"float": lambda: self.pair.expected(one), "int8": lambda: self.pair.actual(other)},
            threads=torch.get_num_threads(),
            rounds=rounds,
            seconds=LAYER_SECONDS,
        )
        return times["float"].median_us, times["int8"].median_us

    def measured(self) -> Measured:
        calls = self.timed_calls
        return Measured(
            self.calls,
            tuple(sorted(self.rows)),
            self.agreement.sqnr_db,
            self.agreement.cosine,
            self.us_float / calls if calls else None,
            self.us_int8 / calls if calls else None,
        )


class _LastProduct(TorchDispatchMode):
    """Keeps the left operand of the last matrix product.

    In nn.MultiheadAttention that is the input of out_proj, which is never called as a module.
    """

    x: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.addmm.default:
            self.x = args[1]
        elif func is torch.ops.aten.mm.default:
            self.x = args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watching(model: nn.Module, meters: Mapping[str, _Meter]) -> Iterator[None]:
    """Within the block, each call of a float layer is measured by its meter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        # The fast path of nn.TransformerEncoder passes the weights to one kernel and calls no layer.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        for name, meter in meters.items():
            parent = modules.get(name.rpartition(".")[0], model)
            if name.endswith("out_proj") and type(parent).forward is nn.MultiheadAttention.forward:
                _watch_attention(stack, parent, meter)
            else:
                handle = meter.pair.float_layer.register_forward_pre_hook(_hook(meter), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _hook(meter: _Meter) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        meter.measure(args, kwargs)

    return hook


def _watch_attention(stack: contextlib.ExitStack, attention: Any, meter: _Meter) -> None:
    modes: list[_LastProduct] = []

    def before(module: nn.Module, args: Any) -> None:
        modes.append(_LastProduct())
        modes[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)
        if output is not None:
            meter.measure((mode.x,), {})

    # always_call: also if the attention raises; its output is None then.
    for handle in (
        attention.register_forward_pre_hook(before),
        attention.register_forward_hook(after, always_call=True),
    ):
        stack.callback(handle.remove)
