"""A sample: the arguments of one call of a model, and runs of models on it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SAMPLE_WORDS = "a tensor, a tuple of arguments or a dict of keyword arguments"
_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Sample:
        """From a user's sample: a tuple holds arguments, a mapping keyword arguments; anything else is one
        argument.

        A list, a namedtuple or a PackedSequence is one argument: models take these as they are.

        Raises:
            TypeError: for a mapping whose keys are not strings.
        """
        if isinstance(value, Sample):
            return value
        if type(value) is tuple:
            return cls(value, {})
        if isinstance(value, Mapping):
            names = list(value)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(
                    "dynquant: expected the names of arguments as keys of the sample, got "
                    f"{', '.join(map(repr, names))}; a dict that the model takes as one argument goes into a "
                    "tuple: (sample,)"
                )
            return cls((), {name: value[name] for name in names})
        return cls((value,), {})

    def __str__(self) -> str:
        arguments = [_describe(value) for value in self.args]
        arguments += [f"{name}={_describe(value)}" for name, value in self.kwargs.items()]
        return ", ".join(arguments) or "no arguments"

    def fresh(self) -> Sample:
        """A copy, for models that write to their arguments.

        Raises:
            TypeError: for arguments that cannot be copied.
        """
        try:
            args, kwargs = tree_map(_copy, (self.args, self.kwargs))
        except Exception as error:
            raise TypeError(
                f"dynquant: the sample ({self}) cannot be copied, which measuring takes: {error}"
            ) from error
        return Sample(args, kwargs)

    def call(self, model: nn.Module) -> Any:
        """Call ``model`` with it. A cache or another object that a call may fill is copied first."""
        plain = all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((self.args, self.kwargs)))
        sample = self if plain else self.fresh()
        return model(*sample.args, **sample.kwargs)

    def run(self, model: nn.Module, name: str) -> Any:
        """The output of ``model`` for a copy of the sample; a model that draws random numbers draws the same
        ones in each run.

        Args:
            name: of the model, for the message.

        Raises:
            ValueError: if the model raises, with the arguments and its message.
        """
        sample = self.fresh()
        try:
            with _same_random_state(model):
                return model(*sample.args, **sample.kwargs)
        except Exception as error:
            message = str(error).strip() or "nothing more"
            raise ValueError(
                f"dynquant: the sample does not fit {name}: {type(model).__name__} was called with {self} "
                f"and said {type(error).__name__}: {message}"
            ) from error


@contextlib.contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Within the block, the models are in eval mode and no gradients are recorded. After it, the modes of all
    modules and the states of the random number generators are as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    # no_grad, not inference_mode: tensors that a model keeps of a run must be usable in training.
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as states:
        for model in models:
            states.enter_context(_same_random_state(model))
        try:
            # Not by eval(): a model's own train() may have effects that the reset below does not undo.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _same_random_state(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    tensors = [*model.parameters(), *model.buffers()]
    cuda = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
    return torch.random.fork_rng(devices=sorted(cuda))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        parts = [_describe(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"{type(value).__name__} of {len(value)} ({', '.join(parts)})"
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return type(value).__name__
