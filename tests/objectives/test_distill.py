"""B batch, T time, D embed, V vocab, K the likeliest tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import columns
from jaxtune.config import Distill
from jaxtune.layers import Outputs, Readout
from jaxtune.objectives import base, distill, sft
from jaxtune.objectives.distill import IDS, LOGP, OWN, Distilling, Lesson

B, T, D, V = 2, 11, 8, 40
KINDS = {"forward": 0.5, "reverse": 0.5, "jsd": 0.3}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def outputs(seed, width=D, rows=V, scale=0.7, vocab=V):
    return Outputs(
        normal(seed, B, T, width), normal(seed + 1, width, rows) * scale, Readout("btd,dv->btv", vocab=vocab)
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(base, "LOGITS_BYTES", {"cpu": B * V * 4 * 12})


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "ids_BT": jnp.array(rng.integers(0, V, (B, T))),
        "segment_BT": jnp.array([[1] * 6 + [2] * 5, [1] * 8 + [0] * 3]),
        "loss_mask_BT": jnp.array(rng.integers(0, 2, (B, T))),
    }


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p, q, kind, beta):
    m = beta * p + (1 - beta) * q
    kl = {"forward": (p, q), "reverse": (q, p)}
    if kind != "jsd":
        a, b = kl[kind]
        return (a * np.log(a / b)).sum(-1)
    return beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)


def parts(c, lesson, batch, kind="sft", **options):
    loss, count, metrics = Distilling(c, kind, V, **options)(lesson, batch)
    return float(loss), float(count), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_float64_and_of_torch(kind, batch):
    import torch
    import torch.nn.functional as F

    student, teacher, T_ = outputs(0), outputs(2, width=5), 2.5
    c = Distill(teacher="t", kind=kind, beta=KINDS[kind], temperature=T_, weight=0.4)
    loss, count, metrics = parts(c, Lesson(student, teacher), batch)
    p, q = (softmax(np.asarray(o.logits()) / T_) for o in (teacher, student))
    weight = np.asarray(base.next_token(batch)[1])
    want = (divergence(p, q, kind, KINDS[kind]) * weight).sum()
    assert metrics["kl"] == pytest.approx(want, rel=2e-5)
    data, n, _ = sft.objective(student, batch)
    assert (count, metrics["data_loss"]) == (float(n), pytest.approx(float(data), rel=1e-5))
    assert loss == pytest.approx(0.6 * float(data) + 0.4 * T_**2 * want, rel=2e-5)
    a, b = (torch.from_numpy(np.log(x)) for x in (p, q))
    m = torch.logsumexp(torch.stack([a + np.log(KINDS[kind]), b + np.log1p(-KINDS[kind])]), 0)

    def kl(x, y):  # KL(y ‖ x)
        return F.kl_div(x, y, reduction="none", log_target=True).sum(-1)

    by_torch = {"forward": kl(b, a), "reverse": kl(a, b)}.get(kind)
    if by_torch is None:
        by_torch = KINDS[kind] * kl(m, a) + (1 - KINDS[kind]) * kl(m, b)
    assert metrics["kl"] == pytest.approx(float((by_torch.numpy() * weight).sum()), rel=2e-5)
    if kind == "jsd":
        measured = parts(c, Lesson(student, teacher), batch, measuring=True)
        assert measured[0] == pytest.approx(float(data), rel=1e-5)
        assert measured[2] == pytest.approx({"hits": metrics["hits"], "kl": metrics["kl"]}, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes(kind, batch):
    """Of hidden states and head, along a direction; and those of the formula without chunks."""
    student, teacher = outputs(0), outputs(2, width=5)
    c = Distill(teacher="t", kind=kind, beta=KINDS[kind], temperature=1.5, weight=0.7)
    target, weight = base.next_token(batch)

    def loss(hidden, head):
        return Distilling(c, "sft", V)(Lesson(student.replace(hidden_BTD=hidden, head=head), teacher), batch)[0]

    def plain(hidden, head):
        logq, logp = (jax.nn.log_softmax(x / 1.5) for x in (jnp.einsum("btd,dv->btv", hidden, head), teacher.logits()))
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
        kl = distill.divergence(logp, logq, kind, KINDS[kind])
        return (weight * (0.3 * ce + 0.7 * 1.5**2 * kl)).sum()

    at = student.hidden_BTD, student.head
    value, got = jax.value_and_grad(loss, (0, 1))(*at)
    if kind == "reverse":
        assert float(value) == pytest.approx(float(plain(*at)), rel=1e-4)
        for g, x in zip(got, jax.grad(plain, (0, 1))(*at), strict=True):
            np.testing.assert_allclose(g, x, rtol=1e-3, atol=1e-5)
    along, eps = (normal(7, B, T, D), normal(8, D, V)), 1e-2
    up, down = (float(loss(*(x + s * eps * d for x, d in zip(at, along, strict=True)))) for s in (1, -1))
    slope = sum(float((g * d).sum()) for g, d in zip(got, along, strict=True))
    assert slope == pytest.approx((up - down) / (2 * eps), rel=5e-3)


def test_limits_of_the_temperature_and_of_beta(batch):
    """T² · KL tends to the squared error of centred logits over 2 V (Hinton et al., 2015, section 2.1); JSD over β, or
    1 - β, to the one-sided divergences."""
    student, teacher = outputs(0), outputs(2)
    weight = np.asarray(base.next_token(batch)[1])
    c = Distill(teacher="t", temperature=100.0, weight=1.0)
    a, b = (np.asarray(o.logits(), np.float64) for o in (student, teacher))
    apart = (a - a.mean(-1, keepdims=True)) - (b - b.mean(-1, keepdims=True))
    want = ((apart**2).mean(-1) / 2 * weight).sum()
    assert parts(c, Lesson(student, teacher), batch)[0] == pytest.approx(want, rel=0.03)
    p, q = (jax.nn.log_softmax(x / 2) for x in (jnp.array(b), jnp.array(a)))
    for beta, kind in ((1e-3, "forward"), (1 - 1e-3, "reverse")):
        one = distill.divergence(p, q, "jsd", beta) / min(beta, 1 - beta)
        np.testing.assert_allclose(one, distill.divergence(p, q, kind), rtol=0.03, atol=1e-3)
    assert float(jnp.abs(distill.divergence(p, p, "jsd", 0.4)).max()) < 1e-6
    assert parts(c.model_copy(update={"weight": 0.0}), Lesson(student, teacher), batch)[0] == pytest.approx(
        float(sft.objective(student, batch)[0]), rel=1e-5
    )


def recorded(teacher, k, temperature):
    ids, logp = columns.likeliest(teacher, k, V, temperature)
    assert (ids.dtype, logp.dtype, logp.shape) == (jnp.uint16, jnp.float16, (B, T, k + 1))
    return {IDS: ids, LOGP: logp}


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_tokens_tend_to_the_live_teacher_from_below(kind):
    student, teacher = outputs(0), outputs(2)
    z = student.logits() / 2
    live = distill.divergence(jax.nn.log_softmax(teacher.logits() / 2), jax.nn.log_softmax(z), kind, KINDS[kind])
    found = []
    for k in (1, 12, V):
        columns_ = recorded(teacher, k, 2.0)
        both = distill.recorded(columns_[IDS].astype(int), columns_[LOGP].astype(jnp.float32), z)
        found.append(np.asarray(distill.divergence(*both, kind, KINDS[kind])))
    assert (found[0] > 0).all()
    assert (found[0] < found[1]).all()
    assert (found[1] < found[2]).all()
    np.testing.assert_allclose(found[2], live, rtol=5e-3)  # float16


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_student_has_no_row_for_are_left_out(kind):
    teacher, z = outputs(2), outputs(0).logits()[..., : V - 4] / 2
    shared = jax.nn.log_softmax(teacher.logits()[..., : V - 4] / 2)
    live = distill.divergence(shared, jax.nn.log_softmax(z), kind, KINDS[kind])
    some, whole = (recorded(teacher, k, 2.0) for k in (12, V))

    def apart(z, found):
        both = distill.recorded(found[IDS].astype(int), found[LOGP].astype(jnp.float32), z)
        return distill.divergence(*both, kind, KINDS[kind])

    assert int(some[IDS].max()) >= V - 4
    np.testing.assert_allclose(apart(z, whole), live, rtol=5e-3)
    assert np.isfinite(jax.grad(lambda z: apart(z, some).sum())(z)).all()


def test_all_tokens_recorded_teach_as_the_live_teacher(batch):
    student, teacher = outputs(0), outputs(2)

    def loss(hidden, lesson, batch):
        lesson = Lesson(student.replace(hidden_BTD=hidden), lesson)
        return Distilling(Distill(teacher="t", weight=0.8), "sft", V)(lesson, batch)[0]

    (a, da), (b, db) = (
        jax.value_and_grad(loss)(student.hidden_BTD, *x)
        for x in ((teacher, batch), (None, batch | recorded(teacher, V, 2.0)))
    )
    assert float(a) == pytest.approx(float(b), rel=1e-3)
    np.testing.assert_allclose(da, db, rtol=0.02, atol=2e-3)


def test_the_rest_is_what_the_others_have():
    """Against float64; a student that puts its mass elsewhere than the teacher's few is told."""
    teacher = outputs(2, scale=1.5)
    ids, logp = columns.likeliest(teacher, 5, V, 1.0)
    p = softmax(teacher.logits())
    rest = 1 - np.take_along_axis(p, np.asarray(ids, int), -1).sum(-1)
    np.testing.assert_allclose(np.exp(np.asarray(logp[..., -1], np.float64)), rest, rtol=4e-3)
    assert (np.diff(np.asarray(logp[..., :-1])) <= 0).all()
    near, far = jnp.log(jnp.array(p)), jnp.array(normal(9, B, T, V))
    apart = [
        distill.divergence(*distill.recorded(ids.astype(int), logp.astype(jnp.float32), z), "forward")
        for z in (near, far)
    ]
    assert float(jnp.abs(apart[0]).max()) < 2e-3
    assert float(apart[1].min()) > 0.05


