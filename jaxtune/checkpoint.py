"""Checkpoints: what trains, the optimiser, the step, the key and the data position, through Orbax.

A step is either whole or not there: Orbax writes it beside its place, a manifest of all its files is added, and only
then it gets its name; all that goes on behind the training. A step whose files are no longer those of its manifest is
named and left out for the one before. Frozen weights are not saved: they are read from the model folder again.

Names in the folder: `9` a whole step, `9.saving…` one that is being written, `9.bad` one that was left out, which stays
until a later step is whole, `9.old` one that is saved again, until that is whole, and `9.gone` one that is being
deleted.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from pydantic import ValidationError

from jaxtune import distributed, log, manifest
from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.weights import path_name

T = TypeVar("T")
# What may differ between a run and its resumption; everything else would change what the run means. Model and data are
# compared by what they hold, not by where they lie.
_FREE = (
    "output", "model", "data", "checkpoint", "evaluate", "mesh", "track", "sweep", "distill.teacher", "distill.columns",
    "train.log_every", "train.remat", "train.attention", "train.nonfinite", "train.spike", "train.profile",
    "optim.learning_rate", "optim.clip", "optim.offload", "template", "versions",
)  # fmt: skip
_TROUBLE = (OSError, ValueError, RuntimeError)  # tensorstore's ValueError may be a full disk, jax's RuntimeError a host
_PAUSES = (0.5, 2.0, 5.0)  # seconds between tries of reading what storage does not give
_PROBE = 2**16  # bytes that are written to see whether any can be
_MARK = "manifest"  # what `about` says where a manifest belongs to the step


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path: the same whatever the containers are."""
    return {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def unflat(leaves: Mapping[str, Any], like: Any) -> Any:
    """The tree of the form of `like` with the leaves of `flat`."""
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(tree, [leaves[path_name(p)] for p, _ in paths])


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, folder: Path, keep: int = 3, read_only: bool = False) -> None:
        """Args:
        folder: where they are, or will be.
        keep: how many stay.
        read_only: touch nothing; the run may be going on in another process.
        """
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what it says of a failed save is said here, in a line
        self.folder, self.keep, self.read_only = folder.resolve(), keep, read_only
        self._args = ocp.args
        # without a name of its own, two of them meet at each other's barriers and wait for ever
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.name)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=apart)
        self._writes = distributed.first() and not read_only
        self._verified: dict[int, Mapping[str, Any]] = {}  # what the manifests remember
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._behind: futures.Future[None] | None = None
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob("*.saving*"), *self.folder.glob("*.gone"), *self.folder.glob("*-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
            for old in self.folder.glob("*.old"):
                if (place := self.folder / old.stem).exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:  # killed between two renames
                    os.replace(old, place)

    # --- what is there ------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """All steps that are there, whole or damaged since, rising."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(f.name) for f in found if f.name.isdecimal() and f.is_dir())

    @property
    def newest(self) -> int | None:
        """The newest step whose files are as they were written; the same on all processes.

        Raises:
          UserError: there are steps, and all are damaged or cannot be read.
        """
        if self._behind is not None:
            futures.wait([self._behind])
        try:
            found, problem = self._find() if distributed.first() else None, None
        except UserError as e:
            found, problem = -1, e
        except OSError as e:
            found, problem = -1, UserError(f"{self.folder}: cannot be read ({e.strerror}); mend the storage")
        if distributed.count() > 1:
            from jax.experimental import multihost_utils

            found = int(multihost_utils.broadcast_one_to_all(np.int32(-2 if found is None else found)))
        if found == -1:
            raise problem or UserError(f"{self.folder}: every checkpoint is damaged; the first process says how")
        return None if found == -2 else found

    def _find(self) -> int | None:
        bad: dict[int, str] = {}
        unread: dict[int, str] = {}  # nothing is proved against them: they stay as they are
        for step in reversed(_patiently(lambda: self.steps)):
            try:
                reason = "" if step in self._verified else _patiently(lambda n=step: self._damage(n))  # type: ignore[misc]
            except OSError as e:
                unread[step] = f"cannot be read: {e.strerror}"
                continue
            if not reason:
                for n, why in unread.items():
                    log.warn(f"{self.folder / str(n)}: {why}; it is left as it is, and that of step {step} is taken")
                for n, why in bad.items():
                    log.warn(
                        f"{self.folder / str(n)}: this checkpoint is damaged ({why}); it is left out, and that of step "
                        f"{step} is taken"
                    )
                    self._put_aside(n)
                return step
            bad[step] = reason
        there = "; ".join(f"{n}: {why}" for n, why in (unread | bad).items())
        if unread:
            raise UserError(f"{self.folder}: no checkpoint is whole ({there}); mend the storage and try again")
        if bad:
            raise UserError(
                f"{self.folder}: every checkpoint is damaged ({there}); bring one back from a copy, or remove the "
                "folder to begin again"
            )
        return None

    def _put_aside(self, step: int) -> None:
        if not self._writes:
            return
        try:
            shutil.rmtree(aside := self.folder / f"{step}.bad", ignore_errors=True)
            os.replace(self.folder / str(step), aside)
        except OSError as e:
            log.warn(f"{self.folder / str(step)}: cannot be put aside ({e.strerror}); remove it")

    def _damage(self, step: int) -> str:
        """What is wrong with a step; nothing if it is as it was written.

        Raises:
          OSError: it cannot be read.
        """
        place = self.folder / str(step)
        try:
            about, reason = manifest.read(place)
        except FileNotFoundError:
            try:
                if _MARK in self._read_about(step):
                    return f"{manifest.NAME} is missing"
            except (FileNotFoundError, NotADirectoryError, ValueError):
                return f"{manifest.NAME} is missing, and it cannot be read"
            log.warn(f"{place}: was saved before checkpoints had manifests, so damage would not be seen")
            about, reason = {}, ""
        if not reason and about and about["step"] != step:
            reason = f"it is that of step {about['step']}"
        if not reason:
            self._verified[step] = about or {}
        return reason

    # --- saving -------------------------------------------------------------------------------------------------------

    def done(self, within: float) -> bool:
        """Whether what is being saved is done, or will be within so many seconds."""
        return self._behind is None or not futures.wait([self._behind], within).not_done

    @property
    def busy(self) -> bool:
        """Whether a save is still going on behind."""
        return self._behind is not None and not self._behind.done()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        data: Mapping[str, Any],
        about: Mapping[str, Any],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Save in the background: trees of arrays by name, where the batches stand, and the config and digests.

        Args:
          step: how many steps were taken.
          state: copied from the devices before this returns, so they may be given away.
          data: JSON.
          about: JSON.
          then: called, in another thread, when it is whole on the disk.

        Raises:
          UserError: it cannot be written, or the save before could not.
        """
        args, problem = self._args, None
        trees = {name: flat(tree) for name, tree in state.items()}
        place = self.folder / f"{step}.saving"
        try:
            self.wait()
            if self._writes:
                self._make_ready(step, sum(x.nbytes for x in jax.tree.leaves(trees)))
        except UserError as e:
            problem = e
        except _TROUBLE as e:
            problem = self._unwritable(e)
        if not distributed.everywhere(problem is None):  # all begin it or none: they would wait for each other
            raise problem or self._unwritable("another process cannot, and says why")
        try:
            self._orbax.save(
                place,
                args=args.Composite(
                    state=args.StandardSave(trees),
                    data=args.JsonSave(dict(data)),
                    about=args.JsonSave({**about, _MARK: 1}),
                ),
            )
        except _TROUBLE as e:
            raise self._unwritable(e) from e
        remembered = {"step": step, "state": {n: [x.dtype.name, list(x.shape)] for n, x in flat(trees).items()}}
        self._behind = self._pool.submit(self._commit, step, place, remembered, then)

    def _make_ready(self, step: int, need: int) -> None:
        """Look before a half is written, as far as one process can for all, whether `need` bytes can be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{step}.saving*"):
            shutil.rmtree(left)
        if need > (free := shutil.disk_usage(self.folder).free):
            raise OSError(f"it needs {log.size(need)}, {log.size(free)} are free")
        probe = self.folder / ".probe"
        probe.write_bytes(bytes(min(need, _PROBE)))
        probe.unlink()

    def _commit(self, step: int, place: Path, about: Mapping[str, Any], then: Callable[[], None] | None) -> None:
        """Behind the training: when Orbax is done, add the manifest, give the step its name, and delete old ones."""
        try:
            self._orbax.wait_until_finished()
            self._orbax.check_for_errors()
            if self._writes:
                manifest.write(place, about)
                if (target := self.folder / str(step)).exists():
                    shutil.rmtree(old := self.folder / f"{step}.old", ignore_errors=True)
                    os.replace(target, old)
                os.replace(place, target)
                self._verified[step] = about
                self._tidy(step)
            if then is not None:
                then()
        except _TROUBLE as e:
            raise self._unwritable(e) from e

    def _tidy(self, step: int) -> None:
        """Delete what a step that is whole now makes needless. A later one that could not be read stays."""
        try:
            for left in (*self.folder.glob(f"{step}.old"), *self.folder.glob("*.gone")):
                shutil.rmtree(left)
            for old in [n for n in self.steps if n <= step][: -self.keep]:
                self._verified.pop(old, None)
                os.replace(self.folder / str(old), gone := self.folder / f"{old}.gone")  # a half looks like no step
                shutil.rmtree(gone)
            for bad in self.folder.glob("*.bad"):
                if int(bad.stem) <= step:
                    shutil.rmtree(bad)
        except OSError as e:
            log.warn(f"{self.folder}: old checkpoints cannot be deleted ({e.strerror}); step {step} is whole")

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.result()

    def _unwritable(self, e: Exception | str) -> UserError:
        reason = " ".join(str(e).split())[:160]
        return UserError(f"{self.folder}: cannot save a checkpoint ({reason}); earlier ones are kept; make room")

    # --- reading ------------------------------------------------------------------------------------------------------

    def about(self, step: int) -> dict[str, Any]:
        """The config and digests that a step was saved with."""
        return {k: v for k, v in self._about(step).items() if k != _MARK}

    def digest(self, step: int) -> str:
        """Eight letters that say which bytes a step has, of its manifest; `old` where it has none."""
        return manifest.digest(self.folder / str(step))[:8] or "old"

    def _about(self, step: int) -> dict[str, Any]:
        try:
            return _patiently(lambda: self._read_about(step))
        except (OSError, ValueError) as e:
            raise self._unreadable(step, e) from e

    def _read_about(self, step: int) -> dict[str, Any]:
        """Not through Orbax, which has all processes read together."""
        return json.loads((self.folder / str(step) / "about" / "metadata").read_text())

    def _unreadable(self, step: int, e: Exception | str) -> UserError:
        reason = " ".join(str(e).split())[:200]
        return UserError(f"{self.folder / str(step)}: cannot be restored ({reason}); remove it to use an older one")

    def restore(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trees of the forms, shapes and shardings of `like` (abstract), and where the batches stood.

        Raises:
          UserError: the checkpoint cannot be read, or holds something else.
        """
        args = self._args
        trees = {name: flat(tree) for name, tree in like.items()}
        held = self._verified.get(step, {}).get("state", {})
        for name, x in flat(trees).items() if held else ():
            if held.get(name) != (wanted := [x.dtype.name, list(x.shape)]):
                raise self._unreadable(step, f"{name} is {held.get(name, 'not in it')}, not {wanted}")
        try:
            found = self._orbax.restore(
                self.folder / str(step),
                args=args.Composite(state=args.StandardRestore(trees), data=args.JsonRestore()),
            )
        except (OSError, ValueError, KeyError) as e:
            raise self._unreadable(step, e) from e
        return {name: unflat(found["state"][name], tree) for name, tree in like.items()}, found["data"]

    def close(self) -> None:
        """Wait for what is being saved; a failure that nobody asked for is said."""
        try:
            self.wait()
        except UserError as e:
            log.warn(str(e))
        self._pool.shutdown()
        self._orbax.close()


def _patiently(read: Callable[[], T]) -> T:
    """What is read from storage, which may be away for moments."""
    for pause in _PAUSES:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def start_step(config: Config, checkpoints: Checkpoints, about: Mapping[str, Any]) -> int:
    """Where a run starts: 0, or the newest checkpoint's step.

    Raises:
      UserError: the folder holds a run that this one does not continue.
    """
    newest = checkpoints.newest
    if newest is None:
        return 0
    if config.checkpoint.resume == "never":
        raise UserError(
            f"{checkpoints.folder}: holds checkpoints and checkpoint.resume=never; choose another output or remove it"
        )
    if differing := _differences(_today(checkpoints.about(newest)), about):
        raise UserError(
            f"{checkpoints.folder}: the run there differs in {', '.join(differing)}; choose another output, or give "
            "the same values to go on with it"
        )
    return newest


def _today(about: Mapping[str, Any]) -> dict[str, Any]:
    """With the keys that configs have since got, which were then as their defaults are."""
    try:
        return {**about, "config": Config.model_validate(about["config"]).model_dump(mode="json")}
    except (KeyError, ValidationError):  # it says itself in what it differs
        return dict(about)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if name.removeprefix("config.") in _FREE or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, f"{name}.")
        else:
            out.append(f"{name.removeprefix('config.')} ({a} there, {b} now)")
    return out
