"""Fusions of quantized layers: in modules by patterns, in torch.fx graphs, and for torch.compile."""
