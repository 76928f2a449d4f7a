"""Times of dynquant beside its baselines and the machine's measured limits: ``cpu`` and ``gpu``."""
