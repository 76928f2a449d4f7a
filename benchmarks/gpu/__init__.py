"""The CUDA kernels on a card: built, judged and timed by ``python benchmarks/gpu/suite.py``.

``suite`` starts each stage (``stage``) as a process with a time limit and collects the entries that it writes
(``results``). ``judge_kernels`` and ``time_kernels`` reach the kernels through ``probe``, a library without
torch that ``build`` links from probe.cu; ``judge_ops`` and ``time_layers`` need the extension; ``memcheck``
is the program for compute-sanitizer. ``report`` makes Markdown and a picture of the results, on any machine.
"""
