"""The service under load and under siege: 64 clients over both dialects against the demo model.

It is killed after some seconds and started again; then 2,000 half-open connections and 500 slow bodies stand
beside the clients for a minute (`siege.py`). Claims: nothing private leaves, every request is answered, the
audit log verifies and misses none, memory stays bounded. `python benchmarks/service.py [--profile demo]
[--seconds 60] [--clients 64] [--half-open 2000] [--slow-bodies 500] [--set k=v]`; the profile's run must have
its 01_dataset and 04_gguf.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from claims import claim, write_claims

from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.stage import stage_input
from so8t_helpers.thinking.audit import AuditLog, verify_audit
from so8t_helpers.thinking.format import contains_markers, decision_of
from so8t_helpers.verbs.arguments import profile_settings

PATIENCE = 180.0  # seconds for one answer; the service gives up before
KILL_SECONDS = 15.0  # from the start to the kill


class Service:
    """The service as a process of its own."""

    def __init__(self, profile: str, overrides: list[str], port: int) -> None:
        chosen = [*overrides, f"serve.port={port}", "serve.requests_per_minute=100000"]
        command = [sys.executable, "-m", "so8t_helpers", "serve", profile]
        command += [part for item in chosen for part in ("--set", item)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.about = self.process.stdout.readline().strip() if self.process.stdout else ""
        if "http://" not in self.about:
            raise SystemExit(f"the service did not start: {' '.join(command)}")

    def family(self) -> list[psutil.Process]:
        """The service and its engine's processes."""
        service = psutil.Process(self.process.pid)
        return [*service.children(recursive=True), service]

    def memory_mib(self) -> float:
        """Resident memory of the family."""
        return sum(member.memory_info().rss for member in self.family() if member.is_running()) / 2**20

    def kill(self) -> None:
        """End it and its engine without any warning."""
        for member in self.family():
            member.kill()
        self.process.communicate()

    def stop(self) -> str:
        """Ask it to end; return what it says last."""
        self.process.terminate()
        return str(self.process.communicate(timeout=PATIENCE)[0])


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    cut_by_kill: int = 0


async def ask(
    client: httpx.AsyncClient, model: str, row: dict[str, Any], user: str, turn: int, tally: Tally
) -> float:
    """Send one question, in both dialects by turns, whole and streamed; judge what comes back.

    Returns how long to wait before the next.
    """
    begun, stream, think = time.monotonic(), bool(turn & 1), bool(turn & 2)
    if think:
        body = {"user_id": user, "query": row["question"], "options": {"stream": stream}}
        response = await client.post("/think", json=body)
    else:
        messages = [{"role": "user", "content": row["question"]}]
        body = {"model": model, "messages": messages, "stream": stream, "user": user}
        response = await client.post("/v1/chat/completions", json=body)
    status, answer = str(response.status_code), ""
    if status == "200":
        data = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        found = data if stream else [response.json()]
        if "error" in found[-1]:
            status = f"event {found[-1]['error']['code']}"
        elif think:
            answer = found[-1]["answer"]
        else:
            choices = [choice for one in found for choice in one["choices"]]
            answer = "".join((c.get("message") or c["delta"]).get("content", "") for c in choices)
    else:
        response.json()  # every error is one that a program can read
    tally.statuses[f"{'think' if think else 'openai'} {status}"] += 1
    if status == "200":
        tally.seconds.append(time.monotonic() - begun)
        tally.answers[response.headers["x-request-id"]] = answer
        said = response.text + str(response.headers)
        private = [
            line for line in row["thinking"].splitlines() if len(line) > 7 and line not in row["final"]
        ]
        if contains_markers(answer) or decision_of(answer) or any(p in said for p in private):
            tally.leaks.append(answer)
    return float(response.headers.get("retry-after", 0))


async def client(
    number: int, url: str, rows: list[dict[str, Any]], over: asyncio.Event, down: asyncio.Event, tally: Tally
) -> None:
    """Ask one question after another until it is over."""
    model = ""
    # Certificates are for nobody here, and cost each client a while to load.
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False) as http:
        turn = number
        while not over.is_set():
            row, turn = rows[turn % len(rows)], turn + 1
            was_down = down.is_set()
            try:
                model = model or (await http.get("/v1/models")).json()["data"][0]["id"]
                wait = await ask(http, model, row, f"client-{number}", turn, tally)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                # A kill cuts what is under way and refuses what comes until the restart; nothing else may.
                await asyncio.sleep(0.2)
                if was_down or down.is_set():
                    tally.cut_by_kill += 1
                else:
                    tally.unanswered.append(repr(error))
                wait = 0.2
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), wait)


