"""The versions of an encoder that are timed: float, dynquant's and those of other libraries.

A maker takes a :class:`Model <benchmarks.cpu.encoder_models.Model>` and the number of threads and returns a
function of the model's inputs. It raises Unavailable, with the reason, for a missing package.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynquant
from dynquant.demo.regression import quantize_with_torch_ao

from .baselines import Unavailable
from .encoder_models import CALIBRATION, Inputs, Model

Call = Callable[[Inputs], Tensor]
Maker = Callable[[Model, int], Call]


def _of_module(make: Callable[[nn.Module], nn.Module]) -> Maker:
    def maker(model: Model, threads: int) -> Call:
        module = make(model.copy()).eval()
        return lambda inputs: module(*inputs)

    return maker


class _InBfloat16(nn.Module):
    """A module in bf16; the other inputs than floats stay as they are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.bfloat16()

    def forward(self, *inputs: Tensor) -> Tensor:
        converted = (x.bfloat16() if x.is_floating_point() else x for x in inputs)
        result: Tensor = self.module(*converted)
        return result


def _quantized(**options: Any) -> Maker:
    return _of_module(lambda module: dynquant.quantize_dynamic(module, **options))


def _compiled(model: Model, threads: int) -> Call:
    module = dynquant.quantize_dynamic(model.copy(), rotation="hadamard", fuse=True)
    torch._dynamo.reset()  # or the versions of earlier models count towards its limit of recompilations
    compiled: Any = torch.compile(module, backend="dynquant", dynamic=False, options={"attention": "int8"})
    return lambda inputs: compiled(*inputs)


def _static(model: Model, threads: int) -> Call:
    module = dynquant.quantize_dynamic(model.copy(), fuse=True)
    with torch.inference_mode(), dynquant.calibrate(module):
        for inputs in model.samples[:CALIBRATION]:
            module(*inputs)
    frozen = dynquant.freeze(module)
    return lambda inputs: frozen(*inputs)


def _import(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notes of converters."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _example(model: Model) -> Inputs:
    """Inputs of two texts or images, from which exporters trace."""
    return tuple(torch.cat([x, x]) for x in model.samples[0])


def _onnxruntime(model: Model, threads: int) -> Call:
    """Graph fused by ONNX Runtime's optimizer of transformers, weights int8 per channel, activations dynamic.

    Exported with written-out attention: the optimizer fuses it to one node, and the one of SDPA not.
    """
    onnx, ort, quantization, optimizer, options = _import(
        "onnx",
        "onnxruntime",
        "onnxruntime.quantization",
        "onnxruntime.transformers.optimizer",
        "onnxruntime.transformers.fusion_options",
    )
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, _quiet():
        exported, optimized, int8 = (str(Path(folder, f"{name}.onnx")) for name in ("float", "fused", "int8"))
        torch.onnx.export(
            model.copy(attention="eager"),
            _example(model),
            exported,
            input_names=list(model.input_names),
            output_names=["output"],
            dynamic_axes={**model.dynamic_sizes, "output": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
        fused = optimizer.optimize_model(
            exported,
            model_type=model.fusion,
            num_heads=model.heads,
            hidden_size=model.hidden,
            optimization_options=options.FusionOptions(model.fusion),
        )
        fused.save_model_to_file(optimized)
        quantization.quantize_dynamic(
            optimized,
            int8,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        session = ort.InferenceSession(int8, settings, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    slots = [model.input_names.index(name) for name in names]

    def call(inputs: Inputs) -> Tensor:
        feed = {name: inputs[slot].numpy() for name, slot in zip(names, slots, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return call


def _openvino(precision: str, prepare: Callable[[Any, Model], Any] | None, **settings: str) -> Maker:
    """A version of OpenVINO.

    Args:
        precision: of what is not int8.
        prepare: changes the converted model.
        settings: of the CPU plugin, further ones.
    """

    def maker(model: Model, threads: int) -> Call:
        (openvino,) = _import("openvino")
        with _quiet(), torch.no_grad():
            converted = openvino.convert_model(model.copy(), example_input=_example(model))
            if prepare is not None:
                converted = prepare(converted, model)
            configuration = {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": precision,
                **settings,
            }
            compiled = openvino.Core().compile_model(converted, "CPU", configuration)
        request = compiled.create_infer_request()

        def call(inputs: Inputs) -> Tensor:
            arrays = [x.numpy() for x in inputs]
            return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

        return call

    return maker


def _calibrated(converted: Any, model: Model) -> Any:
    """Static int8 by NNCF, as sentence-transformers' ``export_static_quantized_openvino_model``."""
    (nncf,) = _import("nncf")
    samples = [[x.numpy() for x in inputs] for inputs in model.samples[:CALIBRATION]]
    return nncf.quantize(
        converted, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )


def _int8_weights(converted: Any, model: Model) -> Any:
    (nncf,) = _import("nncf")
    return nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)


ROTATED = "dynquant per_token, rotation, fused"
COMPILED = "dynquant compiled"
FLOAT_ATTENTION = "dynquant per_token, rotation"

VERSIONS: dict[str, Maker] = {
    "fp32": _of_module(lambda module: module),
    "bf16": _of_module(_InBfloat16),
    "torch.ao": _of_module(quantize_with_torch_ao),
    "dynquant per_tensor": _quantized(activations="per_tensor"),
    "dynquant per_token": _quantized(),
    "dynquant per_tensor, rotation": _quantized(activations="per_tensor", rotation="hadamard"),
    FLOAT_ATTENTION: _quantized(rotation="hadamard"),
    "dynquant per_token, fused": _quantized(fuse=True),
    ROTATED: _quantized(rotation="hadamard", fuse=True),
    "dynquant static, fused": _static,
    COMPILED: _compiled,
    "onnxruntime": _onnxruntime,
    "openvino static": _openvino("f32", _calibrated),
    # Groups of 64: of 32, 64 and whole rows the fastest on the machines at hand.
    "openvino dynamic": _openvino("f32", _int8_weights, DYNAMIC_QUANTIZATION_GROUP_SIZE="64"),
    "openvino bf16": _openvino("bf16", None),
}
"""All are compared with the first."""

INT8_RIVALS = ("onnxruntime", "openvino static", "openvino dynamic")


def prepare(name: str, model: Model, threads: int) -> Call:
    """A version, after a call of it.

    Raises:
        Unavailable: for one whose packages are not installed, or that fails.
    """
    torch.set_num_threads(threads)
    try:
        call = VERSIONS[name](model, threads)
        with torch.inference_mode():
            call(model.samples[0])
    except Unavailable:
        raise
    except Exception as failure:
        first_line = (str(failure).splitlines() or [""])[0]
        raise Unavailable(f"fails: {type(failure).__name__}: {first_line}") from failure
    return call
