"""Pages for people: the playground at ``/``, and the API's documentation, all without the internet."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

PLAYGROUND = Path(__file__).parent.parent / "static" / "playground.html"
ASSETS = "/docs/assets"
_CSP = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
SECURITY_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
PLAYGROUND_HEADERS = {
    **SECURITY_HEADERS,
    "content-security-policy": _CSP
    + "connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:",
}
DOCS_HEADERS = {
    **SECURITY_HEADERS,
    "content-security-policy": _CSP
    + "connect-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; worker-src blob:; child-src blob:",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground() -> Response:
    """A chat page: static, without data, self-contained."""
    return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"), headers=PLAYGROUND_HEADERS)


@router.get("/docs")
async def docs() -> Response:
    """Swagger UI."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Trimaran API",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    page.headers.update(DOCS_HEADERS)
    return page


@router.get("/redoc")
async def redoc() -> Response:
    """ReDoc."""
    page = get_redoc_html(
        openapi_url="/openapi.json",
        title="Trimaran API",
        redoc_js_url=f"{ASSETS}/redoc.standalone.js",
        redoc_favicon_url=f"{ASSETS}/favicon.png",
        with_google_fonts=False,
    )
    page.headers.update(DOCS_HEADERS)
    return page


def mount_assets(app: FastAPI) -> None:
    """Serve Swagger UI and ReDoc from the package that carries them; it is never imported."""
    spec = importlib.util.find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package fastapi-offline is missing; install it again: pip install trimaran")
    app.mount(ASSETS, StaticFiles(directory=Path(spec.origin).parent / "static"))
