"""Learning from a teacher: its distribution over the next token, its hidden states, where its heads look.

The loss is `(1 - w) · data loss + w · T² · D(teacher, student)`, summed over the tokens that the data's objective is
about, with both distributions at temperature T (Hinton et al., 2015, https://arxiv.org/abs/1503.02531); features and
attention come on top, each with a weight of its own. Where the student said a token itself (on-policy), there is no
data to learn it from, and its data loss counts nothing.

Of a teacher that was written down (`columns`) there are the k likeliest tokens alone. All others are then one outcome,
the rest, for both: never more than the divergence of the whole distributions, equal to it at k = V. (To leave the rest
out and renormalise would have the student put nothing there.)

Dimensions: B batch, T time, V vocab, D embed, C chunks, c time within a chunk, K the likeliest tokens and the rest,
N heads, S time of the keys.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.attention import NEVER
from jaxtune.config import Distill
from jaxtune.layers import Outputs, Readout
from jaxtune.objectives import base, pretrain
from jaxtune.weights import Array, node

IDS, LOGP = "teacher_ids_BTK", "teacher_logp_BTK"  # columns; the second has one more, of the rest
OWN = 2  # in a loss mask: the student said it itself


@node
class Lesson:
    """What student and teacher give of a batch."""

    student: Outputs
    teacher: Outputs | None = None  # None: its columns are in the batch
    hidden: tuple[
        tuple[Array, Array], ...
    ] = ()  # of pairs of layers, student's and teacher's, of one width `[B, T, D]`
    attention: tuple[tuple[Array, Array], ...] = ()  # `[B, N, T, S]`, of as many heads

    @property
    def balance(self) -> Any:
        """The load-balancing loss of the student's experts."""
        return self.student.balance


@dataclasses.dataclass(frozen=True)
class Distilling:
    """The objective of a config's section."""

    c: Distill
    kind: str  # the data's objective: sft or pretrain
    vocab: int  # of the teacher
    measuring: bool = False  # the loss is that of the data alone, so that runs with and without a teacher compare

    def __call__(self, lesson: Lesson, batch: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Any]]:
        """Loss sum, token count, and sums `{"hits", "data_loss", "kl"}`, with `features` and `attention` if asked for.

        `batch` has the columns of `sft`, and those named `IDS` and `LOGP` where there is no live teacher. `kl` is the
        divergence that is asked for, at the temperature, without the factor T².
        """
        c, own_BT = self.c, batch["loss_mask_BT"] == OWN
        seen = pretrain.masked(lesson.student, batch) if self.kind == "pretrain" else batch
        target_BT, weight_BT = base.next_token(seen)
        data_BT = weight_BT * ~jnp.roll(own_BT, -1, 1)
        weight, vocab = 0.0 if self.measuring else c.weight, min(self.vocab, lesson.student.readout.vocab)
        terms, times = Terms(c.kind, c.beta, c.temperature, weight, vocab, None), 3
        columns: tuple[Array, ...] = ()
        rest: Any = ()
        if (teacher := lesson.teacher) is not None:
            terms, times = dataclasses.replace(terms, readout=teacher.readout), 4
            columns, rest = (teacher.hidden_BTD,), base.gathered(teacher.head, teacher.readout.eqn)
        else:
            columns = batch[IDS], batch[LOGP]
        sums = base.chunked(lesson.student, terms, (target_BT, weight_BT, data_BT, *columns), rest, times)
        loss, data_loss, kl, hits = sums
        metrics = {"hits": hits, "data_loss": data_loss, "kl": kl}
        if self.measuring:
            return loss, weight_BT.sum(), {"hits": hits, "kl": kl}
        if c.features is not None:
            apart = [features(*pair, weight_BT, c.features.loss) for pair in lesson.hidden]
            metrics["features"] = jnp.stack(apart).sum()
            loss += c.features.weight * metrics["features"]
        if c.attention is not None:
            apart = [attention(*pair, weight_BT, c.attention.loss) for pair in lesson.attention]
            metrics["attention"] = jnp.stack(apart).sum()
            loss += c.attention.weight * metrics["attention"]
        return loss, weight_BT.sum(), metrics


@dataclasses.dataclass(frozen=True)
class Terms:
    """What is made of a chunk of the student's logits, see `base.chunked`: `(loss, data loss, divergence, hits)`."""

    kind: str
    beta: float
    temperature: float
    weight: float
    vocab: int  # tokens that both know; tables may be padded
    readout: Readout | None  # of a live teacher

    def __call__(
        self, logits_BcV: Array, columns: tuple[Array, ...], rest: Any, exact: bool
    ) -> tuple[Array, Array, Array, Array]:
        target_Bc, weight_Bc, data_Bc, *of_teacher = columns
        data_loss = (data_Bc * base.minus_log(logits_BcV, target_Bc)).sum()
        logp_BcK, logq_BcK = self.both(logits_BcV, of_teacher, rest)
        apart_Bc = divergence(logp_BcK, logq_BcK, self.kind, self.beta)
        kl = (weight_Bc * apart_Bc).sum()
        loss = (1 - self.weight) * data_loss + self.weight * self.temperature**2 * kl
        return loss, data_loss, kl, base.hits(logits_BcV, target_Bc, weight_Bc, exact)

    def both(self, logits_BcV: Array, of_teacher: Sequence[Array], rest: Any) -> tuple[Array, Array]:
        """Log-probabilities of the same outcomes by teacher and student, at the temperature."""
        z_BcV = logits_BcV[..., : self.vocab] / self.temperature
        if self.readout is None:
            ids_BcK, logp_BcK = of_teacher
            return recorded(ids_BcK.astype(jnp.int32), logp_BcK.astype(jnp.float32), z_BcV)
        taught_BcV = self.readout(of_teacher[0], rest)[..., : self.vocab] / self.temperature
        return jax.nn.log_softmax(taught_BcV), jax.nn.log_softmax(z_BcV)


