"""Which program runs the GGUF files: a running Ollama, an installed one, or the embedded llama.cpp."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from so8t_helpers.engines.base import Closing, Engine, EngineError, threads_for
from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.engines.ollama import Modelfile, open_ollama
from so8t_helpers.engines.ollama_server import (
    OllamaServer,
    check_version,
    find_binary,
    find_ollama,
    server_version,
)
from so8t_helpers.phi3.template import read_dialect
from so8t_helpers.run.files import StageError, check_disk
from so8t_helpers.run.stage import stage_input
from so8t_helpers.settings import Settings


class GgufHost(Closing):
    """The program that `eval.engine` leads to; it opens GGUF files one after another.

    Attributes:
        server: the Ollama server, None for the embedded llama.cpp.
        name, version: of the program, for the report.

    Raises:
        EngineError: `eval.engine` is "ollama" and there is none, or it is too old.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.server: OllamaServer | None = None
        check_engine(settings)
        if settings.eval.engine != "llama_cpp":
            self.server = find_ollama(settings)
        self.name = "Ollama" if self.server else "llama.cpp"
        self.version = (
            self.server.version if self.server else f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        )

    @property
    def description(self) -> str:
        """What runs, for a reader: program, version, and whose server it is."""
        if self.server is None:
            return f"embedded llama.cpp ({self.version})"
        whose = "started for this run" if self.server.own else f"running at {self.server.url}"
        return f"Ollama {self.version}, {whose}"

    def open(self, gguf: Path, kind: str, on_bytes: Callable[[int], object] | None = None) -> Engine:
        """Load a GGUF; `kind` ("q4_k_m") becomes the tag of its name in Ollama."""
        chosen = self.settings.eval
        if self.server is None:
            return open_llama_cpp(
                gguf,
                num_ctx=chosen.num_ctx,
                timeout=chosen.timeout_seconds,
                parallel=chosen.parallel,
                think_command=self.settings.dataset.think_command,
            )
        if self.server.own:
            check_disk(self.settings.run_dir, gguf.stat().st_size, f"Ollama's copy of {gguf.name}")
        return open_ollama(
            self.server,
            gguf,
            f"so8t-{self.settings.run.name.lower()}:{kind}",
            modelfile_of(self.settings, gguf),
            timeout=chosen.timeout_seconds,
            parallel=chosen.parallel,
            keep=chosen.keep_in_ollama,
            on_bytes=on_bytes,
        )

    def close(self) -> None:
        """End a server that we started."""
        if self.server is not None:
            self.server.close()


def check_engine(settings: Settings) -> None:
    """Raise EngineError: `eval.engine` is "ollama" and there is none, or the one that runs is too old."""
    url = settings.eval.ollama_url
    if settings.eval.engine == "llama_cpp":
        return
    if (version := server_version(url)) is not None:
        check_version(version, url)
    elif find_binary() is None and settings.eval.engine == "ollama":
        raise EngineError(
            f"eval.engine is ollama, but nothing answers at {url} and there is no ollama program in PATH or "
            "SO8T_OLLAMA; start `ollama serve`, install Ollama, or set eval.engine to auto or llama_cpp"
        )


def find_gguf(settings: Settings, kind: str) -> Path:
    """Return the file of one type ("q4_k_m") that 04_gguf made, or that lies in `eval.gguf_dir`.

    Raises:
        StageError: there is none, or several.
    """
    folder = stage_input(settings, settings.eval.gguf_dir, "04_gguf")
    found = sorted(folder.glob(f"*-{kind}.gguf")) or sorted(folder.glob(f"*-{kind.upper()}.gguf"))
    if len(found) > 1:
        raise StageError(f"several files for {kind} in {folder}: {', '.join(path.name for path in found)}")
    if not found:
        there = ", ".join(path.name for path in sorted(folder.glob("*.gguf"))) or "no GGUF at all"
        raise missing_gguf(settings, kind, f"{folder} holds {there}")
    return found[0]


def missing_gguf(settings: Settings, kind: str, there: str) -> StageError:
    """Return the error of a file that is not there and will not be; `there` says what is in its place."""
    return StageError(
        f"missing input 04_gguf/{settings.gguf.name}-{kind}.gguf: {there}; run stage 04_gguf with this type "
        "in gguf.types, or choose another in eval.models or serve.model"
    )


def parted_style(settings: Settings) -> str:
    """The think format that an engine parts by itself: of two trained ones it can part one, the seed's."""
    chosen = settings.dataset.think_format
    return "seed" if chosen == "both" else chosen


def modelfile_of(settings: Settings, gguf: Path) -> Modelfile:
    """What a profile tells Ollama about a file."""
    threads = threads_for(gguf)
    return Modelfile(
        read_dialect(gguf),
        style=parted_style(settings),
        think_command=settings.dataset.think_command,
        num_ctx=settings.eval.num_ctx,
        system=settings.dataset.system_prompt,
        temperature=settings.eval.temperature,
        threads=threads if threads == 1 else None,
    )
