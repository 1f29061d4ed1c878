import base64
import gzip
import json
import struct
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import blueprint, sharding
from jaxtune.config import Mesh
from jaxtune.errors import UserError
from jaxtune.hf import files, foreign, foreign_tokenizers, load, tokenizer
from jaxtune.tuning.method import Method, leave
from tests.tiny import write_tiny

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces\nand a line\t!",
    "naïve Ünïcödé – 日本語 🙂",
    "",
    " leading",
    "<s> is text",
]


def write(folder, f):
    """A foreign model as a Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    files.write_folder(folder, f.tensors)
    (folder / "config.json").write_text(json.dumps(f.config))
    for name, blob in f.side.items():
        (folder / name).write_bytes(blob)
    return folder


def equal(f, arrays):
    assert set(f.tensors) == set(arrays)
    for n, a in arrays.items():
        e = f.tensors[n]
        assert (e.shape, e.dtype) == (a.shape, a.dtype)
        assert e.data().tobytes() == a.tobytes(), n


def fits(folder):
    """Our own model takes the folder: its config and its tensors."""
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    return blueprint.draw(folder, lambda _: Method(leave, [("", "train")]), mesh, "float32")


def random_arrays(tmp_path, tied, dtype="float32"):
    """The tensors of a tiny model, all of them random, and its config."""
    folder = write_tiny(tmp_path / "reference", tied=tied)
    rng = np.random.default_rng(1)
    arrays = {n: rng.normal(size=t.shape).astype(dtype) for n, t in load.read_folder(folder).items()}
    return arrays, json.loads((folder / "config.json").read_text())


def interleaved(w, heads):
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


# --- llama2.c -------------------------------------------------------------------------------------------------------


def test_stories_are_the_reference_bit_by_bit(assets, tmp_path):
    reference = assets / "models/stories260K"
    f = foreign.open_llama2c(reference / "original/stories260K.bin")
    equal(f, {n: t.open() for n, t in load.read_folder(reference).items()})
    wanted = json.loads((reference / "config.json").read_text())
    assert {k: wanted.get(k) for k in f.config} == f.config | {"eos_token_id": 2}
    assert f.config["eos_token_id"] == json.loads((reference / "generation_config.json").read_text())["eos_token_id"]
    folder = write(tmp_path / "m", f)
    fits(folder)
    ours, theirs = tokenizer.load(folder), tokenizer.load(reference)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]).strip() == text.strip()


def llama2c_file(file, arrays, config, version, tied):
    c = {k: config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    c |= {"kv": config["num_key_value_heads"], "vocab": config["vocab_size"], "seq": config["max_position_embeddings"]}
    layer = {
        "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
        "att": "input_layernorm", "ffn": "post_attention_layernorm",
    }  # fmt: skip

    def block(name):
        if name in layer:
            own = [arrays[f"model.layers.{i}.{layer[name]}.weight"] for i in range(config["num_hidden_layers"])]
            heads = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}.get(name)
            return b"".join((interleaved(a, heads) if heads else a).tobytes() for a in own)
        if name == "rope":
            return np.full((c["seq"], config["head_dim"]), np.nan, np.float32).tobytes()
        top = {"tok": "model.embed_tokens", "norm": "model.norm", "wcls": "lm_head"}
        return arrays[f"{top[name]}.weight"].tobytes()

    if version == 0:
        head = struct.pack("<7i", *(c | {"vocab": c["vocab"] if tied else -c["vocab"]}).values())
        order = "tok att wq wk wv wo ffn w1 w2 w3 norm rope"
    else:
        head = (struct.pack("<Ii7iB", 0x616B3432, version, *c.values(), tied)).ljust(256, b"\0")
        order = "att ffn norm tok wq wk wv wo w1 w2 w3"
    file.write_bytes(head + b"".join(block(n) for n in order.split() + ([] if tied else ["wcls"])))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_both_versions_with_and_without_a_head(tmp_path, capsys, version, tied):
    arrays, config = random_arrays(tmp_path, tied)
    file = tmp_path / "model.bin"
    llama2c_file(file, arrays, config, version, tied)
    f = foreign.open_llama2c(file)
    equal(f, arrays)
    assert f.config == config | {"eos_token_id": [1, 2]}
    assert f.side == {}
    assert capsys.readouterr().err == f"warning: {file}: no tokenizer beside it, none is taken; name the model's own\n"
    fits(write(tmp_path / "m", f))


def test_llama2c_files_that_are_not_read(tmp_path):
    arrays, config = random_arrays(tmp_path, True)
    file = tmp_path / "model.bin"
    llama2c_file(file, arrays, config, 2, True)
    with pytest.raises(UserError, match=r"model.bin: llama2.c version 2 \(int8, quantised\) is not read; export"):
        foreign.open_llama2c(file)
    llama2c_file(file, arrays, config, 0, True)
    blob = file.read_bytes()
    for changed in (blob[:-4], blob + b"\0" * 4, blob[:100]):
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"has {len(changed)} bytes, its llama2.c header asks for {len(blob)}"):
            foreign.open_llama2c(file)
    for path in (tmp_path, tmp_path / "none.bin"):
        with pytest.raises(UserError, match="cannot be read"):
            foreign.open_llama2c(path)


@given(st.binary(max_size=64), st.sampled_from([b"", struct.pack("<Ii", 0x616B3432, 1), struct.pack("<i", 64) * 7]))
@settings(max_examples=50, deadline=None)
def test_any_other_file_is_a_user_error(tmp_path_factory, blob, start):
    file = tmp_path_factory.getbasetemp() / "any.bin"
    file.write_bytes(start + blob)
    with pytest.raises(UserError, match="any.bin"):
        foreign.open_llama2c(file)


def test_which_tokenizer_is_taken(assets, tmp_path, capsys):
    original = assets / "models/stories260K/original"
    file = tmp_path / "tok.bin"  # the model may be named like a tokenizer
    file.write_bytes((original / "stories260K.bin").read_bytes())
    own = (original / "tok512.bin").read_bytes()
    assert foreign.open_llama2c(file).side == {}
    (tmp_path / "tokenizer.model").write_bytes((assets / "models/stories260K/tokenizer.model").read_bytes())
    assert foreign.open_llama2c(file).side["tokenizer.model"] == (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.bin").write_bytes(own)
    assert set(foreign.open_llama2c(file).side) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tok512.bin").write_bytes(own)
    capsys.readouterr()
    assert foreign.open_llama2c(file).side == {}
    assert "several tokenizers (tok512.bin, tokenizer.bin)" in capsys.readouterr().err
    assert foreign.open_llama2c(file, tmp_path / "tok512.bin").side
    with pytest.raises(UserError, match="none.bin: cannot be read"):
        foreign.open_llama2c(file, tmp_path / "none.bin")


# --- Meta -----------------------------------------------------------------------------------------------------------

META = {  # name, and the axis that shards divide
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def meta_folder(folder, arrays, shards=1, embed_axis=1, change=lambda shards: None, **params):
    """A checkpoint of the tiny shape as Meta would have made it; `change` may damage the shards."""
    torch = pytest.importorskip("torch")
    out = [{} for _ in range(shards)]
    for name, a in arrays.items():
        if name.startswith("model.layers."):
            _, _, i, inner = name.removesuffix(".weight").split(".", 3)
            meta, axis = META[inner]
            meta = f"layers.{i}.{meta}"
        else:
            meta, axis = {
                "model.embed_tokens": ("tok_embeddings", embed_axis),
                "model.norm": ("norm", None),
                "lm_head": ("output", 0),
            }[name.removesuffix(".weight")]
        if heads := {"wq": 4, "wk": 2}.get(meta[-2:]):
            a = interleaved(a, heads)
        pieces = [a] * shards if axis is None else np.split(a, shards, axis)
        for shard, piece in zip(out, pieces, strict=True):
            piece = np.ascontiguousarray(piece)
            if piece.dtype.name == "bfloat16":
                shard[f"{meta}.weight"] = torch.from_numpy(piece.view(np.int16)).view(torch.bfloat16)
            else:
                shard[f"{meta}.weight"] = torch.from_numpy(piece)
    for shard in out:
        shard["rope.freqs"] = shard["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(4)
    change(out)
    folder.mkdir()
    for i, shard in enumerate(out):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    given = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 16, **params}
    (folder / "params.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize(("shards", "embed_axis"), [(1, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_become_one_model(tmp_path, capsys, shards, embed_axis, dtype):
    dtype = files.DTYPES[{"bfloat16": "BF16", "float32": "F32"}[dtype]]
    arrays, config = random_arrays(tmp_path, False, dtype)
    folder = meta_folder(tmp_path / "meta", arrays, shards, embed_axis, max_seq_len=128, vocab_size=-1)
    f = foreign.open_meta(folder)
    equal(f, arrays)
    assert f.config == config | {"torch_dtype": dtype.name}
    assert f"{folder}: has no tokenizer.model" in capsys.readouterr().err
    fits(write(tmp_path / "m", f))


def meta_forward(shards, ids):
    """What Meta's model computes of the tiny shape: neighbouring pairs as complex numbers, turned by the position."""
    import torch

    def w(name, axis=None):
        parts = [s[f"{name}.weight"] for s in shards]
        return parts[0] if axis is None else torch.cat(parts, axis)

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w(name)

    def rotate(x_TNH):
        angle = torch.outer(torch.arange(len(ids)).float(), 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
        pairs = torch.view_as_complex(x_TNH.unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(2)

    x = w("tok_embeddings", 1)[ids]
    for i in range(2):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = norm(x, f"layers.{i}.attention_norm")
        q, k, v = ((y @ w(f"{at}.{n}", 0).T).unflatten(-1, (-1, 8)) for n in ("wq", "wk", "wv"))
        q, k, v = rotate(q), rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        o = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        x = x + o.transpose(0, 1).flatten(1) @ w(f"{at}.wo", 1).T
        y = norm(x, f"layers.{i}.ffn_norm")
        gated = torch.nn.functional.silu(y @ w(f"{ff}.w1", 0).T) * (y @ w(f"{ff}.w3", 0).T)
        x = x + gated @ w(f"{ff}.w2", 1).T
    return norm(x, "norm") @ w("output", 0).T


def test_the_model_computes_what_metas_does(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    arrays, _ = random_arrays(tmp_path, False)
    arrays = {n: a / 5 if a.ndim == 2 else a for n, a in arrays.items()}
    folder = meta_folder(tmp_path / "meta", arrays, 2)
    model = transformers.LlamaForCausalLM.from_pretrained(write(tmp_path / "m", foreign.open_meta(folder)))
    ids = torch.arange(11) * 7
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
        theirs = meta_forward([torch.load(f) for f in sorted(folder.glob("*.pth"))], ids)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_that_equals_the_embedding_is_tied(tmp_path, shards):
    arrays, _ = random_arrays(tmp_path, False)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    f = foreign.open_meta(meta_folder(tmp_path / "meta", arrays, shards, embed_axis=0))
    tied = {n: a for n, a in arrays.items() if n != "lm_head.weight"}
    equal(f, tied)
    assert f.config["tie_word_embeddings"]
    fits(write(tmp_path / "m", f))
    f = foreign.open_meta(meta_folder(tmp_path / "without", tied, shards, embed_axis=0))
    equal(f, tied)
    assert f.config["tie_word_embeddings"]


def test_configs_of_the_generations(tmp_path):
    arrays, _ = random_arrays(tmp_path, False)
    two = foreign.open_meta(meta_folder(tmp_path / "2", arrays, n_kv_heads=2, vocab_size=300)).config
    assert (two["max_position_embeddings"], two["rope_theta"], two["eos_token_id"]) == (4096, 10000.0, 2)
    arrays = {n: np.zeros((128256, 32), a.dtype) if a.shape == (300, 32) else a for n, a in arrays.items()}
    arrays["lm_head.weight"][-1, -1] = 1
    three = foreign.open_meta(meta_folder(tmp_path / "3", arrays, rope_theta=500000.0, vocab_size=128256)).config
    assert (three["max_position_embeddings"], three["rope_theta"]) == (8192, 500000.0)
    assert (three["bos_token_id"], three["eos_token_id"]) == (128000, [128001, 128009])
    assert "rope_scaling" not in three
    folder = meta_folder(tmp_path / "3.2", arrays, rope_theta=500000.0, use_scaled_rope=True, vocab_size=128256)
    scaled = foreign.open_meta(folder)
    assert scaled.config["max_position_embeddings"] == 131072
    assert scaled.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not scaled.config["tie_word_embeddings"]  # they differ in the very last number
    fits(write(tmp_path / "m", scaled))


def drop(name):
    return lambda shards: shards[-1].pop(name)


def grow(name, axis=0):
    def change(shards):
        shards[-1][name] = shards[-1][name].repeat(*(2 if i == axis else 1 for i in range(shards[-1][name].ndim)))

    return change


def everywhere(change):
    return lambda shards: [change([s]) for s in shards]


def put(name, f):
    return lambda shards: shards[-1].update({name: f(shards[-1][name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("norm.weight"), r"consolidated.01.pth: lacks 'norm.weight', unlike consolidated.00.pth"),
        (everywhere(drop("norm.weight")), "missing: norm.weight"),
        (lambda s: s[1].update(x=s[1]["norm.weight"]), "01.pth: alone has 'x'"),
        (lambda s: [t.update(x=t["norm.weight"]) for t in s], "unexpected: x"),
        (
            grow("layers.1.attention.wk.weight"),
            r"'layers.1.attention.wk.weight' is .* in 2 shards, .* wants \[16, 32\]",
        ),
        (grow("layers.1.attention.wo.weight"), r"wo.weight' is .*\[32, 16\] \+ float32\[64, 16\] .* \[32, 32\]"),
        (grow("norm.weight"), "norm.weight' is"),
        (everywhere(put("output.weight", lambda t: t[0].clone())), "output.weight' has shape"),
        (everywhere(put("tok_embeddings.weight", lambda t: t[0].clone())), "tok_embeddings.weight' has shape"),
        (everywhere(put("tok_embeddings.weight", lambda t: t.sum().clone())), "tok_embeddings.weight' has shape"),
        (everywhere(put("layers.0.feed_forward.w1.weight", lambda t: t.sum())), r"w1.weight' has shape \[\]"),
        (put("norm.weight", lambda t: t + 1), "'norm.weight' differs between shards"),
        (put("output.weight", lambda t: t.double()), "float64 are not read"),
        (put("output.weight", lambda t: t.half()), "output.weight' is .*float16"),
        (everywhere(put("output.weight", lambda t: t.char())), "int8 are not read"),
    ],
)
def test_shards_that_do_not_fit(tmp_path, change, words):
    arrays, _ = random_arrays(tmp_path, False)
    folder = meta_folder(tmp_path / "meta", arrays, 2, change=change)
    with pytest.raises(UserError, match=words) as e:
        foreign.open_meta(folder)
    assert "\n" not in str(e.value)


def test_shards_that_are_missing(tmp_path):
    arrays, _ = random_arrays(tmp_path, False)
    folder = meta_folder(tmp_path / "meta", arrays, 2)
    first, second = sorted(folder.glob("*.pth"))
    second.rename(folder / "consolidated.02.pth")
    with pytest.raises(UserError, match="shard 1 is missing, found consolidated.02.pth"):
        foreign.open_meta(folder)
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(UserError, match="in 1 shards, .*are all the shards of one model there"):
        foreign.open_meta(folder)
    first.unlink()
    with pytest.raises(UserError, match="no consolidated"):
        foreign.open_meta(folder)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"moe": {"num_experts": 8}}, "'moe' is not supported: only dense text LLaMAs"),
        ({"moe_args": {}}, "'moe_args' is not supported"),
        ({"vision_chunk_size": 448}, "'vision_chunk_size' is not supported"),
        ({"quantization_args": {}}, "'quantization_args' is not supported"),
        ({"dim": "32"}, "dim should be a number, is '32'"),
        ({"dim": 32.5}, "impossible sizes: dim 32.5"),
        ({"n_heads": 5}, "impossible sizes"),
        ({"n_layers": None}, "impossible sizes: dim 32, n_layers 0"),
        ({"n_layers": 10**12}, "impossible sizes"),
        ({"n_layers": 3}, r"missing: layers.2.attention_norm.weight, .* and 4 more"),
        ({"n_layers": 1}, r"unexpected: layers.1"),
        ({"vocab_size": 301}, r"\[301, 32\]"),
        ({"max_seq_len": -1}, "impossible sizes"),
        ({"n_kv_heads": None}, r"wk.weight' is .* wants \[32, 32\]"),
    ],
)
def test_params_that_are_not_read(tmp_path, params, words):
    arrays, _ = random_arrays(tmp_path, False)
    with pytest.raises(UserError, match=words) as e:
        foreign.open_meta(meta_folder(tmp_path / "meta", arrays, **params))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "no mapping")])
