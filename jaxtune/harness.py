"""Our models under EleutherAI's lm_eval, whose tasks then run as they are: `pip install jaxtune[lm-eval]`.

Texts become tokens as lm_eval's own adapter of Hugging Face models does it, so that numbers can be compared.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxtune import log
from jaxtune.data.examples import Message
from jaxtune.errors import UserError
from jaxtune.generate import Generation, Sampling
from jaxtune.tuned import Tuned

_SAMPLED = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "num_beams": int}
_MAX_NEW = 256  # where a task names no bound


class Harness(TemplateLM):
    """A `Tuned` as lm_eval wants models."""

    def __init__(self, model: Tuned, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.tokenizer = model.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.blueprint.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise UserError(f"lm_eval: a model has one chat template here, so {chat_template!r} cannot be chosen")
        return self.model.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(m["role"], m["content"]) for m in chat_history]
        if add_generation_prompt:
            return self.model.prompt(messages)
        return self.model.prompt(messages[:-1]) + messages[-1].content  # an answer that has begun already

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.generator.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # what the tokenizer adds by itself, but no second BOS
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """Sums over the continuations, and whether each is the likeliest text. Contexts lose their beginning."""
        contexts, ends = [], []
        for (context, text), context_ids, text_ids in requests:
            room = self.max_length + 1 - len(text_ids)  # the last token is not read
            if room < 1:
                raise UserError(f"lm_eval: {text[:40]!r} alone is longer than the model's context")
            if not text_ids:
                raise UserError(f"lm_eval: {text[:40]!r} adds no token to {context[-40:]!r}")
            contexts.append(context_ids[-room:])
            ends.append(text_ids)
        with jax.set_mesh(self.model.mesh):
            found = self.model.generator.judge(contexts, ends, self.batch_size)
        return [(sum(x.logprobs), x.greedy) for x in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token after as much context as there is."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, windows):
                pairs.append((("", request.args[0]), *window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, requests of one kind together. Contexts lose their beginning."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        made: dict[int, Generation] = {}
        with jax.set_mesh(self.model.mesh):
            for key, members in groups.items():
                s = _sampling(json.loads(key))
                room = self.max_length - min(s.max_new_tokens, self.max_length // 2)
                ids = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
                order = sorted(members, key=lambda i: -len(ids[i]))
                for first in range(0, len(order), self.batch_size):
                    part = order[first : first + self.batch_size]
                    made |= zip(part, self.model.generator.generate([ids[i] for i in part], s), strict=True)
        return [made[i].text for i in range(len(requests))]


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    """How a task of lm_eval wants texts to be generated."""
    given = {k: v for k, v in kwargs.items() if v is not None}
    stop = given.pop("until", [])
    longest = given.pop("max_gen_toks", given.pop("max_new_tokens", _MAX_NEW))
    sampled = given.pop("do_sample", float(given.get("temperature", 0)) > 0)
    if unknown := given.keys() - _SAMPLED.keys():
        raise UserError(
            f"lm_eval: {sorted(unknown)[0]!r} in a task's generation_kwargs means nothing here; allowed: until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLED)}"
        )
    values: dict[str, Any] = {k: _SAMPLED[k](v) for k, v in given.items()}
    values["beams"] = values.pop("num_beams", 1)
    values["temperature"] = values.get("temperature", 1.0) if sampled else 0.0
    return Sampling(int(longest), stop=tuple([stop] if isinstance(stop, str) else stop), **values)


def evaluate(
    model: Tuned,
    tasks: Sequence[str],
    include_path: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm_eval, its own (which download their data) or those of YAML files in `include_path`.

    Returns: lm_eval's `results`, `versions`, `configs` and `n-samples`.

    Raises:
      UserError: there is no such task, or it cannot be asked of this model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        raise UserError(f"lm_eval has no task {unknown[0]!r}; --include-path names a folder of further ones")
    if chat_template and model.template is None:
        raise UserError("--chat-template: the model has none")
    found = simple_evaluate(
        Harness(model, batch_size), tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False,
        apply_chat_template=chat_template, bootstrap_iters=1000,
    )  # fmt: skip
    if found is None:
        raise UserError("lm_eval gave no results")
    if limit is not None:
        log.warn(f"only the first {limit} rows of each task were scored")
    return {k: found[k] for k in ("results", "versions", "configs", "n-samples") if k in found}


def table(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of lm_eval's results."""
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}")
                beside = f" ± {error:.4f}" if isinstance(error, float) else ""
                rows.append(
                    (
                        f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else ""),
                        f"{value:.4f}{beside}",
                    )
                )
    return rows
