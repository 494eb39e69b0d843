"""The card of a pushed model: the baked folder's own, with scores, files, policy and how to run it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from so8t_helpers.run.files import read_json
from so8t_helpers.settings import Settings

Made = dict[str, dict[str, Any]]  # the manifests of the stages that were carried out, by stage

_SCORES = {
    "format": "format",
    "answer": "right answer",
    "label_accuracy": "right decision",
    "refusal": "refused of what must be",
    "over_refusal": "refused of what may be answered",
}
_PROVENANCE = "\n## Provenance\n"


def write_card(settings: Settings, repo: str, made: Made, pages: Sequence[str]) -> str:
    """Return the repository's README.md.

    Args:
        repo: "OWNER/NAME".
        made: manifests by stage; 03_bake's is among them.
        pages: the reports' places in the repository.
    """
    baked = (settings.run_dir / "03_bake" / "model" / "README.md").read_text(encoding="utf-8")
    _, header, body = baked.split("---\n", 2)
    body, heading, provenance = body.partition(_PROVENANCE)
    sections = (
        _running(settings, repo, made),
        _policy(made),
        _scores(settings, made),
        _files(settings, made),
        _reports(pages),
    )
    text = "\n\n".join([body.rstrip(), *sections])
    return f"---\n{_header(header)}---\n{text}\n{heading}{provenance}"


def _header(text: str) -> str:
    """The hub refuses a base that is not one of its ids, such as the name of a local folder."""
    facts = yaml.safe_load(text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.get("base_model", "")):
        facts["base_model_relation"] = "finetune"
    else:
        facts.pop("base_model", None)
    return yaml.safe_dump(facts, allow_unicode=True, sort_keys=False)


def _running(settings: Settings, repo: str, made: Made) -> str:
    kinds = [kind.upper() for kind in settings.gguf.types] if "04_gguf" in made else []
    tag = "Q4_K_M" if "Q4_K_M" in kinds else kinds[-1] if kinds else ""
    ollama = (
        f"""```sh
ollama run hf.co/{repo}:{tag}
```

Files: {", ".join(f"`{kind}`" for kind in kinds)}. `template` and `params` say how this model was taught \
to be asked; Ollama parts the thinking from the answer. A private repository wants Ollama's public key among \
the account's SSH keys."""
        if kinds
        else "There are no GGUF files: 04_gguf was not carried out."
    )
    return f"""## Running it

{ollama}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")
```

`adapter/` holds the LoRA as PEFT reads it and, where there are rotations, `so8t_gates.safetensors`: the \
LoRA without them is another model."""


def _policy(made: Made) -> str:
    """What 01_dataset let in and what it set aside."""
    entry = made["03_bake"]["inputs"].get("01_dataset/card.json")
    if entry is None:
        return "## Data policy\n\nNo dataset card came with the adapter: licences and policy are not known."
    card = read_json(Path(entry["path"]))
    chosen = card["settings"]
    aside = {what: facts["lines"] for what, facts in card["quarantine"].items()}
    counted = "".join(f"\n- {what}: {_counts(found)}" for what, found in card["counted"].items())
    held_out = card["eval"].get("licences", {})
    return f"""## Data policy

- licences allowed: {", ".join(chosen["licences"])}; found in training: \
{_counts(card["train"].get("licences", {}))}; held out: {_counts(held_out)}
- personal data: {chosen["personal_data"]}
- set aside: {_counts(aside)}{counted}"""


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"


def _scores(settings: Settings, made: Made) -> str:
    if "05_ollama_eval" not in made:
        return "## Scores\n\nNot measured: 05_ollama_eval was not carried out."
    scores = read_json(settings.run_dir / "05_ollama_eval/scores.json")
    rows = [f"| model | {' | '.join(_SCORES.values())} | leaks |", "|---|" + "---|" * (len(_SCORES) + 1)]
    for name, entry in scores["models"].items():
        cells = [_share(entry[key], entry["ci"][key]) for key in _SCORES]
        rows.append(f"| {name} | {' | '.join(cells)} | {entry['leaks']} of {entry['n']} |")
    engine, n = scores["engine"], max(entry["n"] for entry in scores["models"].values())
    return f"""## Scores

On {n} held-out prompts, in brackets the 95% bootstrap interval of \
{settings.eval.bootstrap_samples:,} resamples; GGUF files in {engine["name"]} {engine["version"]}, \
temperature {settings.eval.temperature:g}. `base` is the model before training; \
a leak is thinking in the answer.

{chr(10).join(rows)}"""


def _share(value: float | None, ci: list[float] | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.1%}" + (f" [{ci[0]:.1%}, {ci[1]:.1%}]" if ci else "")


def _files(settings: Settings, made: Made) -> str:
    if "04_gguf" not in made:
        return "## GGUF files\n\nNone: 04_gguf was not carried out."
    quality = read_json(settings.run_dir / "04_gguf/quality.json")
    reference = (quality.get("reference") or "").upper()
    rows = [
        f"| file | MB | bits a weight | perplexity | mean KL from {reference} | same next token |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in quality["files"].items():
        measured = [
            format(found[key], style) if found.get(key) is not None else "not measured"
            for key, style in (("perplexity", ".2f"), ("kl_mean", ".2e"), ("top1_agreement", ".2%"))
        ]
        size = f"{found['bytes'] / 1e6:.1f} | {found['bits_per_weight']:.2f}"
        rows.append(f"| {kind.upper()} | {size} | {' | '.join(measured)} |")
    return "## GGUF files\n\n" + "\n".join(rows)


def _reports(pages: Sequence[str]) -> str:
    if not pages:
        return "## Reports\n\nThe run has none."
    links = "\n".join(f"- [`{page}`]({page})" for page in pages)
    return f"## Reports\n\nPages that need nothing else; download them and open them in a browser.\n\n{links}"
