"""Fixtures for all tests.

pytest puts the repository root last on the path (``--import-mode=append`` in pyproject.toml): ``tests`` and
``benchmarks`` are importable, and an installed dynquant stays ahead of the checkout's.
"""

pytest_plugins = ["tests.support.isas", "tests.support.reporting"]
