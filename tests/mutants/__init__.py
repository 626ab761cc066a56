"""Faults that a developer could make, one line each, and a campaign that asks whether the tests notice them.

`<room>.yaml` lists the faults of one package of `megamor`. `python -m tests.mutants` puts each into a copy of the tree
and runs the tests that must fail then (docs/testing.md).
"""
