"""Observers, calibrate and freeze."""