def recorded(ids_BcK: Array, logp_BcK: Array, z_BcV: Array) -> tuple[Array, Array]:
    """Log-probabilities of a teacher's likeliest tokens and of the rest, by it and by the student, `[B, c, K]`.

    `logp_BcK` has one more than `ids_BcK`; where the ids are all tokens, there is no rest. `z_BcV` are the student's
    logits, divided by the temperature; tokens that it has no row for, where the teacher's table is padded further, are
    left out of both.
    """
    logq_BcV, V = jax.nn.log_softmax(z_BcV), z_BcV.shape[-1]
    known_BcK = ids_BcK < V
    logq_BcK = jnp.where(known_BcK, jnp.take_along_axis(logq_BcV, jnp.minimum(ids_BcK, V - 1), -1), NEVER)
    logp_BcK = logp_BcK.at[..., :-1].set(jnp.where(known_BcK, logp_BcK[..., :-1], NEVER))
    if ids_BcK.shape[-1] >= V:
        return jax.nn.log_softmax(logp_BcK[..., :-1]), logq_BcK
    chosen_BcV = jnp.put_along_axis(jnp.zeros(z_BcV.shape, bool), ids_BcK, True, -1, inplace=False, mode="drop")
    rest_Bc1 = jax.nn.logsumexp(jnp.where(chosen_BcV, NEVER, logq_BcV), -1, keepdims=True)
    return jax.nn.log_softmax(logp_BcK), jnp.concatenate([logq_BcK, rest_Bc1], -1)  # float16 does not quite sum to 1


def divergence(logp: Array, logq: Array, kind: str, beta: float = 0.5) -> Array:
    """How far a student's distribution q is from a teacher's p, over the last axis, in nats.

    "forward" is `KL(p ‖ q)`, "reverse" `KL(q ‖ p)`, and "jsd" `β · KL(p ‖ m) + (1 - β) · KL(q ‖ m)` with
    `m = β · p + (1 - β) · q`, the generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024,
    https://arxiv.org/abs/2306.13649, eq. 1).

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> [round(float(divergence(p, q, kind)), 4) for kind in ("forward", "reverse", "jsd")]
    [0.1438, 0.1308, 0.0338]
    """
    if kind == "forward":
        return (jnp.exp(logp) * (logp - logq)).sum(-1)
    if kind == "reverse":
        return (jnp.exp(logq) * (logq - logp)).sum(-1)
    logm = jnp.logaddexp(logp + jnp.log(beta), logq + jnp.log1p(-beta))
    to_p, to_q = ((jnp.exp(x) * (x - logm)).sum(-1) for x in (logp, logq))
    return beta * to_p + (1 - beta) * to_q


def features(mine_BTD: Array, taught_BTD: Array, weight_BT: Array, loss: str) -> Array:
    """Sum over tokens of the mean squared error ("mse"), or of 1 - cosine ("cosine"), float32."""
    mine_BTD, taught_BTD = mine_BTD.astype(jnp.float32), taught_BTD.astype(jnp.float32)
    if loss == "mse":
        return (weight_BT * jnp.square(mine_BTD - taught_BTD).mean(-1)).sum()
    norms_BT = (jnp.sum(x * x, -1) for x in (mine_BTD, taught_BTD))
    together_BT = jax.lax.rsqrt(jnp.maximum(next(norms_BT) * next(norms_BT), 1e-12))
    return (weight_BT * (1 - (mine_BTD * taught_BTD).sum(-1) * together_BT)).sum()


def attention(mine_BNTS: Array, taught_BNTS: Array, weight_BT: Array, loss: str) -> Array:
    """Sum over queries of `KL(teacher ‖ student)` over the keys ("kl"), or of the squared error summed over the keys
    ("mse"), averaged over heads; where these are not as many, over the mean of all heads. Float32."""
    if mine_BNTS.shape[1] != taught_BNTS.shape[1]:
        mine_BNTS, taught_BNTS = (x.mean(1, keepdims=True) for x in (mine_BNTS, taught_BNTS))
    if loss == "mse":
        return (weight_BT * jnp.square(mine_BNTS - taught_BNTS).sum(-1).mean(1)).sum()
    least = jnp.finfo(jnp.float32).tiny  # of a key that is not seen, by both
    logp, logq = (jnp.log(jnp.maximum(x, least)) for x in (taught_BNTS, mine_BNTS))
    return (weight_BT * (taught_BNTS * (logp - logq)).sum(-1).mean(1)).sum()
