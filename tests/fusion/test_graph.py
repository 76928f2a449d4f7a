"""Fusing in graphs: traced, exported and compiled models give the bits of the unfused ones with fewer ops."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional as F

import dynquant
from dynquant import Config, QLinear, fuse_graph
from dynquant.fusion import compile_backend
from dynquant.patterns.registry import PATTERNS, SharedInput
from tests.support.nets import Written
from tests.support.same_bits import assert_same_bits

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
SCHEMES: list[dict[str, Any]] = [{}, {"activations": "per_tensor", "weights": "per_tensor"}, {"rotation": 8}]
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


class Net(nn.Module):
    """Layers whose forward is a function of them and the input."""

    def __init__(self, body: Callable[..., Tensor], layers: int = 1, **words: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(QLinear(24, words.pop("n", 64), **words) for _ in range(layers))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, *self.layers)


class WithLeaves(fx.Tracer):
    """Keeps QLinear as a call of a module."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, QLinear) or super().is_leaf_module(module, name)


def leaves(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.GraphModule(model, WithLeaves().trace(model))


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).module()


def decomposed(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).run_decompositions().module()


GRAPHS = [leaves, traced, exported, decomposed]


def calls(module: fx.GraphModule) -> list[tuple[int, str]]:
    """N and epilogue of every dynquant op in a graph, in order."""
    found = []
    for node in module.graph.nodes:
        if "dynquant.linear" in str(node.target):
            scale = operator.attrgetter(str(node.args[3].target))(module)
            found.append((scale.shape[0], Config.decode(node.args[-1]).epilogue))
    return found


# ---- activations

ACTIVATIONS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (lambda y: y.relu(), "relu"),
    (lambda y: F.relu(y, inplace=True), "relu"),
    (lambda y: y.relu_(), "relu"),
    (nn.ReLU(), "relu"),
    (F.gelu, "gelu"),
    (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (F.silu, "silu"),
    (lambda y: torch.sigmoid(y) * y, "silu"),
    (nn.SiLU(), "silu"),
    (lambda y: y * torch.sigmoid(1.702 * y), "quick_gelu"),
    (lambda y: torch.sigmoid(y * 1.702) * y, "quick_gelu"),
]


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], **words: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation = QLinear(24, 33, **words), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


@pytest.mark.parametrize("graph_of", GRAPHS)
@pytest.mark.parametrize(("activation", "epilogue"), ACTIVATIONS)
def test_activations_become_epilogues(activation, epilogue, graph_of) -> None:
    model = Activated(activation)
    graph = graph_of(model, X)
    assert fuse_graph(graph) is graph
    assert calls(graph) == [(33, epilogue)]
    assert model.layer.config.epilogue == "none", "the model itself stays as it was"
    expected = Activated(Written(epilogue))(X)
    assert_same_bits(graph(X), expected)
    if epilogue == "relu":
        assert_same_bits(graph(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_epilogue_is_closer_to_exact_than_an_activation_of_rounded_values(dtype: torch.dtype) -> None:
    model, x = Activated(F.gelu), X.to(dtype)
    graph = fuse_graph(exported(model, x))
    exact = F.gelu(model.layer(X.to(dtype).double()))
    error, plain = (graph(x).double() - exact).abs().mean(), (model(x).double() - exact).abs().mean()
    assert graph(x).dtype == dtype
    # A float64 output shows the error of the epilogue function itself, which has a bound.
    assert error <= plain + (2.0**-18 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_static_layers(scheme: dict[str, Any]) -> None:
    assert_same_bits(
        fuse_graph(traced(Activated(F.silu, **scheme), X))(X), Activated(Written("silu"), **scheme)(X)
    )
    if "rotation" in scheme:
        return
    models = Activated(F.relu, **scheme), Activated(F.relu, **scheme)
    for model in models:
        with dynquant.calibrate(model):
            model(X)
        dynquant.freeze(model)
    for graph_of in (leaves, exported):
        graph = fuse_graph(graph_of(models[0], X))
        assert calls(graph) == [(33, "relu")]
        assert_same_bits(graph(X), models[1](X))


UNTOUCHED: list[Callable[..., Any]] = [
    lambda x, a: F.relu(y := a(x)) + y,
    lambda x, a: (y := a(x), F.relu(y)),
    lambda x, a: F.elu(a(x)),
    lambda x, a: torch.sigmoid(a(x)) * x.sum(),
    lambda x, a: (y := a(x)) * torch.sigmoid(1.7 * y),
    lambda x, a: (y := a(x)) * torch.sigmoid(1.702 * y) + y,
    lambda x, a: (y := a(x)) * (gate := torch.sigmoid(1.702 * y)) + gate,
    lambda x, a: F.relu(a(x) + 1),
]


@pytest.mark.parametrize("body", UNTOUCHED)
def test_outputs_with_other_users_are_not_fused(body) -> None:
    model = Net(body)
    graph = fuse_graph(exported(model, X))
    assert calls(graph) == [(64, "none")]
    expected, got = model(X), graph(X)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, expected)), strict=True):
        assert_same_bits(a, b)


