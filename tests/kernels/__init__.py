"""The C++ and CUDA sources, without a card: emulated, compiled, disassembled."""
