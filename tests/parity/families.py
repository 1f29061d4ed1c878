"""Tiny models of every family, made by transformers with random weights: what parity tests compare with."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import write_tiny

V = 300
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}

# name -> config class, and what the config has beside SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 7, "layer_types": ALTERNATING}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}),
    "qwen2": ("Qwen2", {}),
    "qwen2_windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {
        "head_dim": 8, "num_experts": 6, "moe_intermediate_size": 16, "norm_topk_prob": True, **MOE}),
    "qwen3_moe_raw": ("Qwen3Moe", {
        "head_dim": 8, "num_experts": 6, "moe_intermediate_size": 16, "norm_topk_prob": False, **MOE}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}),
    "gemma3": ("Gemma3Text", {
        "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "layer_types": ALTERNATING,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi4_mini": ("Phi3", {
        "tie_word_embeddings": True, "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.5, 6.0]}}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 6, "layer_types": ALTERNATING, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    "granite": ("Granite", {
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """A model with random weights, norms and biases among them."""
    kind, own = FAMILIES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")._from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 3 else 0.1))
    return model.to(dtype).eval()


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """The model, and its folder with a tokenizer."""
    model = make(name, dtype, **changes)
    write_tiny(folder)  # its tokenizer stays
    model.save_pretrained(folder)
    return model
