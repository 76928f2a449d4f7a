"""How dynquant is built: the PEP 517 hooks (pep517.py), where torch is (torch_location.py),
the extension module (extension.py), the CUDA objects (nvcc.py). No part of the installed package."""
