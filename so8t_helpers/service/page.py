"""The OpenAPI page: the service's own description as one HTML document that asks nobody else for anything."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from jinja2 import Environment

_ENVIRONMENT = Environment(autoescape=True)
_ENVIRONMENT.filters["pretty"] = lambda data: json.dumps(data, ensure_ascii=False, indent=2)
_PAGE = _ENVIRONMENT.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
_EXAMPLE = {"user_id": "taro", "query": "9×8は?", "options": {"stream": False}}


def docs_page(openapi: dict[str, Any]) -> tuple[str, str]:
    """Return the page and its Content-Security-Policy, which allows nothing but the page itself."""
    nonce = secrets.token_urlsafe(16)
    page = _PAGE.render(
        nonce=nonce,
        title=f"{openapi['info']['title']} {openapi['info']['version']}",
        example=_EXAMPLE,
        paths=openapi["paths"],
        schemas=openapi["components"]["schemas"],
    )
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
