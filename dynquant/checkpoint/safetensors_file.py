"""One safetensors file: written whole or not at all, and checked before any of its tensors is read.

Beside the tensors the file has an entry ``dynquant`` in its metadata, a JSON object:

=============== ========================================================================================
``version``     of this object: 1
``modules``     by the name of each quantized module, in which fields its scheme differs from the default
``fused``       names of the activations that layers have taken in
``merged``      groups of layers that read the same tensor
``encoder_layers`` names of the blocks: EncoderLayer, MLPBlock and EmbeddingBlock
``aliases``     by the key of a tensor that is another one, or an equal int8 weight: the key that is stored
``checksums``   by key, the CRC-32 of dtype, shape and bytes
=============== ========================================================================================

and an entry ``dynquant_checksum``, the CRC-32 of that text.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..extras import needs

VERSION = 1

_CONTENTS, _CHECKSUM = "dynquant", "dynquant_checksum"
_EXTRA = "safetensors"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes of tensors by the names that safetensors gives them."""

Path = str | os.PathLike[str]


def write(path: Path, tensors: Mapping[str, Tensor], contents: Mapping[str, Any]) -> None:
    """Write a file, which replaces an older one of that name once it is whole and on the disk.

    Args:
        tensors: dense ones on any device.
        contents: the first five rows of the table above, without ``version``.

    Raises:
        OSError: if it cannot be written. The older file is then as it was.
    """
    with needs("dynquant.save", extra=_EXTRA):
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    stored, aliases, checksums = _distinct(tensors)
    text = json.dumps({"version": VERSION, **contents, "aliases": aliases, "checksums": checksums})
    metadata = {"format": "pt", _CONTENTS: text, _CHECKSUM: str(zlib.crc32(text.encode()))}

    def fill(temporary: str) -> None:
        try:
            save_file(stored, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"dynquant.save: {os.fspath(path)} was not written: {error}") from None

    _replace_file(os.path.realpath(path), fill)


def _replace_file(path: str, fill: Callable[[str], None]) -> None:
    """Have ``fill`` write a file beside ``path``, and rename it once its bytes are on the disk."""
    folder, name = os.path.split(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    os.close(descriptor)
    try:
        fill(temporary)
        os.chmod(temporary, _mode(path))
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync(folder)


def _mode(path: str) -> int:
    """The permissions of the file at ``path``, or those of a new one."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, int]]:
    """The tensors without repetitions, the keys of what was repeated, and the checksums of the others.

    Repetitions are tensors that are the same memory, and equal int8 weights, which a state_dict copies.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    checksums: dict[str, int] = {}
    places: dict[Any, str] = {}
    storages: set[int] = set()
    weights: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        place = tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr()
        if tensor.numel() and place in places:
            aliases[key] = places[place]
            continue
        whole = tensor.detach().cpu().contiguous()
        checksum = _checksum(whole)
        equal = weights.setdefault(checksum, []) if whole.dtype == torch.int8 else []
        first = next((other for other in equal if _same_bytes(stored[other], whole)), None)
        if first is not None:
            aliases[key] = first
            continue
        storage = whole.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as those of a base and its view do.
        stored[key] = whole.clone() if storage in storages else whole
        checksums[key], places[place] = checksum, key
        storages.add(storage)
        equal.append(key)
    return stored, aliases, checksums


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor on the CPU, with its dtype and shape."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if not tensor.numel():
        return start
    size = tensor.numel() * tensor.element_size()
    return zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr()), start)


class SavedFile:
    """A file that :func:`write` made, open for reading. Its tensors are the file's pages, mapped into memory.

    Attributes:
        contents: the JSON object of the table above, checked for the types of its values.
        header: dtype and shape of every tensor by key, aliases included.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check all of it that is not a tensor.

        Raises:
            ValueError: that says what is wrong with the file.
            OSError: if it cannot be read.
        """
        with needs("dynquant.load", extra=_EXTRA):
            from safetensors import SafetensorError, safe_open
        self._error = SafetensorError
        name = os.fspath(path)
        with open(name, "rb"):  # an OSError with its own words, for a folder too
            pass
        try:
            self._file: Any = safe_open(name, framework="pt")
            metadata = self._file.metadata() or {}
            self._keys = frozenset(self._file.keys())
        except (SafetensorError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is not a whole safetensors file: {error}") from None
        self.contents = _read_contents(metadata)
        self.header: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key in self._keys:
            part = self._file.get_slice(key)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ValueError(f"{key}: no model has tensors of dtype {part.get_dtype()}")
            self.header[key] = dtype, tuple(part.get_shape())
        checksums, aliases = self.contents["checksums"], self.contents["aliases"]
        for key in sorted(self._keys ^ checksums.keys()):
            where = "its checksums do not name it" if key in self._keys else "the file does not hold it"
            raise ValueError(f"{key}: {where}")
        for key, first in aliases.items():
            if key in self._keys or first not in self._keys:
                raise ValueError(f"{key}: expected it to stand for a tensor of the file, got {first!r}")
            self.header[key] = self.header[first]

    def tensors(self, device_of: Callable[[str], torch.device | None]) -> dict[str, Tensor]:
        """Every tensor by key, after a comparison with its checksum.

        Args:
            device_of: where a tensor is to be, by its key; None: on the CPU.

        Raises:
            ValueError: that names a damaged tensor.
        """
        tensors = {}
        for key, checksum in self.contents["checksums"].items():
            try:
                tensor = self._file.get_tensor(key)
            except (self._error, RuntimeError) as error:
                raise ValueError(f"{key}: {error}") from None
            if _checksum(tensor) != checksum:
                raise ValueError(f"{key}: the file is damaged, its checksum is another")
            tensors[key] = _in_own_memory(tensor, device_of(key))
        for key, first in self.contents["aliases"].items():
            tensors[key] = tensors[first]
        return tensors


def _in_own_memory(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A copy, but of an int8 weight: packing it makes another tensor."""
    if device is not None:
        tensor = tensor.to(device)
    return tensor if tensor.dtype == torch.int8 else tensor.clone()


def _read_contents(metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(_CONTENTS)
    if text is None:
        raise ValueError(
            "expected a file of dynquant.save, got one whose metadata has no entry 'dynquant'; "
            "load_state_dict(safetensors.torch.load_file(path)) reads the state_dict of a converted model"
        )
    if metadata.get(_CHECKSUM) != str(zlib.crc32(text.encode())):
        raise ValueError("dynquant: the metadata of the file is damaged, its checksum is another")
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        contents = None
    version = contents.get("version") if isinstance(contents, dict) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"version: expected 1 to {VERSION}, got {version!r}; a newer dynquant may have written it"
        )
    for key, is_right, words in _KINDS:
        if not is_right(contents.get(key)):
            raise ValueError(f"{key}: expected {words} in the metadata of the file")
    return contents


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_dict_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(type(item) is kind for item in value.values())


_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("modules", _is_dict_of(dict), "the scheme of each module"),
    ("fused", _is_names, "a list of names"),
    ("merged", lambda value: isinstance(value, list) and all(map(_is_names, value)), "lists of names"),
    ("encoder_layers", _is_names, "a list of names"),
    ("aliases", _is_dict_of(str), "a key for each key"),
    ("checksums", _is_dict_of(int), "an integer for each key"),
)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block, a ValueError about a file says which file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"dynquant.load: {os.fspath(path)}: {error}") from error.__cause__
