"""Dynamic int8 quantization for PyTorch: linear layers on CPU and CUDA, exact to the bit on every path."""

from typing import TYPE_CHECKING, Any

from . import _saved_names, reference  # noqa: F401
from ._version import __version__
from .calibration.calibrate import calibrate, freeze
from .checkpoint import hugging_face as _hugging_face
from .checkpoint.save_load import load, save
from .config import Config
from .conversion.torch_ao import from_torch_ao
from .environment import Info, available_isas, info, isa
from .fusion import hugging_face_attention as _hugging_face_attention
from .fusion.graph import fuse_graph
from .fusion.modules import fuse
from .measurement.report import report
from .measurement.report_data import Report
from .nn import (
    QGRU,
    QLSTM,
    EmbeddingBlock,
    EncoderLayer,
    MLPBlock,
    QEmbedding,
    QEmbeddingBag,
    QGRUCell,
    QLinear,
    QLSTMCell,
    QModule,
    QMultiheadAttention,
    QRNNCell,
)
from .patterns.registry import register_pattern
from .qtensor import QTensor
from .quantize import quantize_dynamic

if TYPE_CHECKING:
    from .checkpoint.hugging_face_quantizer import DynquantConfig as DynquantConfig

__all__ = [
    "QGRU",
    "QLSTM",
    "Config",
    "EmbeddingBlock",
    "EncoderLayer",
    "Info",
    "MLPBlock",
    "QEmbedding",
    "QEmbeddingBag",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QModule",
    "QMultiheadAttention",
    "QRNNCell",
    "QTensor",
    "Report",
    "__version__",
    "available_isas",
    "calibrate",
    "freeze",
    "from_torch_ao",
    "fuse",
    "fuse_graph",
    "info",
    "isa",
    "load",
    "quantize_dynamic",
    "reference",
    "register_pattern",
    "report",
    "save",
]

_hugging_face.install(quantize_dynamic)
_hugging_face_attention.install()


def __getattr__(name: str) -> Any:
    """``DynquantConfig``: a subclass of a class of transformers, which is imported when it is asked for."""
    if name != "DynquantConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _hugging_face.config_type("dynquant.DynquantConfig")


def __dir__() -> list[str]:
    return [*globals(), "DynquantConfig"]
