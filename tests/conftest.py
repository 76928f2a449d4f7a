"""Makes ``benchmarks`` importable, last on the path: an installed dynquant stays ahead of the checkout's."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

pytest_plugins = ["isas", "reporting"]
