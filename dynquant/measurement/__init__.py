"""Measurements of a converted model on a sample: layers, times, thresholds, reports."""
