"""Float models to int8 models: quantize_dynamic."""
