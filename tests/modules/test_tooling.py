"""Converted models with the rest of PyTorch: compile, export, workers, autocast and more."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dynquant import QLinear, quantize_dynamic
from tests.support.nets import CountInt8
from tests.support.same_bits import assert_same_bits


def net(**scheme) -> nn.Sequential:
    torch.manual_seed(0)
    return quantize_dynamic(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), **scheme)


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
SCHEMES = [{}, {"activations": "per_tensor", "weights": "per_tensor"}, {"rotation": "hadamard"}]


# ---- torch.compile


def compiled(module: nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compile(scheme):
    model = net(**scheme)
    run = compiled(model)
    assert_same_bits(run(X), model(X))
    with torch.inference_mode():
        assert_same_bits(run(X), model(X))


def test_compile_with_inductor():
    model = net()
    with torch.no_grad():
        assert_same_bits(compiled(model, backend="inductor")(X), model(X))


def test_compile_with_gradients():
    model = net()
    expected, got = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(expected).sum().backward()
    bias = model[0].bias.grad.clone()
    model.zero_grad()
    compiled(model)(got).sum().backward()
    torch.testing.assert_close(got.grad, expected.grad)
    torch.testing.assert_close(model[0].bias.grad, bias)


def test_compile_takes_any_batch_without_compiling_each():
    model = net()
    counter = torch._dynamo.testing.CompileCounter()
    run = compiled(model, backend=counter)
    for rows in (5, 3, 4, 2):
        assert_same_bits(run(X[:rows]), model(X[:rows]))
    assert counter.frame_count == 2, "one for the first shape, one for all others"


def test_compile_sees_a_new_weight_dtype_and_bias():
    layer = QLinear(16, 8)
    run = compiled(layer)
    run(X)
    layer.weight = torch.randn(8, 16)
    assert_same_bits(run(X), layer(X))
    layer.half()
    assert_same_bits(run(X.half()), layer(X.half()))
    layer.bias = None
    assert_same_bits(run(X), layer(X))


class Reader(nn.Module):
    """A user's module that reads the weight of a layer."""

    def __init__(self, read) -> None:
        super().__init__()
        self.layer, self.read = QLinear(16, 16), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.layer, x)


INT8_READS = {
    "F.linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "F.linear .to(dtype)": lambda m, x: F.linear(x, m.weight.to(x.dtype), m.bias),
    "F.linear .to(device, dtype)": lambda m, x: F.linear(x, m.weight.to(x.device, x.dtype)),
    "F.linear .to(x)": lambda m, x: F.linear(x, m.weight.to(x)),
    "F.linear .half().float()": lambda m, x: F.linear(x, m.weight.float().detach().contiguous()),
    "F.linear .data": lambda m, x: F.linear(x, m.weight.data.clone()),
    "x.to(weight.dtype)": lambda m, x: m(x.to(m.weight.device, m.weight.dtype)),
    "isinstance": lambda m, x: m(x.to(m.weight.dtype) if isinstance(m.weight, Tensor) else x),
}
OTHER_READS = {
    "cache": lambda m, x: x + torch.ones(16, dtype=m.weight.dtype, device=m.weight.device),
    "shape": lambda m, x: x.reshape(-1, m.weight.shape[1]) * m.weight.size(0) * m.weight.numel(),
    "matmul .t()": lambda m, x: x @ m.weight.t().to(x.dtype),
    "matmul .T": lambda m, x: x @ m.weight.T.to(x.dtype),
    "embedding": lambda m, x: F.embedding(torch.tensor([3, 1]), m.weight),
    "int_repr": lambda m, x: x.sum() * m.weight().int_repr(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("read", [*INT8_READS, *OTHER_READS])
def test_compile_of_code_that_reads_the_weight(read, dtype):
    module, x = Reader({**INT8_READS, **OTHER_READS}[read]), X.to(dtype)
    with torch.no_grad():
        with CountInt8() as count:
            expected = module(x)
        assert count.calls == (read in INT8_READS)
        assert_same_bits(compiled(module)(x), expected)


@pytest.mark.parametrize("build", ["encoder", "attention"])
def test_compile_keeps_attention_in_int8(build):
    """Without gradients torch would take its fast paths here, which run in float."""
    torch.manual_seed(0)
    if build == "encoder":
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        arguments = (torch.randn(2, 3, 16),)
    else:
        model, arguments = nn.MultiheadAttention(16, 2, batch_first=True), (torch.randn(2, 3, 16),) * 3
    model = quantize_dynamic(model)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        got, expected = compiled(model, backend=keep)(*arguments), model(*arguments)
    if build == "attention":
        got, expected = got[0], expected[0]
    torch.testing.assert_close(got, expected)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "dynquant.linear_dynamic" in str(node.target)]
    assert len(calls) == (4 if build == "encoder" else 2)


# ---- torch.export, torch.fx, torch.jit


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_export(scheme, strict, tmp_path):
    model = net(**scheme)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for x in (X, X[:2], torch.randn(9, 16)):
        assert_same_bits(loaded(x), model(x))
    assert_same_bits(program.run_decompositions().module()(X), model(X))
    float_weights = [v for v in program.state_dict.values() if v.dim() == 2]
    assert not float_weights


def test_export_of_attention():
    torch.manual_seed(0)
    model = quantize_dynamic(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))
    calls = [node for node in program.graph.nodes if "dynquant.linear_dynamic" in str(node.target)]
    assert len(calls) == 4


