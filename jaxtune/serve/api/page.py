"""The page at /: a few static files, and nothing else."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from jaxtune.serve.api.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(str(files("jaxtune.serve"))) / "page"
_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json",
    ".svg": "image/svg+xml",
}  # fmt: skip
_HEADERS = {"Cache-Control": "no-cache"}  # files of another version must not be mixed with these


def _known() -> dict[str, Path]:
    """What may be asked for, by name."""
    return {p.relative_to(_FOLDER).as_posix(): p for p in _FOLDER.rglob("*") if p.suffix in _TYPES}


@router.api_route("/", methods=["GET", "HEAD"])
def index() -> FileResponse:
    """The page."""
    return _answer(_FOLDER / "index.html")


@router.api_route("/page/{name:path}", methods=["GET", "HEAD"])
def part(name: str) -> FileResponse:
    """A file of the page."""
    path = _known().get(name)
    if path is None:
        raise ApiError(404, f"the page has no file {name[:100]!r}")
    return _answer(path)


def _answer(path: Path) -> FileResponse:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)
