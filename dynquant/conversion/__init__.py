"""From a float model to one with quantized modules: selection, conversion, replacement."""
