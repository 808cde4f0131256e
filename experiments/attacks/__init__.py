"""Attacks on a federation that anybody can run: what each reaches, measured."""
