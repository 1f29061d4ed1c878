"""Checkpoints: what trains, the optimiser, the step, the key and the data position, through Orbax.

A step is either whole or not there (Orbax writes beside it and renames); saving goes on behind the training. Frozen
weights are not saved: they are read from the model folder again.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtune import log
from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.weights import path_name

# What may differ between a run and its resumption; everything else would change what the run means. Model and data are
# compared by what they hold, not by where they lie.
_FREE = (
    "output", "model", "data", "checkpoint", "evaluate", "mesh", "train.log_every", "train.remat",
    "optim.learning_rate", "optim.clip", "template", "versions",
)  # fmt: skip


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
        self._ocp = ocp
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            # without a name of its own, two managers meet at each other's barriers and wait for ever
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.folder.name),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def newest(self) -> int | None:
        """The newest step that is whole."""
        return self._manager.latest_step()

    def save(self, step: int, state: Mapping[str, Any], data: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Save in the background: trees of arrays by name, where the batches stand, and the config and digests."""
        args = self._ocp.args
        trees = {name: flat(tree) for name, tree in state.items()}
        need = sum(x.nbytes for x in jax.tree.leaves(trees))
        if need > (free := shutil.disk_usage(self.folder).free):  # before a half is written
            raise self._unwritable(f"it needs {log.size(need)}, {log.size(free)} are free")
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(trees), data=args.JsonSave(dict(data)), about=args.JsonSave(dict(about))
                ),
            )
        except (OSError, ValueError) as e:  # also of the save before, which went on behind
            raise self._unwritable(e) from e

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError) as e:  # tensorstore reports a full disk as ValueError
            raise self._unwritable(e) from e

    def _unwritable(self, e: Exception | str) -> UserError:
        reason = " ".join(str(e).split())[:160]
        return UserError(f"{self.folder}: cannot save a checkpoint ({reason}); earlier ones are kept; make room")

    def about(self, step: int) -> dict[str, Any]:
        """The config and digests that a step was saved with."""
        args = self._ocp.args
        try:
            return self._manager.restore(step, args=args.Composite(about=args.JsonRestore()))["about"]
        except (OSError, ValueError, KeyError) as e:
            raise self._unreadable(step, e) from e

    def _unreadable(self, step: int, e: Exception) -> UserError:
        reason = " ".join(str(e).split())[:200]
        return UserError(f"{self.folder / str(step)}: cannot be restored ({reason}); remove it to use an older one")

    def restore(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trees of the forms, shapes and shardings of `like` (abstract), and where the batches stood.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        args = self._ocp.args
        trees = {name: flat(tree) for name, tree in like.items()}
        try:
            found = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(trees), data=args.JsonRestore())
            )
        except (OSError, ValueError, KeyError) as e:
            raise self._unreadable(step, e) from e
        return {name: unflat(found["state"][name], tree) for name, tree in like.items()}, found["data"]

    def close(self) -> None:
        self.wait()
        self._manager.close()


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
    if differing := _differences(checkpoints.about(newest), about):
        raise UserError(
            f"{checkpoints.folder}: the run there differs in {', '.join(differing)}; choose another output, or give "
            "the same values to go on with it"
        )
    return newest


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