def test_params_that_are_damaged(tmp_path, text, words):
    if text:
        (tmp_path / "params.json").write_text(text)
    with pytest.raises(UserError, match=f"params.json: .*{words}"):
        foreign.open_meta(tmp_path)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def goldens(assets, name):
    lines = (assets / "goldens/tokenization.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["tokenizer"] == name]


def save(folder, side):
    folder.mkdir(exist_ok=True)
    for name, blob in side.items():
        (folder / name).write_bytes(blob)
    return tokenizer.load(folder)


def test_tiktokens_ranks_become_the_known_tokenizer(assets, tmp_path):
    import tokenizers

    source = assets / "tokenizers/llama3"
    side = foreign_tokenizers.from_meta(source / "tokenizer.model", 128256, 8192)
    known = tokenizers.Tokenizer.from_str(gzip.decompress((source / "tokenizer.json.gz").read_bytes()).decode())
    raw = tokenizers.Tokenizer.from_str(side["tokenizer.json"].decode())
    assert raw.get_vocab() == known.get_vocab()
    assert json.loads(raw.to_str())["pre_tokenizer"] == json.loads(known.to_str())["pre_tokenizer"]
    specials = json.loads((source / "tiktoken_settings.json").read_text())["special_tokens"]
    assert {t.content: i for i, t in raw.get_added_tokens_decoder().items()} == specials
    ours = save(tmp_path / "t", side)
    cases = goldens(assets, "llama3")
    assert len(cases) > 20
    for e in cases:
        assert ours(e["text"], add_special_tokens=e["add_special"])["input_ids"] == e["ids"]
    for text in [*TEXTS, *(line[:400] for line in (assets / "SOURCES.md").read_text().splitlines())]:
        ids = ours(text)["input_ids"]
        assert ids == known.encode(text).ids
        assert ids[0] == 128000
        assert ours.decode(ids[1:]) == text


def ranks_file(file, tokens):
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return file


ALL_BYTES = [bytes([b]) for b in range(256)]


def test_the_special_tokens_that_llama_31_named(tmp_path):
    file = ranks_file(tmp_path / "tokenizer.model", [*ALL_BYTES, b"ab", b"abc"])
    three, scaled = (save(tmp_path / "t", foreign_tokenizers.from_meta(file, 514, 8192, s)) for s in (False, True))
    names = ["<|reserved_special_token_2|>", "<|reserved_special_token_4|>", "<|reserved_special_token_5|>"]
    assert three.convert_ids_to_tokens([258 + 4, 258 + 8, 258 + 10]) == names
    assert three.convert_ids_to_tokens(513) == "<|reserved_special_token_250|>"
    names = ["<|finetune_right_pad_id|>", "<|eom_id|>", "<|python_tag|>", "<|reserved_special_token_2|>"]
    assert scaled.convert_ids_to_tokens([258 + 4, 258 + 8, 258 + 10, 258 + 5]) == names
    assert scaled.convert_ids_to_tokens(513) == "<|reserved_special_token_247|>"
    assert scaled("abcb")["input_ids"] == [258, 257, ord("b")]


@given(st.lists(st.text("ab", min_size=2, max_size=5), max_size=12, unique=True), st.text("ab c", max_size=12))
@settings(max_examples=50, deadline=None)
def test_one_merge_a_token_joins_what_ranks_join(tmp_path_factory, words, text):
    """A word comes after those that it may be made of, as in a trained vocabulary; some can never be made of others."""
    import tokenizers

    tokens = [*ALL_BYTES, *(w.encode() for w in sorted(words, key=len))]
    file = ranks_file(tmp_path_factory.getbasetemp() / "ranks.model", tokens)
    t = tokenizers.Tokenizer.from_str(foreign_tokenizers.from_meta(file, 1000, 8)["tokenizer.json"].decode())
    ranks = {w: i for i, w in enumerate(tokens)}
    wanted = []
    for word, _ in t.pre_tokenizer.pre_tokenize_str(text):
        own = word.replace("Ġ", " ").encode()
        parts = [own] if own in ranks else [bytes([b]) for b in own]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        wanted += [ranks[p] for p in parts]
    assert t.encode(text, add_special_tokens=False).ids == wanted


def test_a_sentencepiece_model_is_copied(assets, tmp_path):
    import tokenizers

    file = assets / "tokenizers/llama2/tokenizer.model"
    side = foreign_tokenizers.from_meta(file, 32000, 4096)
    assert side["tokenizer.model"] == file.read_bytes()
    raw, ours = tokenizers.Tokenizer.from_str(side["tokenizer.json"].decode()), save(tmp_path / "t", side)
    cases = goldens(assets, "llama2")
    assert len(cases) > 20
    for e in cases:
        assert raw.encode(e["text"], add_special_tokens=e["add_special"]).ids == e["ids"]
        if not e["text"].startswith(" "):  # transformers 5 adds no space of its own to a leading one
            assert ours(e["text"], add_special_tokens=e["add_special"])["input_ids"] == e["ids"]
    with pytest.raises(UserError, match="has 32000 tokens, the model 512"):
        foreign_tokenizers.from_meta(file, 512, 4096)


def test_a_tokenizer_above_the_folder_is_found(assets, tmp_path):
    arrays, _ = random_arrays(tmp_path, False)
    arrays = {n: np.ones((512, 32), a.dtype) if a.shape == (300, 32) else a for n, a in arrays.items()}
    folder = meta_folder(tmp_path / "meta", arrays)
    model = (assets / "models/stories260K/tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert foreign.open_meta(folder).side["tokenizer.model"] == model


def test_llama2cs_tokenizer_is_the_sentencepiece_model_that_it_was_made_of(assets, tmp_path):
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto.FromString((assets / "tokenizers/llama2/tokenizer.model").read_bytes())
    blob = struct.pack("<i", max(len(p.piece.encode()) for p in model.pieces))
    for i, p in enumerate(model.pieces):
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, p.piece).replace("▁", " ").encode()
        blob += struct.pack("<fi", p.score, len(text)) + text
    (tmp_path / "tokenizer.bin").write_bytes(blob)
    side = foreign_tokenizers.from_llama2c(tmp_path / "tokenizer.bin", 32000, 4096)
    ours = pb.ModelProto.FromString(side["tokenizer.model"])
    assert [(p.piece, p.score, p.type) for p in ours.pieces] == [(p.piece, p.score, p.type) for p in model.pieces]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:-1], "no llama2.c tokenizer of the model's 512 tokens"),
        (lambda b: b + b"\0", "no llama2.c tokenizer"),
        (lambda b: b + struct.pack("<fi", 0, 1) + b"x", "no llama2.c tokenizer"),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "no llama2.c tokenizer"),
        (lambda b: b"", "no llama2.c tokenizer"),
        (lambda b: b.replace(b"<0x0A>", b"<0x0B>"), "token 13 is '<0x0B>', not '<0x0A>'"),
        (lambda b: b[:-3] + b"\xff\xff\xff", "token 511 is not UTF-8"),
    ],
)
def test_damaged_tokenizers_of_llama2c(assets, tmp_path, change, words):
    file = tmp_path / "tok512.bin"
    file.write_bytes(change((assets / "models/stories260K/original/tok512.bin").read_bytes()))
    with pytest.raises(UserError, match=f"tok512.bin: .*{words}"):
        foreign_tokenizers.from_llama2c(file, 512, 512)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"\xff\xfe damaged", "neither a sentencepiece model nor tiktoken"),
        (b"", "has 0 tokens"),
        (b"IQ== 0\nIg==\n", "a line is not"),
        (b"IQ== 0\nIg= 1\n", "a line is not"),
        (b"IQ== 0\nIg== 1\n", "ranks are not"),
        (b"IQ== 0\nIQ== 1\n", "ranks are not"),
    ],
)
def test_damaged_tokenizers_of_meta(tmp_path, blob, words):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(blob)
    with pytest.raises(UserError, match=f"tokenizer.model: .*{words}") as e:
        foreign_tokenizers.from_meta(file, 512, 512)
    assert "\n" not in str(e.value)
