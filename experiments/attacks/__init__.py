"""Attacks that anybody can run: what a run gives away, and what participants that lie reach."""
