"""The CPU kernels, timed by ``python -m dynquant bench``."""
