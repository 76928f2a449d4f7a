"""The ops ``torch.ops.dynquant.*``: importing this registers all of them."""

from . import linear, quantize, weight  # noqa: F401
