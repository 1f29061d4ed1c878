"""LLaMA-Factory's keys of the optimiser, the loop, evaluation and saving as our sections."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.config.llamafactory.keys import Keys, number

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ADAMW = (
    "adamw_hf adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_anyprecision"
)
_OPTIMISERS = {
    **dict.fromkeys([*_ADAMW.split(), "paged_adamw", "paged_adamw_32bit"], "adamw"),
    **dict.fromkeys(["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"], "adamw8bit"),
    **dict.fromkeys(["lion", "lion_32bit", "paged_lion", "paged_lion_32bit"], "lion"),
    "sgd": "sgd",
    "schedule_free_adamw": "schedule_free",
}


def optim(k: Keys) -> dict[str, Any]:
    """Our optim section."""
    rate = k.number("learning_rate", 5e-5)
    schedule = k.value("lr_scheduler_type", "linear")
    k.one_of("lr_scheduler_type", "linear", _SCHEDULES)
    options = k.value("lr_scheduler_kwargs", {})
    known = ("min_lr", "min_lr_rate") if schedule == "cosine_with_min_lr" else ()
    if not isinstance(options, Mapping) or set(options) - set(known):
        raise k.error("lr_scheduler_kwargs", "only min_lr and min_lr_rate of cosine_with_min_lr are known")
    name = "muon" if k.flag("use_muon") else k.one_of(
        "optim", "adamw_torch", _OPTIMISERS, "; the nearest to those with a small state is adamw_8bit"
    )  # fmt: skip
    optim: dict[str, Any] = {"name": name, "learning_rate": rate, "schedule": _SCHEDULES[schedule]}
    steps = k.number("warmup_steps", 0) if "warmup_steps" in k else 0
    if steps or schedule == "constant":
        optim["warmup"] = 0 if schedule == "constant" else steps
    else:
        optim["warmup"] = k.number("warmup_ratio", 0.0)
        if optim["warmup"] >= 1:
            raise k.error("warmup_ratio", "a share below 1 was expected")
    if options:
        optim["final"] = _final(k, options, rate)
    optim |= {
        "weight_decay": k.number("weight_decay", 0.0),
        "clip": k.number("max_grad_norm", 1.0),
        "beta1": k.number("adam_beta1", 0.9) if name != "sgd" else 0.0,
        "beta2": k.number("adam_beta2", 0.999),
        "eps": k.number("adam_epsilon", 1e-8),
    }
    return optim


def _final(k: Keys, options: Mapping[str, Any], rate: float) -> float:
    """The rate at the end as a share of the highest."""
    given = {name: v for name, v in options.items() if v is not None}
    if len(given) != 1:
        raise k.error("lr_scheduler_kwargs", "one of min_lr and min_lr_rate was expected")
    [(name, value)] = given.items()
    least = number(value)
    if least is None or least < 0:
        raise k.error("lr_scheduler_kwargs", f"{name} should be a number, not below 0")
    if name == "min_lr_rate":
        return least
    if rate <= 0:
        raise k.error("learning_rate", "should be above 0 where lr_scheduler_kwargs has min_lr")
    return least / rate


def train(k: Keys, devices: Callable[[], int]) -> dict[str, Any]:
    """Our train section."""
    per_device, accumulation = (
        k.whole("per_device_train_batch_size", 8), k.whole("gradient_accumulation_steps", 1)
    )  # fmt: skip
    n = devices()
    size = per_device * accumulation * n
    k.notes.append(
        f"per_device_train_batch_size – {per_device} × {accumulation} of accumulation × {n} devices is "
        f"train.batch_size={size}; set it where the run is to be on another number of devices"
    )
    train: dict[str, Any] = {"batch_size": size, "accumulation": accumulation, "seed": k.whole("seed", 42)}
    if (steps := k.whole("max_steps", -1)) > 0:
        train["steps"] = steps
    else:
        train["epochs"] = k.number("num_train_epochs", 3.0)
    if "data_seed" in k and k.whole("data_seed", 42) != train["seed"]:
        k.note("data_seed", "the order of the rows is drawn by seed")
    if k.flag("pure_bf16"):
        train["param_dtype"] = "bfloat16"
    if k.flag("fp16"):
        k.note("fp16", "computes in bfloat16, which needs no loss scaling")
    elif not k.flag("bf16") and "pure_bf16" not in k:
        k.notes.append("bf16 – is not set; computes in bfloat16, set train.compute_dtype=float32 for full precision")
    train["compute_dtype"] = "bfloat16"
    train["remat"] = "none" if k.flag("disable_gradient_checkpointing") else "full"
    if "logging_strategy" in k and k.value("logging_strategy") != "steps":
        k.note("logging_strategy", "lines of the log come by steps; logging_steps says how often")
    train["log_every"] = _every(k, "logging_steps", 500)
    if "neftune_noise_alpha" in k:
        train["neftune"] = k.number("neftune_noise_alpha", 0.0)
    if "moe_aux_loss_coef" in k:
        train["router_loss"] = k.number("moe_aux_loss_coef", 0.0)
    return train


def _every(k: Keys, key: str, default: int) -> int:
    """Steps; a share below 1 is one of max_steps."""
    value = k.number(key, default)
    if 0 < value < 1:
        steps = k.whole("max_steps", -1)
        if steps <= 0:
            raise k.error(key, "a share of the steps needs max_steps; write a number of steps")
        return math.ceil(value * steps)
    return k.whole(key, default)


def evaluate(k: Keys, devices: Callable[[], int]) -> dict[str, Any]:
    """Our evaluate section."""
    held = "eval_dataset" in k or bool(k.given.get("val_size"))
    best, patience = k.flag("load_best_model_at_end"), k.whole("early_stopping_steps", 0)
    evaluate: dict[str, Any] = {}
    if held:
        evaluate["batch_size"] = k.whole("per_device_eval_batch_size", 8) * devices()
    strategy = k.value("eval_strategy", "steps" if "eval_steps" in k else "no")
    if strategy == "steps":
        evaluate["every"] = _every(k, "eval_steps" if "eval_steps" in k else "logging_steps", 500)
    elif strategy == "epoch":
        evaluate["every"] = 0
    elif strategy == "no":
        if held:
            k.note("eval_strategy", "a validation set is measured by steps all the same; evaluate.every says how often")
    else:
        raise k.error("eval_strategy", "is not known; allowed: no, steps, epoch")
    if best or patience:
        metric = str(k.value("metric_for_best_model", "loss")).removeprefix("eval_")
        if metric not in ("loss", "perplexity", "accuracy"):
            raise k.error(
                "metric_for_best_model", "is not here; allowed: loss, accuracy, or a task's by evaluate.metric"
            )
        evaluate["metric"] = metric
    if best:
        evaluate["best"] = True
    if patience:
        evaluate["patience"] = patience
    return evaluate


def checkpoint(k: Keys) -> dict[str, Any]:
    """Our checkpoint section."""
    checkpoint: dict[str, Any] = {}
    if (strategy := k.value("save_strategy", "steps")) == "steps":
        checkpoint["every"] = _every(k, "save_steps", 500)
    elif strategy == "epoch":
        checkpoint["every"] = 0
    elif strategy in ("no", "best"):
        k.note(
            "save_strategy", "checkpoints come by steps; checkpoint.every says how often, checkpoint.keep how many stay"
        )
    else:
        raise k.error("save_strategy", "is not known; allowed: no, steps, epoch, best")
    if "save_total_limit" in k:
        checkpoint["keep"] = k.whole("save_total_limit", 3)
    else:
        k.notes.append("save_total_limit – is not set; the last 3 checkpoints stay (checkpoint.keep)")
    if k.flag("overwrite_output_dir"):
        k.note("overwrite_output_dir", "nothing is overwritten: a run that stands there is gone on with; else move it")
    resume = k.value("resume_from_checkpoint", True)
    if isinstance(resume, str):
        k.note("resume_from_checkpoint", "a run goes on from the newest checkpoint in its own output folder")
    elif resume is False:
        checkpoint["resume"] = "never"
    elif resume is not True:
        raise k.error("resume_from_checkpoint", "true, false or a path was expected")
    return checkpoint


_LOCAL, _TRACKERS = ("none", "tensorboard"), ("wandb", "trackio", "mlflow")


def track(k: Keys) -> dict[str, Any]:
    """Our track section."""
    asked = k.names("report_to")
    to = [name for name in asked if name in _TRACKERS]
    if "all" in asked:
        k.note("report_to", f"nothing is sent unless it is named: track.to takes {', '.join(_TRACKERS)}")
    elif other := [name for name in asked if name not in (*_LOCAL, *_TRACKERS)]:
        k.note("report_to", f"{', '.join(other)} is not here; track.to takes {', '.join(_TRACKERS)}")
    elif not to and "report_to" in k:
        k.note("report_to", "TensorBoard events, metrics.jsonl and loss.png are always written")
    if not to:
        return {}
    track: dict[str, Any] = {"to": to}
    if "project" in k:
        track["project"] = k.text("project", "")
    if "run_name" in k:
        track["name"] = k.text("run_name", "")
    return track
