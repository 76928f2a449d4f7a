"""Layers with residual and norm, and whole MLPs, in compiled graphs: one op each, with its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynquant
from dynquant._extension import extension, status
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.skipif(extension is None, reason=f"no kernels of these ops: {status}")
_ops = torch.ops.dynquant
BLOCKS = ("linear_dynamic", "linear_norm", "mlp", "linear_mlp")


class Post(nn.Module):
    """Output projection and MLP, each with residual and norm behind it."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, eps: float = 1e-5) -> None:
        super().__init__()
        self.out, self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = norm(32, eps=1e-5), norm(32, eps=eps)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = self.first(self.dropout(self.out(x)) + residual)
        return self.second(h + self.dropout(self.down(F.gelu(self.up(h)))))


class Pre(Post):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = residual + self.out(x)
        return h + self.down(F.gelu(self.up(self.second(h))))


class Watched(Post):
    """The value after the first norm has another reader."""

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        h = self.first(self.out(x) + residual)
        y = self.down(F.gelu(self.up(h)))
        return self.second(h + y), h, y


class WrittenRMSNorm(nn.Module):
    """As transformers writes it, with casts that do nothing in fp32."""

    def __init__(self, size: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(size)), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (y * (self.offset + self.weight.float())).type_as(x)
        return self.weight * y.to(x.dtype)


class Gated(nn.Module):
    """An MLP with a gate, with and without what may stand around it."""

    residual = norm_before = norm_after = False

    def __init__(self, norm: Callable[..., nn.Module] = WrittenRMSNorm) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.dropout = norm(32, eps=1e-5), nn.Dropout(0.1)

    def activated(self, n: Tensor) -> Tensor:
        return F.silu(self.gate(n)) * self.up(n)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.dropout(self.activated(self.norm(x) if self.norm_before else x)))
        if self.residual:
            y = x + self.dropout(y)
        return self.norm(y) if self.norm_after else y


class GatedWithResidual(Gated):
    residual = True


class GatedPre(Gated):
    residual = norm_before = True


class GatedPost(Gated):
    residual = norm_after = True


class GatedAfterNorm(Gated):
    """No residual."""

    norm_before = True


class UpFirst(GatedPre):
    def activated(self, n: Tensor) -> Tensor:
        return self.up(n) * F.silu(self.gate(n))


class TwoInputs(GatedPre):
    """Gate and up read different tensors."""

    def activated(self, n: Tensor) -> Tensor:
        return F.silu(self.gate(n)) * self.up(n + 1.0)


class BroadcastGate(GatedPre):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 1)


class WatchedGate(GatedPre):
    def forward(self, x: Tensor) -> Any:
        n = self.norm(x)
        gate = F.silu(self.gate(n))
        return x + self.down(gate * self.up(n)), gate


class WatchedNorm(GatedPre):
    """The normed rows have another reader: the norm stays, and the rest is one op."""

    def forward(self, x: Tensor) -> Any:
        n = self.norm(x)
        return x + self.down(self.activated(n)), n


