"""Learned scales of keys, values and the MLP's hidden states (IA³, Liu et al., 2022, https://arxiv.org/abs/2205.05638)."""

import re
from typing import Any

import jax.numpy as jnp

from jaxtune import leaves
from jaxtune.config import Ia3
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.ia3 import IA3
from jaxtune.tuning.lora import only_linear, targetable
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training, covering, decoder_names
from jaxtune.weights import Array

_WEIGHT = "/weight"


def method(tuning: Ia3, decoder: DecoderConfig, training: Training) -> Method:
    """A vector of ones for each weight that `tuning.targets` names, on its inputs where `tuning.inputs` does.

    Raises:
      UserError: a pattern matches nothing that it can, or a weight's output has a bias.
    """
    every = decoder_names(decoder)
    names = [n.removesuffix(_WEIGHT) for n in every if targetable(n)]
    covering(tuning.targets, names, "tuning.targets")
    mine = {n for n in names if any(re.search(p, n) for p in tuning.targets)}
    if "inputs" in tuning.model_fields_set:  # what is there by default may be no target
        covering(tuning.inputs, sorted(mine), "tuning.inputs")
    only_linear(mine, "tuning.method=ia3", "take tuning.method=lora")
    inputs = {n for n in mine if any(re.search(p, n) for p in tuning.inputs)}
    if biased := [n for n in sorted(mine - inputs) if f"{n}/bias" in every]:
        raise UserError(
            f"tuning.targets matches {biased[0]}, which has a bias that PEFT's IA3 scales too; that is not supported: "
            "narrow tuning.targets, or name it in tuning.inputs, too"
        )

    def wrap(name: str, w: Weight, key: Array) -> Any:
        short = name.removesuffix(_WEIGHT)
        if short not in mine:
            return w
        leaf = leaves.ia3(w, short in inputs)["l"]
        ones = jnp.ones(leaf.value.shape, jnp.float32)
        return IA3(w, leaf.like(ones), inputs=short in inputs, axes=len(leaf.names) - w.lead)

    base = None if tuning.base is None else (tuning.base, tuning.group)
    return Method(wrap, [(r"/l$", TRAIN), ("", FROZEN)], base=base)