async def load(
    options: argparse.Namespace, rows: list[dict[str, Any]], port: int
) -> tuple[Tally, dict[str, Any]]:
    """Run the clients, kill and restart the service, besiege it, stop it at the end."""
    tally, down, over = Tally(), asyncio.Event(), asyncio.Event()
    service = Service(options.profile, options.set, port)
    url = f"http://127.0.0.1:{port}"
    clients = [asyncio.create_task(client(n, url, rows, over, down, tally)) for n in range(options.clients)]
    await asyncio.sleep(KILL_SECONDS)
    before_kill = sum(tally.statuses.values())
    down.set()
    await asyncio.to_thread(service.kill)
    service = await asyncio.to_thread(Service, options.profile, options.set, port)
    memory = [service.memory_mib()]
    await asyncio.sleep(1.0)
    down.clear()
    before_siege = len(tally.answers)
    numbers = [port, options.seconds, options.half_open, options.slow_bodies]
    siege = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("siege.py")), *map(str, numbers), stdout=subprocess.PIPE
    )
    told = asyncio.create_task(siege.communicate())
    while not told.done():
        memory.append(service.memory_mib())
        await asyncio.sleep(0.5)
    over.set()
    await asyncio.gather(*clients)
    head = httpx.get(f"{url}/healthz").json()["audit_head"]
    service.stop()
    facts = {
        "service": service.about,
        "answers_before_the_kill": before_kill,
        "memory_mib": round(max(memory), 1),
        "memory_growth_mib": round(max(memory) - memory[0], 1),
        "answers_under_siege": len(tally.answers) - before_siege,
        "siege": json.loads((await told)[0]),
        "head": head,
    }
    return tally, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--half-open", type=int, default=2000)
    parser.add_argument("--slow-bodies", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    settings = profile_settings(options.profile, options.set)
    rows = read_jsonl(stage_input(settings, settings.training.dataset_dir, "01_dataset") / "eval.jsonl")
    os.environ["SO8T_AUDIT_KEY"] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        log = Path(folder) / "audit.jsonl"
        options.set.append(f"serve.audit_log={log}")
        tally, facts = asyncio.run(load(options, rows, port))
        verdict = verify_audit(log, facts["head"])
        code = AuditLog(log).code
        entries = [json.loads(line) for line in log.read_text("ascii").splitlines()]
    written = {e["request_id"]: e["answer_hmac"] for e in entries if e["event"] == "answered"}
    missed = [i for i, answer in tally.answers.items() if written.get(i) != code(answer)]
    if tally.unanswered or tally.leaks:
        print("unanswered:", tally.unanswered[:3], "leaks:", tally.leaks[:3])
    figures = {
        **facts,
        "clients": options.clients,
        "seconds": options.seconds,
        "statuses": dict(tally.statuses),
        "cut_by_the_kill": tally.cut_by_kill,
        "answers_per_s_under_siege": round(facts["answers_under_siege"] / options.seconds, 2),
        "median_seconds": round(statistics.median(tally.seconds), 3) if tally.seconds else None,
        "slowest_seconds": round(max(tally.seconds, default=0.0), 3),
        "audit_lines": verdict.lines,
        "audit_problem": verdict.problem,
    }
    clear = {"200", "429", "503"}
    failed = sum(n for status, n in tally.statuses.items() if status.partition(" ")[2] not in clear)
    claims = [
        claim("answers under siege, at least", facts["answers_under_siege"], 1, "answers", at_least=True),
        claim("leaks", len(tally.leaks), 0, "answers"),
        claim("unanswered requests", len(tally.unanswered), 0, "requests"),
        claim("failed requests", failed, 0, "requests"),
        claim("audit logs that do not verify", int(not verdict.ok), 0, "logs"),
        claim("answers that the audit log misses", len(missed), 0, "answers"),
        claim("memory growth under siege", facts["memory_growth_mib"], 64, "MiB"),
    ]
    raise SystemExit(0 if write_claims("service", figures, claims) else 1)


if __name__ == "__main__":
    main()
