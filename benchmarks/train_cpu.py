"""The demo's training on the CPU: ours against LLM.int8 in our loop, and against the libraries as shipped.

    python benchmarks/train_cpu.py [--steps 20] [--folder FOLDER]

All train the demo's base on the same packed sequences with the same LoRA, optimizer and learning rates:

- weight_only: 02_train as it is, gates and PET included.
- llm_int8: the same loop, `model.int8_matmul: llm_int8`: LLM.int8's own product with its 8-bit activations.
- libraries, 16-bit: transformers, PEFT and `load_in_8bit` as they load the model, in a plain loop; no gates,
  no PET. Activations have the 16 bits of the file, which few CPUs multiply fast.
- libraries, float32: the same, all that is not int8 in float32 (`prepare_model_for_kbit_training`).
  bitsandbytes then takes a dequantised product of its own, about what weight_only does.

Results go to benchmarks/results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from claims import claim, write_claims

from so8t_helpers.phi3.source import base_folder
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.stage import stage_input
from so8t_helpers.settings import Settings, load_settings, merge
from so8t_helpers.train import batches
from so8t_helpers.train import stage as train_stage
from so8t_helpers.train.batches import plan
from so8t_helpers.train.optimizer import learning_rate
from so8t_helpers.verbs import batch


def curve(settings: Settings, product: str) -> pd.DataFrame:
    """Train with one of our two products and return the metrics of its steps."""
    chosen = merge(settings, {"run": {"name": product}, "model": {"int8_matmul": product}})
    train_stage.train(chosen)
    return pd.read_parquet(chosen.run_dir / "02_train" / "metrics.parquet")


def libraries(settings: Settings, wide: bool) -> pd.DataFrame:
    """Train with transformers, PEFT and bitsandbytes on the sequences that 02_train would make.

    Args:
        wide: float32 instead of the 16 bits of the file, for all that is not int8.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, t, lora = base_folder(settings), settings.training, settings.lora
    rows = read_jsonl(stage_input(settings, t.dataset_dir, "01_dataset") / "train.jsonl")
    tokenizer = load_tokenizer(folder)
    samples = batches.tokenize(rows, tokenizer, t.sequence_length)
    schedule = plan(settings, samples)

    torch.manual_seed(settings.run.seed)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32 if wide else "auto",
        device_map="cpu",
    )
    if wide:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=t.gradient_checkpointing)
    model = get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=t.weight_decay, fused=True)
    model.train()
    found = []
    for step, group in enumerate(schedule.steps):
        started = time.perf_counter()
        sequences = [
            batches.build_sequence(
                [samples[i] for i in chosen],
                t.sequence_length,
                tokenizer.pad_token_id,
                schedule.most_documents,
            )
            for micro_step in group
            for chosen in micro_step
        ]
        tokens, targets, _ = (sum(c) for c in zip(*(s.counts() for s in sequences), strict=True))
        total = 0.0
        for sequence in sequences:
            same = sequence.documents[:, None] == sequence.documents
            logits = model(
                input_ids=sequence.tokens[None],
                position_ids=sequence.positions[None],
                attention_mask=same.tril()[None, None],  # True: attends; documents do not see each other
                use_cache=False,
            ).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits.float(), sequence.targets, ignore_index=batches.IGNORE, reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item() / targets
        torch.nn.utils.clip_grad_norm_(trainable, t.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(t, step, len(schedule.steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append({"task_loss": total, "tokens": tokens, "seconds": time.perf_counter() - started})
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the demo's base and data are kept between calls")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of its cast to fp16 at every product
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        folders = {"root": str(root / "runs"), "reports_root": str(root / "reports")}
        settings = load_settings("demo", {"run": {"name": "data", **folders}})
        outcomes = batch.run_stages(settings, ["01_dataset"])
        if outcomes[-1].state == "failed":
            sys.exit(f"01_dataset failed: {outcomes[-1].detail}")
        data = {"max_steps": options.steps, "dataset_dir": str(settings.run_dir / "01_dataset")}
        settings = merge(settings, {"training": data})
        curves = {product: curve(settings, product) for product in ("weight_only", "llm_int8")}
        curves |= {"libraries, 16-bit": libraries(settings, False)}
        curves |= {"libraries, float32": libraries(settings, True)}

    # The first step builds threads and buffers.
    speeds = {name: float((c["tokens"] / c["seconds"]).iloc[1:].median()) for name, c in curves.items()}
    losses = {name: c["task_loss"] for name, c in curves.items()}
    jitter = losses["weight_only"].diff().abs().mean()
    figures = {
        name: {
            "tokens_per_s": round(speeds[name], 1),
            "task_loss": [round(x, 4) for x in c["task_loss"]],
            "seconds": [round(x, 3) for x in c["seconds"]],
        }
        for name, c in curves.items()
    }
    theirs = "libraries, 16-bit"
    apart = (losses["weight_only"] - losses[theirs]).abs().mean() / jitter
    claims = [
        claim(
            "CPU training: tokens/s over LLM.int8 as the libraries load it (16-bit)",
            round(speeds["weight_only"] / speeds[theirs], 2),
            10,
            "x",
            at_least=True,
        ),
        claim("CPU training: losses off theirs, over the change a step", round(float(apart), 4), 1, "x"),
    ]
    write_claims("train_cpu", figures, claims)


if __name__ == "__main__":
    main()
