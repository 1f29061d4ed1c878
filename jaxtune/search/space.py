"""What a sweep tries: its keys and values, checked against the config that they belong to, before the first trial."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune import config
from jaxtune.config import METHODS, Config, Range, Sweep
from jaxtune.errors import UserError

if TYPE_CHECKING:
    import optuna

METHOD = "tuning.method"
_COMBINATIONS = 200  # of other keys, beside which a value that does not fit alone is tried
_OWN = ("output", "evaluate.metric", "evaluate.task")  # where trials are, and by what they are compared
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Space:
    """The keys of a sweep over a config."""

    sweep: Sweep
    base: Mapping[str, Any]  # the config that was given, without its sweep
    whole: frozenset[str]  # keys of ranges that take whole numbers
    group: str = "sweep"  # under which trackers show the trials

    def config(self, values: Mapping[str, Any], output: str) -> Config:
        """The config of a trial.

        Raises:
          UserError: these values do not go together.
        """
        c = _with(self.base, {**values, "output": output})
        if c.track.to and c.track.group is None:
            return c.model_copy(update={"track": c.track.model_copy(update={"group": self.group})})
        return c

    def named(self, params: Mapping[str, Any]) -> Values:
        """Values from what the store holds of them."""
        return {k: self._named(k).get(v, v) for k, v in params.items()}

    def _named(self, key: str) -> Values:
        tried = self.sweep.keys[key]
        return {} if isinstance(tried, Range) else {_name(v): v for v in tried}

    def suggest(self, trial: "optuna.trial.Trial") -> Values:
        """The values of a trial; those that it has already stay. The tuning method is drawn first."""
        values: Values = {}
        first = [METHOD] if METHOD in self.sweep.keys else []
        for key in [*first, *(k for k in self.sweep.keys if k != METHOD)]:
            if key == METHOD or _applies(key, self._method(values)):
                values[key] = self._suggest(trial, key)
        return values

    def _suggest(self, trial: "optuna.trial.Trial", key: str) -> Any:
        tried = self.sweep.keys[key]
        if not isinstance(tried, Range):
            named = self._named(key)
            return named[trial.suggest_categorical(key, list(named))]
        if key in self.whole:
            step = 1 if tried.step is None else int(tried.step)
            return trial.suggest_int(key, int(tried.low), int(tried.high), step=step, log=tried.log)
        return trial.suggest_float(key, tried.low, tried.high, step=tried.step, log=tried.log)

    def _method(self, values: Mapping[str, Any]) -> str | None:
        """The tuning method of a trial, where it is one of the keys."""
        return values.get(METHOD)

    def grid(self) -> Iterator[Values]:
        """Each combination, as `suggest` names its values: the last key changes first.

        Raises:
          UserError: a range has no steps.
        """
        steps = {key: self._points(key) for key in self.sweep.keys}
        order = sorted(steps, key=lambda k: k != METHOD)

        def combinations(keys: list[str], before: Values) -> Iterator[Values]:
            if not keys:
                yield before
            elif keys[0] == METHOD or _applies(keys[0], self._method(before)):
                for value in steps[keys[0]]:
                    yield from combinations(keys[1:], {**before, keys[0]: value})
            else:
                yield from combinations(keys[1:], before)

        return combinations(order, {})

    def _points(self, key: str) -> list[Any]:
        tried = self.sweep.keys[key]
        if not isinstance(tried, Range):
            return list(dict.fromkeys(_name(v) for v in tried))
        if tried.log or (tried.step is None and key not in self.whole):
            raise UserError(f"sweep.keys.{key}: sampler grid needs a list of values, or a range with a step")
        step = tried.step or 1
        points = [tried.low + i * step for i in range(int((tried.high - tried.low) / step * (1 + 1e-9)) + 1)]
        return [int(p) for p in points] if key in self.whole else points


def space(c: Config) -> Space:
    """The checked space of a config's sweep.

    Raises:
      UserError: a key is unknown, the sweep's own, or a value does not fit; before any trial.
    """
    if c.sweep is None:
        raise UserError(
            "sweep: the config has no section `sweep`; give it keys, such as sweep.keys: {tuning.rank: [4, 8]}"
        )
    base = c.model_dump(mode="json", exclude_unset=True, exclude={"sweep", "output"})
    if c.track.to and c.track.group is None:  # trials stand together there
        base["track"]["group"] = Path(c.output).resolve().name
    ends = {key: _ends(tried) for key, tried in c.sweep.keys.items()}
    whole = set()
    for key, tried in c.sweep.keys.items():
        if key in _OWN or key.split(".")[0] in ("sweep", *_OWN):
            raise UserError(f"sweep.keys.{key}: trials cannot differ in it; leave it out")
        found = [_checked(base, key, value, ends, c.sweep) for value in ends[key]]
        if isinstance(tried, Range) and all(type(x) is int for x in found):
            whole.add(key)
            if tried.step is not None and tried.step != int(tried.step):
                raise UserError(f"sweep.keys.{key}: step {tried.step} is no whole number, and the key takes those")
    s = Space(c.sweep, base, frozenset(whole), Path(c.output).name)
    if c.sweep.sampler == "grid":
        s.grid()
    return s


def _ends(tried: Range | list) -> list[Any]:
    return [tried.low, tried.high] if isinstance(tried, Range) else tried


def _checked(base: Mapping[str, Any], key: str, value: Any, ends: Mapping[str, list[Any]], sweep: Sweep) -> Any:
    """A value as the config that has it holds it: alone, or beside ends of the other keys.

    Raises:
      UserError: it fits into none.
    """
    method = value if key == METHOD else None
    if key.startswith("tuning.") and key != METHOD and METHOD in sweep.keys:
        method = next((m for m in ends[METHOD] if _applies(key, m)), ends[METHOD][0])
    problem: UserError | None = None
    beside = [k for k in ends if k not in (key, METHOD) and _applies(k, method)]
    combinations = itertools.product(*(ends[k] for k in beside))
    fixed = {} if method is None else {METHOD: method}
    for values in itertools.islice(itertools.chain([()], combinations), _COMBINATIONS):
        try:
            found: Any = _with(
                base,
                {**dict(zip(beside, values, strict=False)), **fixed, key: value},
                f"sweep.keys: {key}={json.dumps(value)}",
            )
        except UserError as e:
            problem = problem or e
            continue
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        return found
    assert problem is not None
    raise problem


def _applies(key: str, method: Any) -> bool:
    """Whether a key means something under a tuning method; where none is drawn, all do."""
    section, _, name = key.partition(".")
    if section != "tuning" or method not in METHODS:
        return True
    return name.partition(".")[0] in METHODS[method].model_fields


def _with(base: Mapping[str, Any], values: Mapping[str, Any], place: str = "sweep") -> Config:
    """A config with other values of dotted keys. Another tuning method starts afresh, as everywhere."""
    tree: Values = json.loads(json.dumps(base))
    if METHOD in values and not config.alike(tree.get("tuning", {}).get("method", "lora"), str(values[METHOD])):
        tree["tuning"] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UserError(f"sweep.keys.{key}: {parent} has no keys of its own")
        level[last] = value
    return config.validate(tree, place)


def _name(value: Any) -> Any:
    """A value as the store of trials holds it: lists as text."""
    return json.dumps(value) if isinstance(value, list) else value
