"""Data sets of the Hugging Face hub, through `datasets`: `hf://owner/name`, with @revision and /folder where wanted."""

from collections.abc import Generator
from typing import Any

from jaxtune.config import Source
from jaxtune.data.reading.text import Step
from jaxtune.errors import UserError

PREFIX = "hf://"


def is_hub(path: str) -> bool:
    """Whether a path names a data set of the hub. (hf://datasets/… names a file there, which fsspec reads.)"""
    return path.startswith(PREFIX) and not path.startswith(PREFIX + "datasets/")


def parts(path: str) -> tuple[str, str | None, str | None]:
    """Name, revision and folder.

    >>> parts("hf://owner/name@v2/sub/folder")
    ('owner/name', 'v2', 'sub/folder')
    """
    owner, _, rest = path.removeprefix(PREFIX).strip("/").partition("/")
    name, _, folder = rest.partition("/")
    name, _, revision = (f"{owner}/{name}" if name else owner).partition("@")
    return name, revision or None, folder or None


def rows(source: Source, streaming: bool, at: Any) -> Generator[Step, None, None]:
    """The rows of a split. Without `streaming` it is downloaded as a whole and kept; code in it is never run."""
    import datasets

    if hasattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE"):  # datasets 3 can run scripts of a repository
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    name, revision, folder = parts(source.path)
    number = at["row"] if at else 0
    try:
        data = datasets.load_dataset(
            name, source.subset, data_dir=folder, split=source.split, revision=revision, streaming=streaming
        )
        if streaming and at:
            data.load_state_dict(at["stream"])
        for row in data if streaming else (data[i] for i in range(number, len(data))):
            number += 1
            yield number, dict(row), {"row": number, "stream": data.state_dict() if streaming else None}
    except (OSError, ValueError, RuntimeError, LookupError, ImportError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"{source.path}:{number + 1}: not to be had from the hub ({type(e).__name__}: {reason}); look at the name, "
            "split, subset, the network and `hf auth login`"
        ) from e
