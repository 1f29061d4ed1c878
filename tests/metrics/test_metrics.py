"""Metrics beside scikit-learn, sacrebleu, rouge-score and slow definitions of their own, on random predictions."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.metrics import (
    base,
    choice,
    classification,
    dialogue,
    language,
    maths,
    regression,
    spans,
    squad,
    summarisation,
    translation,
)

few = settings(max_examples=40, deadline=None)
LABELS = ["ant", "bee", "cat"]
rows_of_labels = st.lists(st.tuples(st.sampled_from([*LABELS, "dog"]), st.sampled_from(LABELS)), min_size=1)


@few
@given(rows_of_labels)
def test_classification_by_counting(rows):
    predictions, references = zip(*rows, strict=True)
    got = classification.score(predictions, references, LABELS)
    counts = Counter(rows)
    of = {}
    for name in LABELS:
        right = counts[name, name]
        ours, theirs = predictions.count(name), references.count(name)
        of[name] = 2 * right / (ours + theirs) if ours + theirs else 0.0
        assert got.details["classes"][name]["rows"] == theirs
        assert got.details["classes"][name]["f1"] == pytest.approx(of[name])
    n = len(rows)
    assert got.values["accuracy"] == pytest.approx(sum(p == r for p, r in rows) / n)
    assert got.values["f1_macro"] == pytest.approx(sum(of.values()) / 3)
    assert got.values["f1_weighted"] == pytest.approx(sum(of[r] for r in references) / n)
    matrix = got.details["confusion"]
    for i, r in enumerate(matrix["references"]):
        for j, p in enumerate(matrix["predictions"]):
            want = counts["dog", r] if p == classification.OTHER else counts[p, r]
            assert matrix["counts"][i][j] == want
    assert sum(map(sum, matrix["counts"])) == n


@few
@given(rows_of_labels)
def test_matthews_is_the_correlation_of_the_matrix(rows):
    predictions, references = zip(*rows, strict=True)
    p, r = (np.array([[x == name for name in [*LABELS, "dog"]] for x in xs], float) for xs in (predictions, references))
    p, r = p - p.mean(0), r - r.mean(0)
    size = np.sqrt((p * p).sum() * (r * r).sum())
    want = (p * r).sum() / size if size > 1e-12 else 0.0  # Gorodkin, 2004
    assert classification.score(predictions, references, LABELS).values["mcc"] == pytest.approx(want, abs=1e-9)


@few
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from([*LABELS, "dog"])), st.sets(st.sampled_from(LABELS))), min_size=1, max_size=9
    )
)
def test_multilabel_by_counting(rows):
    predictions, references = zip(*rows, strict=True)
    got = classification.score_multilabel(predictions, references, LABELS)
    known = [p - {"dog"} for p in predictions]

    def f1(right, ours, theirs):
        return 2 * right / (ours + theirs) if ours + theirs else 0.0

    by_row = [f1(len(p & r), len(p), len(r)) for p, r in zip(known, references, strict=True)]
    both = sum(len(p & r) for p, r in zip(known, references, strict=True))
    assert got.values["f1_samples"] == pytest.approx(np.mean(by_row))
    assert got.values["f1_micro"] == pytest.approx(f1(both, sum(map(len, known)), sum(map(len, references))))
    assert got.values["exact_match"] == pytest.approx(np.mean([p == r for p, r in rows]))
    assert got.details["unknown"] == sum("dog" in p for p in predictions)


def test_an_unknown_label_is_named():
    with pytest.raises(UserError, match="'catt'.*did you mean 'cat'"):
        classification.score(["cat"], ["catt"], LABELS)


def test_confusion_is_drawn(tmp_path):
    scores = classification.score(["$a", "zz"], ["$a", "b"], ["$a", "b"])
    classification.draw(scores, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


@few
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1))
def test_regression_beside_its_libraries(rows):
    from scipy import stats
    from sklearn import metrics

    p, r = np.array(rows, float).T
    got = regression.score(p, r).values
    assert got["mse"] == pytest.approx(metrics.mean_squared_error(r, p))
    assert got["mae"] == pytest.approx(metrics.mean_absolute_error(r, p))
    if np.ptp(p) and np.ptp(r):
        assert got["pearson"] == pytest.approx(stats.pearsonr(p, r).statistic)
        assert got["spearman"] == pytest.approx(stats.spearmanr(p, r).statistic)
    else:
        assert got["pearson"] == got["spearman"] == 0.0


def test_regression_refuses_what_is_no_number():
    with pytest.raises(UserError, match="row 2"):
        regression.score([1.0, float("nan")], [1.0, 2.0])


words = st.lists(st.sampled_from(["the", "A", "cat", "cats", "an", "it's", "—", "New-York", "!", "  "]), max_size=6)


@few
@given(words, st.lists(words, max_size=3))
def test_squad_by_its_definition(prediction, references):
    prediction, references = " ".join(prediction), [" ".join(r) for r in references]

    def bag(text):  # lower case, no ASCII punctuation, no articles
        kept = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
        return [w for w in re.split(r"\s+", re.sub(r"(?<!\w)(a|an|the)(?!\w)", " ", kept)) if w]

    golds = [g for g in map(bag, references) if g] or [[]]
    ours = bag(prediction)
    exact = max(float(ours == g) for g in golds)
    f1 = 0.0
    for g in golds:
        left, common = list(g), 0
        for w in ours:
            if w in left:
                left.remove(w)
                common += 1
        f1 = max(f1, 2 * common / (len(ours) + len(g)) if ours and g else float(ours == g))
    got = squad.score({"q": prediction}, {"q": references}).values
    assert got["exact_match"] == 100 * exact
    assert got["f1"] == pytest.approx(100 * f1)


def test_squad_with_questions_without_answers():
    predictions = {"a": "in the year 1066", "b": "", "c": "Rouen"}
    references = {"a": ["1066", "1066 AD"], "b": [], "c": [], "d": ["Rollo"]}
    got = squad.score(predictions, references)
    assert got.values == {
        "exact_match": 25.0,
        "f1": pytest.approx((50.0 + 100.0) / 4),
        "has_answer_exact_match": 0.0,
        "has_answer_f1": pytest.approx(25.0),
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
    }
    assert got.details["not_predicted"] == 1


@few
@given(st.text("北京中国，。ab ", max_size=8), st.text("北京中国，。ab ", min_size=1, max_size=8))
def test_chinese_answers_by_the_longest_common_run(prediction, reference):
    def segments(text):
        text = "".join(c for c in text.lower().strip() if c not in "，。")
        return re.findall(r"[ab]+|[^ab\s]", text)

    def longest(a, b):
        return max(
            (n for i in range(len(a)) for j in range(len(b)) for n in range(1, 9)
             if i + n <= len(a) and j + n <= len(b) and a[i : i + n] == b[j : j + n]),
            default=0,
        )  # fmt: skip

    a, b = segments(prediction), segments(reference)
    common = longest(a, b)
    want = 2 * common / (len(a) + len(b)) if a and b else float(a == b)
    assert squad.score({"q": prediction}, {"q": [reference]}, "zh").values["f1"] == pytest.approx(100 * want)


def test_chinese_answers():
    got = squad.score({"q": "位于北京。"}, {"q": ["北京", "中国北京"]}, "zh").values
    assert got == {"exact_match": 0.0, "f1": pytest.approx(100 * 2 * 2 / (4 + 2))}
    assert squad.score({"q": "《北京》"}, {"q": ["北京"]}, "zh").values["exact_match"] == 100.0


@pytest.mark.parametrize(
    ("predictions", "references", "tokenizer"),
    [
        (["The cat sat on a mat.", "Hello!"], ["The cat sat on the mat.", "Hello there!"], "13a"),
        (["我 爱 北京天安门。"], ["我爱北京的天安门。"], "zh"),
        (["これはペンです"], ["それはペンです。"], "char"),
    ],
)
def test_translation_is_sacrebleus(predictions, references, tokenizer):
    import sacrebleu

    got = translation.score(predictions, references)
    want = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    assert got.values["bleu"] == pytest.approx(want)
    assert got.values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    assert f"tok:{tokenizer}" in got.details["signatures"]["bleu"]
    assert len(got.rows["bleu"]) == len(predictions)
    if tokenizer == "13a":
        assert got.values["ter"] == pytest.approx(sacrebleu.corpus_ter(predictions, [references]).score)


def test_translation_with_unequal_numbers_of_references():
    got = translation.score(["a b c d", "e f g h"], [["x y", "a b c d"], "e f g h"])
    assert got.values["bleu"] == pytest.approx(100.0)
    assert translation.score(["a"], ["a"], "zh-CN").details["language"] == "zh"


@few
@given(st.lists(st.sampled_from("abcde"), max_size=8), st.lists(st.sampled_from("abcde"), min_size=1, max_size=8))
def test_rouge_by_its_definition(ours, theirs):
    got = summarisation.score([" ".join(ours)], [" ".join(theirs)]).values
    common = sum((Counter(ours) & Counter(theirs)).values())
    table = np.zeros((len(ours) + 1, len(theirs) + 1), int)
    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert got["rouge1"] == pytest.approx(2 * common / (len(ours) + len(theirs)))
    assert got["rougeL"] == pytest.approx(2 * table[-1, -1] / (len(ours) + len(theirs)))


def test_rouge_takes_the_best_reference_and_chinese_characters():
    got = summarisation.score(["the cat", "猫坐着"], [["a dog", "the cat"], "猫站着"]).values
    assert got["rouge1"] == pytest.approx((1 + 0) / 2)  # together they are English: no Latin letter in the second
    alone = summarisation.score(["猫坐着"], ["猫站着"])
    assert alone.values["rouge1"] == pytest.approx(2 / 3)
    assert alone.details["tokenizer"] == "characters"


@few
@given(st.lists(st.text("ab ", max_size=6), min_size=1, max_size=5))
def test_distinct_by_counting(texts):
    got = dialogue.score(texts).values
    tokens = [t.split() for t in texts]
    pairs = [tuple(t[i : i + 2]) for t in tokens for i in range(len(t) - 1)]
    assert got["distinct2"] == pytest.approx(len(set(pairs)) / max(1, len(pairs)))
    assert got["mean_length"] == pytest.approx(np.mean([len(t) for t in tokens]))


@pytest.mark.parametrize(
    ("prediction", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", 1, 1),
        ("#### 7.00", 1, 1),
        ("#### $7", 1, 1),
        ("So it is 7.", 0, 1),
        ("7 and then 8", 0, 0),
        ("#### 8\n7", 0, 0),
        ("#### -7", 0, 0),
        ("", 0, 0),
    ],
)
def test_maths(prediction, strict, flexible):
    got = maths.score([prediction], ["1 + 6\n#### 7"])
    assert got.values == {"exact_match": strict, "exact_match_flexible": flexible}


def test_maths_wants_a_number():
    with pytest.raises(UserError, match="has no number"):
        maths.score(["1"], ["none"])


tags = st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=7)


@few
@given(st.data())
def test_entities_by_conllevals_rule(data):
    row = data.draw(tags)
    begins = [
        i
        for i, t in enumerate(row)
        if t != "O" and (t[0] == "B" or i == 0 or row[i - 1] == "O" or row[i - 1][2:] != t[2:])
    ]
    want = []
    for i in begins:
        end = i
        while end + 1 < len(row) and row[end + 1] == f"I-{row[i][2:]}":
            end += 1
        want.append((row[i][2:], i, end))
    assert spans.entities(row) == want


def test_span_scores_by_hand():
    references = [["B-a", "I-a", "O", "B-b"], ["B-a", "O", "O", "O"]]
    predictions = [["B-a", "I-a", "O", "B-a"], ["B-a", "I-a", "O", "O"]]
    got = spans.score(predictions, references)
    assert got.values["precision"] == got.values["recall"] == pytest.approx(1 / 3)
    assert got.values["accuracy"] == pytest.approx(6 / 8)
    assert got.details["types"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "entities": 1}
    with pytest.raises(UserError, match="row 1"):
        spans.score([["O"]], [["O", "O"]])


def test_choices():
    rows = [[choice.Choice("no", -2.0, 1), choice.Choice("yes, it is", -3.0, 4)]]
    assert choice.score(rows, [0]).values == {"acc": 1.0, "acc_norm": 0.0, "acc_token": 0.0}


def test_languages_are_seen():
    assert language.of(["Он читает 北京"]) == "en"
    assert language.of(["안녕하세요"]) == "ko"


def test_better():
    assert base.better("mse") == "min"
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        base.better("acuracy")


@pytest.mark.parametrize("module", [classification, regression, translation, summarisation, dialogue, maths, spans])
def test_nothing_to_score_is_said(module):
    empty = {classification: ([], [], ["a"]), dialogue: ([],)}.get(module, ([], []))
    with pytest.raises(UserError, match=r"there are no (rows|answers) to score"):
        module.score(*empty)
