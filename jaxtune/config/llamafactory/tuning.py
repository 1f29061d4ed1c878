"""LLaMA-Factory's keys of a tuning method as our section."""

from collections.abc import Sequence
from typing import Any

from jaxtune.config.llamafactory.keys import Keys, line

_MODULES = {"embed_tokens": "embeddings", "lm_head": "head", "norm": "norms"}


def section(k: Keys) -> dict[str, Any]:
    """Our tuning section."""
    kind = k.value("finetuning_type", "lora")
    if kind == "oft":
        raise k.error("finetuning_type", "is not here; lora is the nearest")
    k.one_of("finetuning_type", "lora", {m: m for m in ("lora", "freeze", "full")})
    if kind != "lora":
        for key in (
            "quantization_bit",
            "adapter_name_or_path",
            "use_dora",
            "use_rslora",
            "pissa_init",
            "loraplus_lr_ratio",
        ):
            if k.given.get(key):
                raise k.error(key, f"goes with finetuning_type: lora, not {kind}; leave one of them out")
    if k.flag("use_galore"):
        if kind != "full":
            raise k.error("use_galore", f"goes with finetuning_type: full, not {kind}")
        return _galore(k)
    if kind == "full":
        return {"method": "full"}
    return _freeze(k) if kind == "freeze" else _lora(k)


def _galore(k: Keys) -> dict[str, Any]:
    k.one_of("galore_proj_type", "std", {"std": "std"})
    return {
        "method": "galore",
        "rank": k.whole("galore_rank", 16),
        "every": k.whole("galore_update_interval", 200),
        "scale": k.number("galore_scale", 2.0),
        "targets": _targets(k.names("galore_target") or ["all"]),
    }


def _freeze(k: Keys) -> dict[str, Any]:
    n = k.whole("freeze_trainable_layers", 2)
    modules = k.names("freeze_trainable_modules") or ["all"]
    train = [_MODULES.get(m, m) for m in k.names("freeze_extra_modules")]
    if modules == ["all"]:
        return {"method": "freeze", "last" if n > 0 else "first": abs(n), "train": train}
    if n > 0:
        raise k.error(
            "freeze_trainable_modules",
            "of the last layers is not here; train them whole, or write tuning: {method: freeze, train: [regexes on "
            "names]} as in layers/(30|31)/mlp",
        )
    layers = "|".join(str(i) for i in range(-n))
    return {"method": "freeze", "train": [*(f"^layers/({layers})/{m}" for m in modules), *train]}


def _lora(k: Keys) -> dict[str, Any]:
    rank = k.whole("lora_rank", 8)
    tuning: dict[str, Any] = {
        "method": "lora",
        "rank": rank,
        "alpha": k.number("lora_alpha", 0) or 2 * rank,
        "dropout": k.number("lora_dropout", 0.0),
        "targets": _targets(k.names("lora_target") or ["all"]),
    }
    if extra := k.names("additional_target"):
        tuning["train"] = [_MODULES.get(m, f"(^|/){m.replace('.', '/')}/") for m in extra]
    for theirs, ours in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if k.flag(theirs):
            tuning[ours] = True
    if k.flag("pissa_init"):
        tuning["init"] = "pissa"
    if "loraplus_lr_ratio" in k:
        tuning["lora_plus"] = k.number("loraplus_lr_ratio", 1.0)
    if "quantization_bit" in k:
        k.one_of("quantization_method", "bnb", {"bnb": "bnb"}, "; it is the kind of scales that differs")
        bits = k.whole("quantization_bit", 4)
        if bits not in (4, 8):
            raise k.error("quantization_bit", "is not here; take 4 or 8")
        if bits == 4:
            k.one_of("quantization_type", "nf4", {"nf4": "nf4"})
        tuning["base"] = "nf4" if bits == 4 else "int8"
    adapters = [k.found(a) for a in k.names("adapter_name_or_path")]
    fresh = k.flag("create_new_adapter")
    if len(adapters) > 1 or (adapters and fresh):
        whole = line("merge", k.path("model_name_or_path"), "MERGED", *(w for a in adapters for w in ("--adapter", a)))
        raise k.error("adapter_name_or_path", f"merge what is to stay fixed first, and tune the result: {whole}")
    if adapters:
        tuning["adapter"] = adapters[0]
    return tuning


def _targets(names: Sequence[str]) -> str | list[str]:
    """Modules by the end of their names, as regexes.

    >>> _targets(["all"]), _targets(["q_proj", "self_attn.v_proj"])
    ('all-linear', ['(^|/)q_proj$', '(^|/)self_attn/v_proj$'])
    """
    return "all-linear" if list(names) == ["all"] else [f"(^|/){n.replace('.', '/')}$" for n in names]
