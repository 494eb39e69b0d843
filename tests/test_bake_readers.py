"""The baked folder in a reader of the transformers 4.4x kind, logit for logit against transformers 5.

`.ci/transformers4.sh` installs transformers 4.46 into a folder of its own and prints it; SO8T_TRANSFORMERS4
names that folder. A subprocess reads with it, on the torch of this environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_bake import TEXTS, make_adapter, make_base, make_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8t_helpers.bake.stage import bake

ORIGINAL = 64  # positions; longer texts take the long factors
LENGTHS = (40, 100)  # within the positions that the base was trained on, and beyond
OLD_READER = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts, out = sys.argv[1:]
assert transformers.__version__.startswith("4.4"), transformers.__version__
options = {"torch_dtype": torch.float64, "attn_implementation": "eager"}
model = AutoModelForCausalLM.from_pretrained(folder, **options)
texts = json.loads(texts)
with torch.no_grad():
    logits = {str(len(ids)): model(torch.tensor([ids])).logits[0].contiguous() for ids in texts["ids"]}
save_file(logits, out)
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts["texts"]]))
"""

pytestmark = pytest.mark.skipif(
    "SO8T_TRANSFORMERS4" not in os.environ,
    reason="SO8T_TRANSFORMERS4 does not name a folder with transformers 4.46; .ci/transformers4.sh makes one",
)


def read_old(folder: Path, ids: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits (T, V) of each text, and the token ids of TEXTS, as transformers 4.46 has them."""
    out = folder.parent / "old.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.environ["SO8T_TRANSFORMERS4"]}
    done = subprocess.run(
        [sys.executable, "-c", OLD_READER, folder, json.dumps({"ids": ids, "texts": TEXTS}), out],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits = load_file(out)
    return [logits[str(len(text))] for text in ids], json.loads(done.stdout.splitlines()[-1])


def read_new(folder: Path, ids: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits (T, V) of each text in this environment's transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0].double() for text in ids]


def publish(folder: Path) -> None:
    """Give a base the configuration keys that Phi-3.5 was published with."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {key: rope[key] for key in ("long_factor", "short_factor")} | {
        "type": "longrope"
    }
    config["original_max_position_embeddings"] = ORIGINAL
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("keys", ["published", "transformers 5"])
def test_an_old_reader_computes_the_same_logits(tmp_path: Path, keys: str) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    if keys == "published":
        publish(base)
    adapter = make_adapter(tmp_path / "adapter", gates=[0, 2])
    folder = bake(make_settings(tmp_path, base, adapter, max_shard_gib=100e3 / 2**30)).model_dir
    assert len(list(folder.glob("*.safetensors"))) > 1  # the index is read too
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]
    old, tokens = read_old(folder, ids)
    new = read_new(folder, ids, torch.float64)
    # Both run in float64, but for norms, softmax and rotary tables, which either does in float32. What a
    # whole pass in float32 rounds holds all of these roundings and more, so it bounds their difference.
    bounds = [
        float((x - y).abs().max()) for x, y in zip(new, read_new(folder, ids, torch.float32), strict=True)
    ]
    for x, y, bound in zip(old, new, bounds, strict=True):
        assert float((x - y).abs().max()) <= bound < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokens == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    # The comparison would see what an old reader does without its keys: plain rotary positions.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": None}), encoding="utf-8")
    for x, y, bound in zip(read_old(folder, ids)[0], new, bounds, strict=True):
        assert float((x - y).abs().max()) > 100 * bound
