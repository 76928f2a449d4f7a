"""The scheme of one quantized layer as a small value, and as the int that the ops carry.

Bits of the int, lowest first (``csrc/kernels/config.h`` is the same table in C++):

====  ====================================================================
0     activations: 0 per_token, 1 per_tensor
1     weights: 0 per_channel, 1 per_tensor
2-5   rotation: 0 none, else 1 + log2(block), block = 1, 2, 4 ... 128
6-8   epilogue: 0 none, else its position in ``patterns.activations.ACTIVATIONS``, 1 first
9-11  out dtype: 0 the input's, 1 float32, 2 bfloat16, 3 float16, 4 float64
12-16 the layer's K: 0 unknown, else 1 + K mod 16
17    rotation: 1 with signs
18    weights: 1 if they may hold -128
19    recurrent modules: 1 if the weight of the first layer's input is float; no op reads it
====  ====================================================================

K is for the ops alone: it is neither a part of the scheme nor in files. A packed weight gives K
only up to the next multiple of 4 (16 on CUDA): without it a traced layer would accept inputs of other
widths than its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .patterns.activations import ACTIVATIONS as ACTIVATION_FUNCTIONS

ACTIVATIONS = ("per_token", "per_tensor")
WEIGHTS = ("per_channel", "per_tensor")
EPILOGUES = ("none", *ACTIVATION_FUNCTIONS)
NORMS = ("layer_norm", "rms_norm")
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
OUT_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ROTATION_BLOCK = 128
AUTO_ROTATION = "auto"
K_MODULUS = 16
_K_SHIFT, _K_BITS = 12, 31
_SIGNS_SHIFT, _FULL_RANGE_SHIFT, _FLOAT_INPUT_SHIFT = 17, 18, 19
_FLAGS = 1 << _SIGNS_SHIFT | 1 << _FULL_RANGE_SHIFT | 1 << _FLOAT_INPUT_SHIFT
_KNOWN_BITS = (1 << _K_SHIFT) - 1 | _K_BITS << _K_SHIFT | _FLAGS


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> int:
    """Index of ``value`` in ``allowed``; for any other value a ValueError that lists these."""
    if value not in allowed:
        values = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"dynquant: expected {name} to be one of {values}, got {value!r}")
    return allowed.index(value)


def rotation_block(in_features: int, block: int | None = None) -> int:
    """Block size of the Hadamard rotation of a layer with ``in_features`` inputs.

    Args:
        block: a power of two up to 128 that divides ``in_features``; None takes the largest one.

    Raises:
        ValueError: for any other block.
    """
    largest = min(in_features & -in_features, MAX_ROTATION_BLOCK) if in_features else 1
    if block is None:
        return largest
    if block < 1 or block & (block - 1) or block > largest:
        raise ValueError(
            f"dynquant: expected the rotation block to be a power of two that divides in_features "
            f"({in_features}) and is at most {MAX_ROTATION_BLOCK}, got {block}"
        )
    return block


@dataclass(frozen=True)
class Config:
    """How one layer is quantized.

    Attributes:
        activations: ``"per_token"`` (qparams for each row of x) or ``"per_tensor"`` (for the whole of x).
        weights: ``"per_channel"`` (a scale for each output) or ``"per_tensor"`` (one scale).
        rotation_block: block size of the Hadamard rotation along K, 0 for no rotation.
        epilogue: the function applied after the bias: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"silu"``, ``"quick_gelu"``.
        out_dtype: dtype of the output; None for the input's.
        full_range: whether int8 weights may hold -128, as those that others quantized may; weights quantized
            here lie in [-127, 127].
        rotation_signs: whether the rotation multiplies elements by a fixed sequence of signs first, as all
            new layers do; False without a rotation, and in layers of files from before the signs.
        float_input: of a recurrent module, whether the weight of the first layer's input stays float, as the
            conversion decides by its width (:data:`dynquant.nn.recurrent.MAX_FLOAT_INPUT`).

    Raises:
        ValueError: for any other word, or a block that is not a power of two up to 128.
    """

    activations: str = "per_token"
    weights: str = "per_channel"
    rotation_block: int = 0
    epilogue: str = "none"
    out_dtype: torch.dtype | None = None
    full_range: bool = False
    rotation_signs: bool = True
    float_input: bool = False

    def __post_init__(self) -> None:
        one_of("activations", self.activations, ACTIVATIONS)
        one_of("weights", self.weights, WEIGHTS)
        one_of("epilogue", self.epilogue, EPILOGUES)
        one_of("out_dtype", self.out_dtype, OUT_DTYPES)
        one_of("full_range", self.full_range, (False, True))
        one_of("rotation_block", self.rotation_block, (0, 1, 2, 4, 8, 16, 32, 64, 128))
        one_of("rotation_signs", self.rotation_signs, (False, True))
        one_of("float_input", self.float_input, (False, True))
        if not self.rotation_block:
            object.__setattr__(self, "rotation_signs", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle, which lacks the fields that are younger than it."""
        vars(self).update({"rotation_signs": False, "float_input": False, **state})

    @property
    def rotation_text(self) -> str:
        """``", rotation=hadamard(128)"`` for the ``repr`` of a layer; empty without a rotation."""
        if not self.rotation_block:
            return ""
        signs = "" if self.rotation_signs else ", rotation_signs=False"
        return f", rotation=hadamard({self.rotation_block}){signs}"

    def encode(self, in_features: int | None = None) -> int:
        """The int that the ops take.

        Args:
            in_features: K of the layer, with which the ops then compare x; None in files, and if K is
                unknown.
        """
        return (
            ACTIVATIONS.index(self.activations)
            | WEIGHTS.index(self.weights) << 1
            | self.rotation_block.bit_length() << 2
            | EPILOGUES.index(self.epilogue) << 6
            | OUT_DTYPES.index(self.out_dtype) << 9
            | (0 if in_features is None else 1 + in_features % K_MODULUS) << _K_SHIFT
            | self.full_range << _FULL_RANGE_SHIFT
            | self.rotation_signs << _SIGNS_SHIFT
            | self.float_input << _FLOAT_INPUT_SHIFT
        )

    @staticmethod
    @cache
    def decode(code: int) -> Config:
        """The inverse of :meth:`encode`, without K.

        Raises:
            ValueError: for an int that no Config encodes to.
        """
        rotation, epilogue, out_dtype = code >> 2 & 15, code >> 6 & 7, code >> 9 & 7
        signs = code >> _SIGNS_SHIFT & 1
        known = code & ~_KNOWN_BITS == 0 and (code >> _K_SHIFT & _K_BITS) <= K_MODULUS and rotation <= 8
        known = known and signs <= rotation
        if not known or epilogue >= len(EPILOGUES) or out_dtype >= len(OUT_DTYPES):
            raise ValueError(f"dynquant: config {code} has bits that this version does not know")
        return Config(
            activations=ACTIVATIONS[code & 1],
            weights=WEIGHTS[code >> 1 & 1],
            rotation_block=1 << rotation >> 1,
            rotation_signs=bool(signs),
            epilogue=EPILOGUES[epilogue],
            out_dtype=OUT_DTYPES[out_dtype],
            full_range=bool(code >> _FULL_RANGE_SHIFT & 1),
            float_input=bool(code >> _FLOAT_INPUT_SHIFT & 1),
        )


