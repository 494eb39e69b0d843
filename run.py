#!/usr/bin/env python3
"""One door to the workbench: makes the environment once, then does what was asked.

    python run.py demo             the five notebooks on the demo's own model and data
    python run.py test             formatter, linter, types, who imports whom, and every test
    python run.py lab              JupyterLab on the notebooks
    python run.py so8t VERB ...    the module's verbs: run, sweep, status, verify, serve, import, doctor, …

Only the standard library; Linux, macOS and Windows. The environment is the folder `.venv` beside this file,
with the exact versions of constraints.txt; a stamp in it says what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "so8t.stamp"
# Beside the environment, not in it: it must outlive a folder that was cleared half-way.
INSTALLING = ROOT / ".venv.installing"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST, NEWEST = (3, 11, 5), (3, 13)
# The plain Windows wheel of torch has no CUDA; PyTorch's own index has one that does. Neither brings Triton.
TORCH_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def fingerprint() -> str:
    """Hash of what decides the environment: this folder, the declared and the exact versions, the Python."""
    # As text, since git may have given a Windows checkout other line ends.
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.", 1)[0]
    exact = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    config = VENV / "pyvenv.cfg"
    lines = config.read_text(encoding="utf-8").splitlines() if config.is_file() else []
    python = [line for line in lines if line.startswith("version")]
    return hashlib.sha256("\n".join([str(ROOT), declared, exact, *python]).encode()).hexdigest()


def ready() -> bool:
    """Whether the environment is whole and made from the files as they are."""
    made = STAMP.is_file() and STAMP.read_text(encoding="utf-8").strip() == fingerprint()
    return made and PYTHON.is_file() and not INSTALLING.exists()


def make_environment() -> None:
    """Create or complete `.venv`; one that an earlier call left half-made is made anew."""
    version = sys.version_info[:3]
    if version < OLDEST or version[:2] > NEWEST:
        found = ".".join(map(str, version))
        fail(f"Python {found} is not suitable; use 3.11.5 to 3.13, for example: python3.12 run.py")
    broken = INSTALLING.exists() or not PYTHON.is_file()
    INSTALLING.touch()
    if broken:
        print(f"making {VENV.name} (once; about 5 GB)", flush=True)
        try:
            venv.create(VENV, clear=True, with_pip=True, upgrade_deps=False)
        except (OSError, subprocess.CalledProcessError) as error:
            fail(f"could not make {VENV}: {error} (on Debian and Ubuntu: apt install python3-venv)")
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--quiet",
        "--progress-bar",
        "off",
    ]
    windows_card = os.name == "nt" and shutil.which("nvidia-smi")
    parts = ".[test,windows-cuda]" if windows_card else ".[test]"
    command += ["--constraint", "constraints.txt", "--editable", parts]
    if windows_card:
        command += ["--extra-index-url", TORCH_CUDA_INDEX]
    print("installing the packages of constraints.txt", flush=True)
    if subprocess.call(command, cwd=ROOT) != 0:
        fail("pip could not install the packages (see above); the next call starts over")
    STAMP.write_text(fingerprint() + "\n", encoding="utf-8")
    INSTALLING.unlink()


def call(*arguments: str, cwd: Path | None = None, program: Path = PYTHON) -> int:
    """Run the environment's Python, or another program of it, and return its exit status."""
    try:
        return subprocess.call([str(program), *arguments], cwd=cwd)
    except KeyboardInterrupt:
        return 130


def test(arguments: list[str]) -> int:
    """Run the whole suite; `arguments` go to pytest."""
    # On the other systems the standard library is what differs: without the packages that takes two seconds.
    elsewhere = ["--no-site-packages", "--no-warn-unused-ignores", f"--cache-dir={os.devnull}"]
    others = [["mypy", "--platform", name, *elsewhere] for name in ("win32", "darwin")]
    for check in (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"], *others):
        print("$", *check, flush=True)
        status = call("-m", *check, cwd=ROOT)
        if status != 0:
            return status
    # It has no module that `-m` could name; the script lies beside Python, on Windows with the same .exe.
    print("$ lint-imports", flush=True)
    status = call("--no-cache", cwd=ROOT, program=PYTHON.with_stem("lint-imports"))
    if status != 0:
        return status
    print("$ pytest", *arguments, flush=True)
    # Text without an encoding is Windows' code page there: tests/windows_rules makes such a warning an error.
    return call("-X", "warn_default_encoding", "-m", "pytest", *arguments, cwd=ROOT)


def fail(message: str) -> None:
    """End with one clear line."""
    sys.exit(f"run.py: {message}")


def main(arguments: list[str]) -> int:
    """Carry out one verb and return the exit status."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if verb not in {"demo", "test", "lab", "so8t"}:
        print(__doc__)
        return 0 if verb in {"help", "-h", "--help"} else 2
    if not ready():
        make_environment()
    if verb == "test":
        return test(rest)
    if verb == "lab":
        return call("-m", "jupyterlab", "--notebook-dir", ".", "notebooks/START_HERE.ipynb", *rest, cwd=ROOT)
    return call("-m", "so8t_helpers", *(["run", "demo"] if verb == "demo" else []), *rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
