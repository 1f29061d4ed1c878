"""The parts of a report, as plain values: of one text, of what tuning changed, of training rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.explaining import attributions, changes, insides
from jaxtune.explaining.influence import Influence
from jaxtune.explaining.questions import Question
from jaxtune.explaining.reader import Reader
from jaxtune.nodes import soft_prompt
from jaxtune.tuned import Tuned

Tree = dict[str, Any]
_LIKELIEST = 5
_TOKENS = 12  # of those that changed most
_TEXT = 600  # characters of a training row


def on_text(reader: Reader, q: Question, baseline: str, parts: Sequence[str], remarks: list[str]) -> Tree:
    """What an answer to one text comes from; what did not go well is added to `remarks`."""
    words = reader.tuned.tokenizer
    p_V = reader.outputs(q)
    out: Tree = {
        "name": q.text.name,
        "text": q.text.shown,
        "tokens": q.text.pieces(words),
        "ids": q.text.ids,
        "words": [{"text": w, "tokens": tokens} for w, tokens in q.text.words(words)],
        "answer": q.says,
        "answer_tokens": [output_name(reader.tuned, t) for t in q.target],
        "reference": q.text.answer,
        "likeliest": [[output_name(reader.tuned, int(i)), float(p_V[i])] for i in np.argsort(-p_V)[:_LIKELIEST]],
    }
    if "attributions" in parts:
        found = attributions.attribute(reader, q, baseline)
        if not found.complete:
            remarks.append(
                f"{q.text.name}: integrated gradients over {found.steps} points miss the difference that they explain "
                f"by {100 * found.error:.1f} %; read occlusion instead"
                + (", or take --baseline pad" if baseline == "zero" else "")
            )
        out["attributions"] = {
            **found.told(),
            "scores": {name: _rounded(score_P) for name, score_P in found.score_P.items()},
            "by_word": {
                name: _rounded([score_P[tokens].sum() for _, tokens in q.text.words(words)])
                for name, score_P in found.score_P.items()
            },
        }
    if "inside" in parts:
        seen = insides.see(reader, q)
        lens, own = seen.lens, q.prompt
        out["lens"] = {
            "top": [
                [[[output_name(reader.tuned, int(t)), round(float(p), 4)] for t, p in zip(*place, strict=True)]
                 for place in zip(top_TK, p_TK, strict=True)]
                for top_TK, p_TK in zip(lens.top_LTK, lens.p_LTK, strict=True)
            ],
            "answer": _rounded(lens.target_L),
            "rank": lens.rank_L.tolist(),
        }  # fmt: skip
        if seen.p_LNTS is None or seen.rollout_LTS is None:
            remarks.append("attention is not shown: a prefix stands before the text in every layer")
        else:
            out["attention"] = {
                "from_last": _rounded(seen.p_LNTS[:, :, -1, own]),
                "rollout": _rounded(seen.rollout_LTS[-1][own, own]),
            }
    return out


def output_name(tuned: Tuned, output: int) -> str:
    """A label, or a token as text."""
    if (head := tuned.blueprint.decoder.task) is not None:
        return head.labels[output]
    text = tuned.tokenizer.decode([output])
    return text if text.strip() and "\ufffd" not in text else str(tuned.tokenizer.convert_ids_to_tokens(output))


def on_changes(reader: Reader, base: Tuned, asked: Sequence[Question], remarks: list[str]) -> Tree:
    """What tuning changed in weights, activations and next tokens."""
    tuned, words = reader.tuned, reader.tuned.tokenizer
    found, large = changes.updates(tuned, base)
    if large:
        remarks.append(f"{large} matrices of full updates are too large for their effective ranks, which are left out")
    prompt = soft_prompt.of(tuned.weights)
    virtual = 0 if prompt is None else len(tuned.blueprint.virtual_ids) or getattr(prompt, "tokens", 0)
    out: Tree = {
        "weights": [u._asdict() for u in found],
        "virtual_tokens": virtual,
        "tables": changes.changed_rows(tuned, base, _TOKENS),
    }
    texts = [q.text.ids for q in asked]
    if max(max(ids) for ids in texts) >= base.blueprint.decoder.rows:
        remarks.append("activations are not compared with the base's, which lacks some of the texts' tokens")
        return out
    readers = reader, Reader(base, rows=reader.rows)
    new, old = ([insides.activations(r, ids) for ids in texts] for r in readers)
    special = {*words.all_special_ids}
    kept = [np.array([i not in special for i in ids]) for ids in texts]
    out["cka"] = changes.by_layer(new, old, kept)
    out["cka_tokens"] = int(sum(k.sum() for k in kept))
    if tuned.blueprint.decoder.task is None and base.blueprint.decoder.task is None:
        gain_V, most = changes.likelier(new, old, _TOKENS)
        out["likelier"] = [[output_name(tuned, int(t)), float(gain_V[t])] for t in most]
        out["divergence"] = [_rounded(changes.divergence(x, y)) for x, y in zip(new, old, strict=True)]
        out["next"] = [
            [[output_name(m, int(t)) for m, t in zip((base, tuned), place, strict=True)]
             for place in zip(y.p_TV.argmax(1), x.p_TV.argmax(1), strict=True)]
            for x, y in zip(new, old, strict=True)
        ]  # fmt: skip
    return out


def on_influence(tuned: Tuned, found: Influence, n: int, remarks: list[str]) -> Tree:
    """The most helpful and the most harmful training rows for each question."""
    if len(found.checkpoints) == 1:
        remarks.append("influence: there is one checkpoint, so only the last of the run speaks; see checkpoint.keep")
    if len(found.rows) < found.total:
        remarks.append(f"influence: {len(found.rows):,} of {found.total:,} training rows were drawn (--influence-rows)")
    by_question = []
    for score_N in found.score_QN:
        order = np.argsort(-score_N, kind="stable")
        by_question.append({
            "helpful": [_row(tuned, found, int(i), score_N) for i in order[:n] if score_N[i] > 0],
            "harmful": [_row(tuned, found, int(i), score_N) for i in order[::-1][:n] if score_N[i] < 0],
            "spread": float(np.std(score_N)),
        })  # fmt: skip
    return {
        "checkpoints": [c._asdict() for c in found.checkpoints],
        "rows": len(found.rows),
        "of": found.total,
        "inputs": by_question,
    }


def _row(tuned: Tuned, found: Influence, i: int, score_N: np.ndarray) -> Tree:
    example, words, head = found.rows.examples[i], tuned.tokenizer, tuned.blueprint.decoder.task
    own = example.ids[example.ids < len(words)]
    text = words.decode(own.tolist(), skip_special_tokens=True)
    if head is None:
        answer = words.decode(example.ids[example.mask].tolist(), skip_special_tokens=True)
    else:
        label = np.asarray(example.columns["label_S"])
        several = [name for name, there in zip(head.labels, label.ravel(), strict=False) if there]
        answer = f"{float(label):g}" if head.kind == "regression" else ", ".join(several) if head.multi else ""
        answer = answer or head.labels[int(label)]
    return {"origin": found.rows.origins[i], "text": text[:_TEXT], "answer": answer[:_TEXT], "score": float(score_N[i])}


def _rounded(x: Any) -> Any:
    return np.round(np.asarray(x, np.float64), 6).tolist()
