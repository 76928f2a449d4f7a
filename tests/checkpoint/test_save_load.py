"""dynquant.save and dynquant.load: what comes back, which files are refused, what an error leaves behind."""

from __future__ import annotations

import copy
import gc
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import dynquant
from dynquant import QLinear, quantize_dynamic
from dynquant.checkpoint.safetensors_file import SavedFile, write
from tests.support.nets import assert_unchanged, state
from tests.support.same_bits import assert_same_bits

K, N = 32, 64
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8], [11, 7, 33, 21, 6, 6, 30]])


class Tied(nn.Module):
    """A module with two names, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.again = self.first
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(K, K, bias=False)
        self.second.weight = self.first.weight
        self.plain = nn.Parameter(torch.randn(K, K))
        self.plain_too = self.plain

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.again(self.first(x)))) @ self.plain @ self.plain_too


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K, bias=False), nn.LayerNorm(K))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(K, 2, N, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=K, intermediate_size=N, vocab_size=50, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.BertForMaskedLM(config)


def frozen(model: nn.Module) -> nn.Module:
    with dynquant.calibrate(model):
        run(model)
    return dynquant.freeze(model)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits if isinstance(model, transformers.PreTrainedModel) else model(X)


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "dynamic": (sequence, quantize_dynamic),
    "per_tensor": (
        sequence,
        lambda model: quantize_dynamic(model, activations="per_tensor", weights="per_tensor"),
    ),
    "rotated": (sequence, lambda model: quantize_dynamic(model, rotation="hadamard")),
    "block of 8": (sequence, lambda model: quantize_dynamic(model, rotation=8)),
    "static": (sequence, lambda model: frozen(quantize_dynamic(model))),
    "fused": (sequence, lambda model: quantize_dynamic(model, fuse=True)),
    "fused, static": (sequence, lambda model: frozen(quantize_dynamic(model, fuse=True))),
    "in part": (sequence, lambda model: quantize_dynamic(model, {"0"})),
    "bfloat16": (sequence, lambda model: quantize_dynamic(model.bfloat16()).float()),
    "tied": (Tied, quantize_dynamic),
    "the model itself": (lambda: nn.Linear(K, N), quantize_dynamic),
    "float": (sequence, lambda model: model),
    "encoder": (encoder, quantize_dynamic),
    "EncoderLayer": (encoder, lambda model: quantize_dynamic(model, fuse=True)),
    "bert": (bert, quantize_dynamic),
    "bert, merged": (bert, lambda model: quantize_dynamic(model, fuse=True)),
}
every_case = pytest.mark.parametrize("case", CASES)


def saved(case: str, path: Path) -> nn.Module:
    build, convert = CASES[case]
    model = convert(made(build)).eval()
    dynquant.save(model, path)
    return model


def assert_loaded(loaded: nn.Module, model: nn.Module) -> None:
    assert [str(module) for module in loaded.modules()] == [str(module) for module in model.modules()]
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert value.dtype == expected[key].dtype
        assert_same_bits(value, expected[key], key)
    assert_same_bits(run(loaded), run(model))


@every_case
@pytest.mark.parametrize("into", ["float", "converted", "meta"])
def test_what_was_saved_is_loaded(case: str, into: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = saved(case, path)
    build, convert = CASES[case]
    if into == "meta":
        with torch.device("meta"):
            target = build().eval()
        if case in ("tied", "bert", "bert, merged"):
            target = copy.deepcopy(target)  # a tie of parameters on meta is one too
    else:
        target = made(build, seed=2)
        if into == "converted":
            target = convert(target)
    if into == "meta" and case.startswith("bert"):
        # Buffers that the file does not hold, which transformers' from_pretrained fills.
        target.bert.embeddings.position_ids = torch.arange(512)[None]
        target.bert.embeddings.token_type_ids = torch.zeros(1, 512, dtype=torch.int64)
    loaded = dynquant.load(target, path)
    assert (loaded is target) == (case != "the model itself" or into == "converted")
    assert_loaded(loaded, model)
    gc.collect()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text(), "tensors are the file's memory"
    again = tmp_path / "again.safetensors"
    dynquant.save(loaded, again)
    assert load_file(again).keys() == load_file(path).keys()


def test_a_buffer_that_no_file_has_is_not_left_on_meta(tmp_path: Path) -> None:
    class WithBuffer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)
            self.register_buffer("places", torch.arange(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, self.places]

    path = tmp_path / "model.safetensors"
    dynquant.save(dynquant.quantize_dynamic(WithBuffer()), path)
    with torch.device("meta"):
        target = WithBuffer()
    with pytest.raises(ValueError, match="places: on meta in the model, and not in the file"):
        dynquant.load(target, path)
    assert type(target.layer) is torch.nn.Linear
    target.places = torch.arange(8)
    assert dynquant.load(target, path)(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize("case", ["per_tensor", "rotated", "static", "dynamic"])
@pytest.mark.parametrize("other", ["per_tensor", "rotated", "static", "dynamic"])
def test_the_scheme_is_the_file_s(case: str, other: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = saved(case, path)
    assert_loaded(dynquant.load(CASES[other][1](made(sequence, 2)).eval(), path), model)


def test_ties_are_stored_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved("tied", path)
    assert len([key for key in load_file(path) if key.endswith("weight") and "norm" not in key]) == 1
    for target in (made(Tied, 2), quantize_dynamic(made(Tied, 2))):
        loaded: Any = dynquant.load(target, path)
        assert loaded.again is loaded.first
        assert loaded.second.weight.packed_weight.data_ptr() == loaded.first.weight.packed_weight.data_ptr()
        assert loaded.plain_too is loaded.plain


def test_the_model_keeps_its_tensors_modes_and_hooks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved("dynamic", path)
    model = made(sequence, 2).double()
    model.train()
    model[1].eval()
    norm, gelu, calls = model[3].weight, model[1], []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    weights = dict(model[0].named_parameters())
    linear = model[0]
    dynquant.load(model, path)
    assert model[3].weight is norm
    assert norm.dtype == torch.float64
    assert model[1] is gelu
    assert [module.training for module in model] == [True, False, True, True]
    model(X.double())
    assert calls == [1]
    assert all(getattr(linear, name) is parameter for name, parameter in weights.items())
    biases = model[0].bias, model[0].bias.data_ptr()
    dynquant.load(model, path)
    assert (model[0].bias, model[0].bias.data_ptr()) == biases


def test_a_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = saved("dynamic", path)
    fresh = quantize_dynamic(made(sequence, 2))
    fresh.load_state_dict(load_file(path))
    assert_same_bits(run(fresh), run(model))


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = made(sequence)
    cases = {
        "complex": (torch.zeros(2, dtype=torch.complex64), r"0\.complex: .* got torch\.complex64"),
        "sparse": (torch.eye(2).to_sparse(), r"0\.sparse: .* torch\.sparse_coo"),
        "meta": (torch.empty(2, device="meta"), r"0\.meta: .* on meta"),
        "quantized": (
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            r"0\.quantized: .*qint8",
        ),
    }
    for name, (tensor, sentence) in cases.items():
        other = copy.deepcopy(model)
        other[0].register_buffer(name, tensor)
        with pytest.raises(ValueError, match=rf"^dynquant\.save: {sentence}"):
            dynquant.save(other, path)
    assert list(tmp_path.iterdir()) == []

    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ValueError, match=r"^dynquant\.save: _extra_state: .* a dict"):
        dynquant.save(Extra(2, 2), path)
    with pytest.raises(TypeError, match=r"dynquant\.save: expected an nn\.Module, got OrderedDict"):
        dynquant.save(model.state_dict(), path)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    sentence = r"dynquant\.save needs the package safetensors, .*pip install '\.\[safetensors\]'"
    with pytest.raises(dynquant.extras.MissingPackageError, match=sentence):
        dynquant.save(sequence(), tmp_path / "model.safetensors")


# ---- writing


def in_a_process(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys, torch, dynquant\nfrom torch import nn\npath = sys.argv[1]\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved("dynamic", path)
    before = path.read_bytes()
    done = in_a_process(
        """
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit fail, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            dynquant.save(nn.Linear(512, 512), path)
        except OSError as error:
            print(error)
        """,
        path,
    )
    assert done.stdout.startswith(f"dynquant.save: {path} was not written: "), done.stdout + done.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_is_killed_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved("dynamic", path)
    before = path.read_bytes()
    done = in_a_process(
        """
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        dynquant.save(nn.Linear(512, 512), path)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "model.safetensors", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        saved("dynamic", path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    link.symlink_to(path)
    model = saved("static", link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert_loaded(dynquant.load(made(sequence, 2), path), model)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dynquant.save(sequence(), tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="model"):
        dynquant.load(sequence(), tmp_path / "model.safetensors")
    with pytest.raises(IsADirectoryError):
        dynquant.load(sequence(), tmp_path)


# ---- files that do not fit


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """The file with other tensors or contents, and the right checksums of these."""
    file = SavedFile(path)
    tensors, contents = file.tensors(lambda key: None), file.contents
    change(tensors, contents)
    names = ("modules", "fused", "merged", "encoder_layers")
    write(path, tensors, {name: contents[name] for name in names})


def setter(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], Any], None]:
    return lambda tensors, _: tensors.update({key: value(tensors[key])})


