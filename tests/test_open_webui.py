"""Open WebUI's own page over the service: runs where SO8T_OPEN_WEBUI names the environment that has it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.test_browser import CHROMIUM
from tests.test_service import PUBLIC, SECRET, ScriptedEngine, entries, running

FOLDER = os.environ.get("SO8T_OPEN_WEBUI")
# As docs/open_webui.md has them.
SETTINGS = {
    "WEBUI_AUTH": "False",
    "OFFLINE_MODE": "True",
    "HF_HUB_OFFLINE": "1",
    "RAG_EMBEDDING_ENGINE": "openai",
    "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_KEY": "none",
}


@contextlib.contextmanager
def open_webui(folder, url):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [Path(FOLDER) / "bin" / "open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
    own = {"HOME": str(folder), "DATA_DIR": str(folder / "data"), "OPENAI_API_BASE_URL": url}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**inherited, **SETTINGS, **own}, stdout=log, stderr=log, cwd=folder
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            until = time.monotonic() + 180
            while not _is_up(client, process):
                assert time.monotonic() < until, (folder / "log").read_text("utf-8")[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _is_up(client, process):
    assert process.poll() is None, "it ended; its log lies beside its data"
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").is_success
    return False


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="SO8T_OPEN_WEBUI names no environment with Open WebUI")
def test_its_page_asks_twice_and_shows_the_final_part(tmp_path):
    engine = ScriptedEngine()
    (tmp_path / "home").mkdir()
    with (
        running(tmp_path, engine, requests_per_minute=600) as (http, _),
        open_webui(tmp_path / "home", f"{http.base_url}/v1") as url,
        sync_playwright() as playwright,
    ):
        path = str(CHROMIUM) if CHROMIUM.is_file() else None
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("Okay, Let's Go!").click(timeout=60_000)  # its news, shown once
        for number in (1, 2):
            page.locator("#chat-input").click(timeout=60_000)
            page.keyboard.type(f"問{number}")
            page.keyboard.press("Enter")
            expect(page.locator("#messages-container").get_by_text(PUBLIC)).to_have_count(
                number, timeout=60_000
            )
        assert SECRET not in page.content()
        browser.close()
    assert any("問1" in prompt and PUBLIC in prompt and "/think 問2" in prompt for prompt in engine.prompts)
    assert all(entry["outcome"] == "answered" for entry in entries(tmp_path) if "outcome" in entry)
