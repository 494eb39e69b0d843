"""The same held-out prompts through transformers, llama.cpp and Ollama: same tokens, same greedy answers?

    python benchmarks/engines.py                        # the demo's run
    python benchmarks/engines.py --profile demo --prompts 60

The folder of 03_bake runs in transformers (float32), its F16 file in the other two. Ollama takes part where
one runs or is installed (SO8T_OLLAMA).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This file is called like a package of the project: its folder must not come first.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path += [str(HERE.parent), str(HERE)]

LEAST_EQUAL = 0.95  # greedy answers part where two tokens are as likely within float16's rounding


def ask(open_engine: Callable[[], Any], texts: list[str], limit: int) -> dict[str, Any]:
    """Open an engine; return its token ids, answers and tokens a second."""
    with open_engine() as engine:
        ids = [engine.tokenize(text) for text in texts]
        started = time.perf_counter()
        done = engine.complete_many(texts, max_tokens=limit)
        seconds = time.perf_counter() - started
        rate = sum(answer.tokens for answer in done) / seconds
        return {
            "version": f"{engine.name} {engine.version}",
            "ids": ids,
            "answers": [answer.text.strip() for answer in done],
            "tokens_per_s": round(rate),
        }


def main() -> int:
    """Ask all engines and compare each pair."""
    from claims import claim, write_claims

    from so8t_helpers.engines.host import find_gguf, modelfile_of
    from so8t_helpers.engines.llama_cpp import open_llama_cpp
    from so8t_helpers.engines.ollama import open_ollama
    from so8t_helpers.engines.ollama_server import find_ollama
    from so8t_helpers.engines.transformers_engine import open_transformers
    from so8t_helpers.phi3.template import read_dialect
    from so8t_helpers.run.files import read_jsonl
    from so8t_helpers.run.stage import stage_input
    from so8t_helpers.settings import load_settings

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--prompts", type=int, default=None)
    arguments = parser.parse_args()
    settings = load_settings(arguments.profile)
    folder = stage_input(settings, settings.gguf.model_dir, "03_bake", "model")
    gguf = find_gguf(settings, "f16")
    rows = read_jsonl(settings.run_dir / "01_dataset" / "eval.jsonl")[: arguments.prompts]
    dialect = read_dialect(folder)
    texts = [dialect.render(row["messages"][:-1], add_generation_prompt=True) for row in rows]
    limit = settings.eval.max_new_tokens

    found = {
        "transformers": ask(lambda: open_transformers(folder), texts, limit),
        "llama.cpp": ask(lambda: open_llama_cpp(gguf, num_ctx=settings.eval.num_ctx), texts, limit),
    }
    server = find_ollama(settings)
    if server is not None:
        with server:
            modelfile = modelfile_of(settings, gguf)
            opened = lambda: open_ollama(server, gguf, "so8t-benchmark:f16", modelfile)
            found["ollama"] = ask(opened, texts, limit)

    names, figures, claims = list(found), {"prompts": len(texts)}, []
    for name in names:
        figures[name] = {key: found[name][key] for key in ("version", "tokens_per_s")}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for key, what, least in (("ids", "token ids", 1.0), ("answers", "greedy answers", LEAST_EQUAL)):
                same = sum(x == y for x, y in zip(found[a][key], found[b][key], strict=True)) / len(texts)
                claims.append(claim(f"{what} equal, {a} and {b}", same, least, "of prompts", at_least=True))
    return 0 if write_claims("engines", figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
