"""What the families' config.json files share: sizes, norms, rotary embeddings, windows; both ways, both dialects.

transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`; both are read, and the former, which
both read, is written.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.errors import UserError, nearest
from jaxtune.layers import ROPE_KINDS, Rope
from jaxtune.models.decoder import DecoderConfig

Hf = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
QUANTISED = ("gptq", "compressed-tensors")  # see `hf.quantized`
# what no decoder here does: refused unless the value is one of these
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "clip_qkv": (None,),
    "router_jitter_noise": (None, 0, 0.0),
}


class Experts(NamedTuple):
    """Where a family keeps its mixture of experts: `block` in place of "mlp", and the matrices of one expert in it."""

    block: str
    gate: str
    up: str
    down: str


def common(hf: Hf, **defaults: Any) -> dict[str, Any]:
    """The fields of `DecoderConfig` that every family reads alike. `defaults` stand for keys that are not there.

    Raises:
      KeyError: a size is missing.
      UserError: a feature is not supported.
    """
    hf = {**defaults, **hf}
    for key, allowed in _REFUSED.items():
        if hf.get(key) not in allowed:
            raise UserError(f"{key}={hf[key]!r} is not supported")
    if (given := hf.get("quantization_config")) and given.get("quant_method") not in QUANTISED:
        raise UserError(f"quantization_config={given!r} is not supported; allowed quant_method: {', '.join(QUANTISED)}")
    act = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
    if act not in ACTS:
        raise UserError(f"hidden_act {act!r} is not supported; allowed: {', '.join(ACTS)}")
    heads, embed = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads, head = hf.get("num_key_value_heads") or heads, hf.get("head_dim") or embed // heads
    if heads % kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return {
        "family": hf["model_type"],
        "vocab": hf["vocab_size"],
        "embed": embed,
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "mlp": hf["intermediate_size"],
        "ropes": (rope_from_hf(hf, head),),
        "context": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "act": ACTS[act],
    }


def biases(hf: Hf) -> dict[str, Any]:
    """`attention_bias` and `mlp_bias`, as LLaMA means them."""
    attention = bool(hf.get("attention_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(hf.get("mlp_bias"))}


def layer_types(hf: Hf, otherwise: list[str]) -> list[str]:
    """`layer_types`, or what the family means where there are none.

    Raises:
      UserError: a type is unknown, or there are not as many as layers.
    """
    types = hf.get("layer_types") or otherwise
    if odd := sorted({*types} - {FULL, SLIDING}):
        raise UserError(f"layer_types: {', '.join(odd)} is not supported; allowed: {FULL}, {SLIDING}")
    if len(types) != hf["num_hidden_layers"]:
        raise UserError(f"layer_types: there are {len(types)} for {hf['num_hidden_layers']} layers")
    return types


def windows(hf: Hf, types: list[str]) -> tuple[int, ...]:
    """How many keys each layer sees; empty where all layers see all."""
    size = hf.get("sliding_window")
    if size is None or SLIDING not in types:
        return ()
    return tuple(size if t == SLIDING else 0 for t in types)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rope_from_hf(hf: Hf, head_dim: int, layer_type: str | None = None) -> Rope:
    """The rotary embedding of either dialect, of all layers or of those of a type.

    Raises:
      UserError: its kind is not supported, or it lacks what its kind needs.
    """
    if hf.get("rope_parameters") and hf.get("rope_scaling"):
        raise UserError("rope_parameters and rope_scaling are both there; keep the one that holds")
    p = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if layer_type is not None and layer_type in p:
        p = dict(p[layer_type] or {})
    elif FULL in p or SLIDING in p:
        p = dict(p.get(FULL) or {})
    kind = p.get("rope_type", p.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in ROPE_KINDS:
        raise UserError(f"rope_type {kind!r} is not supported{nearest(str(kind), list(ROPE_KINDS))}")
    part = p.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if part != 1.0 and hf.get("model_type") != "phi3":  # transformers heeds it for some kinds of rope only
        raise UserError(f"partial_rotary_factor={part} is not supported in this family")
    dim = int(head_dim * part)
    longest = hf.get("max_position_embeddings", 2048)
    original = hf.get("original_max_position_embeddings") or p.get("original_max_position_embeddings")
    if kind == "llama3" and original is None:
        raise UserError("rope_type 'llama3' needs original_max_position_embeddings")
    factor = p.get("factor") or (longest / original if original else 1.0)
    attention = 1.0
    if kind == "yarn":
        attention = _yarn_attention(p, factor)
    elif kind == "longrope":
        attention = p.get("attention_factor") or _longrope_attention(factor, original or longest)
        for key in ("short_factor", "long_factor"):
            if len(p.get(key) or ()) != dim // 2:
                raise UserError(f"rope_type 'longrope' needs {dim // 2} numbers in {key}, not {len(p.get(key) or ())}")
    return Rope(
        dim,
        theta=float(p.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        kind=kind,
        factor=factor if kind not in ("default", "longrope") else 1.0,
        context=longest if kind in ("default", "linear", "dynamic") else original or longest,
        low_freq_factor=p.get("low_freq_factor") or 1.0,
        high_freq_factor=p.get("high_freq_factor") or 4.0,
        beta_fast=p.get("beta_fast") or 32.0,
        beta_slow=p.get("beta_slow") or 1.0,
        attention_factor=attention,
        truncate=p.get("truncate", True),
        short_factor=tuple(p.get("short_factor") or ()) if kind == "longrope" else (),
        long_factor=tuple(p.get("long_factor") or ()) if kind == "longrope" else (),
    )


def _yarn_attention(p: Hf, factor: float) -> float:
    """YaRN's scaling of the logits, eq. 22, with DeepSeek's two optional factors."""
    if p.get("attention_factor") is not None:
        return p["attention_factor"]

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def _longrope_attention(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_to_hf(rope: Rope, head_dim: int) -> dict[str, Any]:
    """`rope_theta` and, where there is one, `rope_scaling`: the dialect that transformers 4 and 5 both read."""
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.dim != head_dim:
        out["partial_rotary_factor"] = rope.dim / head_dim
    if rope.kind == "default":
        return out
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "longrope":
        scaling["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.context
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.kind in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.attention_factor
    return {**out, "rope_scaling": scaling}


# --- back -------------------------------------------------------------------------------------------------------------


def to_hf(c: DecoderConfig, architecture: str, **own: Any) -> dict[str, Any]:
    """A config.json of the fields that all families have, and a family's `own`."""
    act = next(name for name, ours in ACTS.items() if ours == c.act)
    rope = next(r for r in c.ropes if r is not None)
    return {
        "architectures": [architecture],
        "model_type": c.family,
        "head_dim": c.head,
        "hidden_act": act,
        "hidden_size": c.embed,
        "initializer_range": 0.02,
        "intermediate_size": c.mlp,
        "max_position_embeddings": c.context,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "torch_dtype": "float32",
        "vocab_size": c.vocab,
        **rope_to_hf(rope, c.head),
        **own,
    }


def types_to_hf(c: DecoderConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window`, of a family that has them."""
    size = max(c.windows, default=0)
    types = [SLIDING if w else FULL for w in c.windows or (0,) * c.layers]
    return {"layer_types": types, "sliding_window": size or None}
