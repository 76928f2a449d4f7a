"""benchmarks/ and the commands of python -m dynquant."""
