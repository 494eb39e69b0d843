"""The program of the llama.cpp subprocess: load one GGUF, serve it on loopback, end with its parent.

Run as `python -m so8t_helpers.engines.llama_server`. The first line of stdin is a JSON object with the
options (a secret among them, which is why it is not an argument); the first line of stdout is the answer,
`{"url": …}` or `{"error": …}`. The end of stdin is the end of the program.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def serve(options: dict[str, Any], answer: TextIO) -> None:
    """Load the model and serve until stdin ends.

    Args:
        options: `model` (path), `num_ctx` (tokens for each slot), `parallel` (slots), `threads`, `secret`.
        answer: where the one line of answer goes.
    """
    import xllamacpp  # noqa: PLC0415  slow to load, and only this process may hold it

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [options["secret"]]
    # Each slot gets `num_ctx` of its own: llama.cpp takes longrope's long factors by a slot's context.
    params.n_parallel = options["parallel"]
    params.n_ctx = options["num_ctx"] * options["parallel"]
    params.kv_unified = params.ctx_shift = params.warmup = False
    params.fit_params = params.ui = params.use_jinja = False
    params.special = True  # control tokens are written out: stops and the scanner must see them
    params.verbosity = 1  # errors alone; at 0 a failed load would not say why
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    server = xllamacpp.Server(params)
    answer.write(json.dumps({"url": server.listening_address}) + "\n")
    answer.flush()
    sys.stdin.read()


def main() -> None:
    """Read the options, keep stdout for the one line of answer, serve."""
    options = json.loads(sys.stdin.readline())
    # llama.cpp writes its log to whatever is descriptor 1; the answer gets a copy of the real one.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        try:
            serve(options, answer)
        except Exception as error:
            answer.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
    # llama.cpp's worker threads do not always let the interpreter end.
    os._exit(0)


if __name__ == "__main__":
    main()
