"""Configs of LLaMA-Factory: every key is translated, noted or refused."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import cli, config
from jaxtune.config import llamafactory
from jaxtune.config.llamafactory.names import (
    KNOWN,
    MEDIA_TEMPLATES,
    NOTED,
    OTHER_TEMPLATES,
    REFUSED,
    TEMPLATES,
    TRANSLATED,
)
from jaxtune.data import templates
from jaxtune.errors import UserError

GOLDENS = Path(__file__).parent.parent / "goldens" / "llamafactory" / "batches.json"
BASE = {"model_name_or_path": "m", "do_train": True, "dataset": "a,b", "output_dir": "out"}

LORA = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
# val_size: 0.1
"""


def translate(keys, folder=Path(), devices=1):
    return llamafactory.translate(keys, "their.yaml", folder, lambda: devices)


def sections(**keys):
    tree = translate({**BASE, **keys}).tree
    config.validate(tree, "their.yaml")
    return tree


def call(arguments):
    with pytest.raises(SystemExit) as e:
        cli.main(arguments)
    assert not e.value.code


def write(folder, text, name="their.yaml"):
    file = folder / name
    file.write_text(text)
    return file


def test_all_keys_of_theirs_are_known():
    assert set(json.loads(GOLDENS.read_text())["keys"]) <= KNOWN
    assert len(KNOWN) == len(TRANSLATED) + len(NOTED) + len(REFUSED)


def test_a_lora_run(tmp_path):
    c = config.load(write(tmp_path, LORA), devices=lambda: 4)
    assert c.model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert [(s.path, s.max_samples) for s in c.data.train] == [("identity", 1000), ("alpaca_en_demo", 1000)]
    assert (c.data.template, c.data.max_length, c.data.packing, c.data.workers) == ("llama3", 2048, False, None)
    assert (c.tuning.rank, c.tuning.alpha, c.tuning.targets) == (8, 16, "all-linear")
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.warmup) == (1e-4, "cosine", 0.1)
    assert (c.train.batch_size, c.train.accumulation, c.train.epochs, c.train.seed) == (32, 8, 3, 42)
    assert (c.train.log_every, c.checkpoint.every) == (10, 500)
    assert c.output == str(Path.cwd() / "saves/llama3-8b/lora/sft")


def test_defaults_are_theirs():
    c = config.validate(sections(), "x")
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.warmup) == (5e-5, "linear", 0)
    assert (c.train.epochs, c.train.batch_size, c.train.log_every, c.checkpoint.every) == (3, 8, 500, 500)
    assert (c.data.max_length, c.data.packing, c.data.template) == (2048, False, "auto")
    assert c.objective == "sft"


