"""An export, with its card, to the Hugging Face hub: looked through first, then sent as one commit."""

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtune import card, log
from jaxtune.errors import UserError
from jaxtune.hf import adapters
from jaxtune.job import CONFIG, EXPORT

_REFUSED = {  # patterns of names, and why
    "pickles, which run code when they are opened": "*.pkl *.pickle *.pt *.pth *.bin *.joblib *.npy *.npz",
    "state of an optimiser or of a run": "optimizer* scheduler* rng_state* trainer_state* training_args* events.out.*",
    "checkpoints": "*.ckpt checkpoint checkpoints checkpoint-* _CHECKPOINT_METADATA _METADATA *.orbax* *.ocdbt *.zarr*",
    "keys": "*.pem *.key .env* *token .netrc credentials*",
}


class Upload(NamedTuple):
    """What is to be sent where."""

    name: str  # of the repository, OWNER/NAME
    files: dict[str, Path | bytes]  # by path there; bytes are what was changed for its new place

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def gather(folder: Path, name: str, base: str | None = None) -> Upload:
    """Look through a folder that is to be uploaded; nothing is sent.

    Args:
      folder: a run folder, whose export is meant, or a model folder.
      name: OWNER/NAME.
      base: the hub's name of the base, to be written in the place of a folder of this machine.

    Raises:
      UserError: it has no card, or holds what is not for others; or its adapter's base is only here.
    """
    for given in (name, base):
        if given is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
            raise UserError(f"{given!r} is no name on the hub; write OWNER/NAME")
    if (folder / CONFIG).exists():
        if not (folder / EXPORT).is_dir():
            raise UserError(f"{folder}: the run has no export yet; `jaxtune train` goes on with it")
        folder = folder / EXPORT
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run folder or a model folder")
    if not (folder / card.FILE).is_file():
        raise UserError(
            f"{folder}: has no model card; write {card.FILE}, or make the folder by train, merge or convert"
        )
    root, files = folder.resolve(), dict[str, Path | bytes]()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        for why, patterns in _REFUSED.items():
            if any(fnmatch.fnmatch(part.lower(), p.lower()) for part in place.parts for p in patterns.split()):
                raise UserError(f"{path}: {why} are not uploaded; remove it, or push a folder without it")
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise UserError(f"{path}: is a link out of the folder; put the file itself there")
        if path.is_file() and not any(part.startswith(".") for part in place.parts):
            files[place.as_posix()] = path
    text = (folder / card.FILE).read_text(encoding="utf-8")
    files[card.FILE] = card.at_home(text, name, base).encode()
    if (file := folder / adapters.CONFIG).is_file():
        files[adapters.CONFIG] = _with_base(file, base)
    return Upload(name, files)


def _with_base(file: Path, base: str | None) -> bytes:
    """An adapter's config with its base as others have it."""
    tree = json.loads(file.read_text())
    given = tree.get("base_model_name_or_path") or ""
    if base is None and (Path(given).is_absolute() or Path(given).exists() or "/" not in given):
        raise UserError(f"{file}: its base is {given or 'not named'}, which others do not have; give --base OWNER/NAME")
    return (
        file.read_bytes() if base is None else json.dumps({**tree, "base_model_name_or_path": base}, indent=2).encode()
    )


def send(
    upload: Upload, public: bool = False, revision: str | None = None, message: str = "", endpoint: str | None = None
) -> str:
    """Send what was gathered, as one commit. What a failed try has sent is not sent again.

    Args:
      upload: what `gather` found.
      public: whether everybody may see the repository.
      revision: a branch, made where it is not there; the main one where not given.
      message: of the commit.
      endpoint: the hub's address; HF_ENDPOINT or https://huggingface.co where not given.

    Returns: the repository's address.

    Raises:
      UserError: nobody is signed in, the hub refuses, cannot be reached, or shows the repository to everybody.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if huggingface_hub.get_token() is None:
        raise UserError(
            "push: nobody is signed in; `hf auth login`, or set HF_TOKEN, with a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    api = huggingface_hub.HfApi(endpoint=endpoint)
    with _told(upload.name, api.endpoint):
        try:
            there = api.repo_info(upload.name)
        except RepositoryNotFoundError:
            there = None
        if there is not None and not there.private and not public:
            raise UserError(f"{upload.name}: is there and everybody can see it; say --public, or choose another name")
        if there is not None and there.private and public:
            log.warn(f"{upload.name}: is there and stays private; its settings on the hub change that")
        api.create_repo(upload.name, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(upload.name, branch=revision, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(n, f) for n, f in upload.files.items()]
        api.create_commit(
            upload.name, operations, commit_message=message or "Upload by jaxtune push", revision=revision
        )
    return f"{api.endpoint}/{upload.name}" + (f"/tree/{revision}" if revision else "")


_SAID = {
    401: "the token is not accepted; `hf auth login` again, or look at HF_TOKEN",
    403: "the token may not write there; take one with write rights, or another OWNER",
    404: "there is no such place, or the token may not see it; look at OWNER/NAME and at the token's rights",
    409: "somebody else writes there at the same time; run it again",
    412: "somebody else wrote there at the same time; run it again",
    429: "it was asked too often; wait and run it again",
}


@contextlib.contextmanager
def _told(name: str, endpoint: str) -> Iterator[None]:
    """What the hub answers, and what becomes of the network, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # of the package, and of whichever one it speaks HTTP by
        known = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests")
        if not isinstance(e, OSError | RuntimeError | ValueError) and type(e).__module__.split(".")[0] not in known:
            raise
        cause = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ else e  # of uploads in its threads
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = " ".join(str(cause).split())[:200]
        again = "run it again: what is sent stays sent"
        if status is None:
            raise UserError(
                f"{name}: {endpoint} is not reached ({type(cause).__name__}: {reason}); look at the network and at "
                f"HF_HUB_OFFLINE, and {again}"
            ) from e
        raise UserError(f"{name}: {endpoint} answers {status}: {_SAID.get(status, f'{reason}; later {again}')}") from e
