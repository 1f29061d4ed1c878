"""A model made smaller: fewer weights that are not zero, fewer layers, heads and channels, fewer bits.

All here takes weights and gives weights; `jaxtune prune` and `jaxtune quantize` read a model, and write one.
"""
