"""Finding an Ollama server, or starting one of our own on a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from so8t_helpers.engines.base import Closing, EngineError, EngineTimeoutError, child_environment
from so8t_helpers.engines.http_engine import http_client
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import Settings

# Thinking apart from the answer came with v0.9.0.
OLDEST = (0, 9, 0)
_START_SECONDS = 60.0
_TRIES = 3


@dataclass
class OllamaServer(Closing):
    """A server that answers; `own` is one that we started, and that `close` ends."""

    url: str
    version: str
    own: bool = False
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None  # of a server of our own

    def close(self) -> None:
        """End a server of our own, with its runners; leave any other alone."""
        if self.process is None:
            return
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in family:
            if child.is_running():
                child.kill()
        self.process = None


def find_ollama(settings: Settings) -> OllamaServer | None:
    """Return the server at `eval.ollama_url`, else one started from an installed binary, else None.

    The environment variable SO8T_OLLAMA names the binary; without it PATH is searched. Our own server keeps
    its models in the run folder, in the user's store only where `eval.keep_in_ollama` is set.

    Raises:
        EngineError: the server is too old, or the binary does not start.
    """
    if (version := server_version(settings.eval.ollama_url)) is not None:
        check_version(version, settings.eval.ollama_url)
        return OllamaServer(settings.eval.ollama_url, version)
    if (binary := find_binary()) is None:
        return None
    store = None if settings.eval.keep_in_ollama else settings.run_dir / ".ollama" / "models"
    return start_server(binary, settings.run_dir / ".ollama", store, parallel=settings.eval.parallel)


def find_binary() -> Path | None:
    """Return Ollama's program: what SO8T_OLLAMA names, else the one in PATH.

    Raises:
        EngineError: SO8T_OLLAMA names no file.
    """
    if named := os.environ.get("SO8T_OLLAMA"):
        path = Path(named).expanduser()
        if not path.is_file():
            raise EngineError(f"SO8T_OLLAMA={named}: no such file; name Ollama's program, or unset it")
        return path
    found = shutil.which("ollama")
    return Path(found) if found else None


def server_version(url: str) -> str | None:
    """Return the version of the Ollama server at `url`, None where nothing answers.

    Raises:
        EngineError: something else answers there.
    """
    try:
        with http_client(url, 3.0) as client:
            response = client.get("/api/version")
    except httpx.HTTPError:
        return None
    try:
        return str(response.json()["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"eval.ollama_url: what answers at {url} is not Ollama (HTTP {response.status_code} for "
            "/api/version): the port is taken by another program; set eval.ollama_url to Ollama's address"
        ) from error


def check_version(version: str, url: str) -> None:
    """Raise EngineError for a server from before Ollama parted thinking; a build without a version passes."""
    numbers = tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())
    if (0, 0, 0) < numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"Ollama {version} at {url} is too old: {oldest} or later is needed; update it")


def start_server(binary: Path, folder: Path, store: Path | None, parallel: int = 1) -> OllamaServer:
    """Start `ollama serve` on a free port of loopback, with its log in `folder`.

    Args:
        store: for its models; None for the user's own store.
        parallel: prompts that one model works on at once.

    Raises:
        EngineError: it ended; the message has its last words.
        EngineTimeoutError: it does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Another program may take the port between our look and Ollama's; any other will do.
    for _ in range(_TRIES - 1):
        with contextlib.suppress(_PortTakenError):
            return _start(binary, folder / "serve.log", store, parallel)
    return _start(binary, folder / "serve.log", store, parallel)


class _PortTakenError(EngineError):
    pass


def _start(binary: Path, log_path: Path, store: Path | None, parallel: int) -> OllamaServer:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    url = f"http://{address}"
    # What the user set for a server of their own must not decide what ours does.
    env = {key: value for key, value in child_environment().items() if not key.startswith("OLLAMA_")}
    env |= {"OLLAMA_HOST": address, "OLLAMA_NUM_PARALLEL": str(parallel), "OLLAMA_NO_CLOUD": "1"}
    if models := store or os.environ.get("OLLAMA_MODELS"):
        env["OLLAMA_MODELS"] = str(models)
    command = [str(binary), "serve"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    server = OllamaServer(url, "", True, process, log_path)
    until = time.monotonic() + _START_SECONDS
    try:
        while time.monotonic() < until:
            if process.poll() is not None:
                words = log_path.read_text("utf-8", "replace").strip().splitlines()
                kind = _PortTakenError if "address already in use" in " ".join(words[-3:]) else EngineError
                raise kind(f"{binary} serve ended with status {process.returncode}: {' | '.join(words[-3:])}")
            if (version := server_version(url)) is not None:
                check_version(version, url)
                server.version = version
                return server
            time.sleep(0.1)
        raise EngineTimeoutError(f"{binary} serve does not answer after {_START_SECONDS:g} s; see {log_path}")
    except (StageError, KeyboardInterrupt):
        server.close()
        raise
