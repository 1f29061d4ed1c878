"""Scores of predictions beside references, as the field computes them; numpy only, one theme a file."""
