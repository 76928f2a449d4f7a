"""The ops ``torch.ops.dynquant.*``: importing this registers all of them."""

from . import registry  # noqa: F401