def of_contents(**values: Any) -> Callable[[Any, dict[str, Any]], None]:
    return lambda _, contents: contents.update(values)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "NaN scale": (setter("0.weight_scale", lambda t: t * float("nan")), r"'0': .*weight_scale\[0\] = nan"),
    "negative scale": (setter("0.weight_scale", lambda t: -t), r"'0': expected weight_scale to be finite"),
    "scale of fp64": (setter("0.weight_scale", Tensor.double), r"'0': expected weight_scale to be float32"),
    "scale too short": (setter("0.weight_scale", lambda t: t[:5]), r"0\.weight_scale: expected shape \[64\]"),
    "NaN bias": (setter("0.bias", lambda t: t * float("nan")), r"'0': expected bias without NaN"),
    "float weight": (
        setter("0.weight", Tensor.float),
        r"0\.weight: expected torch\.int8, got torch\.float32",
    ),
    "weight of int16": (
        setter("0.weight", Tensor.short),
        r"0\.weight: expected torch\.int8, got torch\.int16",
    ),
    "weight without its last dimension": (
        setter("0.weight", lambda t: t[..., 0]),
        r"0\.weight: expected shape \[64, 32, 1\], got \[64, 32\]",
    ),
    "a newer format": (setter("0.format", lambda t: t + 7), r"'0': format .* is not one that this dynquant"),
    "an unknown config": (
        setter("0.format", lambda t: t + torch.tensor([0, 1 << 40, 0, 0])),
        r"'0': dynquant: config \d+ has bits",
    ),
    "another epilogue": (
        of_contents(modules={"0": {"epilogue": "relu"}, "2": {}}),
        r"'0': expected epilogue",
    ),
    "norm of integers": (setter("3.weight", Tensor.long), r"3\.weight: expected torch\.float32, got"),
    "norm of another shape": (
        setter("3.weight", lambda t: t[:3]),
        r"3\.weight: expected shape \[32\], got \[3\]",
    ),
    "no scale": (lambda t, c: t.pop("0.weight_scale"), r"0\.weight_scale: the file has no such entry"),
    "no norm": (lambda t, c: t.pop("3.weight"), r"3\.weight: the file has no such entry"),
    "no layer": (
        lambda t, c: [t.pop(key) for key in list(t) if key[0] == "2"],
        r"2\.weight: the file has no",
    ),
    "one more": (lambda t, c: t.update(other=torch.ones(2)), r"other: the model has no such entry"),
    "one more of a layer": (
        lambda t, c: t.update({"0.x": torch.ones(1)}),
        r"0\.x: the model has no such entry",
    ),
    "half of static": (
        lambda t, c: t.update({"0.activation_scale": torch.ones(1)}),
        r"'0': expected activation_scale and activation_zero_point together",
    ),
    "a module of another model": (of_contents(modules={"7": {}}), r"layer '7' is quantized in the file, but"),
    "a norm that is quantized": (
        of_contents(modules={"0": {}, "2": {}, "3": {}}),
        r"'3' .* it is a LayerNorm",
    ),
    "a layer less": (
        of_contents(modules={"0": {}}),
        r"2\.weight: expected|2\..*: the model has no such entry",
    ),
    "an unknown word": (of_contents(modules={"0": {"rows": 2}}), r"modules: layer '0': .*'rows'"),
    "an unknown scheme": (of_contents(modules={"0": {"weights": "odd"}}), r"modules: layer '0': .*got 'odd'"),
    "a list as scheme": (of_contents(modules={"0": {"weights": [1]}}), r"modules: layer '0': .*got \[1\]"),
    "modules as a list": (of_contents(modules=["0"]), r"modules: expected the scheme of each module"),
    "fused of another model": (of_contents(fused=["9.act"]), r"fused: '9\.act' .* it is missing"),
    "a norm as activation": (of_contents(fused=["3"]), r"fused: '3' .* it is a LayerNorm"),
    "merged norms": (of_contents(merged=[["0", "3"]]), r"merged: '3' is not a quantized layer"),
    "merged of numbers": (of_contents(merged=[[3]]), r"merged: expected lists of names"),
    "an EncoderLayer of another model": (
        of_contents(encoder_layers=["5"]),
        r"5: the model has no such layer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("into", ["float", "converted"])
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays(
    fault: str, into: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    saved("dynamic", path)
    change, sentence = FAULTS[fault]
    rewritten(path, change)
    model = made(sequence, 2)
    if into == "converted":
        model = quantize_dynamic(model)
        if fault == "a layer less":
            sentence = "layer '2' is quantized in the model, but not in the file"
        elif fault in ("a norm that is quantized", "another epilogue"):
            sentence = "'3' .* it is a LayerNorm|'0': expected epilogue"
    expected, before = run(model), state(model)
    with pytest.raises(
        ValueError, match=f"^dynquant\\.load: .*model\\.safetensors: .*({sentence})"
    ) as caught:
        dynquant.load(model, path)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert_same_bits(run(model), expected)


@pytest.mark.parametrize(
    "case", ["tied", "EncoderLayer", "bert, merged", "the model itself", "fused, static"]
)
@pytest.mark.parametrize("into", ["float", "converted"])
def test_models_of_every_kind_stay(case: str, into: str, tmp_path: Path) -> None:
    """The last entry of the file is at fault, after everything else was loaded."""
    path = tmp_path / "model.safetensors"
    saved(case, path)

    def spoil(tensors: dict[str, Tensor], _: Any) -> None:
        key = [key for key in tensors if key.endswith("weight_scale")][-1]
        tensors[key] = tensors[key] * float("inf")

    rewritten(path, spoil)
    build, convert = CASES[case]
    model = made(build, 2)
    if into == "converted":
        model = convert(model)
    expected, before = run(model), state(model)
    kinds = [type(module) for module in model.modules()]
    config = copy.deepcopy(vars(model.config)) if case.startswith("bert") else None
    with pytest.raises(ValueError, match=r"expected weight_scale to be finite and positive"):
        dynquant.load(model, path)
    assert_unchanged(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert config is None or str(config) == str(vars(model.config))
    assert_same_bits(run(model), expected)
    good = saved(case, path)
    assert_loaded(dynquant.load(model, path), good)


def test_a_file_of_other_software(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(quantize_dynamic(made(sequence)).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"expected a file of dynquant\.save, .* load_state_dict\(safetensors"
    ):
        dynquant.load(sequence(), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a whole safetensors file"):
        dynquant.load(sequence(), path)


def test_two_values_of_one_tensor(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))

    path = tmp_path / "model.safetensors"
    dynquant.save(Two(), path)
    model = Two()
    model.second = model.first
    with pytest.raises(ValueError, match=r"second: a tensor with several places .* several values"):
        dynquant.load(model, path)
    assert_same_bits(model.first.detach(), torch.ones(2))


def test_a_fused_model_and_a_file_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain = saved("dynamic", path)
    with pytest.raises(ValueError, match=r"layer '0' ends in 'none' in the file, in the model in 'gelu'"):
        dynquant.load(quantize_dynamic(made(sequence), fuse=True), path)
    fused = saved("fused", path)
    assert_loaded(dynquant.load(plain, path), fused)


def test_declared_sizes_take_no_memory(tmp_path: Path) -> None:
    """A file of 8 GB that occupies a few blocks of the disk."""
    path = tmp_path / "model.safetensors"
    saved("dynamic", path)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    header = path.read_bytes()[8 : 8 + header_size].decode()
    declared = 1 << 33
    end = max(int(part.partition("]")[0].split(",")[1]) for part in header.split('"data_offsets":[')[1:])
    entry = f'"2.other":{{"dtype":"I8","shape":[{declared}],"data_offsets":[{end},{end + declared}]}},'
    header = "{" + entry + header.strip()[1:]
    tail = path.read_bytes()[8 + header_size :]
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + tail)
    os.truncate(path, 8 + len(header) + end + declared)
    done = in_a_process(
        """
        import resource
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.LayerNorm(32))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            dynquant.load(model, path)
        except ValueError as error:
            print(error)
        assert type(model[0]) is nn.Linear
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
        """,
        path,
    )
    assert "2.other: its checksums do not name it" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"dynquant\.load: expected an nn\.Module, got str"):
        dynquant.load("model.safetensors", sequence())  # type: ignore[arg-type]
    assert QLinear.__module__ == "dynquant.nn.linear"
