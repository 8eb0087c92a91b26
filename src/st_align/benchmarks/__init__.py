"""Recipes that reproduce the protocol of the paper's tables and the comparisons it leaves out.

`table` holds what they all write, `cells` makes them resume, `audit` looks for leaks.
"""
