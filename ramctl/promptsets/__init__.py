"""Generators of the shipped prompt sets, one module per family of sets."""