def test_symbolic_trace():
    model = net()
    graph = torch.fx.symbolic_trace(model)
    assert_same_bits(graph(X), model(X))
    assert_same_bits(copy.deepcopy(graph)(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace(tmp_path):
    model = net()
    torch.jit.trace(model, (X,)).save(tmp_path / "net.pt")
    assert_same_bits(torch.jit.load(tmp_path / "net.pt")(X), model(X))


def test_a_traced_graph_can_be_converted():
    torch.manual_seed(0)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    assert_same_bits(quantize_dynamic(graph)(X), net()(X))


# ---- modes


def test_all_grad_modes_compute_the_same():
    model = net()
    expected = model(X)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_same_bits(model(X), expected)
    with torch.inference_mode():
        inside = X.clone()
    assert_same_bits(model.requires_grad_(False)(inside), expected)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast(autocast, dtype):
    layer, x = QLinear(16, 8), X.to(dtype)
    out = torch.float64 if dtype == torch.float64 else autocast
    expected = layer(x.double()).to(out) if dtype == torch.float64 else layer(x.float()).to(out)
    with torch.autocast("cpu", dtype=autocast):
        y, z = layer(x), F.linear(x, layer.weight, layer.bias)
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == dtype
    assert_same_bits(y, expected)
    assert_same_bits(z, expected)


def test_autocast_gradients_and_compile():
    model = net()
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        with torch.no_grad():
            assert_same_bits(compiled(model)(X), y)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert model[0].bias.grad.dtype == torch.float32


def test_default_dtype_and_flush_denormal_do_not_matter():
    model = net()
    expected = model(X)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_flush_denormal(True)
        assert_same_bits(model(X), expected)
        assert QLinear(4, 4).weight_scale.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)


def test_deterministic_algorithms():
    model = net()
    expected = model(X)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(model(X), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpointing_and_functional_calls():
    model = net()
    expected, x = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(expected).sum().backward()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert_same_bits(x.grad, expected.grad)
    double = {name: 2 * parameter for name, parameter in model.named_parameters()}
    by_hand = copy.deepcopy(model)
    for parameter in by_hand.parameters():
        parameter.data.mul_(2)
    assert_same_bits(torch.func.functional_call(model, double, (X,)), by_hand(X))
    assert_same_bits(torch.func.vmap(model)(X[:, None]).squeeze(1), model(X))


# ---- threads and processes


def test_threads_share_a_layer():
    model, inputs = net(), torch.randn(64, 7, 16)
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(model, inputs), expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_the_number_of_threads_does_not_matter(threads):
    torch.manual_seed(0)
    layer, x = QLinear(96, 200), torch.randn(130, 96)
    before = torch.get_num_threads()
    expected = layer(x)
    torch.set_num_threads(threads)
    try:
        assert_same_bits(layer(x), expected)
    finally:
        torch.set_num_threads(before)


class Embedded(Dataset):
    """Runs a converted model in the worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(X[index])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start):
    model = net()
    with torch.no_grad():
        expected = model(X)
    loader = DataLoader(Embedded(model), batch_size=2, num_workers=2, multiprocessing_context=start)
    assert_same_bits(torch.cat(list(loader)), expected)


# ---- memory and files


def test_a_call_is_one_op():
    """The dispatcher sees one op, without separate quantization, unpacking or casts."""
    layer = QLinear(16, 8)
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Record():
        layer(X)
    assert seen == ["dynquant.linear_dynamic.default"]


def test_nothing_outlives_the_layer():
    layer = QLinear(16, 8)
    gc.collect()
    gc.disable()
    try:
        packed, weight = weakref.ref(layer.weight.packed_weight), weakref.ref(layer.weight)
        layer(X)
        del layer
        assert packed() is None
        assert weight() is None
    finally:
        gc.enable()


def test_tied_modules_through_safetensors(tmp_path):
    shared = nn.Linear(8, 8)
    model = quantize_dynamic(nn.Sequential(shared, nn.ReLU(), shared))
    safetensors.save_model(model, tmp_path / "tied.safetensors")
    fresh = quantize_dynamic(nn.Sequential(tied := nn.Linear(8, 8), nn.ReLU(), tied))
    safetensors.load_model(fresh, tmp_path / "tied.safetensors")
    x = torch.randn(3, 8)
    assert_same_bits(fresh(x), model(x))


def test_copies_of_a_model_are_independent():
    model = net()
    expected = model(X)
    other = copy.deepcopy(model)
    other[0].weight = torch.zeros(32, 16)
    other[2].bias.data.zero_()
    assert_same_bits(model(X), expected)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(X), expected)


def test_an_encoder_through_every_step(tmp_path):
    """Encoder → convert → half → save → load into a converted copy → compile."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = quantize_dynamic(nn.TransformerEncoder(layer, 2), rotation="hadamard")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        torch.save(model.state_dict(), tmp_path / "encoder.pt")
        fresh = quantize_dynamic(nn.TransformerEncoder(copy.deepcopy(layer), 2))
        fresh.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
        assert_same_bits(fresh(x), expected)
        assert fresh.half()(x.half()).dtype == torch.float16
        assert (fresh(x.half()) - expected).abs().max() < 0.05
