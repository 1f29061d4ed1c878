"""A model in another form: Hugging Face folders, caches, other dtypes and shards, from whatever a model is found in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import blueprint, config, log, sharding, tuned
from jaxtune.errors import UserError, nearest
from jaxtune.hf import cache, files, foreign, remote, tokenizer
from jaxtune.models import families
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.nodes import soft_prompt

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype("float32"),
    "bfloat16": files.DTYPES["BF16"],
    "float16": np.dtype("float16"),
}
FORMS = ("hf", "orbax")


class _Source(NamedTuple):
    """A model that can be written: its tensors when their turn comes, and what lies beside them."""

    decoder: DecoderConfig
    config: dict[str, Any]
    tensors: Mapping[str, files.Entry]
    folders: tuple[Path, ...]  # from which other files are copied; the later win
    side: Mapping[str, bytes]  # other files that are made


def write_model(
    source: str,
    target: Path,
    adapter: str | None = None,
    dtype: str | None = None,
    to: str = "hf",
    shard_bytes: int = files.SHARD_BYTES,
) -> None:
    """Write a model as one whole folder, adapters merged; after a kill, the same call goes on where it was.

    Args:
      source: a run, an export, an adapter, a model folder or its cache; llama2.c's `.bin`; a folder of Meta's.
      target: the folder, which appears when it is complete.
      adapter: a PEFT folder to merge into the source.
      dtype: float32, bfloat16 or float16; each tensor's own where not given.
      to: "hf", a Hugging Face folder; "orbax", a cache that a big model starts from in seconds.
      shard_bytes: the largest safetensors file.

    Raises:
      UserError: the source cannot be opened or holds NaN, or the target exists.
    """
    for option, value, known in (("--dtype", dtype, list(DTYPES)), ("--to", to, list(FORMS))):
        if value is not None and value not in known:
            raise UserError(f"{option} {value!r} is not known{nearest(value, known)}")
    s = _open(source, adapter, None if dtype is None else DTYPES[dtype])
    places = {Path(p).absolute() for p in (source, adapter, *s.folders) if p and Path(p).exists()}
    about = {"from": [_fingerprint(p, target) for p in sorted(places)], "as": [dtype, to, shard_bytes]}
    with files.resumable(target, about) as folder, log.Progress(sum(t.nbytes for t in s.tensors.values())) as bar:
        for place in s.folders:
            mine = files.LICENCE_FILES if place is s.folders[0] else ()
            names = [f for f in files.SIDE_FILES if place is s.folders[0] or f != "config.json"]
            files.copy_files(place, folder, [*names, *mine])
        for name, blob in s.side.items():
            (folder / name).write_bytes(blob)
        blueprint.write_config(folder, s.config, s.decoder.vocab, dtype)
        if to == "orbax":
            cache.write(folder, s.tensors, abstract_weights(s.decoder), s.decoder.family, bar.add)
        else:
            files.write_folder(folder, s.tensors, shard_bytes, bar.add, keep=True)


def _open(source: str, adapter: str | None, dtype: np.dtype | None) -> _Source:
    path = Path(source)
    if path.is_file() and path.suffix == ".bin":
        return _foreign(foreign.open_llama2c(path), dtype, source)
    if not (path / "config.json").exists() and any(path.glob("consolidated.*.pth")):
        return _foreign(foreign.open_meta(path), dtype, source)
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh):
        b, weights, side, template = tuned.open_weights(source, adapter, None, mesh, base=False)
    if soft_prompt.of(weights) is not None:
        raise UserError(
            f"{adapter or source}: a prompt is no part of the weights, so there is no whole model with it; use it as "
            "an adapter: `jaxtune chat`, `predict` and `evaluate` take the folder, and so does peft"
        )
    if any((side / f).exists() for f in tokenizer.FILES):
        tokenizer.check_size(tokenizer.load(side), b.decoder.vocab, str(side))
    made = {} if template is None else {"chat_template.jinja": template.encode()}
    folders = (b.folder,) if side == b.folder else (b.folder, side)
    return _Source(b.decoder, blueprint.read_config(b.folder), blueprint.full_tensors(b, weights, dtype), folders, made)


def _foreign(found: foreign.Foreign, dtype: np.dtype | None, place: str) -> _Source:
    tensors = found.tensors
    if dtype is not None:
        tensors = {n: _cast(t, dtype) for n, t in tensors.items()}
    return _Source(families.from_hf(found.config, place), found.config, tensors, (), found.side)


def _cast(entry: files.Entry, dtype: np.dtype) -> files.Entry:
    def data() -> np.ndarray:
        with np.errstate(over="ignore"):  # what becomes infinite is refused when it is written
            return entry.data().astype(dtype)

    return files.Entry(entry.shape, dtype, data)


def _fingerprint(path: Path, target: Path) -> list[Any]:
    """What a source was when it was opened: its files, their sizes and times; of a remote one, what its store says."""
    if (mark := path / remote.MARK).exists():
        return [str(path), mark.read_text()]
    found = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    half = files.partial(target).absolute()
    stats = [(f, f.stat()) for f in found if not f.is_relative_to(half)]
    return [str(path), [[f.name, s.st_size, s.st_mtime_ns] for f, s in stats]]
