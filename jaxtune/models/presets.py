"""Published model sizes as minimal Hugging Face `config.json` contents, so that planning needs no weights.

`PRESETS` maps a name to the keys that determine the architecture, in the transformers 4 dialect in which the models
were published (`rope_theta`/`rope_scaling`, `torch_dtype`). Each follows the repository with that plain name: the base
checkpoint where there is one (Llama, Mistral, Mixtral, Qwen2.5, Gemma, OLMo, SmolLM2), else the post-trained one
(Llama 3.3, Ministral, Qwen3, Phi, SmolLM3; Granite is 3.3 instruct). DeepSeek-R1 distillations appear only where their
config differs from every other preset: Qwen 14B and 32B are `qwen2.5-14b` and `-32b`, Llama 8B and 70B are
`llama3.1-8b` and `llama3.3-70b`. Treat the dictionaries as read-only; copy before changing one.

`PARAMETERS` maps the same names to the exact number of parameters, tied embeddings counted once. Gemma 3 of 4B and
more are their language models alone, without the vision tower.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["PARAMETERS", "PRESETS"]

Config = dict[str, Any]

_PLAIN: Config = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None}
_GEGLU: Config = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def _config(
    model_type: str, embed: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int,
    *, positions: int, theta: float, eps: float = 1e-5, tied: bool = False, **more: Any,
) -> Config:  # fmt: skip
    """The keys that every family has, then the family's own."""
    return {
        "model_type": model_type, "vocab_size": vocab, "hidden_size": embed, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


def _llama(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any) -> Config:
    return _config("llama", embed, layers, heads, kv_heads, mlp, vocab, **(_PLAIN | {"mlp_bias": False} | more))


def _llama3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, factor: float, **more: Any) -> Config:
    """Llama 3.1 and later: Llama 3's 8192 positions stretched by frequency bands."""
    rope: Config = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more["rope_scaling"] = rope | {"original_max_position_embeddings": 8192}
    return _llama(embed, layers, heads, kv_heads, mlp, 128256, positions=131072, theta=500000.0, **more)


def _smollm2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, theta: float) -> Config:
    return _llama(embed, layers, heads, kv_heads, mlp, 49152, positions=8192, theta=theta, tied=True)


def _mistral(
    embed: int, layers: int, heads: int, mlp: int, vocab: int, positions: int, theta: float = 1e6, **more: Any
) -> Config:
    """Mistral (and, with `model_type`, Mixtral): eight key-value heads of 128 throughout."""
    more = {"hidden_act": "silu", "head_dim": 128, "sliding_window": None, "model_type": "mistral", **more}
    kind = more.pop("model_type")
    return _config(kind, embed, layers, heads, 8, mlp, vocab, positions=positions, theta=theta, **more)


def _mixtral(embed: int, layers: int, heads: int, mlp: int, vocab: int, positions: int) -> Config:
    more: Config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    return _mistral(embed, layers, heads, mlp, vocab, positions, **more)


def _qwen2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any) -> Config:
    """Qwen2.5: biases on the query, key and value projections come with the model type."""
    more = {"hidden_act": "silu", "use_sliding_window": False, "positions": 131072, "theta": 1e6, "eps": 1e-6, **more}
    return _config("qwen2", embed, layers, heads, kv_heads, mlp, vocab, **more)


def _qwen3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any) -> Config:
    more = _PLAIN | {"model_type": "qwen3", "head_dim": 128, "use_sliding_window": False, "vocab": 151936} | more
    kind = more.pop("model_type")
    return _config(kind, embed, layers, heads, kv_heads, mlp, positions=40960, theta=1e6, eps=1e-6, **more)


def _qwen3_moe(embed: int, layers: int, heads: int, mlp: int, expert_mlp: int) -> Config:
    more: Config = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    more |= {"moe_intermediate_size": expert_mlp, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return _qwen3(embed, layers, heads, 4, mlp, **more)


def _gemma(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Config:
    more: Config = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "head_dim": 256, "tied": True}
    return _config("gemma", embed, layers, heads, kv_heads, mlp, 256000, positions=8192, theta=1e4, eps=1e-6, **more)


def _gemma2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, head_dim: int, scale: int) -> Config:
    more = _GEGLU | {"head_dim": head_dim, "query_pre_attn_scalar": scale, "sliding_window": 4096, "tied": True}
    more |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _config("gemma2", embed, layers, heads, kv_heads, mlp, 256000, positions=8192, theta=1e4, eps=1e-6, **more)


