"""Low-rank adapters and their kin, beside frozen weights: LoRA, DoRA, PiSSA, OLoRA; VeRA, LoHa and LoKr by `forms`.

Dimensions: in… and out… are the weight's contracted and remaining axes, I and O all of them; r is the rank.
"""

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import leaves
from jaxtune.config import Lora
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.dora import DoRA, norm
from jaxtune.nodes.lora import LoRA, each
from jaxtune.tuning import forms
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training, covering, decoder_names, named
from jaxtune.weights import Array

_WEIGHT = "/weight"
_NORM = re.compile(r"norm/weight$")
_TRAINS: Mapping[str, str] = {  # what of a node trains, by form
    "lora": r"/(a|b|magnitude)$",
    "vera": r"/lambda_[bd]$",
    "loha": r"/[ab][12]$",
    "lokr": r"/(left|right|a|b)$",
}
_PRINCIPAL = ("pissa", "olora")


def method(tuning: Lora, decoder: DecoderConfig, training: Training) -> Method:
    """Adapters on the weights that `tuning.targets` names: all matrices of the layers, or regexes on names.

    What `tuning.train` names trains whole, without an adapter.

    Raises:
      UserError: a pattern matches nothing that it can, experts are to train whole, or keys do not go together.
    """
    every = decoder_names(decoder)
    patterns = [r"^layers/"] if tuning.targets == "all-linear" else _listed(tuning.targets)
    base = None if tuning.base is None else (tuning.base, tuning.group)
    names = [n for n in every if targetable(n) or (n.startswith("embed_tokens") and not decoder.tied)]
    covering(patterns, [n.removesuffix(_WEIGHT) for n in names], "tuning.targets")
    whole = named(tuning.train, decoder.tied)
    covering(whole, [n for n in every if n.endswith(_WEIGHT) or "/experts/" in n], "tuning.train")
    if taken := [n for n in every if "/experts/" in n and any(re.search(p, n) for p in whole)]:
        raise UserError(
            f"tuning.train matches {taken[0]}: PEFT cannot hold experts that train whole; narrow the pattern, or adapt "
            "them by tuning.targets"
        )
    mine = {n.removesuffix(_WEIGHT) for n in names if any(re.search(p, n.removesuffix(_WEIGHT)) for p in patterns)}
    mine -= {n.removesuffix(_WEIGHT) for n in names if any(re.search(p, n) for p in whole)}
    if not mine:
        raise UserError("tuning.train takes all that tuning.targets names, so no adapter is left; narrow one of them")
    for key in ("rank_pattern", "alpha_pattern"):
        covering(list(getattr(tuning, key)), sorted(mine), f"tuning.{key}")
    _check(tuning, mine)
    make = _maker(tuning, decoder, mine)

    def wrap(name: str, w: Weight, key: Array) -> Any:
        short = name.removesuffix(_WEIGHT)
        if short not in mine:
            return w
        rank = _first(tuning.rank_pattern, short, tuning.rank)
        return make(short, w, rank, tuning.scale_of(rank, _first(tuning.alpha_pattern, short, tuning.alpha)), key)

    rules = [
        (r"/base/(a|b)$", FROZEN),  # what an initialisation took from the base
        (_TRAINS[tuning.form], TRAIN),
        *[(f"(?:{p})(?!.*/bias$)", TRAIN) for p in whole],
        ("", FROZEN),
    ]
    rates = [(r"^(?!embed_tokens/).*/b$", tuning.lora_plus)] if tuning.lora_plus != 1 else []
    return Method(wrap, rules, from_base=tuning.dora or tuning.init in _PRINCIPAL, base=base, rates=rates)


def _listed(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def _first(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for p, value in patterns.items() if re.search(p, name)), otherwise)


def targetable(name: str) -> bool:
    """Whether a weight is a matrix of a linear module or of experts; routers and the embedding table are none."""
    matrix = name.endswith(_WEIGHT) and not _NORM.search(name) and not name.endswith("/mlp/gate/weight")
    return (matrix and not name.startswith("embed_tokens")) or "/experts/" in name


def only_linear(names: set[str], key: str, instead: str = "take plain LoRA without it") -> None:
    """Check that no name is that of experts or of the embedding table.

    Raises:
      UserError: names the config's key that asks for it, and the weight.
    """
    for name in sorted(names):
        if "/experts/" in name or name.startswith("embed_tokens"):
            what = "experts" if "/experts/" in name else "an embedding table"
            raise UserError(
                f"{key} is for linear layers, and {name} is {what}; narrow tuning.targets, as in [self_attn], or "
                f"{instead}"
            )


def _check(tuning: Lora, names: set[str]) -> None:
    """Raises: UserError: keys that do not go together, or weights that a form is not for."""
    if tuning.form != "lora":
        only_linear(names, f"tuning.form={tuning.form}")
        if tuning.adapter is not None:
            raise UserError(f"tuning.adapter goes on from LoRA only; leave tuning.form={tuning.form} out")
    if tuning.adapter is not None and tuning.init != "default":
        raise UserError(f"tuning.init={tuning.init} is for fresh adapters; leave it or tuning.adapter out")
    if tuning.dora:
        only_linear(names, "tuning.dora")
    if tuning.init in _PRINCIPAL:
        only_linear(names, f"tuning.init={tuning.init}")
    if tuning.form == "vera" and (tuning.rank_pattern or tuning.alpha_pattern):
        raise UserError("tuning.form=vera shares its matrices, so it has one rank and no alpha; leave the patterns out")
    if tuning.form in ("loha", "lokr") and tuning.dropout:
        raise UserError(f"tuning.dropout is not for tuning.form={tuning.form}; set it to 0")
    for key in ("rank_pattern", "alpha_pattern"):
        if any("/experts/" in n and _first(getattr(tuning, key), n, None) for n in names):
            raise UserError(f"tuning.{key} matches experts, where PEFT overlooks such patterns; narrow the pattern")


