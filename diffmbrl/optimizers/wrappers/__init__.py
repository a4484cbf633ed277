"""Solvers around solvers."""
