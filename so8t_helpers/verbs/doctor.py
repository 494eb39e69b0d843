"""What this machine has, what the chosen profile will need, and whether it fits."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from so8t_helpers.phi3.source import hub_cache, local_base
from so8t_helpers.run.files import StageError, free_bytes
from so8t_helpers.run.origin import llama_source
from so8t_helpers.run.stage import STAGE_TITLES, STAGES, artefact_fault
from so8t_helpers.settings import PROJECT_ROOT, Settings, SettingsError, resolve
from so8t_helpers.verbs.needs import GIB, Needs, check_places, check_stage, estimate, host_memory

GOOD, NOTE, BAD = "ok", "note", "PROBLEM"
# Of the Visual C++ runtime, what torch and xllamacpp load and neither brings.
_RUNTIME = ("msvcp140.dll", "vcruntime140_1.dll", "vcomp140.dll")
_FILE_SYSTEM = r"SYSTEM\CurrentControlSet\Control\FileSystem"
_LONGEST = 67  # characters of a project's folder, 192 for the longest path in .venv, 260 in all (torch 2.13)


@dataclass(frozen=True)
class Finding:
    """One line of the report: "ok", "note" (works, but know it) or "PROBLEM" (the profile will not run)."""

    state: str
    subject: str
    text: str


def print_report(settings: Settings) -> int:
    """Print all findings; return 1 where the profile will not run here, else 0."""
    findings = list(examine(settings))
    for finding in findings:
        print(f"{finding.state:>7}  {finding.subject:<12} {finding.text}")  # noqa: T201
    problems = sum(finding.state == BAD for finding in findings)
    verdict = f"{problems} problems" if problems else "fits this machine"
    print(f"profile {settings.profile}: {verdict}")  # noqa: T201
    return 1 if problems else 0


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything a run depends on."""
    yield Finding(GOOD, "Python", f"{platform.python_version()} in {sys.prefix}")
    yield from _windows()
    yield _packages()
    yield _numbers(settings)
    yield from _memory(settings, needs := estimate(settings))
    yield from _disks(settings, needs)
    for stage in STAGES:
        yield _stage(settings, stage)
    yield _ollama(settings)
    yield _llama_cpp()


def _windows() -> Iterator[Finding]:
    """What Windows lacks as it is delivered."""
    if sys.platform != "win32":
        return
    import winreg  # noqa: PLC0415

    missing = []
    for name in _RUNTIME:
        try:
            ctypes.WinDLL(name)
        except OSError:
            missing.append(name)
    text = f"{', '.join(missing)} missing: install Microsoft's Visual C++ Redistributable (x64)"
    yield Finding(BAD if missing else GOOD, "Visual C++", text if missing else "its runtime is there")
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _FILE_SYSTEM) as key:
            long = bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    except OSError:  # no such value
        long = False
    length = len(str(PROJECT_ROOT))
    off = f"off: the project's folder may have {_LONGEST} characters, and has {length} (docs/windows.md)"
    yield Finding(GOOD if long or length <= _LONGEST else NOTE, "long paths", "on" if long else off)


def _packages() -> Finding:
    def normalised(name: str) -> str:  # as PEP 503 compares names
        return re.sub(r"[-_.]+", "-", name).lower()

    text = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8")
    pairs = re.findall(r"^([\w.-]+) *== *([^;\s]+)", text, flags=re.MULTILINE)
    pinned = {normalised(name): version for name, version in pairs}
    found = {normalised(dist.name): dist.version for dist in importlib.metadata.distributions()}
    # torch from PyTorch's CUDA index calls itself 2.13.0+cu130.
    other = [
        f"{name} {found[name]} (pinned: {version})"
        for name, version in pinned.items()
        if name in found and found[name].split("+")[0] != version
    ]
    if other:
        return Finding(NOTE, "packages", f"not as in constraints.txt: {', '.join(sorted(other))}")
    return Finding(GOOD, "packages", f"{len(found)} installed, versions as in constraints.txt")


