"""The /think service under load: 64 clients for a minute against the demo model, killed half-way.

Claims: nothing private leaves, every request is answered, the audit log verifies and misses none, memory
stays bounded. `python benchmarks/service.py [--profile demo] [--seconds 60] [--clients 64] [--set k=v]`; the
profile's run must have its 01_dataset and 04_gguf.
"""

from __future__ import annotations

import argparse
import asyncio
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


async def ask(client: httpx.AsyncClient, row: dict[str, Any], user: str, stream: bool, tally: Tally) -> float:
    """Send one question and judge what comes back; return how long to wait before the next."""
    begun = time.monotonic()
    body = {"user_id": user, "query": row["question"], "options": {"stream": stream}}
    response = await client.post("/think", json=body)
    text = response.text
    if stream and response.status_code == 200:
        last = text.strip().rpartition("\n\n")[2]
        event, data = (line.partition(": ")[2] for line in last.splitlines()[:2])
        found = json.loads(data)
        status = "200" if event == "done" else f"event {found['error']['code']}"
    else:
        found, status = response.json(), str(response.status_code)
    tally.statuses[status] += 1
    if status == "200":
        tally.seconds.append(time.monotonic() - begun)
        tally.answers[found["request_id"]] = found["answer"]
        said = found["answer"] + str(response.headers)
        private = [
            line for line in row["thinking"].splitlines() if len(line) > 7 and line not in row["final"]
        ]
        if (
            contains_markers(found["answer"])
            or decision_of(found["answer"])
            or any(p in said for p in private)
        ):
            tally.leaks.append(found["answer"])
    return float(response.headers.get("retry-after", 0))


async def client(
    number: int, url: str, rows: list[dict[str, Any]], until: float, down: asyncio.Event, tally: Tally
) -> None:
    """Ask one question after another until the time is up."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
        turn = number
        while time.monotonic() < until:
            row, turn = rows[turn % len(rows)], turn + 1
            was_down = down.is_set()
            try:
                wait = await ask(http, row, f"client-{number}", bool(turn % 2), tally)
            except (httpx.HTTPError, ValueError) as error:
                # A kill cuts what is under way and refuses what comes until the restart; nothing else may.
                await asyncio.sleep(0.2)
                if was_down or down.is_set():
                    tally.cut_by_kill += 1
                else:
                    tally.unanswered.append(repr(error))
                wait = 0.2
            await asyncio.sleep(min(wait, max(0.0, until - time.monotonic())))


async def load(
    options: argparse.Namespace, rows: list[dict[str, Any]], port: int
) -> tuple[Tally, dict[str, Any]]:
    """Run the clients, kill and restart the service half-way, stop it at the end."""
    tally, down = Tally(), asyncio.Event()
    service = Service(options.profile, options.set, port)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + options.seconds
    clients = [asyncio.create_task(client(n, url, rows, until, down, tally)) for n in range(options.clients)]
    await asyncio.sleep(options.seconds / 2)
    before_kill = sum(tally.statuses.values())
    down.set()
    await asyncio.to_thread(service.kill)
    service = await asyncio.to_thread(Service, options.profile, options.set, port)
    await asyncio.sleep(1.0)
    down.clear()
    memory = []
    while not all(task.done() for task in clients):
        memory.append(service.memory_mib())
        await asyncio.sleep(0.5)
    await asyncio.gather(*clients)
    head = httpx.get(f"{url}/healthz").json()["audit_head"]
    service.stop()
    settled = memory[len(memory) // 3 :]
    facts = {
        "service": service.about,
        "answers_before_the_kill": before_kill,
        "memory_mib": round(max(memory), 1),
        "memory_growth_mib": round(settled[-1] - settled[0], 1),
        "head": head,
    }
    return tally, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--seconds", type=float, default=60)
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
        "answers_per_s": round(len(tally.answers) / options.seconds, 2),
        "median_seconds": round(statistics.median(tally.seconds), 3) if tally.seconds else None,
        "slowest_seconds": round(max(tally.seconds, default=0.0), 3),
        "audit_lines": verdict.lines,
        "audit_problem": verdict.problem,
    }
    failed = sum(n for status, n in tally.statuses.items() if status not in {"200", "503"})
    claims = [
        claim("answers, at least", len(tally.answers), 1, "answers", at_least=True),
        claim("leaks", len(tally.leaks), 0, "answers"),
        claim("unanswered requests", len(tally.unanswered), 0, "requests"),
        claim("failed requests", failed, 0, "requests"),
        claim("audit logs that do not verify", int(not verdict.ok), 0, "logs"),
        claim("answers that the audit log misses", len(missed), 0, "answers"),
        claim("memory growth after the restart", facts["memory_growth_mib"], 32, "MiB"),
    ]
    raise SystemExit(0 if write_claims("service", figures, claims) else 1)


if __name__ == "__main__":
    main()
