"""The door of the service: what is turned away, in what order, and that answers go on meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from so8t_helpers.engines.base import EngineError, child_environment
from so8t_helpers.engines.http_engine import HttpEngine
from so8t_helpers.service.connections import Listener
from so8t_helpers.service.limits import names_loopback, rate_key
from so8t_helpers.settings import PROJECT_ROOT
from tests.test_service import PUBLIC, ScriptedEngine, ask, running, wait_until

HEAD = "POST /think HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"user_id": "taro", "query": "問"}).encode()


@pytest.fixture
def engine():
    return ScriptedEngine()


def connect(client):
    return socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10)


def heard(connection):
    """Everything until the service closes."""
    text = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            text += part
    return text.decode()


def send_head(client, head):
    """Send a head and no body; return the status that comes back all the same."""
    with connect(client) as connection:
        connection.sendall(head.encode() + b"\r\n")
        return int(connection.recv(65536).split()[1])


# --- names, token, size, rate: before the body -----------------------------------------------------

FOREIGN = [
    "evil.example", "evil_name.example", "-evil.example", "ev!l.example", "evil.example:",
    "x.127.0.0.1.example",
    "127.0.0.1.evil.example", "localhost.evil.example", "localhost@evil.example", "evil.example#localhost",
    "[::1", "[::1].evil.example", "::1", "127.0.0.1:80:80", "127.0.0.1:x", "localhost:999999", "", " ",
    "\u00e9vil.example", "0.0.0.0", "10.0.0.1", "localhost, evil.example",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_is_not_loopback_s_or_cannot_be_read_stays_outside(host):
    assert not names_loopback([(b"host", host.encode("latin-1"))])


def test_loopback_s_names_and_one_alone():
    for host in (b"localhost", b"LOCALHOST:8808", b"127.0.0.1", b"127.1.2.3:1", b"[::1]", b"[::1]:8808"):
        assert names_loopback([(b"accept", b"*/*"), (b"host", host)])
        assert not names_loopback([(b"host", host), (b"host", host)])
    assert not names_loopback([])


def test_names_in_a_running_service(tmp_path, engine):
    with running(tmp_path, engine) as (client, _):
        for host in ("evil_name.example", "ev!l.example", "[::1", "localhost:1:2"):
            head = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n"
            assert send_head(client, head) == 421
        assert send_head(client, "GET /healthz HTTP/1.1\r\nHost: [::1]:1\r\n") == 200
        assert send_head(client, "GET /healthz HTTP/1.0\r\n") == 421


def test_token_rate_and_size_are_judged_before_a_body_has_come(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("SO8T_TOKEN", "t0ken")
    bearer = f"{HEAD}Authorization: Bearer t0ken\r\n"
    with running(tmp_path, engine, requests_per_minute=3) as (client, _):
        for _ in range(5):
            assert (
                send_head(client, f"{HEAD}Content-Length: 999999999\r\n") == 401
            )  # costs nobody's allowance
        assert send_head(client, f"{HEAD}Transfer-Encoding: chunked\r\n") == 411  # before anything else
        for _ in range(2):
            assert send_head(client, f"{bearer}Content-Length: 999999999\r\n") == 413
        assert client.post("/nothing", headers={"Authorization": "Bearer t0ken"}).status_code == 404
        assert send_head(client, f"{bearer}Content-Length: 20\r\n") == 429
        assert send_head(client, "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n") == 401
    assert not engine.prompts


@pytest.mark.parametrize("line", ["GET /healthz", "POST /think", "PUT /nothing"])
@pytest.mark.parametrize("length", ["", "Content-Length: 9\r\n"])
def test_a_chunked_body_is_not_read_whatever_its_head_says_besides(tmp_path, engine, line, length):
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\n{length}Transfer-Encoding: chunked\r\n\r\n"
    follow = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"  # what a proxy may take for another's request
    with running(tmp_path, engine) as (client, _), connect(client) as connection:
        connection.sendall(f"{head}5\r\n{follow[:5]}\r\n0\r\n\r\n{follow}".encode())
        text = heard(connection)
    assert text.startswith("HTTP/1.1 411 ")
    assert text.count("HTTP/1.1 ") == 1
    assert not engine.prompts


def test_an_error_names_no_field_that_the_client_made_up(tmp_path, engine):
    body = {"user_id": "taro", "query": "問", "秘密の問": 1, "options": {"秘密の問": 1}}
    with running(tmp_path, engine) as (client, _):
        response = client.post("/think", json=body)
    assert response.status_code == 422
    assert "秘密" not in response.text
    assert "body.options: " in response.text


def test_the_rate_is_an_address_s(tmp_path, engine):
    assert rate_key("2001:db8:1:2::1") == rate_key("2001:db8:1:2:ffff::9") != rate_key("2001:db8:1:3::1")
    assert rate_key("fe80::1%eth0") == "fe80::/64"
    assert rate_key("10.0.0.1") != rate_key("10.0.0.2")
    with running(tmp_path, engine, requests_per_minute=2) as (client, _):
        for forged in ("1.2.3.4", "1.2.3.5"):
            client.headers["X-Forwarded-For"] = forged
            assert ask(client, user=f"user-{forged}").status_code == 200
        assert ask(client, user="another").status_code == 429


# --- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "part"),
    [(b"POST /think HT", "head"), (f"{HEAD}Content-Length: 90\r\n\r\n".encode() + b'{"user', "body")],
)
def test_head_and_body_have_a_time_limit_that_trickling_does_not_stretch(tmp_path, engine, sent, part):
    with running(tmp_path, engine, receive_seconds=0.6) as (client, _), connect(client) as connection:
        begun = time.monotonic()
        connection.sendall(sent)
        for _ in range(3):
            time.sleep(0.15)
            connection.sendall(b" ")
        text = heard(connection)
        assert time.monotonic() - begun < 3
        assert text.startswith("HTTP/1.1 408 ")
        assert part in json.loads(text.partition("\r\n\r\n")[2])["error"]["message"]
        assert ask(client).status_code == 200
    assert not engine.at_work


def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path, engine):
    with running(tmp_path, engine, receive_seconds=0.3) as (client, _), connect(client) as connection:
        assert heard(connection) == ""


def test_an_answer_may_take_longer_than_a_request(tmp_path, engine):
    engine.gate.clear()
    with running(tmp_path, engine, receive_seconds=0.2) as (client, _):
        threading.Timer(0.8, engine.gate.set).start()
        assert ask(client).json()["answer"] == PUBLIC


def test_a_body_that_goes_on_after_the_answer_is_not_waited_for(tmp_path, engine):
    with running(tmp_path, engine, receive_seconds=0.4) as (client, _), connect(client) as connection:
        connection.sendall(f"{HEAD}Content-Length: 999999\r\n\r\n".encode())
        assert b"413" in connection.recv(65536)
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 5:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - begun < 3


# --- numbers ---------------------------------------------------------------------------------------


def test_half_open_connections_are_pushed_out_and_answers_go_on(tmp_path, engine, caplog):
    with running(tmp_path, engine, connections=16) as (client, _), contextlib.ExitStack() as held:
        assert ask(client).status_code == 200  # this client's connection is known from now on
        half_open = [held.enter_context(connect(client)) for _ in range(60)]
        for connection in half_open[20:]:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"POST /think HTTP/1.1\r\nHost: ")
        slow = [held.enter_context(connect(client)) for _ in range(20)]
        for connection in slow:
            with contextlib.suppress(ConnectionError):
                connection.sendall(f"{HEAD}Content-Length: 90\r\n\r\n".encode())
        assert ask(client).status_code == 200
        with httpx.Client(base_url=client.base_url) as stranger:
            assert ask(stranger).status_code == 200
        for connection in half_open[:30]:
            text = heard(connection)
            assert text.startswith("HTTP/1.1 503 ")
            assert "retry-after: 1" in text.lower()
    lines = [record for record in caplog.records if "turned away" in record.message]
    assert 1 <= len(lines) <= 4


def test_where_all_are_at_work_the_next_gets_503_and_nobody_is_lost(tmp_path, engine):
    engine.gate.clear()
    found, after = [], []
    with running(tmp_path, engine, connections=16, queue_length=64) as (client, _):
        threads = [threading.Thread(target=lambda: found.append(_ask_once(client))) for _ in range(15)]
        for thread in threads:
            thread.start()
        # Asked over the sixteenth connection; one over the limit would push out an asker not yet heard.
        wait_until(lambda: "so8t_questions_pending 15.0" in client.get("/metrics").text)
        threads.append(threading.Thread(target=lambda: found.append(ask(client).status_code)))
        threads[-1].start()
        wait_until(lambda: httpx.get(f"{client.base_url}/healthz").status_code == 503)
        after = [_ask_once(client) for _ in range(8)]
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert found == [200] * 16
        assert after == [503] * 8
        assert _ask_once(client) == 200


def _ask_once(client):
    with httpx.Client(base_url=client.base_url, timeout=120) as another:  # a busy machine is slow, not lost
        return ask(another).status_code


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_without_a_free_descriptor_the_listener_says_503(caplog):
    import resource

    caplog.set_level(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Listener("127.0.0.1", 0) as listener, contextlib.ExitStack() as held:
        listener.setblocking(False)
        clients = [held.enter_context(socket.create_connection(listener.getsockname())) for _ in range(5)]
        # No number is free below the spare file's, and none is allowed above it.
        spare = listener._spare
        while (handle := os.open(os.devnull, os.O_RDONLY)) < spare:
            held.callback(os.close, handle)
        os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
        try:
            for client in clients:
                with pytest.raises(BlockingIOError):
                    listener.accept()
                assert client.recv(4096).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                os.open(os.devnull, os.O_RDONLY)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody is waiting
    assert len(caplog.records) == 1


SERVER = """
import logging, sys, time
from pathlib import Path
from tests.test_service import ScriptedEngine, running
logging.basicConfig(level=logging.INFO)
with running(Path(sys.argv[1]), ScriptedEngine(), requests_per_minute=10000) as (client, _):
    print(client.base_url.port, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_more_half_open_connections_than_files_leave_the_service_whole(tmp_path):
    """300 of them under `ulimit -n 256` once ended it, and wrote 20.9 MB of log."""
    log = tmp_path / "log"
    limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "-c", SERVER, str(tmp_path)]
    with log.open("wb") as errors, contextlib.ExitStack() as held:
        process = subprocess.Popen(
            limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=PROJECT_ROOT
        )
        port = int(process.stdout.readline())
        for _ in range(300):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            for _ in range(30):
                response = ask(client)
                assert response.status_code == 200, response.text
                held.enter_context(socket.create_connection(("127.0.0.1", port)))
                time.sleep(0.1)
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert log.stat().st_size < 20_000


