"""Decoder-only transformers in Flax Linen: stateless descriptions whose weights live outside of them."""
