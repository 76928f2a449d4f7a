"""File names of results."""

from __future__ import annotations

import re


def file_stem(words: str) -> str:
    """Lower case, everything but letters and digits as single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
