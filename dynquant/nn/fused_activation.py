"""What stands in the place of an activation that the layer before it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class FusedActivation(nn.Identity):
    """The identity in the place of an activation that :func:`dynquant.fuse` made the epilogue of a layer.

    It brings the activation back where somebody looks between the two or changes one of them: when a hook is
    registered on the layer or on this module, and at the next call after either was replaced. (In a compiled
    model the replacement of a part counts from the first call outside torch.compile.)

    Attributes:
        owner: the module that holds this one, as its part ``name``.
        activation: the module or function that was here.
        layer: the layer whose epilogue it is, in ``layer_place``, its owner's modules and its name in them.
        relu_or_gelu: the ``activation_relu_or_gelu`` of its owner before, as of
            nn.TransformerEncoderLayer; None if there is none.
    """

    __jit_ignored_attributes__ = ("owner", "name", "activation", "relu_or_gelu", "layer", "layer_place")

    if TYPE_CHECKING:  # torch.jit.script reads the annotations of a class, and does not know these types
        owner: nn.Module
        name: str
        activation: Any
        relu_or_gelu: int | None
        layer: Any
        layer_place: tuple[dict[str, Any], str]

    @staticmethod
    def install(
        layer_owner: nn.Module, layer_name: str, owner: nn.Module, name: str, epilogue: str
    ) -> FusedActivation:
        """Make the activation ``owner.name`` the epilogue of the layer ``layer_owner.layer_name``."""
        fused = FusedActivation()
        layer = getattr(layer_owner, layer_name)
        # In __dict__ beside the registered submodules: names and state_dict stay as they are.
        vars(fused).update(
            owner=owner,
            name=name,
            activation=getattr(owner, name),
            relu_or_gelu=getattr(owner, "activation_relu_or_gelu", None),
            layer=layer,
            layer_place=(layer_owner._modules, layer_name),
        )
        layer.set_epilogue(epilogue)
        setattr(owner, name, fused)
        if isinstance(fused.relu_or_gelu, int):
            # The activation that the float kernel of nn.TransformerEncoderLayer would apply.
            vars(owner)["activation_relu_or_gelu"] = 0
        vars(layer)["fused_activation"] = fused
        return fused

    def follow(self, layer: nn.Module) -> None:
        """Another layer that computes the same has taken the place of the layer."""
        vars(self)["layer"] = layer
        vars(layer)["fused_activation"] = self

    def is_intact(self) -> bool:
        """Whether both parts are in their places."""
        modules, name = self.layer_place
        return modules.get(name) is self.layer and self.owner._modules.get(self.name) is self

    def dissolve(self) -> None:
        """Bring the activation back, if nothing else is in its place, and take it from the layer."""
        with torch.inference_mode(False):
            self.layer.set_epilogue("none")
        vars(self.layer).pop("fused_activation", None)
        owner, name = self.owner, self.name
        if getattr(owner, name, None) is self:
            if not isinstance(self.activation, nn.Module):
                delattr(owner, name)
            setattr(owner, name, self.activation)
            if self.relu_or_gelu is not None:
                vars(owner)["activation_relu_or_gelu"] = self.relu_or_gelu

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.is_intact():
            return input
        self.dissolve()
        result: Tensor = self.activation(input)
        return result

    def _forward_in_torch_script(self, input: Tensor) -> Tensor:
        return input

    forward.__wrapped__ = _forward_in_torch_script  # type: ignore[attr-defined]

    def _register(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook on this module is one on the activation, which is called again from now on."""
        self.dissolve()
        target = self.activation if isinstance(self.activation, nn.Module) else super()
        return getattr(target, method)(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._register("register_forward_hook", args, kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._register("register_forward_pre_hook", args, kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._register("register_full_backward_hook", args, kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        return self._register("register_full_backward_pre_hook", args, kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "layer" in state:  # copies of the layer do not take this module along
            vars(state["layer"])["fused_activation"] = self


class WithActivation(nn.Module):
    """A layer that may have taken in an activation, which a hook on the layer brings back: the hook is to see
    the layer's own output."""

    fused_activation: FusedActivation | None = None

    def _separate_activation(self) -> None:
        if self.fused_activation is not None:
            self.fused_activation.dissolve()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._separate_activation()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._separate_activation()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._separate_activation()
        return super().register_full_backward_pre_hook(*args, **kwargs)
