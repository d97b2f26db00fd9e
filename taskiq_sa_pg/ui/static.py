"""The static files: kept in memory, each with a URL that changes with its content."""

from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath
from typing import Final, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Not by mimetypes, which uses the system's settings: browsers reject scripts as text/plain.
_MEDIA_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_NAMES: Final = ("htmx.min.js", "icon.svg", "style.css", "ui.js")
_FOR_A_YEAR: Final = "public, max-age=31536000, immutable"


class Asset(NamedTuple):
    """A file, its media type, and a hash of its content."""

    content: bytes
    media_type: str
    version: str


@cache
def read_assets() -> dict[str, Asset]:
    """All files by name."""
    folder = files("taskiq_sa_pg.ui") / "static"
    assets = {}
    for name in _NAMES:
        content = (folder / name).read_bytes()
        media_type = _MEDIA_TYPES[PurePath(name).suffix]
        assets[name] = Asset(content, media_type, sha256(content).hexdigest()[:16])
    return assets


def asset_url(name: str) -> str:
    """The URL of a file, relative to the root."""
    return f"static/{name}?v={read_assets()[name].version}"


async def asset(request: Request) -> Response:
    """Returns a file; it may be cached for ever if the URL has its current version.

    Raises:
        HTTPException: The file does not exist.
    """
    found = read_assets().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    is_current = request.query_params.get("v") == found.version
    headers = {"Cache-Control": _FOR_A_YEAR if is_current else "no-cache"}
    return Response(found.content, media_type=found.media_type, headers=headers)