def layer_config(
    in_features: int, activations: str, weights: str, rotation: str | int | None, epilogue: str = "none"
) -> Config:
    """The Config of a layer from the arguments of its constructor.

    Args:
        rotation: None, ``"hadamard"`` or a block size; the block becomes the largest power of two that
            divides ``in_features`` and is at most that size (128 for ``"hadamard"``).

    Raises:
        ValueError: for any other word or block size.
    """
    sizes = [1 << i for i in range(MAX_ROTATION_BLOCK.bit_length())]
    if rotation is None:
        block = 0
    elif rotation == "hadamard":
        block = rotation_block(in_features)
    elif type(rotation) is int and rotation in sizes:
        block = min(rotation, rotation_block(in_features))
    elif rotation == AUTO_ROTATION:
        raise ValueError(
            "dynquant: expected rotation to be None, 'hadamard' or a block size, got 'auto', which "
            "dynquant.quantize_dynamic alone takes: it chooses for each layer of a model"
        )
    else:
        raise ValueError(
            f"dynquant: expected rotation to be None, 'hadamard' or one of {sizes}, got {rotation!r}"
        )
    return Config(activations, weights, block, epilogue)


def recode(code: int, **fields: Any) -> int:
    """``code`` with some fields of its Config replaced and the same K."""
    return replace(Config.decode(code), **fields).encode() | code & _K_BITS << _K_SHIFT


def k_modulo_16(code: int) -> int | None:
    """K mod 16 of the layer that ``code`` belongs to; None if the code does not hold it."""
    one_more = code >> _K_SHIFT & _K_BITS
    return one_more - 1 if one_more else None
