"""Eager fusion and graph rewriting."""
