"""The dashboard of the shop's tasks, behind a password."""

import os
from base64 import b64encode
from secrets import compare_digest

from fastapi import HTTPException, Request

from shop.tasks import backend, broker
from taskiq_sa_pg.ui import Permission, dashboard

# run.py generates one if it is not set.
PASSWORD = os.environ.get("ADMIN_PASSWORD")


def permission_of(request: Request) -> Permission:
    """What the user of a request may do. In your application, use your own login instead."""
    if not PASSWORD:
        raise HTTPException(403, "Set ADMIN_PASSWORD for the web server, and start it again.")
    expected = b"Basic " + b64encode(f"admin:{PASSWORD}".encode())
    if compare_digest(request.headers.get("Authorization", "").encode(), expected):
        return "write"
    # Makes the browser ask for the password.
    challenge = {"WWW-Authenticate": 'Basic realm="Shop", charset="UTF-8"'}
    raise HTTPException(401, "Log in as admin, with the password in ADMIN_PASSWORD.", challenge)


admin = dashboard(backend, authorize=permission_of, broker=broker, title="Shop tasks")
