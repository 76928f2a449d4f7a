"""Attention of traced, exported and compiled graphs in int8, where it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dynquant
from dynquant._extension import extension, status
from dynquant.nn.attention import scaled_dot_product_attention

with_kernels = pytest.mark.skipif(extension is None, reason=f"no int8 attention: {status}")


class _Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def _operands(s_q: int = 20, s_kv: int = 70, dims: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3)[: dims - 2]
    q, k, v = (torch.randn(*shape, s, 16, generator=generator) for s in (s_q, s_kv, s_kv))
    return q, k, v


def _traced(module: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    return fx.symbolic_trace(module)


def _exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    return torch.export.export(module, inputs).module()


def _targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


_OURS = (torch.ops.dynquant.attention.default, scaled_dot_product_attention)
OPTIONS = [
    {},
    {"is_causal": True},
    {"scale": 0.5},
    {"attn_mask": (torch.arange(70) < 50)[None]},
    {"attn_mask": torch.linspace(-3.0, 3.0, 70)[None]},
]


@with_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "scale", "bool", "additive"])
@pytest.mark.parametrize("graph_of", [_traced, _exported])
def test_attention_of_a_graph_is_that_of_the_op(
    graph_of: Callable[..., fx.GraphModule], options: dict[str, Any]
) -> None:
    inputs = _operands()
    module = graph_of(_Attention(**options).eval(), inputs)
    fused = dynquant.fuse_graph(module, attention="int8")
    assert any(target in _OURS for target in _targets(fused))
    names = {"attn_mask": "mask"}
    expected = torch.ops.dynquant.attention(*inputs, **{names.get(k, k): v for k, v in options.items()})
    assert torch.equal(fused(*inputs), expected)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (_Attention(dropout_p=0.5), _operands()),
        (_Attention(), _operands(1, 70)),  # a token and a cache
        (_Attention(), _operands(dims=3)),
    ],
    ids=["dropout", "few queries", "three dimensions"],
)
def test_other_attention_stays_as_it_is(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    graph = dynquant.fuse_graph(_exported(module, inputs), attention="int8")
    assert not any(target in _OURS for target in _targets(graph))


@pytest.mark.parametrize("dims", [3, 4])
def test_a_traced_graph_decides_by_its_operands(dims: int) -> None:
    module = dynquant.fuse_graph(fx.symbolic_trace(_Attention()), attention="int8")
    for s_q in (1, 20):
        q, k, v = _operands(s_q, dims=dims)
        exact = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(module(q, k, v), exact, rtol=0.1, atol=0.05)


def test_no_graph_changes_its_attention_unasked() -> None:
    module = dynquant.fuse_graph(_exported(_Attention(), _operands()))
    assert not any(target in _OURS for target in _targets(module))


@with_kernels
def test_a_compiled_model_has_int8_attention_where_it_is_asked_for() -> None:
    inputs = _operands()
    torch._dynamo.reset()
    options = {"backend": "eager", "attention": "int8"}
    compiled = torch.compile(_Attention(is_causal=True), backend="dynquant", options=options)
    assert torch.equal(compiled(*inputs), torch.ops.dynquant.attention(*inputs, is_causal=True))
    torch._dynamo.reset()
    plain = torch.compile(_Attention(is_causal=True), backend="dynquant", options={"backend": "eager"})
    assert torch.equal(plain(*inputs), F.scaled_dot_product_attention(*inputs, is_causal=True))


@with_kernels
def test_gradients_pass_through_the_attention_of_a_compiled_model() -> None:
    inputs = tuple(x.requires_grad_() for x in _operands())
    torch._dynamo.reset()
    options = {"backend": "aot_eager", "attention": "int8"}
    compiled = torch.compile(_Attention(), backend="dynquant", options=options)
    grads = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs)
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact)


def test_wrong_values_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="fuse_graph: expected attention to be None or 'int8', got 'fp8'"):
        dynquant.fuse_graph(fx.symbolic_trace(_Attention()), attention="fp8")
    with pytest.raises(
        ValueError, match="quantize_dynamic: expected attention to be None or 'int8', got True"
    ):
        dynquant.quantize_dynamic(nn.Linear(2, 2), attention=True)  # type: ignore[call-overload]
    torch._dynamo.reset()
    compiled = torch.compile(_Attention(), backend="dynquant", options={"attention": "fp8"})
    with pytest.raises(Exception, match=r"expected options\['attention'\] to be None or 'int8', got 'fp8'"):
        compiled(*_operands())
