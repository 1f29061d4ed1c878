import numpy as np
import pytest

from jaxtune.explaining import attributions, questions
from jaxtune.explaining.attributions import integrate
from jaxtune.explaining.questions import Question


def ask(reader, text: str, label: str) -> Question:
    read = questions.text_of(reader.tuned, questions.example_of(reader.tuned, text, "input 1"), 64)
    return questions.answered(reader.tuned, read, label)


def test_integrals_of_what_is_known():
    x, base, w = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.0, 1.0]), np.array([2.0, 1.0, -1.0])

    def linear(alpha_N, weight_N):
        return weight_N.sum() * (x - base) * w

    found = integrate(linear, float(((x - base) * w).sum()))
    np.testing.assert_allclose(found.score_T, (x - base) * w, rtol=1e-12)

    def cubes(alpha_N, weight_N):  # of f = Σ x³: the attribution of each is its own difference
        at_NT = base + alpha_N[:, None] * (x - base)
        return (weight_N[:, None] * 3 * at_NT**2 * (x - base)).sum(0)

    found = integrate(cubes, float((x**3 - base**3).sum()))
    np.testing.assert_allclose(found.score_T, x**3 - base**3, rtol=1e-12)
    assert (found.steps, found.complete) == (32, True)


def test_points_are_doubled_until_it_adds_up_or_it_is_said():
    def steep(alpha_N, weight_N):  # the slope of tanh(α / 0.0005)
        return np.array([(weight_N / 0.0005 / np.cosh(np.minimum(alpha_N / 0.0005, 300)) ** 2).sum()])

    found = integrate(steep, np.tanh(1 / 0.0005))
    assert found.steps > 32
    assert found.complete
    assert found.error <= 0.01
    lost = integrate(steep, np.tanh(1 / 0.0005), few=4, many=8)
    assert (lost.steps, lost.complete) == (8, False)
    assert lost.error > 0.01


@pytest.mark.parametrize("text", ["fox eats moon 1 + 2", "moon berries the fox eats"])
def test_the_word_that_decides_is_found_by_all_methods(reader, text):
    q = ask(reader, text, "night")
    found = attributions.attribute(reader, q)
    assert found.complete
    added = found.score_P["integrated_gradients"].sum()
    assert added == pytest.approx(found.value - found.baseline_value, rel=0.01)
    names = q.text.words(reader.tuned.tokenizer)
    for score_P in found.score_P.values():
        by_word = [score_P[tokens].sum() for _, tokens in names]
        assert names[int(np.argmax(by_word))][0] == "moon"


def test_slopes_are_finite_differences(reader):
    a = reader.asked(ask(reader, "fox eats moon", "night"))
    x_TD = reader.embedded(a.ids_T)
    base_TD, h = np.zeros_like(x_TD), 2e-3
    slope_T = reader.slopes(a, x_TD, base_TD, np.ones(1), np.ones(1))
    for t in range(3):
        moved = [x_TD.copy(), x_TD.copy()]
        moved[0][t] *= 1 + h
        moved[1][t] *= 1 - h
        up, down = reader.values(a, iter(moved), 2)
        assert slope_T[t] == pytest.approx((up - down) / (2 * h), rel=2e-2, abs=2e-4)


def test_occlusion_is_the_value_lost_when_a_token_is_replaced(reader):
    q = ask(reader, "fox eats moon", "night")
    found = attributions.attribute(reader, q)
    pad = attributions.pad_token(reader.tuned.tokenizer)
    at = next(i for i, x in enumerate(q.ids) if x not in reader.tuned.tokenizer.all_special_ids)
    ids = [*q.ids[:at], pad, *q.ids[at + 1 :]]
    before, after = (float(np.log(reader.outputs(x)[q.target[0]])) for x in (q, q._replace(ids=ids)))
    assert found.value == pytest.approx(before, abs=1e-5)
    assert found.score_P["occlusion"][at] == pytest.approx(before - after, abs=1e-5)


def test_an_answer_stays_as_it_is_and_special_tokens_too(words):
    q = ask(words, "1 + 2 =", " 3 berries")
    found = attributions.attribute(words, q)
    assert len(found.score_P["occlusion"]) == len(q.text.ids) < len(q.ids)
    lost = words.tuned.generator.score([q.text.shown], [" 3 berries"])[0]
    assert found.value == pytest.approx(sum(lost), abs=1e-4)
    special = [i in words.tuned.tokenizer.all_special_ids for i in q.text.ids]
    for score_P in found.score_P.values():
        assert not score_P[special].any()
