"""EmbeddingBlock: embedding stages as one op, against the float modules and their own parts."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant
from dynquant import quantize_dynamic
from dynquant.nn import block_call
from dynquant.nn.embedding_block import EmbeddingBlock
from dynquant.patterns import EmbeddingStage, registry
from dynquant.patterns.embedding_stages import EMBEDDING_STAGES
from dynquant.patterns.registry import patterns_of
from tests.support.same_bits import assert_same_bits

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="the patterns are of transformers 5"
)


@pytest.fixture(autouse=True)
def _ops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run as ops also on the reference."""
    monkeypatch.setattr(block_call, "runs_on", lambda op, device_type: hasattr(torch.ops.dynquant, op))


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
DISTILBERT = {"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128, "vocab_size": 50}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", {**SIZES, "embedding_size": 32}),
    "bert": ("Bert", SIZES),
    "camembert": ("Camembert", SIZES),
    "convbert": ("ConvBert", {**SIZES, "embedding_size": 64}),
    "data2vec": ("Data2VecText", SIZES),
    "distilbert": ("DistilBert", {**DISTILBERT, "max_position_embeddings": 40, "initializer_range": 0.3}),
    "electra": ("Electra", {**SIZES, "embedding_size": 32}),
    "ernie": ("Ernie", SIZES),
    "modernbert": ("ModernBert", {**SIZES, "pad_token_id": 1, "layer_types": ["full_attention"]}),
    "mpnet": ("MPNet", SIZES),
    "rembert": ("RemBert", {**SIZES, "input_embedding_size": 32}),
    "roberta": ("Roberta", SIZES),
    "roformer": ("RoFormer", SIZES),
    "splinter": ("Splinter", SIZES),
    "xlm_roberta": ("XLMRoberta", SIZES),
    "xmod": ("Xmod", {**SIZES, "languages": ["en_XX"], "default_language": "en_XX"}),
}


def made(name: str) -> Any:
    """The float embedding stage of a family, in eval mode."""
    prefix, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    model = getattr(transformers, f"{prefix}Model")(config).eval()
    (stage,) = (part for part in model.modules() if patterns_of(part, EmbeddingStage))
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return stage


def block_of(stage: nn.Module) -> Any:
    """A copy as an EmbeddingBlock."""
    block = copy.deepcopy(stage)
    assert EmbeddingBlock.adopt(block, patterns_of(stage, EmbeddingStage)[0])
    return block


IDS = torch.randint(2, 50, (3, 17), generator=torch.Generator().manual_seed(0))
IDS[1, 9:] = 1  # the padding of RoBERTa's vocabulary
NO_POSITIONS = ("modernbert", "roformer")
NO_TYPES = ("distilbert", "modernbert", "mpnet")


