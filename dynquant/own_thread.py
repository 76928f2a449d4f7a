"""Large tensor work on a thread that ends with it.

torch computes on OpenMP's workers, which belong to the thread that first needed them. A process that is
forked later (gunicorn's --preload, multiprocessing's "fork") has that thread but not its workers, and waits
for them forever. Converting, loading and unpickling a model leave no workers to the calling thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._device import DeviceContext

T = TypeVar("T")

_FEWEST_ELEMENTS = 1 << 14  # torch computes fewer on one thread
_own = threading.local()


def on_own_thread(tensors: Iterable[Tensor], function: Callable[[], T]) -> T:
    """``function()``, on a thread of its own if a tensor on the CPU is large enough for several threads.

    The thread has the caller's grad mode, inference mode, default device and context variables. Under a mode
    that sees each op (fake tensors, a counter of ops), and where CUDA tensors take part, whose streams belong
    to the calling thread, the function runs there.
    """
    tensors = [tensor for tensor in tensors if not is_lazy(tensor)]
    large = any(tensor.numel() >= _FEWEST_ELEMENTS for tensor in tensors)
    on_cpu = all(tensor.device.type in ("cpu", "meta") for tensor in tensors)
    devices = _default_devices()
    if not large or not on_cpu or devices is None or getattr(_own, "running", False):
        return function()
    results: list[T] = []
    errors: list[BaseException] = []
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run() -> None:
        _own.running = True
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                for device in devices:
                    torch.set_default_device(device)
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="dynquant")
    thread.start()
    try:
        thread.join()
    except (
        BaseException
    ):  # an interrupt: the function ends first, so that it changes nothing behind the caller
        thread.join()
        raise
    if errors:
        raise errors[0]
    return results[0]


def _default_devices() -> list[torch.device] | None:
    """The default device, if one is set; None under another mode, or while a graph is made."""
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return None
    modes: list[Any] = [
        torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
    ]
    if any(type(mode) is not DeviceContext for mode in modes):
        return None
    return [mode.device for mode in modes]


_SMALLEST_SUBNORMAL = 5e-324


@contextlib.contextmanager
def keeping_subnormals() -> Iterator[None]:
    """Within the block this thread keeps subnormal numbers, also after torch.set_flush_denormal(True)."""
    if _SMALLEST_SUBNORMAL != 0.0:  # Python's floats are computed in the same mode
        yield
        return
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
