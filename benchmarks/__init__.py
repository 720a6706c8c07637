"""Benchmarks of the project against the floor and a peer: `python -m benchmarks SUITE`.

One file is one suite. A suite's module docstring says what it measures, and it has one function,
`rows(bench)`, which yields `harness.Row` values as they become known. `harness` has the rest.
"""
