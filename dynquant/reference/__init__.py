"""The definition of every op in plain PyTorch, on any device.

All arithmetic is fp32, rounded to nearest even once for each operation that is written here; the kernels
give the same bits. Three habits keep that true on every backend: a constant divisor is a tensor on x's device
(by a Python number CUDA multiplies with the reciprocal), no op that contracts or approximates (``addcmul``,
``lerp``, ``add(alpha=)``, ``F.gelu``), and an integer product that goes through fp64, exact below 2**53.
"""

from .arithmetic import fma
from .attention import attention
from .checks import FLOAT_DTYPES
from .embedding import embedding, embedding_bag
from .embedding_norm import embedding_norm
from .epilogue import apply_epilogue
from .layout import pack_weight, packed_shape, unpack_weight
from .linear import dequantize, int8_mm, linear_dynamic, linear_static
from .mlp import linear_mlp, linear_norm, mlp
from .norm import layer_norm, rms_norm
from .quantization import choose_qparams, min_max, quantize, quantize_weight, rotate, rotate_back
from .rnn import rnn

__all__ = [
    "FLOAT_DTYPES",
    "apply_epilogue",
    "attention",
    "choose_qparams",
    "dequantize",
    "embedding",
    "embedding_bag",
    "embedding_norm",
    "fma",
    "int8_mm",
    "layer_norm",
    "linear_dynamic",
    "linear_mlp",
    "linear_norm",
    "linear_static",
    "min_max",
    "mlp",
    "pack_weight",
    "packed_shape",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rnn",
    "rotate",
    "rotate_back",
    "unpack_weight",
]