@pytest.mark.parametrize(
    ("keys", "section", "wanted"),
    [
        ({"finetuning_type": "full"}, "tuning", {"method": "full"}),
        ({"finetuning_type": "freeze"}, "tuning", {"method": "freeze", "last": 2, "train": []}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_extra_modules": "embed_tokens,norm"},
            "tuning",
            {"method": "freeze", "first": 3, "train": ["embeddings", "norms"]},
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -2, "freeze_trainable_modules": "mlp"},
            "tuning",
            {"method": "freeze", "train": ["^layers/(0|1)/mlp"]},
        ),
        ({"quantization_bit": 4, "lora_rank": 4}, "tuning", {"base": "nf4", "rank": 4, "alpha": 8}),
        ({"quantization_bit": 8}, "tuning", {"base": "int8"}),
        (
            {"lora_target": "q_proj,v_proj", "additional_target": "embed_tokens,lm_head", "lora_dropout": 0.1},
            "tuning",
            {"targets": ["(^|/)q_proj$", "(^|/)v_proj$"], "train": ["embeddings", "head"], "dropout": 0.1},
        ),
        ({"use_dora": True, "use_rslora": True}, "tuning", {"dora": True, "rslora": True}),
        ({"pissa_init": True, "loraplus_lr_ratio": 16}, "tuning", {"init": "pissa", "lora_plus": 16}),
        (
            {"finetuning_type": "full", "use_galore": True, "galore_rank": 32, "galore_target": "all"},
            "tuning",
            {"method": "galore", "rank": 32, "every": 200, "scale": 2.0, "targets": "all-linear"},
        ),
        ({"stage": "pt"}, "data", {"packing": True}),
        ({"neat_packing": True}, "data", {"packing": True}),
        ({"train_on_prompt": True}, "data", {"train_on": "all"}),
        ({"mask_history": True}, "data", {"train_on": "last"}),
        ({"val_size": 0.1}, "data", {"validation": 0.1}),
        ({"eval_dataset": "c", "max_samples": 5}, "data", {"validation": [{"path": "c", "max_samples": 5}]}),
        (
            {"mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"},
            "data",
            {"mix": "interleave_over", "train": [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]},
        ),
        ({"streaming": True, "max_steps": 9}, "data", {"streaming": True, "shuffle_buffer": 16384}),
        ({"dataset": ["x/y"], "dataset_dir": "ONLINE"}, "data", {"train": [{"path": "hf://x/y"}]}),
        ({"template": "smollm2", "default_system": "Be kind."}, "data", {"template": "chatml", "system": "Be kind."}),
        ({"template": "qwen3"}, "data", {"template": "qwen3", "thinking": "keep"}),
        ({"template": "qwen3", "enable_thinking": False}, "data", {"thinking": "off"}),
        ({"optim": "paged_adamw_8bit", "weight_decay": 0.1}, "optim", {"name": "adamw8bit", "weight_decay": 0.1}),
        ({"optim": "sgd"}, "optim", {"name": "sgd", "beta1": 0.0}),
        ({"use_muon": True, "max_grad_norm": 0}, "optim", {"name": "muon", "clip": 0}),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "optim", {"schedule": "constant", "warmup": 0}),
        ({"warmup_steps": 20, "warmup_ratio": 0.1}, "optim", {"warmup": 20}),
        ({"warmup_steps": "20", "weight_decay": "1e-2"}, "optim", {"warmup": 20, "weight_decay": 0.01}),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            "optim",
            {"schedule": "cosine", "final": 0.1},
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0}},
            "optim",
            {"schedule": "cosine", "final": 0},
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"},
             "learning_rate": "1e-5"},
            "optim",
            {"learning_rate": 1e-5, "final": pytest.approx(0.1)},
        ),
        ({"pure_bf16": True}, "train", {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}),
        ({"disable_gradient_checkpointing": True}, "train", {"remat": "none"}),
        ({"max_steps": 200, "logging_steps": 0.1}, "train", {"steps": 200, "log_every": 20}),
        ({"neftune_noise_alpha": 5, "moe_aux_loss_coef": 0.01}, "train", {"neftune": 5, "router_loss": 0.01}),
        (
            {"val_size": 9, "eval_strategy": "steps", "eval_steps": 50, "load_best_model_at_end": True,
             "metric_for_best_model": "eval_accuracy", "early_stopping_steps": 3},
            "evaluate",
            {"every": 50, "best": True, "metric": "accuracy", "patience": 3, "batch_size": 8},
        ),
        ({"val_size": 9, "eval_strategy": "epoch"}, "evaluate", {"every": 0}),
        ({"save_steps": 20, "save_total_limit": 1}, "checkpoint", {"every": 20, "keep": 1}),
        ({"save_strategy": "epoch"}, "checkpoint", {"every": 0}),
        ({"resume_from_checkpoint": False}, "checkpoint", {"resume": "never"}),
        ({"add_tokens": "<a>,<b>"}, "vocabulary", {"add": ["<a>", "<b>"], "special": [], "grow": True, "multiple": 64}),
        (
            {"report_to": "wandb,tensorboard", "run_name": "first", "project": "sums"},
            "track",
            {"to": ["wandb"], "project": "sums", "name": "first"},
        ),
        ({"report_to": ["mlflow"]}, "track", {"to": ["mlflow"]}),
        ({"resize_vocab": True}, "tuning", {"train": ["embeddings", "head"]}),
    ],
)  # fmt: skip
def test_keys_become_ours(keys, section, wanted):
    found = sections(**keys)[section]
    assert {k: found.get(k) for k in wanted} == wanted


