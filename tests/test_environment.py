"""pyproject, constraints and environment.yml give one and the same environment."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import run as run_py
from so8t_helpers.settings import PROJECT_ROOT

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *(t for extra in PROJECT["optional-dependencies"].values() for t in extra),
    ]
]


def _pins() -> dict[str, Requirement]:
    lines = (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement: Requirement):
    pin = _pins()[canonicalize_name(requirement.name)]
    version = str(pin.specifier).removeprefix("==")
    assert requirement.specifier.contains(version)
    assert pin.marker is None, "what we import ourselves must be pinned on every system"


# Declared, and no import says so.
USED_WITHOUT_IMPORT = {
    "protobuf": "transformers and gguf read SentencePiece's models with it",
    "matplotlib-fontja": "its font file is read; an import would change matplotlib's font for all",
    "jupyterlab": "run.py lab starts it",
    "ipykernel": "the kernel that papermill and JupyterLab start",
}
# Imported, and not declared: each belongs to a declared package as its own part, or is an extra's.
BROUGHT_BY = {
    "ipython": "ipykernel",
    "pillow": "matplotlib",
    "cycler": "matplotlib",
    "fonttools": "matplotlib",
    "pygments": "nbconvert",
    "starlette": "fastapi",
    "h11": "uvicorn",
    "triton": "torch",  # on Linux alone
    "ray": "so8t-workbench",  # extras, these six
    "datasets": "so8t-workbench",
    "openpyxl": "so8t-workbench",
    "mlflow-skinny": "so8t-workbench",
    "wandb": "so8t-workbench",
    "ja-ginza": "so8t-workbench",
}


def test_what_is_declared_is_what_is_imported():
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for path in (PROJECT_ROOT / "so8t_helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in (
                {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"so8t_helpers"}
            ):
                owners = distributions.get(name, [name])
                # Triton comes from another package on Windows.
                imported |= {canonicalize_name(owner.removesuffix("-windows")) for owner in owners}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert declared - imported == set(USED_WITHOUT_IMPORT), "declared and not used, or used and not said how"
    assert imported - declared == set(BROUGHT_BY), "imported and not declared"
    for name, owner in BROUGHT_BY.items():
        needed = importlib.metadata.requires(owner) or []
        assert name in {canonicalize_name(Requirement(text).name) for text in needed}


def test_everything_installed_here_is_as_pinned():
    """Transitive packages too: of what pyproject reaches, nothing is left to the day of the install."""
    pins, seen = _pins(), set[str]()
    todo = [Requirement("so8t-workbench[test]")]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        key = f"{name}[{','.join(sorted(extras))}]"
        if key in seen:
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(name)
        if name != "so8t-workbench":
            assert name in pins, f"{name} is not in constraints.txt"
            assert pins[name].specifier.contains(distribution.version.split("+")[0]), name
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    assert len(seen) > 100


def test_windows_gets_the_triton_that_torch_asks_for_on_linux():
    """Its builds add a number of their own: 3.7.1.post27."""
    pins = _pins()
    theirs, ours = (str(pins[name].specifier).removeprefix("==") for name in ("triton", "triton-windows"))
    assert ours.partition(".post")[0] == theirs
    asked = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    assert any(one.name == "triton" and one.specifier.contains(theirs) for one in asked)
    (declared,) = PROJECT["optional-dependencies"]["windows-cuda"]
    marker = Requirement(declared).marker
    assert marker is not None
    assert marker.evaluate({"sys_platform": "win32"})
    assert not marker.evaluate({"sys_platform": "linux"})


@pytest.mark.parametrize(
    ("system", "card", "wanted"),
    [("nt", True, ".[test,windows-cuda]"), ("nt", False, ".[test]"), ("posix", True, ".[test]")],
)
def test_run_py_asks_for_triton_on_windows_with_a_card(system: str, card: bool, wanted: str, tmp_path: Path):
    code = (
        "import os, run, shutil, subprocess\n"
        "run.PYTHON.parent.mkdir(parents=True); run.PYTHON.touch()\n"
        f"shutil.which = lambda name: 'nvidia-smi' if {card} else None\n"
        "subprocess.call = lambda command, cwd: print(command) or 0\n"
        f"os.name = {system!r}\n"
        "run.make_environment()\n"
    )
    done = _run_py(_checkout(tmp_path), code)
    assert f"'--editable', '{wanted}'" in done.stdout, done.stderr
    assert (run_py.TORCH_CUDA_INDEX in done.stdout) == (wanted != ".[test]")


def test_conda_users_get_the_same_pins_and_a_suitable_python():
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[test]"]
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    version = python.removeprefix("python=")
    assert f"{version}.99" in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_run_py_and_pyproject_agree_on_python():
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    oldest = ".".join(map(str, run_py.OLDEST))
    newest = ".".join(map(str, run_py.NEWEST))
    assert oldest in allowed
    assert f"{newest}.99" in allowed
    assert f"{newest[:2]}{run_py.NEWEST[1] + 1}" not in allowed
    assert "3.11.4" not in allowed


def test_formatter_and_type_checker_are_exact():
    """Another version of these would find other faults in the same code."""
    exact = {requirement.name: str(requirement.specifier) for requirement in DECLARED}
    assert exact["ruff"].startswith("==")
    assert exact["mypy"].startswith("==")


def _checkout(folder: Path) -> Path:
    for name in ("run.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT_ROOT / name, folder / name)
    return folder


def _run_py(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


def test_an_unsuitable_python_gives_one_line(tmp_path: Path):
    code = "import sys; sys.version_info = (3, 9, 1)\nimport run\nrun.main(['demo'])"
    done = _run_py(_checkout(tmp_path), code)
    assert done.returncode != 0
    assert done.stderr.strip() == (
        "run.py: Python 3.9.1 is not suitable; use 3.11.5 to 3.13, for example: python3.12 run.py"
    )
    assert not (tmp_path / ".venv").exists()


def test_an_interrupted_install_is_not_taken_for_ready(tmp_path: Path):
    """A stamp and a Python make it ready; the marker of an unfinished install says it is not."""
    _checkout(tmp_path)
    code = (
        "import run\n"
        "run.PYTHON.parent.mkdir(parents=True); run.PYTHON.touch()\n"
        "print(run.ready())\n"
        "run.STAMP.write_text(run.fingerprint()); print(run.ready())\n"
        "run.INSTALLING.touch(); print(run.ready()); run.INSTALLING.unlink()\n"
        "f = run.ROOT / 'constraints.txt'; f.write_text(f.read_text() + 'six==1.0\\n'); print(run.ready())\n"
    )
    done = _run_py(tmp_path, code)
    assert done.stdout.split() == ["False", "True", "False", "False"], done.stderr


def test_a_second_call_adds_less_than_two_seconds():
    """The environment that runs this test is whole; a call that does nothing shows what run.py adds."""
    if not run_py.ready():
        pytest.skip("this environment was not made by run.py")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "run.py", "so8t", "--help"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert "doctor" in done.stdout
    assert time.perf_counter() - started < 2.0
