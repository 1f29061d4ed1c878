"""A teacher beside the student: drawn and checked before anything is read, then in the state, then at work.

A live teacher lives in `State.frozen`, under the name "teacher" beside the student's own frozen weights. So it is
sharded by the same rules, handed to the one step like any weight, never differentiated, in no optimiser and in no
checkpoint: no second state, step or loop. What is learned along to compare widths, "matching", lies in
`State.trainable` likewise, and so is in the optimiser and in checkpoints; `method.student` leaves both out of exports.

Dimensions: B batch, T time, S student's width, D teacher's width.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import blueprint, distributed, log, sharding
from jaxtune.blueprint import Blueprint
from jaxtune.config import Config, Distill
from jaxtune.data import token_cache
from jaxtune.data.batches import Beside, Rows
from jaxtune.data.pipeline import Prepared
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from jaxtune.layers import Outputs, Weight, is_weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.inside import Inside, look
from jaxtune.objectives.distill import IDS, LOGP, Distilling, Lesson
from jaxtune.tuning import method as tuning
from jaxtune.tuning.method import FROZEN, MATCHING, TEACHER, TRAIN
from jaxtune.weights import Array

Tree = Any
_VERSION = 1  # of what columns hold


class Teacher(NamedTuple):
    """A teacher, and what it adds to the student's weights, abstract."""

    c: Distill
    blueprint: Blueprint
    matching: Mapping[str, Mapping[str, Weight]]  # from the student's width to the teacher's, by pair of layers
    mesh: jax.sharding.Mesh

    @property
    def live(self) -> bool:
        """Whether it works beside the student, rather than having been written down."""
        return self.c.top_k is None

    def beside(self, student: Tree, theirs: Tree, matching: Tree) -> Tree:
        """A tree of the student with those of what is beside it."""
        if not self.live:
            return student
        return {**student, TEACHER: theirs, **({MATCHING: matching} if self.matching else {})}

    def weights(self, student: Tree) -> Tree:
        """Abstract `Weight`s of all."""
        return self.beside(student, self.blueprint.weights, self.matching)

    def labels(self, student: Tree) -> Tree:
        """Who trains."""

        def all_(label: str, tree: Tree) -> Tree:
            return jax.tree.map(lambda _: label, tree, is_leaf=is_weight)

        return self.beside(student, all_(FROZEN, self.blueprint.weights), all_(TRAIN, self.matching))

    def abstract(self, student: Tree) -> Tree:
        """Shapes, dtypes and shardings of all."""
        where = sharding.shardings(self.matching, self.mesh, log.warn)

        def one(w: Weight, s: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(w.value.shape, w.value.dtype, sharding=s)

        made = jax.tree.map(one, self.matching, where, is_leaf=is_weight)
        return self.beside(student, self.blueprint.abstract, made)

    def materialise(self, student: Tree, key: Array) -> Tree:
        """`Weight`s with arrays of all: the teacher's are read, those of matching are drawn."""
        if not self.live:
            return student
        made: Tree = {}
        if self.matching:
            where = jax.tree.map(lambda x: x.sharding, self.abstract({})[MATCHING])
            made = jax.jit(self._drawn, out_shardings=where)(jax.random.fold_in(key, 1))
        return self.beside(student, blueprint.materialise(self.blueprint, key), self._boxed(made))

    def _boxed(self, arrays: Tree) -> Tree:
        return jax.tree.map(lambda w, x: w.like(x), self.matching, arrays, is_leaf=is_weight)

    def _drawn(self, key: Array) -> Tree:
        make, out = jax.nn.initializers.lecun_normal(), {}
        for i, (name, weight) in enumerate(sorted(self.matching.items())):
            w = weight["weight"].value
            out[name] = {"weight": make(jax.random.fold_in(key, i), w.shape, w.dtype)}
        return out

    def columns(self, digest: str, of_data: str) -> Beside:
        """Where the likeliest tokens by a teacher of this digest are kept, for data of that digest."""
        c, V = self.c, self.blueprint.decoder.vocab
        k = c.top_k or 0
        told = f"{_VERSION} {digest} {of_data} {k} {c.temperature} {self.blueprint.decoder.dtype}"
        name = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
        root = Path(c.columns) if c.columns else token_cache.folder().parent / "teacher"
        return Beside(root / name, planned(k, V))


def planned(k: int, vocab: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the columns of the `k` likeliest tokens: their ids, and their log-probabilities with that of
    the rest."""
    return {IDS: ((k,), "uint16" if vocab <= 2**16 else "int32"), LOGP: ((k + 1,), "float16")}


def draw(c: Config, folder: Path, student: Blueprint, words: Any, mesh: jax.sharding.Mesh) -> Teacher:
    """The teacher of a config in a model folder, for a student and its tokenizer.

    Raises:
      UserError: it cannot teach this student.
    """
    d, t = _section(c), c.train
    b = blueprint.draw(
        folder, lambda _: frozen(), mesh, t.compute_dtype, attention=t.attention, rules=sharding.rules(c.mesh)
    )
    check(c, b.decoder, student)
    theirs = tokenizer.load(folder)
    if (found := tokenizer.first_difference(words, theirs)) is not None:
        here, there = ("nothing" if x is None else repr(x) for x in found[1:])
        raise UserError(
            f"distill.teacher {d.teacher}: has another tokenizer than the student: token {found[0]} is {there} there "
            f"and {here} here; take a teacher of the student's tokenizer, or its answers as data (`jaxtune predict "
            "--as-data`)"
        )
    tokenizer.check_size(theirs, b.decoder.vocab, str(folder))
    if c.data.max_length > b.decoder.context:
        log.warn(f"data.max_length={c.data.max_length} is beyond the teacher's context of {b.decoder.context}")
    return Teacher(d, b, matching(d, student.decoder, b.decoder, t.param_dtype), mesh)


def frozen() -> tuning.Method:
    """The tuning method of a teacher: none of it trains."""
    return tuning.Method(tuning.leave, [("", FROZEN)])


def _section(c: Config) -> Distill:
    if c.distill is None:
        raise ValueError("the config has no teacher")
    return c.distill


def check(c: Config, teacher: DecoderConfig, student: Blueprint) -> None:
    """Look whether a teacher suits a run.

    Raises:
      UserError: it does not.
    """
    d, own = _section(c), student.decoder
    if teacher.task is not None:
        raise UserError(f"distill.teacher {d.teacher}: has a head for {teacher.task.kind} and says no text")
    if student.method.virtual:
        raise UserError(
            f"distill: the virtual tokens of tuning.method={c.tuning.method} are none of the teacher's; take lora, "
            "prefix, freeze or full"
        )
    if d.top_k is not None and d.top_k > teacher.vocab:
        raise UserError(f"distill.top_k={d.top_k}: the teacher has {teacher.vocab} tokens; take fewer")
    if d.top_k is not None and c.data.streaming:
        raise UserError(
            "distill.top_k is written down row by row, and data.streaming does not count them; leave it out"
        )
    if d.attention is not None and student.method.past:
        raise UserError("distill.attention: a prefix hides where heads look; take another tuning.method, or features")
    if d.on_policy and (distributed.count() > 1 or c.mesh.sizes["stage"] != 1):
        raise UserError("distill.on_policy has one process say answers, without stages of a pipeline; set it to 0")
    for key, part in (("features", d.features), ("attention", d.attention)):
        for mine, theirs in part.layers if part is not None else ():
            if not (0 <= mine < own.layers and 0 <= theirs < teacher.layers):
                raise UserError(
                    f"distill.{key}.layers: {[mine, theirs]} is no pair of layers; the student has {own.layers}, the "
                    f"teacher {teacher.layers}, from 0"
                )


def matching(d: Distill, student: DecoderConfig, teacher: DecoderConfig, dtype: str) -> dict[str, dict[str, Weight]]:
    """Abstract matrices `[S, D]` for each pair of layers whose hidden states are compared, where widths differ."""
    if d.features is None or student.embed == teacher.embed:
        return {}
    shape = jax.ShapeDtypeStruct((student.embed, teacher.embed), jnp.dtype(dtype))
    return {f"{i}": {"weight": Weight(shape, ("embed", "rank"), n_in=1)} for i in range(len(d.features.layers))}


def taught(data: Prepared, t: Teacher, digest: str) -> Prepared:
    """The data with the columns that a teacher of this digest writes down."""
    if t.live:
        return data

    def one(rows: Rows) -> Rows:
        return dataclasses.replace(rows, beside=t.columns(digest, rows.digest()))

    return data._replace(train=one(data.rows), validation=one(data.validation) if data.validation else None)


Run = Callable[[Tree, Mapping[str, Array]], Outputs]


def lessons(
    t: Teacher, student: Blueprint, run: Run, ready: Callable[[Tree], Tree] = lambda w: w, measuring: bool = False
) -> Callable[[Tree, Mapping[str, Array]], Lesson]:
    """Student and teacher as one function of all weights and a batch.

    Args:
      t: the teacher.
      student: the student.
      run: the student as a function of its weights and a batch.
      ready: what is done to the student's weights before.
      measuring: whether the insides stay unseen.
    """
    looks = (t.c.features is not None or t.c.attention is not None) and not measuring

    def both(weights: Tree, batch: Mapping[str, Array]) -> Lesson:
        mine = ready(tuning.student(weights))
        if not t.live:
            return Lesson(run(mine, batch))
        b = t.blueprint
        if not looks:
            columns = batch["ids_BT"], batch["segment_BT"], batch["position_BT"]
            return Lesson(run(mine, batch), b.model.apply({"params": weights[TEACHER]}, *columns)[0])
        outputs, seen = look(student.decoder, mine, batch)
        theirs, shown = look(b.decoder, weights[TEACHER], batch)
        return Lesson(outputs, theirs, *_pairs(t.c, seen, shown, weights.get(MATCHING, {})))

    return both


def _pairs(d: Distill, mine: Inside, theirs: Inside, through: Tree) -> tuple[tuple, tuple]:
    """What is compared of the insides of both."""
    hidden = []
    for i, (a, b) in enumerate(d.features.layers if d.features is not None else ()):
        x_BTD = mine.hidden_LBTD[a]
        if through:
            x_BTD = jnp.einsum("bts,sd->btd", x_BTD, through[str(i)]["weight"].astype(x_BTD.dtype))
        hidden.append((x_BTD, theirs.hidden_LBTD[b]))
    if d.attention is None:
        return tuple(hidden), ()
    assert mine.p_LBNTS is not None
    assert theirs.p_LBNTS is not None
    return tuple(hidden), tuple((mine.p_LBNTS[a], theirs.p_LBNTS[b]) for a, b in d.attention.layers)


def objective(t: Teacher, kind: str, measuring: bool = False) -> Distilling:
    """The loss of a lesson, or what is measured of it."""
    return Distilling(t.c, kind, t.blueprint.decoder.vocab, measuring)
