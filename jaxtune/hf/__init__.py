"""Hugging Face folders, in and out: names and layouts, safetensors, adapters, tokenizers."""