def _gemma3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any) -> Config:
    """The language model: every sixth layer sees everything; 4B and more differ in vocabulary and lengths."""
    more = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window_pattern": 6, "tied": True, **more}
    more |= {"rope_local_base_freq": 10000.0, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    if layers < 30:
        more |= {"vocab": 262144, "positions": 32768, "sliding_window": 512, "rope_scaling": None}
    else:
        rope = {"rope_type": "linear", "factor": 8.0}
        more |= {"vocab": 262208, "positions": 131072, "sliding_window": 1024, "rope_scaling": rope}
    return _config("gemma3_text", embed, layers, heads, kv_heads, mlp, theta=1e6, eps=1e-6, **_GEGLU, **more)


def _phi3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any) -> Config:
    more = _PLAIN | {"positions": 4096, "original_max_position_embeddings": 4096, "theta": 1e4} | more
    return _config("phi3", embed, layers, heads, kv_heads, mlp, vocab, **more)


def _longrope(short: str, long: str) -> Config:
    """What a Phi of 128k positions adds."""
    rope: Config = {"type": "longrope", "short_factor": [float(number) for number in short.split()]}
    rope["long_factor"] = [float(number) for number in long.split()]
    return {"positions": 131072, "sliding_window": 262144, "rope_scaling": rope}


def _olmo2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any) -> Config:
    more = _PLAIN | {"model_type": "olmo2", "vocab": 100352, "positions": 4096} | more
    return _config(more.pop("model_type"), embed, layers, heads, kv_heads, mlp, theta=500000.0, eps=1e-6, **more)


def _olmo3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Config:
    """OLMo 3: every fourth layer sees everything, and only that one stretches its positions."""
    rope: Config = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    rope |= {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}
    more: Config = {"model_type": "olmo3", "vocab": 100278, "positions": 65536, "rope_scaling": rope}
    more |= {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4), "sliding_window": 4096}
    return _olmo2(embed, layers, heads, kv_heads, mlp, **more)


