"""Experiments: `python -m experiments NAME` measures one question and writes a figure and its numbers into results/."""
