"""Attacks and faults, each as somebody would try it; small, bounded, on loopback alone."""