def test_one_epilogue_for_each_layer_and_none_across_modes() -> None:
    assert calls(fuse_graph(traced(Net(lambda x, a: a(x).relu().relu()), X))) == [(64, "relu")]

    def across(x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        with torch.no_grad():
            return y.relu()

    graphs = []
    torch._dynamo.reset()
    torch.compile(Net(across), backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(X)
    before = graphs[0].code
    assert fuse_graph(graphs[0]).code == before


def test_a_hook_stays() -> None:
    model = Net(lambda x, a: a(x).relu())
    model.layers[0].register_forward_hook(lambda module, args, out: out + 1)
    graph = fuse_graph(leaves(model, X))
    assert [node.op for node in graph.graph.nodes][1] == "call_module"
    assert_same_bits(graph(X), model(X))


# ---- layers that read the same tensor


def heads(x: Tensor, *layers: nn.Module) -> Tensor:
    """Attention's views of its projections, which need contiguous outputs."""
    q, k, v = (layer(x).view(-1, 4, 16).transpose(0, 1) for layer in layers)
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(x.shape[0], -1)


def one_dimension(x: Tensor, *layers: nn.Module) -> Tensor:
    return sum((layer(x).view(-1) for layer in layers), torch.zeros(())) * 2


@pytest.mark.parametrize("graph_of", GRAPHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("body", [heads, one_dimension])
def test_layers_that_read_the_same_tensor_become_one(body, scheme, graph_of) -> None:
    model = Net(body, 3, **scheme)
    graph = fuse_graph(graph_of(model, X))
    assert calls(graph) == [(192, "none")]
    for mode in MODES:
        with mode():
            assert_same_bits(graph(X), model(X))
    other = copy.deepcopy(graph)
    other.load_state_dict(graph.state_dict())
    assert_same_bits(other(X), model(X))
    int8 = [value for value in graph.state_dict().values() if value.dtype == torch.int8]
    assert sum(value.numel() for value in int8) in (0, 192 * 24)


def test_shapes_of_groups() -> None:
    class Widths(nn.Module):
        def __init__(self, *widths: int, bias: tuple[bool, ...] | None = None) -> None:
            super().__init__()
            torch.manual_seed(0)
            biases = bias or (True,) * len(widths)
            self.layers = nn.ModuleList(QLinear(24, n, b) for n, b in zip(widths, biases, strict=True))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], -1)

    for model, expected in (
        (Widths(64, 128), [192]),
        (Widths(50, 64, 64), [178]),
        (Widths(40, 64, 50, 128), [40, 242]),
        (Widths(40, 40), [40, 40]),
        (Widths(16, 64), [16, 64]),
        (Widths(64, 64, 64, bias=(True, False, False)), [64, 128]),
    ):
        graph = fuse_graph(exported(model, X))
        assert sorted(n for n, _ in calls(graph)) == sorted(expected)
        assert_same_bits(graph(X), model(X))


def test_epilogues_come_first_and_equal_ones_are_shared() -> None:
    model = Net(lambda x, a, b, c, d: F.silu(a(x)) * b(x) + F.relu(c(x)) * F.relu(d(x)), 4)
    graph = fuse_graph(exported(model, X))
    assert calls(graph) == [(64, "silu"), (64, "none"), (128, "relu")]
    torch.testing.assert_close(graph(X), model(X))


def stored(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    x.add_(1)
    return y * b(x)


def changed(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    y.select(1, 0).fill_(3)
    return y * b(x)


def asked(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x).as_strided((5, 2), (64, 1)) * b(x)[:, :2]


def returned(x: Tensor, a: nn.Module, b: nn.Module) -> Any:
    return a(x), b(x)


def other_inputs(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) * b(x + 1)


def twice(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) * a(x)


@pytest.mark.parametrize("body", [stored, changed, asked, returned, other_inputs, twice])
@pytest.mark.parametrize("graph_of", [traced, exported])
def test_layers_that_are_not_merged(body, graph_of) -> None:
    model = Net(body, 2)
    graph = fuse_graph(graph_of(model, X.clone()))
    assert calls(graph) == [(64, "none")] * 2
    expected, got = model(X.clone()), graph(X.clone())
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, expected)), strict=True):
        assert_same_bits(a, b)


