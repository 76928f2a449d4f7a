"""dynquant beside its rivals and the machine's measured limits: ``python -m dynquant bench``."""