def test_padded_tables_and_the_students_own_tokens(batch):
    """Rows of a table beyond the vocabulary are no tokens; what the student said itself has no data loss."""
    student, teacher = outputs(0, rows=V + 6), outputs(2)
    c = Distill(teacher="t", weight=0.5)
    short = student.replace(head=student.head[:, :V], readout=Readout("btd,dv->btv", vocab=V))
    for more, less in (
        (Lesson(student, teacher), Lesson(short, teacher)),
        (Lesson(teacher, student), Lesson(teacher, short)),
    ):
        a, b = parts(c, more, batch), parts(c, less, batch)
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        assert a[2] == pytest.approx(b[2], rel=1e-5)
    own = batch | {"loss_mask_BT": batch["loss_mask_BT"] * jnp.array([[OWN], [1]])}
    loss, count, metrics = parts(c, Lesson(short, teacher), own)
    _, n, both = parts(c, Lesson(short, teacher), batch)
    alone = {k: v[1:] for k, v in batch.items()}
    row = short.replace(hidden_BTD=short.hidden_BTD[1:])
    assert (count, metrics["kl"]) == (n, pytest.approx(both["kl"], rel=1e-6))
    assert metrics["data_loss"] == pytest.approx(float(sft.objective(row, alone)[0]), rel=1e-5)
    assert loss == pytest.approx(0.5 * metrics["data_loss"] + 0.5 * 4 * both["kl"], rel=1e-5)
    everywhere = parts(c, Lesson(short, teacher), batch, "pretrain")
    assert everywhere[1] == 6 - 1 + 5 - 1 + 8 - 1