def test_groups_one_after_the_other() -> None:
    def body(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        y = a(x) - b(x)
        z = y[:, :24]
        return c(z) * d(z) + c(x) * a(z)

    model = Net(body, 4)
    graph = fuse_graph(traced(model, X))
    assert calls(graph) == [(192, "none"), (192, "none")]
    assert_same_bits(graph(X), model(X))


def test_static_layers_with_the_same_qparams_become_one() -> None:
    model = Net(heads, 3)
    with dynquant.calibrate(model):
        model(X)
    dynquant.freeze(model)
    for graph_of in (leaves, exported):
        graph = fuse_graph(graph_of(model, X))
        assert calls(graph) == [(192, "none")]
        assert_same_bits(graph(X), model(X))
    model.layers[1].set_activation_qparams(torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32))
    assert len(calls(fuse_graph(exported(model, X)))) == 2


def test_a_graph_is_fused_once_and_for_all() -> None:
    model = Net(lambda x, a, b, c, d: a(x) * b(x) + c(x).relu() * d(x).relu(), 4)
    graph = fuse_graph(traced(model, X))
    code, state = graph.code, graph.state_dict()
    assert fuse_graph(graph).code == code
    assert graph.state_dict().keys() == state.keys()
    assert_same_bits(graph(X), model(X))


def test_biases_that_no_gradient_reaches_become_constants() -> None:
    model = Net(heads, 3)
    trained = fuse_graph(traced(model, X))
    frozen = fuse_graph(traced(model.requires_grad_(False), X))
    names = {name.rpartition(".")[2] for name, _ in frozen.named_buffers()}
    assert "bias" in names
    assert not [node for node in frozen.graph.nodes if node.target is torch.cat]
    assert_same_bits(frozen(X), trained(X))
    assert not list(frozen.parameters())


def test_gradients_of_a_fused_graph() -> None:
    model = Net(lambda x, a, b, c: F.relu(a(x)) + b(x) * c(x), 3)
    graph = fuse_graph(traced(copy.deepcopy(model), X))
    grads = []
    for run in (model, graph):
        x = X.clone().requires_grad_()
        run(x).square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in run.parameters())])
    for unfused, fused in zip(*grads, strict=True):
        torch.testing.assert_close(unfused, fused)


def test_a_fused_graph_is_exported_again(tmp_path) -> None:
    model = Net(heads, 3)
    graph = fuse_graph(
        torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("m")},)).module()
    )
    assert_same_bits(graph(X[:3]), model(X[:3]))
    program = torch.export.export(graph, (X,))
    torch.export.save(program, tmp_path / "net.pt2")
    assert_same_bits(torch.export.load(tmp_path / "net.pt2").module()(X), model(X))


def test_other_things_than_graphs_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a torch.fx.GraphModule, got ReLU"):
        fuse_graph(nn.ReLU())


