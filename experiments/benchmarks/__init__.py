"""Benchmarks of single parts and whole rounds; `mh-pfedhn bench` runs them."""
