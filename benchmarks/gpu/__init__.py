"""The CUDA kernels on a card: built, proven and measured by ``python benchmarks/gpu_suite.py --out DIR``.

A room for each thing: ``environment`` (what the machine has), ``build``, ``correctness`` (judged by
``bits``), ``sanitizer`` (over ``sanitized``), ``ceilings`` and ``kernels`` (timed by ``clock``, rivals in
``contenders`` and ``cublaslt``, kernels one by one through ``probe``), ``figures`` (targets), ``report`` and
``plot``. ``stages`` runs them as processes with time limits, ``worker`` is such a process.

A machine that has torch, setuptools and nvcc alone is enough: ``stand_ins`` take the place of what else
dynquant imports.
"""

from . import stand_ins

stand_ins.install()
