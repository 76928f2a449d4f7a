"""Names that code written for other linear layers reads from a quantized one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..qtensor import QTensor
from .module import QModule
from .state import check_bias

_OF_TORCH_AO = {"scale": 1.0, "zero_point": 0}
"""Constants of torch.ao's dynamic layers, whose output is float: the qparams of that output."""


class LinearNames(QModule):
    """Answers for the members of a user's subclass of nn.Linear, and for those of torch.ao's layers that the
    layer itself does not have. Lookups that succeed do not come here.
    """

    if TYPE_CHECKING:
        out_features: int
        weight: QTensor
        bias: nn.Parameter | None

    def take_members_of(self, float_type: type) -> None:
        """Answer for the methods, properties and constants that ``float_type``, a subclass of nn.Linear, has
        beyond nn.Linear's, as an instance of it would."""
        members = {
            name: member
            for base in reversed(float_type.__mro__)
            if issubclass(base, nn.Linear) and base is not nn.Linear
            for name, member in vars(base).items()
            if not (name.startswith("__") or hasattr(type(self), name))
        }
        if members:
            self.__dict__["_float_type"] = float_type

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            member = inspect.getattr_static(self.__dict__.get("_float_type"), name, None)
            if name.startswith("__") or (member is None and name not in _OF_TORCH_AO):
                raise
        if member is None:
            return _OF_TORCH_AO[name]
        bind = getattr(type(member), "__get__", None)
        return member if bind is None else bind(member, self, type(self))

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self.__dict__.get("_float_type"), name, None)
        if isinstance(member, property):
            member.__set__(self, value)
        else:
            super().__setattr__(name, value)

    def _weight_bias(self) -> tuple[QTensor, Tensor | None]:
        """``.weight`` and ``.bias``, as torch.ao's layers return them."""
        return self.weight, self.bias

    def set_weight_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replace both.

        Args:
            weight: [N, K]. A QTensor is taken as it is; a float tensor, or one of torch's own quantized
                tensors, is quantized in the scheme of the layer.
            bias: float [N], or None.

        Raises:
            ValueError: for a weight or a bias of another shape or dtype, or with a NaN. The layer keeps what
                it had.
        """
        if isinstance(weight, Tensor) and not isinstance(weight, QTensor) and weight.is_quantized:
            weight = weight.dequantize()
        shape = [self.out_features]
        if bias is not None and list(bias.shape) != shape:
            raise ValueError(f"QLinear: expected bias of shape {shape}, got {list(bias.shape)}")
        if bias is not None:
            check_bias(bias)
        self.weight = weight  # type: ignore[assignment]
        with torch.inference_mode(False):
            self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
