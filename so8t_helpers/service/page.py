"""The OpenAPI page: the service's own description as one HTML document that asks nobody else for anything."""

from __future__ import annotations

import html
import json
import secrets
from typing import Any

_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:52rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;border-top:1px solid #8886;padding-top:1rem}
code,pre,textarea{font:14px/1.4 ui-monospace,monospace}
pre{overflow:auto;padding:.75rem;background:#8881;border-radius:.3rem}
textarea,input{width:100%;box-sizing:border-box;padding:.5rem}
table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}
.verb{font-weight:700;text-transform:uppercase}
"""

# Sends the text area's JSON; a stream is shown while it comes.
_SCRIPT = """
const out=document.getElementById("out");
document.getElementById("ask").addEventListener("submit",async(event)=>{
  event.preventDefault(); out.textContent="";
  const headers={"Content-Type":"application/json"};
  const token=document.getElementById("token").value;
  if(token) headers.Authorization="Bearer "+token;
  const answer=await fetch("/think",{method:"POST",headers,body:document.getElementById("body").value});
  const reader=answer.body.pipeThrough(new TextDecoderStream()).getReader();
  out.textContent="HTTP "+answer.status+"\\n";
  for(;;){const {done,value}=await reader.read(); if(done) break; out.textContent+=value;}
});
"""


def docs_page(openapi: dict[str, Any]) -> tuple[str, str]:
    """Return the page and its Content-Security-Policy, which allows nothing but the page itself."""
    nonce = secrets.token_urlsafe(16)
    info = openapi["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    example = {"user_id": "taro", "query": "9×8は?", "options": {"stream": False}}
    operations = [
        _operation(path, verb, operation)
        for path, verbs in openapi["paths"].items()
        for verb, operation in verbs.items()
    ]
    schemas = [
        f"<h3 id='{html.escape(name)}'>{html.escape(name)}</h3><pre>{_pretty(schema)}</pre>"
        for name, schema in openapi["components"]["schemas"].items()
    ]
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>
<link rel="icon" href="data:,"><style nonce="{nonce}">{_STYLE}</style></head><body><h1>{title}</h1>
<p>Machine-readable: <a href="/openapi.json">/openapi.json</a></p>
<h2>Try it</h2><form id="ask"><p><label>Question<br>
<textarea id="body" rows="7">{_pretty(example)}</textarea></label></p>
<p><label>Bearer token, where one is set<br><input id="token" type="password" autocomplete="off"></label></p>
<p><button>POST /think</button></p></form><pre id="out" aria-live="polite"></pre>
{"".join(operations)}<h2>Schemas</h2>{"".join(schemas)}
<script nonce="{nonce}">{_SCRIPT}</script></body></html>"""
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _operation(path: str, verb: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{status}</code></td><td>{html.escape(answer['description'])}</td></tr>"
        for status, answer in sorted(operation["responses"].items())
    )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    about = f"<p>Body:</p><pre>{_pretty(body)}</pre>" if body else ""
    return (
        f"<h2><span class='verb'>{verb}</span> <code>{html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation.get('summary', ''))}</p>{about}<table>{rows}</table>"
    )


def _pretty(data: Any) -> str:
    return html.escape(json.dumps(data, ensure_ascii=False, indent=2))
