"""QLinear and QTensor, alone and with the rest of PyTorch."""
