"""LLaMA-Factory's keys of data and vocabulary as our sections."""

import os
from collections.abc import Mapping
from typing import Any

from jaxtune.config.llamafactory.keys import Keys, short
from jaxtune.config.llamafactory.names import DIFFERS, MEDIA_TEMPLATES, OTHER_TEMPLATES, TEMPLATES
from jaxtune.errors import UserError, nearest


def section(k: Keys, objective: str) -> dict[str, Any]:
    """Our data section."""
    names = k.names("dataset")
    if not names:
        also = "; a tokenized_path alone cannot be read" if "tokenized_path" in k else ""
        raise UserError(f"{k.place}: dataset is missing; name sets of dataset_info.json{also}")
    streaming = k.flag("streaming")
    data: dict[str, Any] = {}
    folder = k.text("dataset_dir", "data")
    if folder == "ONLINE":
        start = "hf://"
    elif folder.startswith("REMOTE:"):
        raise k.error("dataset_dir", "download it (`hf download --repo-type dataset …`) and give the folder")
    else:
        start, data["registry"] = "", os.path.abspath(k.path("dataset_dir", "data"))
    first = {"max_samples": k.whole("max_samples", 0)} if "max_samples" in k else {}
    data["train"] = [{"path": start + name, **first} for name in names]
    if "interleave_probs" in k:
        _weights(k, data["train"])
    if held := k.names("eval_dataset"):
        data["validation"] = [{"path": start + name, **first} for name in held]
    if size := k.number("val_size", 0):
        if held:
            raise k.error("val_size", "eval_dataset is given too; keep one")
        data["validation"] = size
    data["mix"] = _mix(k)
    if streaming:
        if k.whole("max_steps", -1) <= 0:
            raise k.error("streaming", "max_steps is missing; add it")
        data |= {"streaming": True, "shuffle_buffer": k.whole("buffer_size", 16384)}
    data["max_length"] = k.whole("cutoff_len", 2048)
    neat = k.flag("neat_packing")
    data["packing"] = k.flag("packing", objective == "pretrain" or neat) or neat
    if data["packing"] and not neat:
        k.note("packing", "examples that share a row never see each other here, as with neat_packing")
    elif objective == "pretrain":
        k.note("packing", "texts longer than cutoff_len go into pieces; there, they are cut")
    if objective == "pretrain":
        k.value("template")  # of conversations only
    else:
        data |= _conversations(k)
    if "preprocessing_num_workers" in k:
        k.whole("preprocessing_num_workers", 0)
        k.note("preprocessing_num_workers", "as many processes make tokens as are worth it; data.workers sets a number")
    if "tokenized_path" in k:
        k.value("tokenized_path")
        k.note(
            "tokenized_path", "tokens are kept by a hash of all that they depend on (data.cache), so this is not read"
        )
    return data


def _weights(k: Keys, sources: list[dict[str, Any]]) -> None:
    shares = k.value("interleave_probs")
    try:
        weights = [float(p) for p in (shares.split(",") if isinstance(shares, str) else shares)]
    except (TypeError, ValueError) as e:
        raise k.error("interleave_probs", "numbers with commas between them were expected") from e
    if len(weights) != len(sources):
        raise k.error("interleave_probs", f"{len(sources)} numbers were expected, one for each set of dataset")
    for source, weight in zip(sources, weights, strict=True):
        source["weight"] = weight


def _mix(k: Keys) -> str:
    mix = k.value("mix_strategy", "concat")
    if mix == "interleave_once":
        if "interleave_probs" in k:
            raise k.error("mix_strategy", "does not go with interleave_probs; take interleave_under or interleave_over")
        k.note("mix_strategy", "each row once, which shuffled is the same as concat")
        return "concat"
    allowed = ("concat", "interleave_under", "interleave_over")
    return k.one_of("mix_strategy", "concat", {m: m for m in allowed})


def _conversations(k: Keys) -> dict[str, Any]:
    data: dict[str, Any] = {"train_on_space": True}
    if k.flag("train_on_prompt") and k.flag("mask_history"):
        raise k.error("mask_history", "does not go with train_on_prompt; keep one")
    if k.flag("train_on_prompt"):
        data["train_on"] = "all"
    if k.flag("mask_history"):
        data["train_on"] = "last"
    data["template"], system = "auto", None
    if "template" in k:
        name = k.text("template", "")
        if name in TEMPLATES:
            data["template"], system = TEMPLATES[name]
            if name in DIFFERS:
                k.note("template", f"as its makers write it: {DIFFERS[name]}")
        elif name in OTHER_TEMPLATES:
            k.note("template", "the tokenizer's own chat template is taken, or without one what suits the data")
        elif name in MEDIA_TEMPLATES:
            raise k.error("template", "is of a model that sees or hears; models and data are text only")
        else:
            known = [*TEMPLATES, *OTHER_TEMPLATES, *MEDIA_TEMPLATES]
            raise k.error("template", f"is not known{short(nearest(name, known))}")
    if system := k.value("default_system", system):
        data["system"] = system
    if (thinking := _thinking(k, data)) != "auto":
        data["thinking"] = thinking
    return data


def _thinking(k: Keys, data: Mapping[str, Any]) -> str:
    """Reasoning, which there is an empty block of before each answer that has none; of templates that know it."""
    if data["template"] not in ("auto", "qwen3", "deepseek_r1"):
        return "auto"
    wanted, kept = k.value("enable_thinking", True), k.flag("preserve_thinking")
    if wanted not in (True, False, None):
        raise k.error("enable_thinking", "true, false or null was expected")
    if wanted is False:
        if kept:
            raise k.error("preserve_thinking", "does not go with enable_thinking=false; keep one")
        return "off"
    return "keep" if kept or (data["template"] == "qwen3" and data.get("train_on") != "last") else "auto"


def vocabulary(k: Keys, tuning: dict[str, Any]) -> dict[str, Any]:
    """Our vocabulary section, empty where no tokens are added; new ones train, for which `tuning` is changed."""
    add, special = k.names("add_tokens"), k.names("add_special_tokens")
    if not (k.flag("resize_vocab") or add or special):
        return {}
    if tuning["method"] == "lora" and "train" not in tuning:
        tuning["train"] = ["embeddings", "head"]
        k.notes.append("additional_target – is not set; embeddings and head train, for the new tokens' sake")
    return {"add": add, "special": special, "grow": True, "multiple": 64}
