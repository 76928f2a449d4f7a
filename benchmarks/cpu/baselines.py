"""All implementations of one linear layer that are timed, ours and the baselines, from the same nn.Linear.

A maker takes the float layer, the fp32 input and the number of threads, and returns a function without
arguments that computes the output. It raises Unavailable, with the reason, for a missing package or engine.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant.demo.regression import quantize_with_torch_ao

Call = Callable[[], Any]
Maker = Callable[[nn.Linear, Tensor, int], Call]

# Every working 8-bit scheme stays below this relative error; torch.ao's 7 bits stay under 0.04.
MAX_RELATIVE_ERROR = 0.1


class Unavailable(Exception):
    """Carries the reason, in a few words, for leaving out an implementation."""


def _fp32(linear: nn.Linear, x: Tensor, threads: int) -> Call:
    return lambda: linear(x)


def _bf16(linear: nn.Linear, x: Tensor, threads: int) -> Call:
    layer, x16 = copy.deepcopy(linear).bfloat16(), x.bfloat16()
    return lambda: layer(x16)


def _torch_ao(engine: str) -> Maker:
    def make(linear: nn.Linear, x: Tensor, threads: int) -> Call:
        supported = torch.backends.quantized.supported_engines
        if engine not in supported:
            raise Unavailable(f"this torch has no {engine} engine")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:  # the engine is chosen when the weight is packed
            layer = quantize_with_torch_ao(nn.Sequential(copy.deepcopy(linear))).get_submodule("0")
        finally:
            torch.backends.quantized.engine = before
        return lambda: layer(x)

    return make


def _torchao(linear: nn.Linear, x: Tensor, threads: int) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError as error:
            raise Unavailable(f"not installed ({error})") from error
        model = nn.Sequential(copy.deepcopy(linear))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    layer = model[0]
    return lambda: layer(x)


def _onnxruntime(linear: nn.Linear, x: Tensor, threads: int) -> Call:
    """x @ W + b, dynamically quantized by onnxruntime's own tool, per channel; numpy in, numpy out."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    weight = numpy_helper.from_array(linear.weight.detach().t().contiguous().numpy(), "weight")
    bias = numpy_helper.from_array(linear.bias.detach().numpy(), "bias")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["xw"]), helper.make_node("Add", ["xw", "bias"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], linear.out_features])],
        [weight, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = min(model.ir_version, 9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def _dynquant(activations: str) -> Maker:
    def make(linear: nn.Linear, x: Tensor, threads: int) -> Call:
        layer = dynquant.QLinear.from_float(linear, activations=activations)
        return lambda: layer(x)

    return make


OURS: dict[str, Maker] = {
    "dynquant per_token": _dynquant("per_token"),
    "dynquant per_tensor": _dynquant("per_tensor"),
}
FLOAT_BASELINES: dict[str, Maker] = {"fp32": _fp32, "bf16": _bf16}
INT8_BASELINES: dict[str, Maker] = {
    "torch.ao x86": _torch_ao("x86"),
    "torch.ao fbgemm": _torch_ao("fbgemm"),
    "torch.ao onednn": _torch_ao("onednn"),
    "onnxruntime": _onnxruntime,
    "torchao": _torchao,
}
BASELINES: dict[str, Maker] = FLOAT_BASELINES | INT8_BASELINES


def relative_error(call: Call, expected: Tensor) -> float:
    """||y - expected|| / ||expected|| for the output y of the call."""
    with torch.inference_mode():
        y = torch.as_tensor(call()).double().reshape(expected.shape)
    return ((y - expected).norm() / expected.norm()).item()


def prepare(name: str, linear: nn.Linear, x: Tensor, expected: Tensor, threads: int) -> tuple[Call, float]:
    """The call of an implementation and its relative error, after a check of its result.

    Raises:
        Unavailable: for an implementation that is not installed, fails, or gives a wrong result.
    """
    maker = (OURS | BASELINES)[name]
    try:
        call = maker(linear, x, threads)
        error = relative_error(call, expected)
    except Unavailable:
        raise
    except Exception as failure:
        first_line = (str(failure).splitlines() or [""])[0]
        raise Unavailable(f"fails: {type(failure).__name__}: {first_line}") from failure
    if not error < MAX_RELATIVE_ERROR:
        raise Unavailable(f"wrong result: relative error {error:.3g}")
    return call, error
