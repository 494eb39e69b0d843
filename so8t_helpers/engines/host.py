"""Which program runs the GGUF files: a running Ollama, an installed one, or the embedded llama.cpp."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from so8t_helpers.engines.base import Engine, EngineError, threads_for
from so8t_helpers.engines.llama_cpp import open_llama_cpp
from so8t_helpers.engines.ollama import Modelfile, open_ollama
from so8t_helpers.engines.ollama_server import OllamaServer, find_ollama
from so8t_helpers.run.files import check_disk
from so8t_helpers.settings import Settings


class GgufHost:
    """The program that `eval.engine` leads to; it opens GGUF files one after another.

    Args:
        settings: the profile; `eval` decides.

    Attributes:
        server: the Ollama server, None for the embedded llama.cpp.
        name, version: of the program, for the report.

    Raises:
        EngineError: `eval.engine` is "ollama" and there is none, or it is too old.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.server: OllamaServer | None = None
        if settings.eval.engine != "llama_cpp":
            self.server = find_ollama(settings)
        if settings.eval.engine == "ollama" and self.server is None:
            raise EngineError(
                f"eval.engine is ollama, but nothing answers at {settings.eval.ollama_url} and there is no "
                "ollama program in PATH or SO8T_OLLAMA; start `ollama serve`, install Ollama, or set "
                "eval.engine to auto or llama_cpp"
            )
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def modelfile_of(settings: Settings, gguf: Path) -> Modelfile:
    """What a profile tells Ollama about a file; of two trained formats Ollama can part one, the seed's."""
    threads = threads_for(gguf)
    return Modelfile(
        style="quadruple" if settings.dataset.think_format == "quadruple" else "seed",
        think_command=settings.dataset.think_command,
        num_ctx=settings.eval.num_ctx,
        system=settings.dataset.system_prompt,
        temperature=settings.eval.temperature,
        threads=threads if threads == 1 else None,
    )
