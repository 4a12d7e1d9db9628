"""Faults put into the product on purpose: each must make a named fast test fail.

`make mutants` applies every one of `catalogue.MUTANTS` to a copy of the tree and runs the tests
that are said to catch it. `make mutants ARGS="WORD ..."` takes those whose file or promise holds
one of the words.
"""
