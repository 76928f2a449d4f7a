"""Vowel-like sounds as mel spectrograms, for a model that was trained on voices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 16_000
HOP = 160
WINDOW = 400
LEVEL = 10 ** (-30 / 20)
FORMANTS = ((300, 800, 1.0), (900, 2200, 0.6), (2300, 3200, 0.3))
"""Lowest and highest frequency in Hz, and the strength."""


def voices(batch: int, frames: int) -> Tensor:
    """Waves [batch, HOP * frames]: harmonics of a gliding pitch in moving formants, with pauses and noise."""
    return torch.stack([_voice(HOP * frames) for _ in range(batch)])


def _voice(samples: int) -> Tensor:
    time = torch.arange(samples) / RATE

    def swing(rate: float) -> Tensor:
        return torch.sin(2 * math.pi * torch.rand(1) * rate * time + 2 * math.pi * torch.rand(1))

    pitch = torch.empty(1).uniform_(90, 240) * (1 + 0.1 * swing(3))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
    formants = [
        (torch.empty(1).uniform_(lowest, highest) * (1 + 0.2 * swing(4)), strength)
        for lowest, highest, strength in FORMANTS
    ]
    wave = torch.zeros(samples)
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        gain = sum(strength / (1 + ((frequency - at) / 80) ** 2) for at, strength in formants)
        wave += gain / harmonic**0.5 * torch.sin(harmonic * phase) * (frequency < 7000)
    syllables = (torch.sin(2 * math.pi * (2 + 2 * torch.rand(1)) * time) > -0.4).float()
    wave *= F.avg_pool1d(syllables[None, None], 801, 1, 400)[0, 0]
    wave += 0.003 * torch.randn(samples)
    return wave * (LEVEL / wave.square().mean().sqrt())


def mel_power(waves: Tensor, bands: int) -> Tensor:
    """Power in mel bands (Slaney's scale and areas, as librosa's), [batch, frames, bands]."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True, pad_mode="constant")
    edges = _hertz(torch.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), bands + 2))
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, middle, high = (edges[i : bands + i, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    filters = torch.minimum(rising, falling).clamp(min=0) * (2 / (high - low))
    return (filters @ spectrum.abs().square()).transpose(1, 2)[:, : waves.shape[1] // HOP].contiguous()


def _hertz(mels: Tensor) -> Tensor:
    """Linear up to 1 kHz, which is 15 mels, and logarithmic above."""
    return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
