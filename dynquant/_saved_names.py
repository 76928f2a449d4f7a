"""Names of moved classes and functions in files that version 0.1.0 saved.

A pickle (``torch.save(model)``, a pickled Report) names each class by the module that defined it. The modules
below are registered under those names, with the objects at their present places.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .calibration.calibrate import calibrate, freeze
from .environment import Info
from .fusion.graph import fuse_graph
from .fusion.modules import fuse
from .measurement.layers import Measured, MeasuredModel
from .measurement.report import report
from .measurement.report_data import LayerReport, ModelReport, Report, SkippedLayer
from .measurement.sample import Sample
from .measurement.timing import Timing
from .nn.merged import MergedGroup, MergedLinear
from .quantize import quantize_dynamic

_NAMES: dict[str, dict[str, Any]] = {
    "dynquant.calibrate": {"calibrate": calibrate, "freeze": freeze},
    "dynquant.convert": {"quantize_dynamic": quantize_dynamic},
    "dynquant.fuse": {"fuse": fuse},
    "dynquant.graph": {"fuse_graph": fuse_graph},
    "dynquant.info": {"Info": Info},
    "dynquant.measure": {"Measured": Measured, "MeasuredModel": MeasuredModel},
    "dynquant.nn.shared_input": {"SharedInput": MergedGroup, "SharingLinear": MergedLinear},
    "dynquant.report": {
        "LayerReport": LayerReport,
        "ModelReport": ModelReport,
        "Report": Report,
        "SkippedLayer": SkippedLayer,
        "report": report,
    },
    "dynquant.sample": {"Sample": Sample},
    "dynquant.timing": {"Timing": Timing},
}

for _path, _objects in _NAMES.items():
    _module = ModuleType(_path, f"Names in files of version 0.1.0; see {__name__}.")
    vars(_module).update(_objects)
    sys.modules[_path] = _module