# --- the engine's side -----------------------------------------------------------------------------


def test_the_engine_s_process_gets_no_secret(monkeypatch):
    monkeypatch.setenv("SO8T_AUDIT_KEY", "k" * 32)
    monkeypatch.setenv("SO8T_TOKEN", "t0ken")
    monkeypatch.setenv("SO8T_OTHER", "x")
    assert {"SO8T_AUDIT_KEY", "SO8T_TOKEN"}.isdisjoint(child_environment())
    assert child_environment()["SO8T_OTHER"] == "x"


class _Bare(HttpEngine):
    """The client's side alone."""


_Bare.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(
    ("drops", "requests", "found"),
    [([""], 2, "ab"), (["", ""], 2, None), (['{"text": "a"}\n'], 1, None)],
    ids=["before the first", "twice", "after the first"],
)
def test_a_connection_dropped_before_the_first_token_is_tried_once_more(drops, requests, found):
    """Each drop is what a server writes of its answer before it closes; then one answers in full."""
    whole = '{"text": "a"}\n{"text": "b"}\n'
    seen = []

    def serve(listener):
        for said in [*drops, whole][:requests]:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(whole)}\r\n\r\n"
                connection.sendall(f"{head}{said}".encode() if said else b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        engine = _Bare("test", "1", "model", url, 5.0, 1)
        texts = []
        try:
            for data in engine.lines("/completion", {}):
                texts.append(data["text"])
            assert "".join(texts) == found
        except EngineError as error:
            assert found is None
            assert re.search("broke off", str(error))
        thread.join(10)
        assert len(seen) == requests
        engine.close()