class InPlace(Gated):
    """Writes the sum to the residual, which the caller sees."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(self.activated(x))
        return x


class InPlacePost(Post):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        residual += self.out(x)
        return self.first(residual)


class Broadcast(Post):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.first(self.out(x) + residual[..., :1])


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, 24, generator=generator), torch.randn(3, 7, 32, generator=generator)


def _model(make: Callable[[], nn.Module], **scheme: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dynquant.quantize_dynamic(model, **scheme)


def _compiled(model: nn.Module, backend: str = "eager") -> tuple[Callable[..., Any], list[str]]:
    """The compiled model and, once it ran, the ops in its graph."""
    names: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
        names.extend(name for t in targets for name in BLOCKS if t is getattr(_ops, name).default)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    torch._dynamo.reset()
    return torch.compile(model, backend="dynquant", fullgraph=True, options={"backend": keep}), names


def _operands(layer: Any) -> list[Tensor | None]:
    return [*layer._packed[:3], layer.bias]


def _expected(model: Any, x: Tensor, residual: Tensor) -> Tensor:
    """By the ops, as an EncoderLayer calls them."""
    up = model.up
    up.set_epilogue("gelu")
    configs = [model.out._packed[-1], 0, up._packed[-1], model.down._packed[-1]]
    norms = [[n.weight, getattr(n, "bias", None)] for n in (model.first, model.second)]
    kind = 0 if isinstance(model.first, nn.LayerNorm) else 1
    layers = [_operands(model.out), [], _operands(up), _operands(model.down)]
    if isinstance(model, Pre):
        h = residual + model.out(x)
        result = _ops.mlp(h, *layers[1:], configs[1:], h, norms[1], [], 1e-5, kind)
    else:
        result = _ops.linear_mlp(x, *layers, configs, residual, *norms, 1e-5, kind, False)
    up.set_epilogue("none")
    return result


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", [{}, {"rotation": "hadamard"}], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (Post, ["linear_mlp"]),
        (lambda: Post(nn.RMSNorm), ["linear_mlp"]),
        (Pre, ["linear_dynamic", "mlp"]),
    ],
    ids=["post", "post rms", "pre"],
)
def test_a_block_is_one_op(
    make: Callable[[], nn.Module], ops: list[str], scheme: dict[str, Any], backend: str
) -> None:
    model, inputs = _model(make, **scheme), _inputs()
    with torch.no_grad():
        expected = _expected(model, *inputs)
        compiled, names = _compiled(model, backend)
        assert_same_bits(compiled(*inputs), expected)
        assert names == ops
        torch.testing.assert_close(expected, model(*inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (Watched, ["linear_norm", "linear_dynamic", "linear_dynamic"]),
        (Broadcast, ["linear_dynamic"]),
        (lambda: Post(eps=1e-3), ["linear_norm", "mlp"]),
    ],
    ids=["other readers", "broadcast residual", "other eps"],
)
def test_other_blocks_stay_apart(make: Callable[[], nn.Module], ops: list[str]) -> None:
    model, inputs = _model(make), _inputs()
    with torch.no_grad():
        compiled, names = _compiled(model)
        got, expected = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        assert names == ops


def _expected_of_gated(model: Any, x: Tensor) -> Tensor:
    """By the op."""
    model.gate.set_epilogue("silu")
    layers = [model.gate, model.up, model.down]
    configs = [layer._packed[-1] for layer in layers]
    offset = getattr(model.norm, "offset", 0.0)
    norm = [model.norm.weight + offset if offset else model.norm.weight, getattr(model.norm, "bias", None)]
    kind = 0 if isinstance(model.norm, nn.LayerNorm) else 1
    before = norm if model.norm_before else []
    after = norm if model.norm_after else []
    residual = x if model.residual else None
    result = _ops.mlp(x, *map(_operands, layers), configs, residual, before, after, 1e-5, kind)
    model.gate.set_epilogue("none")
    return result


GATED: dict[str, Callable[[], Gated]] = {
    "alone": Gated,
    "residual": GatedWithResidual,
    "pre": GatedPre,
    "post": GatedPost,
    "pre, torch's rms": lambda: GatedPre(nn.RMSNorm),
    "pre, layer norm": lambda: GatedPre(nn.LayerNorm),
    "pre, 1 + weight": lambda: GatedPre(lambda size, eps: WrittenRMSNorm(size, eps, 1.0)),
    "post, layer norm": lambda: GatedPost(nn.LayerNorm),
    "norm without residual": GatedAfterNorm,
    "up first": UpFirst,
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", [{}, {"rotation": "hadamard"}], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", GATED)
def test_a_gated_mlp_is_one_op(name: str, scheme: dict[str, Any], backend: str) -> None:
    model, x = _model(GATED[name], **scheme), _inputs()[1]
    with torch.no_grad():
        expected = _expected_of_gated(model, x)
        compiled, names = _compiled(model, backend)
        assert_same_bits(compiled(x), expected)
        assert names == ["mlp"]
        torch.testing.assert_close(expected, model(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (TwoInputs, ["linear_dynamic"] * 3),
        (BroadcastGate, ["linear_dynamic"] * 3),
        (WatchedGate, ["linear_dynamic"] * 3),
        (WatchedNorm, ["mlp"]),
    ],
)
def test_other_gated_mlps_stay_apart(make: Callable[[], nn.Module], ops: list[str]) -> None:
    model, x = _model(make), _inputs()[1]
    with torch.no_grad():
        compiled, names = _compiled(model)
        torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
        assert names == ops


def test_layers_of_two_rotations_stay_apart() -> None:
    model: Any = _model(GatedPre, rotation="hadamard")
    model.up = dynquant.QLinear.from_float(model.up.to_float())
    x = _inputs()[1]
    with torch.no_grad():
        compiled, names = _compiled(model)
        torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
        assert names == ["linear_dynamic"] * 3


@pytest.mark.parametrize(("make", "ops"), [(InPlace, ["mlp"]), (InPlacePost, ["linear_dynamic"])])
def test_a_sum_in_place_writes_to_its_residual(make: Callable[[], nn.Module], ops: list[str]) -> None:
    model, inputs = _model(make), _inputs()
    inputs = inputs[1:] if make is InPlace else inputs
    with torch.no_grad():
        compiled, names = _compiled(model)
        written, expected = ([x.clone() for x in inputs] for _ in range(2))
        out = compiled(*written)
        torch.testing.assert_close(out, model(*expected), rtol=0.02, atol=0.02)
        torch.testing.assert_close(written[-1], expected[-1], rtol=0.02, atol=0.02)
        assert names == ops


def test_a_layer_of_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = dynquant.quantize_dynamic(transformers.LlamaModel(config).eval(), rotation="hadamard")
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        compiled, names = _compiled(model)
        got = compiled(ids).last_hidden_state
    assert names.count("mlp") == 2
    assert torch.cosine_similarity(got, expected, dim=-1).min() > 0.9999


@pytest.mark.parametrize("scheme", [{"activations": "per_tensor"}, {"static": True}], ids=str)
def test_other_schemes_stay_apart(scheme: dict[str, Any]) -> None:
    static = scheme.pop("static", False)
    model, inputs = _model(Post, **scheme), _inputs()
    if static:
        with dynquant.calibrate(model):
            model(*inputs)
        dynquant.freeze(model)
    with torch.no_grad():
        compiled, names = _compiled(model)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0.02, atol=0.02)
        assert not set(names) - {"linear_dynamic"}


def test_with_gradients_the_layers_stay_apart() -> None:
    model, inputs = _model(Post), _inputs()
    x = inputs[0].requires_grad_()
    compiled, names = _compiled(model, "aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, inputs[1]).sum(), x)
    assert grad.isfinite().all()
    assert set(names) == {"linear_dynamic"}


def test_other_dtypes_stay_apart() -> None:
    model, inputs = _model(Post).bfloat16(), tuple(x.bfloat16() for x in _inputs())
    with torch.no_grad():
        compiled, names = _compiled(model)
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0.1, atol=0.1)
        assert set(names) == {"linear_dynamic"}


def test_new_weights_take_effect() -> None:
    model, inputs = _model(Post), _inputs()
    with torch.no_grad():
        compiled, names = _compiled(model)
        compiled(*inputs)
        torch.manual_seed(1)
        model.load_state_dict(dynquant.quantize_dynamic(Post()).state_dict())
        assert_same_bits(compiled(*inputs), _expected(model, *inputs))
        assert "linear_mlp" in names
