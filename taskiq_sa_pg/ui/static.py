"""The files that pages load: in memory, each under a URL that changes with what is in it."""

from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath
from typing import Final, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Not by mimetypes, which asks the machine: where that says text/plain, browsers refuse scripts.
_MEDIA_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_NAMES: Final = ("htmx.min.js", "icon.svg", "style.css", "ui.js")
_FOR_A_YEAR: Final = "public, max-age=31536000, immutable"


class Asset(NamedTuple):
    """A file, its type, and a hash of what is in it."""

    content: bytes
    media_type: str
    version: str


@cache
def read_assets() -> dict[str, Asset]:
    """All files, by their names."""
    folder = files("taskiq_sa_pg.ui") / "static"
    assets = {}
    for name in _NAMES:
        content = (folder / name).read_bytes()
        media_type = _MEDIA_TYPES[PurePath(name).suffix]
        assets[name] = Asset(content, media_type, sha256(content).hexdigest()[:16])
    return assets


def asset_url(name: str) -> str:
    """Where a file is, relative to the root."""
    return f"static/{name}?v={read_assets()[name].version}"


async def asset(request: Request) -> Response:
    """Answers with a file; to be kept where its URL says of which version it is.

    Raises:
        HTTPException: There is no such file.
    """
    found = read_assets().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    is_current = request.query_params.get("v") == found.version
    headers = {"Cache-Control": _FOR_A_YEAR if is_current else "no-cache"}
    return Response(found.content, media_type=found.media_type, headers=headers)
