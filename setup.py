"""Whether and how the extension is built; what never changes is in pyproject.toml.

DYNQUANT_BUILD=0 leaves the extension out; DYNQUANT_CUDA=1 compiles the CUDA part also under a torch without
CUDA, 0 never does; TORCH_CUDA_ARCH_LIST names its architectures; MAX_JOBS bounds the parallel compilations.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_backend.torch_location import builds_extension, runtime_requirement, stop

COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
DEPENDENCIES = [runtime_requirement(), "tqdm>=4.60"]

# sdist and metadata commands must work without torch, so only a command that compiles imports it.
if builds_extension() and not COMPILING.isdisjoint(sys.argv[1:]):
    if importlib.util.find_spec("torch") is None:
        stop("building the extension needs torch; install it first, or set DYNQUANT_BUILD=0.")
    from build_backend.extension import BuildWithCuda, extension

    setup(install_requires=DEPENDENCIES, ext_modules=[extension()], cmdclass={"build_ext": BuildWithCuda})
else:
    setup(install_requires=DEPENDENCIES)