FLOOR = {"lr_scheduler_type": "cosine_with_min_lr"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"stage": "ppo"}, "stage: ppo: training on preferences is not here"),
        ({"stage": "dpo"}, "sft on the preferred answers"),
        ({"finetuning_type": "oft"}, "lora is the nearest"),
        ({"use_badam": True}, "tuning.method=lisa"),
        ({"use_llama_pro": True}, "finetuning_type=freeze"),
        ({"rope_scaling": "yarn"}, "config.json"),
        ({"lora_rnak": 8}, "unknown key lora_rnak; did you mean 'lora_rank'?"),
        ({"tunning": {}}, "unknown key tunning; did you mean 'tuning'?"),
        ({"learning_rate": "fast"}, "learning_rate: fast: a number was expected"),
        ({"lora_rank": 1.5}, "a whole number was expected"),
        ({**FLOOR, "lr_scheduler_kwargs": {"min_lr": "low"}}, "min_lr should be a number, not below 0"),
        ({**FLOOR, "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}}, "one of min_lr and min_lr_rate"),
        ({**FLOOR, "lr_scheduler_kwargs": {"min_lr": 1e-6}, "learning_rate": 0}, "should be above 0"),
        ({"bf16": "yes"}, "true or false was expected"),
        ({"optim": "lomo"}, "allowed: adamw_hf"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "allowed: linear, cosine"),
        ({"quantization_bit": 3}, "take 4 or 8"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "goes with finetuning_type: lora, not full"),
        ({"use_galore": True}, "goes with finetuning_type: full, not lora"),
        ({"adapter_name_or_path": "x,y"}, "jaxtune merge m MERGED --adapter x --adapter y"),
        ({"streaming": True}, "max_steps is missing"),
        ({"template": "lama3"}, "is not known; did you mean 'llama3'?"),
        ({"template": "qwen2_vl"}, "text only"),
        ({"val_size": 0.1, "eval_dataset": "c"}, "keep one"),
        ({"interleave_probs": "1", "mix_strategy": "interleave_under"}, "2 numbers were expected"),
        ({"metric_for_best_model": "rouge-l", "load_best_model_at_end": True}, "allowed: loss, accuracy"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"do_train": False, "do_predict": True}, "jaxtune predict RUN FILE"),
        ({"adapter_name_or_path": "a", "export_dir": "to"}, "jaxtune merge m to --adapter a"),
        ({"export_dir": "to", "export_size": 2}, "jaxtune convert m to --shard-size 2"),
    ],
)
def test_what_is_not_here_is_an_error_with_a_remedy(keys, words):
    with pytest.raises(UserError) as e:
        translate({**BASE, **keys})
    assert words in str(e.value)
    assert str(e.value).startswith("their.yaml: ")


def test_a_config_for_inference_names_chat():
    with pytest.raises(UserError, match="jaxtune chat m --adapter a"):
        translate(
            {"model_name_or_path": "m", "adapter_name_or_path": "a", "template": "llama3", "infer_backend": "vllm"}
        )