def _numbers(settings: Settings) -> Finding:
    """The card and its memory."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        if os.name == "nt" and shutil.which("nvidia-smi") and torch.version.cuda is None:
            return Finding(BAD, "GPU", "torch was built without CUDA; delete .venv and call run.py again")
        small = settings.model.base == "demo"
        return Finding(GOOD if small else NOTE, "GPU", f"none; {os.cpu_count()} CPU cores do the work")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding(GOOD, "GPU", ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards))


def _memory(settings: Settings, needs: Needs) -> Iterator[Finding]:
    import torch  # noqa: PLC0415

    takes = needs.training
    if torch.cuda.is_available():
        have, where = torch.cuda.get_device_properties(0).total_memory, "the card"
    elif llama_source(settings.model.base) and local_base(settings) is None:
        yield Finding(
            NOTE, "memory", "what training takes is known once the base is imported, as a run begins"
        )
        return
    else:
        try:
            takes = host_memory(settings)
        except (SettingsError, StageError):  # no Phi3: the stage that stops at it says so
            return
        have, where = psutil.virtual_memory().available, "free RAM"
    if settings.training.memory_gib != "auto":
        have, where = int(settings.training.memory_gib * GIB), "training.memory_gib"
    text = f"training takes about {takes / GIB:.1f} GiB of {have / GIB:.1f} GiB ({where})"
    yield Finding(GOOD if takes <= have else BAD, "memory", text)


def _disks(settings: Settings, needs: Needs) -> Iterator[Finding]:
    try:
        check_places(settings)
    except StageError as error:
        yield Finding(BAD, "folders", str(error))
    guess = "" if needs.base_known else " (base not here yet: taken as Phi-3.5-mini)"
    for subject, folder, takes in (
        ("run folder", settings.run_dir, needs.run),
        ("downloads", hub_cache(settings), needs.download),
    ):
        free = free_bytes(folder)
        text = f"{folder}: takes {takes / GIB:.1f} GiB{guess}, {free / GIB:.0f} GiB free"
        yield Finding(GOOD if takes <= free else BAD, subject, text)
    for key, value in settings.cache:
        if value is not None:
            yield Finding(GOOD, "cache", f"cache.{key}: {resolve(value)}")


def _stage(settings: Settings, stage: str) -> Finding:
    try:
        check_stage(settings, stage)
    except (SettingsError, StageError) as error:
        return Finding(BAD, STAGE_TITLES[stage], str(error))
    if fault := artefact_fault(settings, stage):  # of what `so8t verify` looks at as well
        return Finding(NOTE, STAGE_TITLES[stage], f"{fault}; a run carries the stage out again")
    return Finding(GOOD, STAGE_TITLES[stage], "nothing found that would stop it")


def _ollama(settings: Settings) -> Finding:
    import httpx  # noqa: PLC0415

    url = settings.eval.ollama_url
    try:
        version = httpx.get(f"{url}/api/version", timeout=2).json()["version"]
        return Finding(GOOD, "Ollama", f"running, {version}, at {url}")
    except (httpx.HTTPError, ValueError, KeyError):
        binary = os.environ.get("SO8T_OLLAMA") or shutil.which("ollama")
    if binary and Path(binary).is_file():
        return Finding(GOOD, "Ollama", f"installed, not running: {binary} (a run starts its own)")
    replaced = "; the embedded llama.cpp answers in its place" if settings.eval.engine == "auto" else ""
    return Finding(NOTE, "Ollama", f"not found{replaced}")


def _llama_cpp() -> Finding:
    try:
        return Finding(GOOD, "llama.cpp", f"xllamacpp {importlib.metadata.version('xllamacpp')}")
    except importlib.metadata.PackageNotFoundError:
        text = "the package xllamacpp is missing; delete .venv and call run.py again"
        return Finding(BAD, "llama.cpp", text)
