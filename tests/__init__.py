"""Tests of dynquant: one folder per subject, ``support`` for shared code."""
