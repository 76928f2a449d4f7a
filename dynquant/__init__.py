"""Dynamic int8 quantization for PyTorch: linear layers on CPU and CUDA, exact to the bit on every path."""

from . import _saved_names, reference  # noqa: F401
from ._version import __version__
from .calibration.calibrate import calibrate, freeze
from .config import Config
from .fusion.graph import fuse_graph
from .fusion.modules import fuse
from .info import Info, available_isas, info, isa
from .measurement.report import report
from .measurement.report_data import Report
from .nn import QLinear
from .qtensor import QTensor
from .quantize import quantize_dynamic

__all__ = [
    "Config",
    "Info",
    "QLinear",
    "QTensor",
    "Report",
    "__version__",
    "available_isas",
    "calibrate",
    "freeze",
    "fuse",
    "fuse_graph",
    "info",
    "isa",
    "quantize_dynamic",
    "reference",
    "report",
]
