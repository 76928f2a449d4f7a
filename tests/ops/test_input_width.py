"""A layer in a graph, as a bare op, accepts only inputs of its own width: the op's config holds K mod 16.

The shape of the packed weight does not distinguish K = 13, 14, 15 and 16.
"""

from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dynquant import QLinear, fuse_graph, reference
from dynquant.config import Config, k_modulo_16, recode
from dynquant.nn.merged import MergedGroup
from dynquant.ops.autograd import with_autocast_dtype
from tests.support.same_bits import assert_same_bits

K, N = 15, 64
OTHERS = (13, 14, 16)
WORDS = r"linear_(dynamic|static): expected x\.shape\[-1\] to be 15 modulo 16, as config says, got "
QPARAMS = (torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32))
CONFIGS = [
    Config(),
    Config("per_tensor", "per_tensor", 8, "silu", torch.bfloat16),
    Config(rotation_block=128, epilogue="gelu_tanh", out_dtype=torch.float64),
    Config(rotation_block=128, rotation_signs=False),
]


def layer(epilogue: str = "none", static: bool = False) -> QLinear:
    torch.manual_seed(0)
    made = QLinear(K, N, epilogue=epilogue)
    if static:
        made.set_activation_qparams(*QPARAMS)
    return made.requires_grad_(False)


def refuses_others(function: Callable[[Tensor], Any], words: str = WORDS) -> None:
    assert function(torch.randn(2, K)).shape == (2, N)
    for k in OTHERS:
        with pytest.raises(RuntimeError, match=f"{words}{k}"):
            function(torch.randn(2, k))


# ---- the int


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 4096, None])
def test_config_carries_it_beside_the_scheme(config: Config, k: int | None) -> None:
    code = config.encode(k)
    assert Config.decode(code) == config
    assert k_modulo_16(code) == (None if k is None else k % 16)
    assert (code & ~(31 << 12)) == config.encode()
    changed = recode(code, epilogue="relu", out_dtype=None)
    assert k_modulo_16(changed) == k_modulo_16(code)
    assert (Config.decode(changed).epilogue, Config.decode(changed).weights) == ("relu", config.weights)


def test_files_do_not_hold_it() -> None:
    made = layer()
    assert k_modulo_16(made._packed[-1]) == K
    assert made.state_dict()["format"].tolist()[1] == made.config.encode() == 0
    assert made.__getstate__()["_packed"] == 0
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other._packed[-1] == made._packed[-1]
    assert made.weight.__reduce_ex__(2)[1][2] == 0


# ---- the op


@pytest.mark.parametrize("static", [False, True])
def test_op_and_reference(static: bool) -> None:
    *tensors, qparams, code = layer(static=static)._packed
    op = "linear_static" if static else "linear_dynamic"
    last = (*(qparams or ()), code)
    for function in (getattr(torch.ops.dynquant, op), getattr(reference, op)):
        refuses_others(lambda x, function=function: function(x, *tensors, None, *last))
        for other in (12, 17, 31):
            with pytest.raises(RuntimeError, match=f"{op}: expected packed_weight"):
                function(torch.randn(2, other), *tensors, None, *last)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake(static: bool, device: str) -> None:
    code = Config().encode(K)
    with FakeTensorMode():
        weight = torch.empty(N, K, dtype=torch.int8, device=device)
        packed, weight_sum = torch.ops.dynquant.pack_weight(weight)
        tensors = (packed, weight_sum, torch.empty(N, device=device), None)

        qparams = (
            torch.empty(1, device=device),
            torch.empty(1, dtype=torch.int32, device=device),
        )

        def call(x: Tensor) -> Tensor:
            x = torch.empty_like(x, device=device)
            if static:
                return torch.ops.dynquant.linear_static(x, *tensors, *qparams, code)
            return torch.ops.dynquant.linear_dynamic(x, *tensors, code)

        refuses_others(call)