def _granite(embed: int, mlp: int, attention: float, logits: float) -> Config:
    """Granite 3.3: 40 layers of 32 heads, and four multipliers."""
    more = _PLAIN | {"mlp_bias": False, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tied": True}
    more |= {"attention_multiplier": attention, "logits_scaling": logits, "positions": 131072, "theta": 1e7}
    return _config("granite", embed, 40, 32, 8, mlp, 49159, **more)


def _smollm3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Config:
    """SmolLM3: every fourth layer goes without rotary positions (0 in `no_rope_layers`)."""
    more = _PLAIN | {"mlp_bias": False, "use_sliding_window": False, "sliding_window": None, "tied": True}
    more |= {"no_rope_layers": [1, 1, 1, 0] * (layers // 4), "no_rope_layer_interval": 4}
    return _config("smollm3", embed, layers, heads, kv_heads, mlp, 128256, positions=65536, theta=5e6, eps=1e-6, **more)


_PHI3_SHORT = (
    "1.1 1.1 1.1 1.3000000000000003 1.3500000000000003 1.3500000000000003 1.4000000000000004 1.5500000000000005"
    + " 2.000000000000001" * 17
    + " 2.0500000000000007" * 6
    + " 2.1000000000000005 2.1000000000000005 2.1500000000000004 2.25 2.25 2.25 2.25 2.25 2.3999999999999995"
    " 2.4499999999999993 2.499999999999999 2.6999999999999984 2.6999999999999984 2.7499999999999982"
    " 2.799999999999998 2.8999999999999977 3.049999999999997"
)
_PHI3_LONG = (
    "1.0700000524520874 1.1200000047683716 1.149999976158142 1.4199999570846558 1.5699999332427979 1.7999999523162842"
    " 2.129999876022339 2.129999876022339 3.009999990463257 5.910000324249268 6.950000286102295 9.070000648498535"
    " 9.930000305175781 10.710000038146973 11.130000114440918 14.609999656677246 15.409998893737793 19.809999465942383"
    " 37.279998779296875 38.279998779296875 38.599998474121094 40.12000274658203 46.20000457763672 50.940006256103516"
    " 53.66000747680664 54.9373893737793 56.89738845825195 57.28738784790039 59.98738479614258 60.86738586425781"
    " 60.887386322021484 61.71739196777344 62.91739273071289 62.957393646240234 63.41739273071289 63.8173942565918"
    " 63.83739471435547 63.897396087646484 63.93739700317383 64.06739807128906 64.11434936523438 64.12435150146484"
    " 64.15435028076172 64.19435119628906 64.24435424804688 64.57435607910156 64.69000244140625 64.76000213623047"
)
_PHI4_LONG = (
    "1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898 2.735880826"
    " 3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555 7.485043894"
    " 8.370679318 9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807"
    " 22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93 32.97 33.28"
    " 33.49 33.5 44.16 47.77"
)
_PHI4_MINI = {"partial_rotary_factor": 0.75} | _longrope(" 1.0" * 48, _PHI4_LONG)
_PHI4 = {"positions": 16384, "original_max_position_embeddings": 16384, "theta": 250000.0, "sliding_window": None}

# Name: (parameters, config).
_MODELS: dict[str, tuple[int, Config]] = {
    "llama2-7b": (6_738_415_616, _llama(4096, 32, 32, 32, 11008, 32000, positions=4096, theta=1e4)),
    "llama2-13b": (13_015_864_320, _llama(5120, 40, 40, 40, 13824, 32000, positions=4096, theta=1e4)),
    "llama2-70b": (68_976_648_192, _llama(8192, 80, 64, 8, 28672, 32000, positions=4096, theta=1e4)),
    "llama3-8b": (8_030_261_248, _llama(4096, 32, 32, 8, 14336, 128256, positions=8192, theta=500000.0)),
    "llama3.1-8b": (8_030_261_248, _llama3(4096, 32, 32, 8, 14336, 8.0)),
    "llama3.1-70b": (70_553_706_496, _llama3(8192, 80, 64, 8, 28672, 8.0)),
    "llama3.2-1b": (1_235_814_400, _llama3(2048, 16, 32, 8, 8192, 32.0, tied=True, head_dim=64)),
    "llama3.2-3b": (3_212_749_824, _llama3(3072, 28, 24, 8, 8192, 32.0, tied=True, head_dim=128)),
    "llama3.3-70b": (70_553_706_496, _llama3(8192, 80, 64, 8, 28672, 8.0)),
    "mistral-7b": (7_248_023_552, _mistral(4096, 32, 32, 14336, 32768, 32768)),
    "mistral-nemo-12b": (12_247_782_400, _mistral(5120, 40, 32, 14336, 131072, 128000)),
    "ministral-8b": (8_019_808_256, _mistral(4096, 36, 32, 12288, 131072, 32768, theta=1e8, sliding_window=32768)),
    "mixtral-8x7b": (46_702_792_704, _mixtral(4096, 32, 32, 14336, 32000, 32768)),
    "mixtral-8x22b": (140_620_634_112, _mixtral(6144, 56, 48, 16384, 32000, 65536)),
    "qwen2.5-0.5b": (494_032_768, _qwen2(896, 24, 14, 2, 4864, 151936, positions=32768, tied=True)),
    "qwen2.5-1.5b": (1_543_714_304, _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True)),
    "qwen2.5-3b": (3_085_938_688, _qwen2(2048, 36, 16, 2, 11008, 151936, positions=32768, tied=True)),
    "qwen2.5-7b": (7_615_616_512, _qwen2(3584, 28, 28, 4, 18944, 152064)),
    "qwen2.5-14b": (14_770_033_664, _qwen2(5120, 48, 40, 8, 13824, 152064, eps=1e-5)),
    "qwen2.5-32b": (32_763_876_352, _qwen2(5120, 64, 40, 8, 27648, 152064, eps=1e-5)),
    "qwen2.5-72b": (72_706_203_648, _qwen2(8192, 80, 64, 8, 29568, 152064, eps=1e-5)),
    "deepseek-r1-distill-qwen-1.5b": (1_777_088_000, _qwen2(1536, 28, 12, 2, 8960, 151936, theta=1e4)),
    "deepseek-r1-distill-qwen-7b": (7_615_616_512, _qwen2(3584, 28, 28, 4, 18944, 152064, theta=1e4)),
    "qwen3-0.6b": (596_049_920, _qwen3(1024, 28, 16, 8, 3072, tied=True)),
    "qwen3-1.7b": (1_720_574_976, _qwen3(2048, 28, 16, 8, 6144, tied=True)),
    "qwen3-4b": (4_022_468_096, _qwen3(2560, 36, 32, 8, 9728, tied=True)),
    "qwen3-8b": (8_190_735_360, _qwen3(4096, 36, 32, 8, 12288)),
    "qwen3-14b": (14_768_307_200, _qwen3(5120, 40, 40, 8, 17408)),
    "qwen3-32b": (32_762_123_264, _qwen3(5120, 64, 64, 8, 25600)),
    "qwen3-30b-a3b": (30_532_122_624, _qwen3_moe(2048, 48, 32, 6144, 768)),
    "qwen3-235b-a22b": (235_093_634_560, _qwen3_moe(4096, 94, 64, 12288, 1536)),
    "gemma-2b": (2_506_172_416, _gemma(2048, 18, 8, 1, 16384)),
    "gemma-7b": (8_537_680_896, _gemma(3072, 28, 16, 16, 24576)),
    "gemma2-2b": (2_614_341_888, _gemma2(2304, 26, 8, 4, 9216, 256, 256)),
    "gemma2-9b": (9_241_705_984, _gemma2(3584, 42, 16, 8, 14336, 256, 256)),
    "gemma2-27b": (27_227_128_320, _gemma2(4608, 46, 32, 16, 36864, 128, 144)),
    "gemma3-270m": (268_098_176, _gemma3(640, 18, 4, 1, 2048)),
    "gemma3-1b": (999_885_952, _gemma3(1152, 26, 4, 1, 6912)),
    "gemma3-4b": (3_880_263_168, _gemma3(2560, 34, 8, 4, 10240)),
    "gemma3-12b": (11_766_034_176, _gemma3(3840, 48, 16, 8, 15360)),
    "gemma3-27b": (27_009_346_304, _gemma3(5376, 62, 32, 16, 21504, head_dim=128, query_pre_attn_scalar=168)),
    "phi3-mini-4k": (3_821_079_552, _phi3(3072, 32, 32, 32, 8192, 32064, sliding_window=2047)),
    "phi3-mini-128k": (3_821_079_552, _phi3(3072, 32, 32, 32, 8192, 32064, **_longrope(_PHI3_SHORT, _PHI3_LONG))),
    "phi3-medium-4k": (13_960_238_080, _phi3(5120, 40, 40, 10, 17920, 32064, sliding_window=2047)),
    "phi4-mini": (3_836_021_760, _phi3(3072, 32, 24, 8, 8192, 200064, tied=True, **_PHI4_MINI)),
    "phi4-14b": (14_659_507_200, _phi3(5120, 40, 40, 10, 17920, 100352, **_PHI4)),
    "olmo2-1b": (1_484_916_736, _olmo2(2048, 16, 16, 16, 8192)),
    "olmo2-7b": (7_298_617_344, _olmo2(4096, 32, 32, 32, 11008)),
    "olmo2-13b": (13_716_198_400, _olmo2(5120, 40, 40, 40, 13824)),
    "olmo2-32b": (32_234_279_936, _olmo2(5120, 64, 40, 8, 27648)),
    "olmo3-7b": (7_298_011_136, _olmo3(4096, 32, 32, 32, 11008)),
    "olmo3-32b": (32_233_522_176, _olmo3(5120, 64, 40, 8, 27648)),
    "granite3-2b": (2_533_539_840, _granite(2048, 8192, 0.015625, 8.0)),
    "granite3-8b": (8_170_864_640, _granite(4096, 12800, 0.0078125, 16.0)),
    "smollm2-135m": (134_515_008, _smollm2(576, 30, 9, 3, 1536, 1e5)),
    "smollm2-360m": (361_821_120, _smollm2(960, 32, 15, 5, 2560, 1e5)),
    "smollm2-1.7b": (1_711_376_384, _smollm2(2048, 24, 32, 32, 8192, 1.3e5)),
    "smollm3-3b": (3_075_098_624, _smollm3(2048, 36, 16, 4, 11008)),
}

PRESETS: Mapping[str, Config] = {name: config for name, (_, config) in _MODELS.items()}
PARAMETERS: Mapping[str, int] = {name: count for name, (count, _) in _MODELS.items()}