# ---- torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Seen:
    """A backend that records the fused graph and runs it unchanged."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def ops(self) -> list[tuple[int, str]]:
        found = []
        for node in (node for graph in self.graphs for node in graph.graph.nodes):
            if "dynquant.linear" in str(node.target):
                n = node.meta["example_value"].shape[-1]
                found.append((n, Config.decode(node.args[-1]).epilogue))
        return found


def compiled(model: nn.Module, backend: Any, **words: Any) -> Any:
    return torch.compile(model, backend="dynquant", fullgraph=True, options={"backend": backend}, **words)


def block(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v, gate, up = layers
    return heads(x, q, k, v) + F.relu(gate(x)) * up(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_models_give_the_same_bits(scheme: dict[str, Any]) -> None:
    seen, model = Seen(), Net(block, 5, **scheme)
    run = compiled(model, seen)
    with torch.no_grad():
        assert_same_bits(run(X), model(X))
    assert seen.ops() == [(256, "none"), (64, "relu")]


def test_inductor_compiles() -> None:
    model = Net(block, 5)
    run = torch.compile(model, backend="dynquant", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(X), model(X))


def test_options_and_modes_go_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    options_of_inductor: list[Any] = []

    def compile_(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
        options_of_inductor.append(options)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_)
    model = Net(block, 5)
    for words in ({"options": {"max_autotune": True}}, {"mode": "max-autotune-no-cudagraphs"}):
        torch._dynamo.reset()
        torch.compile(model, backend="dynquant", **words)(X)
        assert options_of_inductor.pop()["max_autotune"] is True


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            {"options": {"backend": "eager", "max_autotune": True}},
            "no options but 'backend' and 'attention' for 'eager', got options .'max_autotune'.",
        ),
        ({"options": {"backend": "dynquant"}}, "to be another backend, got 'dynquant'"),
    ],
)
def test_unsupported_options_are_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        torch.compile(Net(block, 5), backend="dynquant", **words)(X)


def test_gradients_of_compiled_models() -> None:
    model = Net(lambda x, a, b, c: F.gelu(a(x)) + b(x) * c(x), 3)
    run = compiled(model, "aot_eager")
    results = []
    for call in (model, run):
        x = X.clone().requires_grad_()
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in model.parameters())])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(eager, fused)


def test_new_weights_biases_and_batches_take_effect_without_compiling_again() -> None:
    seen, model = Seen(), Net(heads, 3)
    run = compiled(model, seen, dynamic=True)
    with torch.no_grad():
        run(X)
        model.layers[1].weight = torch.randn(64, 24)
        assert_same_bits(run(X), model(X))
        model.layers[2].bias.fill_(0.5)
        model.layers[0].bias.data.fill_(-1)
        assert_same_bits(run(X), model(X))
        model.load_state_dict(Net(heads, 3).state_dict())
        assert_same_bits(run(X[:3]), model(X[:3]))
    assert len(seen.graphs) == 1


def test_a_layer_with_two_inputs_is_not_merged() -> None:
    model = Net(lambda x, a, b: a(x) * b(x) + a(x + 1), 2)
    with torch.no_grad():
        assert_same_bits(compiled(model, "eager")(X), model(X))


def test_large_weights_are_merged_only_if_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_backend, "COPIED_BYTES", 0)
    model = Net(heads, 3)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = copy.deepcopy(model).layers

        def forward(self, x: Tensor) -> Tensor:
            return heads(x, self.a, self.b, self.c)

    holder = Holder()
    monkeypatch.setitem(PATTERNS, f"{__name__}.{Holder.__qualname__}", [SharedInput(("a", "b", "c"))])
    dynquant.fuse(holder)
    for net, widths in ((model, [64, 64, 64]), (holder, [192])):
        torch._dynamo.reset()
        seen = Seen()
        with torch.no_grad():
            assert_same_bits(compiled(net, seen)(X), model(X))
        assert [n for n, _ in seen.ops()] == widths
    inputs = []
    torch._dynamo.reset()

    def keep(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inputs.extend(args)
            return graph.forward(*args)

        return run

    with torch.no_grad():
        compiled(holder, keep)(X)
    wide = holder.a.group.merged.packed_weight
    wide_input = next(x for x in inputs if isinstance(x, Tensor) and x.shape == wide.shape)
    assert wide_input.data_ptr() == wide.data_ptr()


def test_threads_call_a_compiled_model() -> None:
    model = Net(block, 5)
    run = compiled(model, "eager")
    inputs = [torch.randn(5, 24) for _ in range(40)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        run(X)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(call, inputs), expected, strict=True):
            assert_same_bits(got, want)


def test_autocast() -> None:
    model = Net(block, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(model, "eager")(X), model(X)
    assert got.dtype == expected.dtype
    assert_same_bits(got, expected)


SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192}


@pytest.mark.parametrize(
    ("config", "ops"),
    [
        (transformers.BertConfig(vocab_size=50, **SMALL), [384, 128]),
        (transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL), [256, 128]),
        (transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2), [192, 64, 256, 64]),
    ],
)
def test_hugging_face_models(config: transformers.PretrainedConfig, ops: list[int]) -> None:
    torch.manual_seed(0)
    model = dynquant.quantize_dynamic(transformers.AutoModel.from_config(config).eval())
    tokens = torch.arange(12)[None] + 2
    seen = Seen()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).last_hidden_state
        got = torch.compile(model, backend="dynquant", options={"backend": seen})(tokens, use_cache=False)
    torch.testing.assert_close(got.last_hidden_state, expected, atol=1e-2, rtol=0)
    assert [n for n, _ in seen.ops()][: 2 * len(ops)] == [*ops, *ops]
