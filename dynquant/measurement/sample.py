"""A sample: one input of a model, in whatever form the model takes it, and running models on it."""

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
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any) -> Sample:
        """What users give: a tuple holds arguments, a mapping keyword arguments; all else is one argument.

        A list, a namedtuple or a PackedSequence is one argument: models take these as they are.

        Raises:
            TypeError: for a mapping whose keys are not strings.
        """
        if isinstance(given, Sample):
            return given
        if type(given) is tuple:
            return cls(given, {})
        if isinstance(given, Mapping):
            names = list(given)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(
                    "dynquant: expected the names of arguments as keys of the sample, got "
                    f"{', '.join(map(repr, names))}; a dict that the model takes as one argument goes into a "
                    "tuple: (sample,)"
                )
            return cls((), {name: given[name] for name in names})
        return cls((given,), {})

    def __str__(self) -> str:
        arguments = [_described(value) for value in self.args]
        arguments += [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return ", ".join(arguments) or "no arguments"

    def fresh(self) -> Sample:
        """A copy, for models that write to what they are given.

        Raises:
            TypeError: for what cannot be copied.
        """
        try:
            args, kwargs = tree_map(_copied, (self.args, self.kwargs))
        except Exception as error:
            raise TypeError(
                f"dynquant: the sample ({self}) cannot be copied, which measuring takes: {error}"
            ) from error
        return Sample(args, kwargs)

    def call(self, model: nn.Module) -> Any:
        """Call ``model`` with it. A cache or another object that a call may fill is copied before."""
        plain = all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((self.args, self.kwargs)))
        sample = self if plain else self.fresh()
        return model(*sample.args, **sample.kwargs)

    def run(self, model: nn.Module, name: str) -> Any:
        """The output of ``model`` for a copy of the sample; a model that draws random numbers draws the same
        ones in each run.

        Args:
            name: of the model, for the message.

        Raises:
            ValueError: with what was given and what the model said, where it raises.
        """
        sample = self.fresh()
        try:
            with _random_state_kept(model):
                return model(*sample.args, **sample.kwargs)
        except Exception as error:
            said = str(error).strip() or "nothing more"
            raise ValueError(
                f"dynquant: the sample does not fit {name}: {type(model).__name__} was called with {self} "
                f"and said {type(error).__name__}: {said}"
            ) from error


@contextlib.contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in eval mode and no gradients are recorded. Afterwards each module is in the
    mode it was in, and the random number generators stand where they stood."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    # no_grad, not inference_mode: what a model keeps of a run must be of use in training.
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as states:
        for model in models:
            states.enter_context(_random_state_kept(model))
        try:
            # Not by eval(): a train() of the model's own may do more than that, and not only to be undone.
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _random_state_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    tensors = [*model.parameters(), *model.buffers()]
    cuda = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
    return torch.random.fork_rng(devices=sorted(cuda))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        shown = [_described(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"{type(value).__name__} of {len(value)} ({', '.join(shown)})"
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}..."
    return type(value).__name__