# A value of each key that asks for something else than its default, beside what it needs to have a meaning.
MEANT = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "adapter_name_or_path": "x",
    "add_special_tokens": "<x>",
    "add_tokens": "<x>",
    "additional_target": "lm_head",
    "bf16": True,
    "buffer_size": (9, {"streaming": True, "max_steps": 2}),
    "create_new_adapter": (True, {"adapter_name_or_path": "x"}),
    "cutoff_len": 99,
    "data_seed": 1,
    "dataset": "z",
    "dataset_dir": "elsewhere",
    "default_system": "x",
    "disable_gradient_checkpointing": True,
    "do_train": True,
    "early_stopping_steps": 2,
    "enable_thinking": (False, {"template": "qwen3"}),
    "eval_dataset": "z",
    "eval_steps": 7,
    "eval_strategy": ("steps", {"val_size": 2}),
    "export_dir": "x",
    "finetuning_type": "full",
    "fp16": True,
    "freeze_extra_modules": ("norm", {"finetuning_type": "freeze"}),
    "freeze_trainable_layers": (1, {"finetuning_type": "freeze"}),
    "freeze_trainable_modules": ("mlp", {"finetuning_type": "freeze"}),
    **{
        k: (v, {"finetuning_type": "full", "use_galore": True})
        for k, v in {
            "galore_proj_type": "left",
            "galore_rank": 2,
            "galore_scale": 1.5,
            "galore_target": "q_proj",
            "galore_update_interval": 3,
        }.items()
    },
    "gradient_accumulation_steps": 3,
    "interleave_probs": ("1,2", {"mix_strategy": "interleave_under"}),
    "learning_rate": 1,
    "load_best_model_at_end": True,
    "logging_steps": 3,
    "logging_strategy": "epoch",
    "lora_alpha": 3,
    "lora_dropout": 0.5,
    "lora_rank": 3,
    "lora_target": "q_proj",
    "loraplus_lr_ratio": 4,
    "lr_scheduler_kwargs": ({"min_lr": 1e-6}, {"lr_scheduler_type": "cosine_with_min_lr"}),
    "lr_scheduler_type": "cosine",
    "mask_history": True,
    "max_grad_norm": 2,
    "max_samples": 3,
    "max_steps": 3,
    "metric_for_best_model": ("accuracy", {"load_best_model_at_end": True}),
    "mix_strategy": "interleave_once",
    "model_name_or_path": "other",
    "moe_aux_loss_coef": 0.1,
    "neat_packing": True,
    "neftune_noise_alpha": 5,
    "num_train_epochs": 2,
    "optim": "sgd",
    "output_dir": "z",
    "overwrite_output_dir": True,
    "packing": True,
    "per_device_eval_batch_size": (3, {"val_size": 2}),
    "per_device_train_batch_size": 3,
    "pissa_init": True,
    "preprocessing_num_workers": 3,
    "preserve_thinking": (True, {"template": "qwen3", "mask_history": True}),
    "project": ("x", {"report_to": "wandb"}),
    "pure_bf16": True,
    "quantization_bit": 4,
    "quantization_method": ("hqq", {"quantization_bit": 4}),
    "quantization_type": ("fp4", {"quantization_bit": 4}),
    "report_to": "wandb",
    "resize_vocab": True,
    "resume_from_checkpoint": "x",
    "run_name": ("x", {"report_to": "wandb"}),
    "save_steps": 3,
    "save_strategy": "no",
    "save_total_limit": 2,
    "seed": 3,
    "stage": "pt",
    "streaming": (True, {"max_steps": 2}),
    "template": "llama3",
    "tokenized_path": "x",
    "train_on_prompt": True,
    "use_dora": True,
    "use_galore": (True, {"finetuning_type": "full"}),
    "use_muon": True,
    "use_rslora": True,
    "val_size": 0.2,
    "warmup_ratio": 0.2,
    "warmup_steps": 3,
    "weight_decay": 0.2,
}


def outcome(keys):
    try:
        return translate(keys)
    except UserError as e:
        return str(e)


@pytest.mark.parametrize("key", sorted(TRANSLATED))
def test_no_translated_key_is_dropped(key):
    value, beside = MEANT[key] if isinstance(MEANT[key], tuple) else (MEANT[key], {})
    assert outcome({**BASE, **beside, key: value}) != outcome({k: v for k, v in {**BASE, **beside}.items() if k != key})


VALUES = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.lists(st.text(), max_size=2))


@given(st.sampled_from(sorted(KNOWN - TRANSLATED)), VALUES)
def test_other_keys_are_named(key, value):
    found = outcome({**BASE, key: value})
    if isinstance(found, str):
        assert key in found
    else:
        inert = key in REFUSED and value in REFUSED[key].inert
        assert inert or any(note.startswith(key) for note in found.notes)


@given(st.sampled_from(sorted(TRANSLATED)), VALUES)
def test_any_value_ends_in_a_config_or_an_error(key, value):
    found = outcome({**BASE, key: value})
    if not isinstance(found, str):
        try:
            config.validate(found.tree, "their.yaml")
        except UserError as e:
            assert "their.yaml" in str(e)


@pytest.mark.parametrize("key", ["hf_hub_token", "hub_token", "swanlab_api_key"])
def test_secrets_are_not_repeated(key):
    assert "s3cret" not in str(outcome({**BASE, key: "s3cret"}))


def test_our_templates_are_there():
    assert {ours for ours, _ in TEMPLATES.values()} <= templates.TEMPLATES.keys()
    every = [*TEMPLATES, *OTHER_TEMPLATES, *MEDIA_TEMPLATES]
    assert len(every) == len({*every})


