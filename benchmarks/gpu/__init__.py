"""The CUDA kernels on a card: built, judged and timed by ``python benchmarks/gpu/suite.py``.

``suite`` starts processes of ``stage``, each with a time limit, and collects the entries that they write
(``results``). ``judge_kernels`` and ``time_kernels`` reach the kernels through ``probe``, a library without
torch that ``build`` links from probe.cu; ``judge_ops`` and ``time_layers`` need the extension; ``memcheck``
is what compute-sanitizer runs. ``report`` makes Markdown and a picture of the results, on any machine.
"""
