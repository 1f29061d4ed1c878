"""Configs of LLaMA-Factory (Zheng et al., 2024; its flat keys as of 0.9.5) as ours.

Each of its keys is translated, or noted where it has no meaning here, or refused where leaving it out would change what
is trained; an unknown one is an error. Defaults are its own where ours differ.

Relative paths start at the working directory, as there; one that is not there is looked for beside the file and in the
folders above it, so that a file of its examples runs from anywhere. Outputs are written in the working directory.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config.llamafactory import data, training, tuning
from jaxtune.config.llamafactory.keys import Keys, line
from jaxtune.config.llamafactory.names import KNOWN

OWN = (
    "model",
    "output",
    "data",
    "vocabulary",
    "objective",
    "tuning",
    "train",
    "evaluate",
    "checkpoint",
    "mesh",
    "track",
)

_STAGES = {"sft": "sft", "pt": "pretrain"}


class Translation(NamedTuple):
    """A config of ours as nested dicts, and what its reader should know, each note starting with a key."""

    tree: dict[str, Any]
    notes: list[str]


def recognises(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether these are LLaMA-Factory's flat keys, beside the sections of ours that stand among them."""
    return "model_name_or_path" in theirs or (not ours and not KNOWN.isdisjoint(theirs))


def split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flat keys, and the sections of ours; `optim` is a name there and a section here.

    >>> split({"model_name_or_path": "m", "optim": "adamw_torch", "mesh": {"fsdp": 8}})
    ({'model_name_or_path': 'm', 'optim': 'adamw_torch'}, {'mesh': {'fsdp': 8}})
    """
    own = {k: v for k, v in tree.items() if k in OWN or (k == "optim" and isinstance(v, Mapping))}
    return {k: v for k, v in tree.items() if k not in own}, own


def translate(given: Mapping[str, Any], place: str, folder: Path, devices: Callable[[], int]) -> Translation:
    """Flat keys as a config of ours.

    Args:
      given: the keys.
      place: what errors name.
      folder: where the file lies.
      devices: how many there are; a step there takes a batch from each of them.

    Raises:
      UserError: a key is unknown, has a wrong value, or asks for something that is not here; or the file is not for
        training, and which verb it is for.
    """
    k = Keys(given, place, folder)
    k.check_known()
    _for_training(k)
    k.refuse()
    tree: dict[str, Any] = {"model": k.path("model_name_or_path"), "objective": _objective(k)}
    tree["output"] = os.path.abspath(Path(k.text("output_dir", "trainer_output")).expanduser())
    tree["data"] = data.section(k, tree["objective"])
    tree["tuning"] = tuning.section(k)
    tree |= {"optim": training.optim(k), "train": training.train(k, devices), "evaluate": training.evaluate(k, devices)}
    tree |= {"checkpoint": training.checkpoint(k), "track": training.track(k)}
    if vocabulary := data.vocabulary(k, tree["tuning"]):
        tree["vocabulary"] = vocabulary
    k.note_the_rest()
    return Translation({name: value for name, value in tree.items() if value != {}}, k.notes)


def _for_training(k: Keys) -> None:
    """Raises: UserError: the file is for exporting, chatting or predicting: the verb for it."""
    if "export_dir" in k or ("dataset" not in k and "output_dir" not in k and not k.flag("do_train")):
        model, adapters = k.path("model_name_or_path"), [k.found(a) for a in k.names("adapter_name_or_path")]
        options = [word for a in adapters for word in ("--adapter", a)]
        if "export_dir" not in k:
            raise k.error("dataset", f"is missing, so this is no training: {line('chat', model, *options)}")
        out = k.text("export_dir", "")
        if adapters:
            raise k.error("export_dir", f"this is an export: {line('merge', model, out, *options)}")
        size = ["--shard-size", str(k.given["export_size"])] if "export_size" in k else []
        raise k.error("export_dir", f"this is an export: {line('convert', model, out, *size)}")
    if not k.flag("do_train"):
        if "do_predict" in k or "do_eval" in k:
            verb = "predict RUN FILE" if k.given.get("do_predict") else "evaluate RUN FILE"
            raise k.error("do_train", f"is not set, so this is no training: jaxtune {verb}; or set do_train=true")
        k.notes.append("do_train – is not set; `jaxtune train` trains all the same")


def _objective(k: Keys) -> str:
    stage = k.value("stage", "sft")
    if stage in ("rm", "dpo", "kto", "ppo"):
        raise k.error("stage", "training on preferences is not here; sft on the preferred answers is the nearest")
    return k.one_of("stage", "sft", _STAGES)
