"""A process forked after a conversion computes: nobody waits for workers that the fork left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from dynquant import _extension

# Weights come from numpy: torch itself would start workers to make them. Each case has a process of its own,
# in which no other case has started any.
SCRIPT = textwrap.dedent(
    """
    import io, os, pickle, signal, sys
    import numpy as np, torch
    from torch import nn
    import dynquant

    torch.set_num_threads(2)
    random = np.random.RandomState(0)

    def linear(k, n):
        layer = nn.Linear(k, n, device="meta")
        layer.weight = nn.Parameter(torch.from_numpy(random.randn(n, k).astype(np.float32)))
        layer.bias = nn.Parameter(torch.from_numpy(random.randn(n).astype(np.float32)))
        return layer

    def embedding(n, k):
        return nn.Embedding(n, k, _weight=torch.from_numpy(random.randn(n, k).astype(np.float32)))

    model = nn.Sequential(embedding(5000, 256), linear(256, 40000), nn.ReLU(), linear(40000, 64))
    x = torch.from_numpy(random.randint(0, 5000, 64))

    def alone(function, *arguments):
        torch.set_num_threads(1)
        result = function(*arguments)
        torch.set_num_threads(2)
        return result

    def unpickle():
        return pickle.loads(alone(lambda: pickle.dumps(dynquant.quantize_dynamic(model))))

    def assign():
        quantized = alone(dynquant.quantize_dynamic, model)
        quantized[1].weight = model[1].weight
        return quantized

    PER_TENSOR = {"activations": "per_tensor", "weights": "per_tensor"}
    from_float = dynquant.QLinear.from_float
    CASES = {
        "convert": lambda: dynquant.quantize_dynamic(model),
        "inplace": lambda: dynquant.quantize_dynamic(model, inplace=True),
        "fuse": lambda: dynquant.quantize_dynamic(model, rotation="hadamard", fuse=True),
        "per_tensor": lambda: dynquant.quantize_dynamic(model, **PER_TENSOR),
        "default device": lambda: (torch.set_default_device("cpu"), dynquant.quantize_dynamic(model))[1],
        "from_float": lambda: nn.Sequential(model[0], from_float(model[1]), from_float(model[3])),
        "unpickle": unpickle,
        "assign": assign,
    }

    def forked(function, seconds):
        process = os.fork()
        if process == 0:
            signal.alarm(seconds)  # a process that waits forever ends by it
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(process, 0)[1]

    def convert_and_fork(make):
        quantized = make()
        assert sum(isinstance(layer, dynquant.QLinear) for layer in quantized.modules()) == 2
        assert forked(lambda: quantized(x), 60) == 0, "the forked process does not compute"

    for name, make in CASES.items():
        print(name, forked(lambda: convert_and_fork(make), 120), flush=True)
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(_extension.extension is None, reason=f"no kernels to run: {_extension.status}")
def test_a_forked_process_computes() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    results = dict(line.rsplit(" ", 1) for line in run.stdout.splitlines())
    assert len(results) == 8, run.stderr
    assert set(results.values()) == {"0"}, f"{results}\n{run.stderr}"