class Ops(TorchDispatchMode):
    """Counts the calls of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.dynquant.embedding_norm.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def as_op(block: Any, *args: Any, **kwargs: Any) -> Tensor:
    with Ops() as ops:
        out: Tensor = block(*args, **kwargs)
    assert ops.count == 1
    return out


@torch.no_grad()
def as_parts(block: Any, *args: Any, **kwargs: Any) -> Tensor:
    with Ops() as ops:
        out: Tensor = block(*args, **kwargs)
    assert ops.count == 0
    return out


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_that_of_the_float_module(name: str) -> None:
    stage = made(name)
    block = block_of(stage)
    calls: list[dict[str, Any]] = [{"input_ids": IDS}, {"input_ids": IDS[:1, :1]}, {"input_ids": IDS.int()}]
    if name not in NO_TYPES:
        calls.append({"input_ids": IDS, "token_type_ids": IDS % 2})
        calls.append({"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)})
    if name not in NO_POSITIONS:
        calls.append({"input_ids": IDS, "position_ids": torch.arange(17)[None] + 3})
        calls.append({"input_ids": IDS, "position_ids": (IDS * 7) % 40})
    if "cache_length" in inspect.signature(stage.forward).parameters:
        calls.append({"input_ids": IDS, "cache_length": 5})
    for arguments in calls:
        if arguments["input_ids"].dtype == torch.int32 and name in ("data2vec", "roberta"):
            continue
        with torch.no_grad():
            assert_near(as_op(block, **arguments), stage(**arguments))
    with torch.no_grad():
        assert_near(as_op(block, IDS), stage(IDS))


def test_every_pattern_is_of_a_type_of_transformers() -> None:
    for dotted, pattern in EMBEDDING_STAGES.items():
        module, _, name = dotted.rpartition(".")
        kind = getattr(__import__(module, fromlist=[name]), name)
        parameters = inspect.signature(kind.forward).parameters.values()
        names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD][1:]
        assert tuple(names) == pattern.arguments, dotted


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_int8_tables(name: str) -> None:
    stage = quantize_dynamic(made(name), embeddings=True)
    block = block_of(stage)
    with torch.no_grad():
        assert_near(as_op(block, IDS), stage(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    stage = made("bert").to(dtype)
    exact = copy.deepcopy(stage).float()
    out = as_op(block_of(stage), IDS)
    with torch.no_grad():
        expected = exact(IDS).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)


def test_fuse_makes_it_and_says_so() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    fused = quantize_dynamic(copy.deepcopy(model), fuse=True)
    assert isinstance(fused.embeddings, EmbeddingBlock)
    assert type(fused.embeddings).__name__ == "BertEmbeddings"
    assert isinstance(fused.embeddings, type(model.embeddings))
    assert "EmbeddingBlock[BertEmbeddings]" in repr(fused)
    assert fused.state_dict().keys() == quantize_dynamic(copy.deepcopy(model)).state_dict().keys()
    assert_near(as_op(fused.embeddings, IDS), as_parts(model.embeddings, IDS))
    assert fused.embeddings.why_parts() is None
    fused.embeddings.restore()
    assert type(fused.embeddings) is type(model.embeddings)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str) -> None:
    block = block_of(made("roberta"))
    expected = as_op(block, IDS)
    if way == "deepcopy":
        again = copy.deepcopy(block)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(block))
    else:
        file = io.BytesIO()
        torch.save(block, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_same_bits(as_op(again, IDS), expected)


@pytest.mark.parametrize("embeddings", [False, True])
def test_files(tmp_path: Path, embeddings: bool) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    fused = quantize_dynamic(copy.deepcopy(model), fuse=True, embeddings=embeddings)
    expected = as_op(fused.embeddings, IDS)
    dynquant.save(fused, tmp_path / "model.safetensors")
    loaded = dynquant.load(copy.deepcopy(model), tmp_path / "model.safetensors")
    assert isinstance(loaded.embeddings, EmbeddingBlock)
    assert_same_bits(as_op(loaded.embeddings, IDS), expected)
    fused.save_pretrained(tmp_path / "folder")
    loaded = transformers.BertModel.from_pretrained(tmp_path / "folder").eval()
    assert isinstance(loaded.embeddings, EmbeddingBlock)
    assert_same_bits(as_op(loaded.embeddings, IDS), expected)


# ---- calls that run the parts ----


def test_arguments_that_the_op_does_not_take() -> None:
    stage = made("bert")
    block = block_of(stage)
    rows = torch.randn(3, 17, 64)
    assert_same_bits(as_parts(block, inputs_embeds=rows), as_parts(stage, inputs_embeds=rows))
    with pytest.raises(TypeError):
        block(IDS, no_such_argument=1)
    with pytest.raises(RuntimeError, match=r"embedding_norm, table 0: expected indices in \[0, 50\), got 50"):
        as_op(block, torch.full((1, 3), 50))
    with pytest.raises(RuntimeError, match="embedding_norm, table 1: expected indices that broadcast to"):
        as_op(block, torch.ones(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("name", ["albert", "bert", "convbert", "roberta"])
def test_token_types_that_are_not_given_are_the_buffer_s(name: str) -> None:
    stage = made(name)
    block = block_of(stage)
    as_op(block, IDS)
    for module in (block, stage):
        module.token_type_ids.data.copy_(torch.arange(40) % 2)  # which leaves the version as it is
    offset = {"cache_length": 3} if name in ("bert", "roberta") else {}
    with torch.no_grad():
        for arguments in ({}, {"position_ids": IDS % 7}, offset):
            assert_near(as_op(block, IDS, **arguments), stage(IDS, **arguments))
        for module in (block, stage):
            module.position_ids = module.position_ids.flip(1)
        assert_near(as_op(block, IDS), stage(IDS))


def test_training_and_gradients() -> None:
    block = block_of(made("bert"))
    with Ops() as ops:
        block(IDS).sum().backward()
        assert block.word_embeddings.weight.grad is not None
        block.train()
        with torch.no_grad():
            block(IDS)
    assert ops.count == 0
    block.eval()
    block.requires_grad_(False)
    with Ops() as ops:
        block(IDS)
    assert ops.count == 1


def test_hooks_on_parts_run() -> None:
    block = block_of(made("bert"))
    seen: list[Any] = []
    handle = block.position_embeddings.register_forward_hook(lambda *args: seen.append(args))
    as_parts(block, IDS)
    assert len(seen) == 1
    handle.remove()
    as_op(block, IDS)


def set_token_types(block: Any) -> None:
    block.token_type_ids[:, 4:] = 1


def replace_table(block: Any) -> None:
    block.word_embeddings = nn.Embedding(50, 64).requires_grad_(False)


def new_parameter(block: Any) -> None:
    block.position_embeddings.weight = nn.Parameter(torch.randn(40, 64), requires_grad=False)


def in_place(block: Any) -> None:
    block.word_embeddings.weight.data += 1


def positions(block: Any) -> None:
    block.position_ids = block.position_ids.flip(1)


def positions_in_place(block: Any) -> None:
    block.position_ids = block.position_ids.clone()
    block.position_ids[:, :3] = 7


def other_norm(block: Any) -> None:
    block.LayerNorm.eps = 0.5


def token_types_through_data(block: Any) -> None:
    block.token_type_ids = block.token_type_ids.clone()
    block.token_type_ids.data[:, 2:9] = 1


def strided(block: Any) -> None:
    weight = block.word_embeddings.weight
    weight.data = weight.data.t().contiguous().t()


CHANGES: list[Callable[[Any], None]] = [
    replace_table,
    new_parameter,
    in_place,
    positions,
    positions_in_place,
    other_norm,
    set_token_types,
    token_types_through_data,
    strided,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_reach_the_op(change: Callable[[Any], None]) -> None:
    stage = made("bert")
    block = block_of(stage)
    as_op(block, IDS)
    torch.manual_seed(5)
    change(block)
    torch.manual_seed(5)
    change(stage)
    with torch.no_grad():
        check = as_parts if change is strided else as_op
        assert_near(check(block, IDS), stage(IDS))


def another_norm(block: Any) -> None:
    block.LayerNorm = nn.GroupNorm(1, 17)


def doubled(block: Any) -> None:
    block.double()


def with_max_norm(block: Any) -> None:
    block.word_embeddings.max_norm = 1.0


def own_forward(block: Any) -> None:
    forward = block.word_embeddings.forward
    block.word_embeddings.forward = lambda ids: 2 * forward(ids)


UNTAKEN: dict[Callable[[Any], None], str] = {
    another_norm: "LayerNorm is a GroupNorm",
    doubled: "its tables are of torch.float64",
    with_max_norm: "word_embeddings has a max_norm",
    own_forward: "word_embeddings.forward was replaced",
}


@pytest.mark.parametrize("change", UNTAKEN, ids=lambda change: change.__name__)
def test_changes_that_the_op_cannot_express(change: Callable[[Any], None]) -> None:
    stage = made("bert")
    block = block_of(stage)
    as_op(block, IDS)
    for module in (block, stage):
        change(module)
    assert block.why_parts() == UNTAKEN[change]
    assert_same_bits(as_parts(block, IDS), as_parts(stage, IDS))
    assert not EmbeddingBlock.adopt(stage, patterns_of(stage, EmbeddingStage)[0])


def test_a_module_with_a_part_of_no_role_stays_as_it_is() -> None:
    stage = made("bert")
    stage.extra = nn.Linear(3, 3)
    assert not EmbeddingBlock.adopt(stage, patterns_of(stage, EmbeddingStage)[0])


def test_conversions_in_place() -> None:
    block = block_of(made("bert"))
    as_op(block, IDS)
    block.bfloat16()
    assert as_op(block, IDS).dtype == torch.bfloat16
    block.float()
    assert as_op(block, IDS).dtype == torch.float32


def test_tracing_runs_the_parts() -> None:
    stage = made("bert")
    block = block_of(stage)
    with torch.no_grad():
        traced = torch.jit.trace(block, (IDS,))
        assert_same_bits(traced(IDS), stage(IDS))
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert_same_bits(compiled(IDS), stage(IDS))
        exported = torch.export.export(block, (IDS,))
        assert_same_bits(exported.module()(IDS), stage(IDS))


class Stage(nn.Module):
    """An embedding stage of a user."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.days = nn.Embedding(30, 24), nn.Embedding(7, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 24)

    def forward(self, items: Tensor, days: Tensor) -> Tensor:
        return self.norm(self.items(items) + self.days(days))


def test_a_registered_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PATTERNS", copy.copy(registry.PATTERNS))
    monkeypatch.setattr(registry, "REGISTERED", set(registry.REGISTERED))
    dynquant.register_pattern(
        Stage, EmbeddingStage(("items", "days"), ("items", "days"), "norm", ("items", "days"))
    )
    stage = Stage().eval()
    del stage.head
    block = block_of(stage)
    items, days = torch.randint(0, 30, (5, 8)), torch.randint(0, 7, (5, 1))
    with torch.no_grad():
        assert_near(as_op(block, items, days), stage(items, days))
        assert_near(as_op(block, items, days=days), stage(items, days))