_Make = Callable[[str, Weight, int, float, Array], Any]


def _maker(tuning: Lora, decoder: DecoderConfig, names: set[str]) -> _Make:
    """How a weight gets a fresh node of the form asked for: (name, weight, rank, scale, key) -> node."""
    dropout = tuning.dropout
    if tuning.form == "vera":
        largest = forms.largest(decoder, names)
        return lambda name, w, rank, scale, key: forms.vera(w, rank, largest, dropout)
    if tuning.form == "loha":
        return lambda name, w, rank, scale, key: forms.loha(w, rank, scale, key)
    if tuning.form == "lokr":
        return lambda name, w, rank, scale, key: forms.lokr(w, rank, scale, key)
    if tuning.init in _PRINCIPAL:
        return lambda name, w, rank, scale, key: principal(name, w, rank, scale, dropout, tuning.init)

    def make(name: str, w: Weight, rank: int, scale: float, key: Array) -> LoRA | DoRA:
        node = adapter(w, rank, scale, dropout, key, gaussian=tuning.init == "gaussian")
        return with_magnitude(node) if tuning.dora else node

    return make


def adapter(w: Weight, rank: int, scale: float, dropout: float, key: Array, gaussian: bool = False) -> LoRA:
    """A fresh adapter on a weight: A uniform in ±1/√in, or normal with a deviation of 1/r, as peft draws it; B zero, so
    that nothing changes at first."""
    made = leaves.lora(w, rank)
    a, b = made["a"].value.shape, made["b"].value.shape
    bound = prod(leaves.sides(w)[0]) ** -0.5
    if w.names[w.lead] == "vocab":  # peft's way with a table
        a_, b_ = jnp.zeros(a, jnp.float32), jax.random.normal(key, b, jnp.float32)
    else:
        draw = jax.random.normal(key, a) / rank if gaussian else jax.random.uniform(key, a, minval=-bound, maxval=bound)
        a_, b_ = draw.astype(jnp.float32), jnp.zeros(b, jnp.float32)
    return LoRA(w, made["a"].like(a_), made["b"].like(b_), scale=scale, dropout=dropout)


def with_magnitude(node: LoRA) -> DoRA:
    """A fresh adapter with the magnitudes of the weight that it stands on."""
    w: Weight = node.base
    leaf = leaves.dora(w, node.a.value.shape[-1])["magnitude"]
    magnitude = each(norm, w.lead)(w.value, node.a.value, jnp.zeros_like(node.b.value))
    return DoRA(w, node.a, node.b, leaf.like(magnitude), scale=node.scale, dropout=node.dropout)


def principal(name: str, w: Weight, rank: int, scale: float, dropout: float, init: str) -> LoRA:
    """An adapter that starts with a part of the weight, upon another that takes this part away and stays frozen.

    The part is that of the largest singular values (PiSSA, Meng et al., 2024, https://arxiv.org/abs/2404.02948), or the
    first columns of the weight's QR decomposition (OLoRA, Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775). So the
    base stays what the files hold, and a folder with both factors is a plain LoRA of twice the rank.

    Raises:
      UserError: the weight has no such rank.
    """
    into, out = leaves.sides(w)
    sizes = prod(into), prod(out)
    if rank > min(sizes):
        raise UserError(f"tuning.init={init}: rank {rank} is above {min(sizes)}, the smaller side of {name}; lower it")
    made = leaves.lora(w, rank)

    def one(w_: Array) -> tuple[Array, Array]:
        w_IO = w_.astype(jnp.float32).reshape(sizes)
        a_Ir, b_rO = pissa(w_IO, rank, scale) if init == "pissa" else olora(w_IO, rank)
        return a_Ir.reshape(*into, rank), b_rO.reshape(rank, *out)

    def loop(x: Array, lead: int) -> tuple[Array, Array]:
        """One matrix after the other: a decomposition holds several times what it is of."""
        return jax.lax.map(lambda y: loop(y, lead - 1), x) if lead else one(x)

    # rounded as the frozen pair is held, so that the two take each other away exactly
    a, b = (x.astype(w.value.dtype).astype(jnp.float32) for x in loop(jnp.asarray(w.value), w.lead))
    below = LoRA(w, made["a"].like(a), made["b"].like(-b), scale=scale)
    return LoRA(below, made["a"].like(a), made["b"].like(b), scale=scale, dropout=dropout)


def pissa(w_IO: Array, rank: int, scale: float) -> tuple[Array, Array]:
    """Factors of the principal part: `scale · A B = U_r S_r V_r`, each with the root of the singular values."""
    u, s, v = jnp.linalg.svd(w_IO, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * v[:rank]


def olora(w_IO: Array, rank: int) -> tuple[Array, Array]:
    """Factors of the QR decomposition of the matrix with outputs first: A the rows of R, B the columns of Q."""
    q, r = jnp.linalg.qr(w_IO.T)
    return r[:rank].T, q[:, :rank].T
