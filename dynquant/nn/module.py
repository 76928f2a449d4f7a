"""QModule: the questions that the rest of the package asks a quantized module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..qtensor import QTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class OpCall(NamedTuple):
    """The one op that a module's forward calls, as ``op(x, *constants.values(), config)``.

    Attributes:
        op: of ``torch.ops.dynquant``.
        constants: its tensors by the names of the schema; None for an absent optional one.
        config: the last argument.
    """

    op: Any
    constants: dict[str, Tensor | None]
    config: int


class NotScriptable:
    """A module that torch.jit.script refuses by a sentence, not by the first line that it cannot compile."""

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"{type(self).__name__}: expected torch.export, torch.compile or torch.jit.trace, since "
            "torch.jit.script cannot compile its forward"
        )


class QModule(nn.Module):
    """Base class of every quantized module: what conversion, fusion, calibration, checkpoints, thresholds and
    reports ask it. None of them knows the types that derive from it.

    A subclass implements :meth:`from_float`, :meth:`to_float`, ``config``, :attr:`matrix_shape` and
    :meth:`quantized_weights`, and overrides those of the other answers that are not right for it. A module
    may quantize several inputs (:attr:`quantized_input_names`), hold several weights
    (:meth:`quantized_weights`) and return tuples or nested outputs: measurements pass whole calls to
    :meth:`expected` and to ``forward`` and compare the tensors in the two outputs, in order.

    A conversion calls ``from_float``, carries hooks and attributes over from the float module, and puts the
    new module in its place. The module's ``state_dict`` holds plain tensors only, in a format of
    :mod:`dynquant.nn.state`.

    Nothing here is on the way of a forward call.
    """

    quantized_input_names: ClassVar[tuple[str, ...]] = ("input",)
    """The first arguments of ``forward``, which a call quantizes, in the order of its signature."""

    has_static_form: ClassVar[bool] = False
    """Whether :func:`dynquant.calibrate` and :func:`dynquant.freeze` take it: one input is quantized, and may
    have fixed qparams, by ``set_activation_qparams(scale, zero_point)``."""

    __jit_unused_properties__: ClassVar[tuple[str, ...]] = ()
    """For torch.jit.script, which would compile them: all properties."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = {
            name for base in cls.__mro__ for name, value in vars(base).items() if type(value) is property
        }
        cls.__jit_unused_properties__ = tuple(sorted(names))

    converts_parts: ClassVar[bool] = False
    """Whether from_float also takes what is in the float module, which is then not converted by itself."""

    replaced_attributes: ClassVar[tuple[str, ...]] = ()
    """Attributes of the float module that hold or name its float weights: a conversion carries all others
    over."""

    # ---- from float and back

    @classmethod
    def from_float(cls, *args: Any, **kwargs: Any) -> Self:
        """Quantize a float module, the first argument, which does not change.

        Args:
            kwargs: the scheme, any of activations, weights, rotation and epilogue. A conversion passes those
                that the signature names.

        Raises:
            TypeError: for a module of another type.
            ValueError: for a scheme that does not exist, a weight that cannot be quantized; the conversion
                adds the module's name.
        """
        raise NotImplementedError(f"{cls.__name__} has no from_float")

    def to_float(self) -> nn.Module:
        """A float module that computes the same without quantized activations.

        Raises:
            RuntimeError: if no float module of the type computes what this one does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no to_float")

    def expected(self, float_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The float output that this module's output stands for, for one call.

        Args:
            float_module: the module that it was made of. Its hooks do not run.

        Returns:
            The output of ``float_module``, and of what fusion made a part of this module since.
        """
        return float_module.forward(*args, **kwargs)

    def fits(self, float_module: nn.Module) -> bool:
        """Whether it may have been made of this float module, by its sizes."""
        return True

    @classmethod
    def why_not(cls, float_module: nn.Module) -> str | None:
        """Why a float module of the right type cannot be quantized, as a clause; None if it can."""
        return None

    # ---- scheme and contents

    @property
    def config(self) -> Config:
        """The scheme of its weights and inputs."""
        raise NotImplementedError(f"{type(self).__name__} has no config")

    @property
    def is_static(self) -> bool:
        """Whether the qparams of its input are fixed."""
        return False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """N and K of its product, of the widest one if it has several."""
        raise NotImplementedError(f"{type(self).__name__} has no matrix_shape")

    def quantized_weights(self) -> dict[str, QTensor]:
        """Its packed weights by attribute, which is also the name of the float module's parameter.

        Assigning one of them to the attribute makes two modules share it, as tied float modules do.
        """
        raise NotImplementedError(f"{type(self).__name__} has no quantized_weights")

    def shares(self, name: str, weight: QTensor) -> bool:
        """Whether this weight, which another module made of the same float parameter, may be the one of the
        name here too."""
        own = self.quantized_weights()[name]
        return own.config == weight.config and own.is_rows == weight.is_rows

    def int8_tensors(self) -> dict[str, Tensor]:
        """Its int8 tensors by name, those of its submodules too: the packed weights."""
        return {name: tensor for name, tensor in self._all_tensors() if tensor.dtype == torch.int8}

    def other_tensors(self) -> dict[str, Tensor]:
        """All other tensors that it holds: scales, sums, biases, what was carried over."""
        return {name: tensor for name, tensor in self._all_tensors() if tensor.dtype != torch.int8}

    def _all_tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(), *self.named_buffers()]

    def saved_scheme(self) -> dict[str, Any]:
        """What a file beside the weights (``config.json``) needs to say of the module: the fields in which
        its scheme differs from ``dynquant.Config()``, and ``"static": True`` if it is. Values that JSON has.
        """
        default, config = vars(Config()), vars(self.config)
        scheme = {name: value for name, value in config.items() if value != default[name]}
        return {**scheme, "static": True} if self.is_static else scheme

    # ---- one call

    def quantized_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors among the arguments of a call that ``forward`` quantizes, by name, each [..., K]."""
        given = dict(zip(self.quantized_input_names, args, strict=False)) | dict(kwargs)
        values = {name: given.get(name) for name in self.quantized_input_names}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
        }

    def op_call(self) -> OpCall | None:
        """The op that stands for a call of the module in a graph; None if it is not one op on one input."""
        return None

    # ---- fusion and static qparams

    @property
    def takes_epilogue(self) -> bool:
        """Whether :meth:`set_epilogue` may make an activation a part of it."""
        return False

    def set_epilogue(self, epilogue: str) -> None:
        """Apply an activation to each output, or none for ``"none"``."""
        raise RuntimeError(f"{type(self).__name__} takes no epilogue, got {epilogue!r}")

    @property
    def is_mergeable(self) -> bool:
        """Whether :class:`dynquant.nn.merged.MergedGroup` may merge it with others that read its input."""
        return False

    @property
    def merged_count(self) -> int:
        """The number of modules, with this one, whose weights are merged: they read the same tensor."""
        return 1

    @property
    def is_fused(self) -> bool:
        """Whether it does more than a layer: an activation is a part of it, or it is merged with others."""
        return self.merged_count > 1 or self.config.epilogue != "none"

    def why_not_static(self) -> str | None:
        """The reason why its qparams cannot be fixed in its present scheme, as a clause; None if they can."""
        return None if self.has_static_form else f"is a {type(self).__name__}, which has no static form"

    # ---- conversion

    def set_float_input(self, float_input: bool) -> None:
        """Have the weight of the input in float or int8, as a file has it; its values are loaded later."""

    def take_members_of(self, float_type: type) -> None:
        """Answer for the members that ``float_type``, a user's subclass, has beyond its float base."""
