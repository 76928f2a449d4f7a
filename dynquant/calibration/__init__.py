"""Static quantization: activation ranges from sample batches, and the layers that are frozen with them."""
