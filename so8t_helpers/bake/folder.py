"""What stands next to the weights of a baked folder: configuration, tokenizer files, model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from so8t_helpers.phi3 import tokenizer_files
from so8t_helpers.phi3.shape import rope_parameters
from so8t_helpers.run.files import StageError, read_json, write_json, write_text

_OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md")
_REMOTE_CODE_KEYS = ("auto_map", "_name_or_path")


def base_files(base: Path, weights: Iterable[Path]) -> dict[str, Path]:
    """Return the base's files that decide the baked folder, by name.

    Raises:
        StageError: if config.json or the tokenizer is missing.
    """
    names = (
        "config.json",
        *tokenizer_files.FILES,
        *_OTHER_FILES,
        "README.md",
        "model.safetensors.index.json",
    )
    found = {name: base / name for name in names if (base / name).is_file()}
    if "config.json" not in found:
        raise StageError(f"{base}: no config.json; model.base must name a Phi3 model folder or hub id")
    if not found.keys() & {"tokenizer.json", "tokenizer.model"}:
        raise StageError(f"{base}: neither tokenizer.json nor tokenizer.model; fetch the model again")
    return found | {path.name: path for path in weights}


def write_side_files(base: Path, folder: Path) -> None:
    """Write config.json and generation_config.json, and copy the base's tokenizer and licence files."""
    config = read_json(base / "config.json")
    tokenizer_files.copy_tokenizer(base, folder)
    for name in _OTHER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_json(folder / "config.json", baked_config(config, base))
    if not (folder / "generation_config.json").is_file():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / "generation_config.json", {k: config[k] for k in keys if k in config})


def baked_config(config: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the base's configuration with the rope and dtype keys of old readers and new ones.

    transformers 5 saves `rope_parameters` and `dtype`; transformers 4, llama.cpp's converter and Ollama read
    `rope_scaling` (transformers 4 insists on exactly three keys there), `rope_theta`,
    `original_max_position_embeddings` and `torch_dtype`.

    Raises:
        StageError: if the base is quantised.
    """
    if "quantization_config" in config:
        raise StageError(f"{base}: this base is quantised; bake onto the 16-bit one (set model.base)")
    new = {key: value for key, value in config.items() if key not in _REMOTE_CODE_KEYS}
    rope = rope_parameters(config)
    factors = {key: rope[key] for key in ("long_factor", "short_factor") if key in rope}
    new["rope_scaling"] = {**factors, "type": "longrope"} if rope["rope_type"] == "longrope" else None
    new |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    new["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    new["rope_parameters"] = rope
    new["dtype"] = new["torch_dtype"] = config.get("dtype") or config.get("torch_dtype")
    return new


def write_card(
    folder: Path,
    base_readme: Path,
    provenance: dict[str, Any],
    changes: str,
    dataset_card: dict[str, Any] | None,
    proof: dict[str, Any],
) -> None:
    """Write the model card: what it was made from, under which licence, how it was proven, the hashes."""
    readme = base_readme.read_text(encoding="utf-8") if base_readme.is_file() else ""
    front_matter = re.match(r"---\n(.*?)\n---", readme, flags=re.DOTALL)
    facts = yaml.safe_load(front_matter[1]) if front_matter else None
    licence = facts.get("license") if isinstance(facts, dict) else None
    header = {
        "base_model": provenance["base"]["id"],
        **({"license": str(licence)} if licence else {}),
        **({"language": languages} if (languages := _languages(dataset_card)) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["so8t", "phi3", "lora"],
    }
    baking, rounding = proof["logits"]["baking"], proof["logits"]["rounding"]
    commit = provenance["base"].get("commit")
    base = f"`{provenance['base']['id']}`" + (f" at commit `{commit}`" if commit else "")
    text = f"""---
{yaml.safe_dump(header, allow_unicode=True, sort_keys=False).rstrip()}
---
# {provenance["run"]}

A plain Phi3 model, baked by the SO8T workbench from {base}: {changes}. \
W' = (W + s·B·A) @ R in float32, rounded once to the base's 16 bits. \
It loads with `AutoModelForCausalLM` and needs no further code.

## Licence

{f"The base's: {licence}." if licence else "The base's; its folder states none in its model card."}

## Data

{_dataset_text(dataset_card)}

## Proof

On {proof["tokens"]} tokens of {proof["texts"]} held-out texts, with float64 activations:

- gated and adapted model against baked weights before rounding: logits differ by at most \
{baking["largest"]:.2e}, next token the same for {baking["next_token_agreement"]:.2%};
- rounding to 16 bits alone: at most {rounding["largest"]:.2e}, next token the same for \
{rounding["next_token_agreement"]:.2%}, mean KL divergence {proof["rounding_kl_mean"]:.2e} nats.

## Provenance

SHA-256; `so8t verify` walks these back to the input lines.

```json
{json.dumps(provenance, ensure_ascii=False, indent=2)}
```
"""
    write_text(folder / "README.md", text)


def _languages(card: dict[str, Any] | None) -> list[str]:
    """Return the languages of at least a twentieth of the training samples, the most frequent one first."""
    counts = card["train"].get("languages", {}) if card else {}
    return [name for name, number in counts.items() if number >= 0.05 * sum(counts.values())]


def _dataset_text(card: dict[str, Any] | None) -> str:
    """Sum up 01_dataset's card; its settings stay out, they may name folders of one machine."""
    if card is None:
        return "No dataset card came with the adapter."
    lines = card["lines"]
    rows = ""
    for group, counts in card["train"].items():
        listed = ", ".join(f"{name} {number:,}" for name, number in list(counts.items())[:12])
        rows += f"| {group} | {listed} |\n"
    inputs = "".join(f"\n- input `{file['name']}`: `{file['sha256']}`" for file in card["inputs"])
    return f"""{card["purpose"]}

Of {lines["read"]:,} input lines {lines["train"]:,} became training samples, {lines["eval"]:,} \
were held out, {lines["quarantine"]:,} were set aside. Not looked for: {card["not_covered"]}.

| training samples by | |
|---|---|
{rows}{inputs}"""