def test_features_and_attention_against_float64(batch):
    x, y, weight = np.asarray(normal(0, B, T, D)), np.asarray(normal(1, B, T, D)), np.asarray(base.next_token(batch)[1])
    mse = (((x - y) ** 2).mean(-1) * weight).sum()
    cosine = ((1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)) * weight).sum()
    for loss, want in (("mse", mse), ("cosine", cosine)):
        assert float(distill.features(jnp.array(x), jnp.array(y), weight, loss)) == pytest.approx(want, rel=1e-5)
    causal = np.tril(np.ones((T, T)))
    p, q = (softmax(np.where(causal, np.asarray(normal(s, B, n, T, T)), -1e30)) for s, n in ((2, 4), (3, 2)))
    few, most = p.mean(1, keepdims=True), q.mean(1, keepdims=True)
    safe = np.maximum
    for mine, taught, a, b in ((p[:, :2], q, p[:, :2], q), (p, q, few, most)):
        kl = (np.where(causal, b * np.log(safe(b, 1e-30) / safe(a, 1e-30)), 0).sum(-1).mean(1) * weight).sum()
        mse = (((a - b) ** 2).sum(-1).mean(1) * weight).sum()
        for loss, want in (("kl", kl), ("mse", mse)):
            found = distill.attention(jnp.array(mine, jnp.float32), jnp.array(taught, jnp.float32), weight, loss)
            assert float(found) == pytest.approx(want, rel=1e-4)
    lesson = Lesson(outputs(0), outputs(2), ((jnp.array(x), jnp.array(y)),), ((jnp.array(p), jnp.array(q)),))
    both = {"features": {"layers": [[0, 0]], "weight": 3.0}, "attention": {"layers": [[0, 1]], "weight": 0.25}}
    c = Distill.model_validate({"teacher": "t", **both})
    loss, _, metrics = parts(c, lesson, batch)
    without = parts(Distill(teacher="t"), lesson, batch)[0]
    assert loss == pytest.approx(without + 3 * metrics["features"] + 0.25 * metrics["attention"], rel=1e-6)
