"""Benchmarks: our attention beside torch's in one process, alternated, with the measured limit of the machine.

`attention` prefill, bound by arithmetic · `backward` its gradients, likewise · `decode` one query, bound by memory · `harness` how both are measured ·
`peers` other libraries, if installed · `plot` a report drawn.
"""