def test_keys_without_effect_are_noted():
    notes = translate({**BASE, "finetuning_type": "full", "lora_rank": 8}).notes
    assert "lora_rank: 8 – has no effect beside the other keys" in notes


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("none", "report_to: none – TensorBoard events, metrics.jsonl and loss.png are always written"),
        ("all", "report_to: all – nothing is sent unless it is named"),
        ("swanlab", "report_to: swanlab – swanlab is not here; track.to takes wandb, trackio, mlflow"),
    ],
)
def test_nothing_is_reported_where_no_tracker_of_ours_is_named(value, said):
    t = translate({**BASE, "report_to": value, "run_name": "x"})
    assert "track" not in t.tree
    assert any(note.startswith(said) for note in t.notes)
    assert "run_name: x – has no effect beside the other keys" in t.notes


def test_values_over_a_file_are_theirs_or_ours(tmp_path):
    over = config.parse_overrides(["learning_rate=1e-5", "optim=sgd", "tuning.rank=3", "mesh.fsdp=2"])
    c = config.load(write(tmp_path, LORA), over)
    assert (c.optim.learning_rate, c.optim.name, c.tuning.rank, c.train.batch_size) == (1e-5, "sgd", 3, 16)
    c = config.load(write(tmp_path, LORA + "optim: sgd\n"), config.parse_overrides(["optim.beta1=0.5"]))
    assert (c.optim.name, c.optim.beta1) == ("sgd", 0.5)


def test_paths_start_here_or_at_the_file_or_above_it(tmp_path, monkeypatch):
    examples, here = tmp_path / "examples" / "lora", tmp_path / "here"
    for folder in (examples, here, tmp_path / "data"):
        folder.mkdir(parents=True)
    file = write(examples, LORA)
    monkeypatch.chdir(here)
    c = config.load(file)
    assert c.data.registry == str(tmp_path / "data")
    assert c.output == str(here / "saves/llama3-8b/lora/sft")
    (here / "data").mkdir()
    assert config.load(file).data.registry == str(here / "data")


def test_json_is_read(tmp_path):
    keys = json.dumps({**BASE, "lora_rank": 4}, indent="\t")
    assert config.load(write(tmp_path, keys, "their.json")).tuning.rank == 4
    with pytest.raises(UserError, match="key 'a' stands twice"):
        config.load(write(tmp_path, '{"a": 1, "a": 2}', "twice.json"))
    with pytest.raises(UserError, match="not JSON"):
        config.load(write(tmp_path, '{"a": ', "cut.json"))


def test_import_config_prints_what_reads_the_same(tmp_path, capsys):
    file = write(tmp_path, LORA)
    call(["import-config", str(file), "cutoff_len=64", "--devices=2"])
    printed = capsys.readouterr().out
    assert "# trust_remote_code: true – " in printed
    assert "model_name_or_path" not in yaml.safe_load(printed)
    ours = write(tmp_path, printed, "ours.yaml")
    assert config.load(ours) == config.load(file, {"cutoff_len": 64}, devices=lambda: 2)


def test_import_config_of_ours_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["import-config", str(write(tmp_path, "model: demo"))])
    assert "not of LLaMA-Factory" in capsys.readouterr().err


def test_their_config_trains(tiny, sums_file, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in sums_file.read_text().splitlines()]
    data = tmp_path / "data"
    data.mkdir()
    (data / "sums.json").write_text(json.dumps(rows))
    columns = {"prompt": "prompt", "response": "completion"}
    (data / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json", "columns": columns}}))
    keys = {
        "dataset": "sums",
        "template": "empty",
        "cutoff_len": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 9,
    }
    names = {
        "model_name_or_path": str(tiny),
        "output_dir": "saves/x",
        "do_train": True,
        "disable_gradient_checkpointing": True,
    }
    file = write(tmp_path, yaml.safe_dump({**keys, **names}))
    monkeypatch.chdir(tmp_path)
    call(["train", str(file), "max_steps=2", "logging_steps=1", "train.compute_dtype=float32", "data.workers=0"])
    said = capsys.readouterr().out
    assert "of LLaMA-Factory, translated" in said
    assert (tmp_path / "saves/x/export/adapter_config.json").exists()
    again = config.load(tmp_path / "saves/x/config.yaml")
    assert (again.train.steps, again.data.sources[0].path, again.data.registry) == (2, "sums", str(data))
