"""Benchmarks, run by hand: each prints ratios from one run, with the machine it ran on."""