def test_a_config_without_the_width_accepts_any() -> None:
    *tensors, _, code = layer()._packed
    assert code != 0
    x = torch.randn(2, K)
    expected = torch.ops.dynquant.linear_dynamic(x, *tensors, None, code)
    assert_same_bits(torch.ops.dynquant.linear_dynamic(x, *tensors, None, 0), expected)
    wider = torch.cat([x, torch.zeros(2, 1)], 1)
    for function in (torch.ops.dynquant.linear_dynamic, reference.linear_dynamic):
        assert_same_bits(function(wider, *tensors, None, 0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_it(dtype: torch.dtype) -> None:
    *tensors, _, code = layer()._packed
    with torch.autocast("cpu", dtype):
        refuses_others(lambda x: torch.ops.dynquant.linear_dynamic(x, *tensors, None, code))
        in_python = with_autocast_dtype("linear_dynamic", "AutocastCPU")
        refuses_others(lambda x: in_python(x, *tensors, None, code))
        made, x = layer(), torch.randn(2, K)
        assert_same_bits(in_python(x, *tensors, made.bias, code), made(x))


@pytest.mark.parametrize("epilogue", ["relu", "gelu", "silu"])
def test_backward_computes_the_layer_again(epilogue: str) -> None:
    x = torch.randn(2, K, requires_grad=True)
    made = layer(epilogue)
    made(x).sum().backward()
    y = layer()(x.detach()).requires_grad_()
    activation: Callable[..., Tensor] = getattr(nn.functional, epilogue)
    activation(y).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad @ made.dequantize_weight())


# ---- layers in programs


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traced_by_jit(static: bool, tmp_path: Path) -> None:
    made = layer(static=static)
    torch.jit.trace(made, (torch.randn(3, K),)).save(tmp_path / "layer.pt")
    refuses_others(torch.jit.load(tmp_path / "layer.pt"))


def test_traced_by_fx() -> None:
    refuses_others(fx.symbolic_trace(nn.Sequential(layer())))


def test_exported_with_a_free_width() -> None:
    program = torch.export.export(layer(), (torch.randn(2, K),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    # By default the program's guards refuse other widths before the op is called.
    refuses_others(program.module(check_guards=False))


@pytest.mark.parametrize("leaves", [False, True])
def test_fused_graphs(leaves: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = QLinear(K, N), QLinear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).relu() + self.second(x).relu()

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return (leaves and isinstance(module, QLinear)) or super().is_leaf_module(module, name)

    model = Net().requires_grad_(False)
    graph = fuse_graph(fx.GraphModule(model, Tracer().trace(model)))
    x = torch.randn(2, K)
    assert_same_bits(graph(x), model(x))
    calls = [node for node in graph.graph.nodes if "dynquant.linear" in str(node.target)]
    assert len(calls) == 1
    assert operator.attrgetter(str(calls[0].args[3].target))(graph).shape[0] == 2 * N
    assert Config.decode(calls[0].args[-1]).epilogue == "relu"
    refuses_others(graph)


def test_layers_that_share_an_input() -> None:
    layers = [QLinear(K, N), QLinear(K, N)]
    wide = MergedGroup(layers).merged
    assert wide is not None
    assert k_modulo_16(wide.config) == K
    # Both packed weights have the same shape.
    assert MergedGroup([QLinear(K, N), QLinear(K - 1, N)]).merged is None


def test_weight_in_a_linear_function() -> None:
    weight = layer().weight
    refuses_others(
        lambda x: nn.functional.linear(x, weight), r"F\.linear: expected input\.shape\[-1\] .* got "
    )


# ---- fake and meta tensors


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("other", [K + 16, K + 32, K - 1])
def test_tracing_refuses_a_width_that_is_the_same_modulo_16(static: bool, other: int) -> None:
    """The config cannot distinguish them; the shape of the packed weight does."""
    made = layer(static=static)
    words = rf"QLinear: expected input\.shape\[-1\] == in_features \({K}\), got {other}"
    with pytest.raises(RuntimeError, match=words):
        torch.export.export(made, (torch.randn(2, other),))
    on_meta = copy.deepcopy(made).to("meta")
    with pytest.raises(RuntimeError, match=words):
        on_meta(torch.randn(2, other, device="meta"))
    assert on_meta(torch.randn(2, K, device="meta")).shape == (2, N)


@pytest.mark.parametrize("static", [False, True])
def test_meta_and_real_tensors_in_one_call_are_an_error(static: bool) -> None:
    """Otherwise the fake kernel would run and return uninitialised memory."""
    here = layer(static=static)
    there = copy.deepcopy(here).to("meta")
    op = torch.ops.dynquant.linear_static if static else torch.ops.dynquant.linear_dynamic
    for made, x in ((here, torch.randn(2, K, device="meta")), (there, torch.randn(2, K))):
        with pytest.raises(RuntimeError, match="QLinear: expected input on"):
            made(x)
        packed_weight, weight_sum, weight_scale, qparams, config = made._packed
        operands = packed_weight, weight_sum, weight_scale, made.bias, *(qparams or ())
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            op(x, *operands, config)


@pytest.mark.parametrize("of_meta", [0, 1])
@pytest.mark.parametrize("op", ["choose_qparams", "quantize", "int8_mm"])
def test_no_op_mixes_meta_and_real_tensors(op: str, of_meta: int) -> None:
    packed_weight, weight_sum = reference.pack_weight(torch.ones(N, K, dtype=torch.int8))
    arguments = {
        "choose_qparams": (torch.zeros(3), torch.ones(3)),
        "quantize": (torch.randn(3, K), *QPARAMS),
        "int8_mm": (torch.ones(3, K, dtype=torch.int8), packed_weight, weight_sum),
    }[op]
    mixed = [value.to("meta") if i == of_meta else value for i, value in enumerate(arguments)]
    with pytest.raises(RuntimeError, match=f"{op}: expected all tensors on one device"):
        getattr(torch.ops.dynquant, op)(*mixed)


@pytest.mark.parametrize("path", ["extension", "reference"])
def test_non_tensors_raise_the_same_error_on_every_path(path: str) -> None:
    program = "import dynquant; dynquant.QLinear(3, 2)(None)"
    environment = os.environ | ({"DYNQUANT_ISA": "reference"} if path == "reference" else {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "TypeError: QLinear: expected input to be a tensor, got NoneType" in done.stderr


@pytest.mark.parametrize("shape", [(N,), (N, 16, 1), (1, 4, 64, 3), (2, 4, 64, 4), (N + 1, 16)])
def test_a_fake_kernel_refuses_other_shapes_of_a_packed_weight(shape: tuple[int, ...]) -> None:
    packed_weight = torch.empty(shape, dtype=torch.int8, device="meta")
    weight_sum = torch.empty(N, dtype=torch.int32, device="meta")
    x, scale = torch.empty(2, K, device="meta"), torch.empty(N, device="meta")
    with pytest.raises(
        RuntimeError, match="linear_dynamic: expected packed_weight to be contiguous int8 as pack_weight"
    ):
        torch.ops.dynquant.linear_dynamic(x, packed_weight, weight_sum, scale, None, 0)
    with pytest.raises(
        RuntimeError, match="int8_mm: expected packed_weight to be contiguous int8 as pack_weight"
    ):
        torch.ops.dynquant.int8_mm(x.to(torch.int8), packed_weight, weight_sum)


def test_a_fake_product_refuses_another_width_by_its_name() -> None:
    packed_weight, weight_sum = reference.pack_weight(torch.ones(N, K, dtype=torch.int8))
    q = torch.empty(3, K + 16, dtype=torch.int8, device="meta")
    with pytest.raises(RuntimeError, match=rf"int8_mm: expected q\.shape\[-1\] to fit .*, got {K + 16}"):
        torch.ops.dynquant.int8_mm(q, packed_weight.to("meta"), weight_sum.to("meta"))
