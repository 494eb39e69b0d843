"""The peers' stacks for train_gpu.py: Unsloth, and the libraries as shipped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_gpu_common import (
    ACCUMULATION,
    ALPHA,
    DROPOUT,
    LENGTH,
    RANK,
    TARGETS,
    documents,
    measure,
    random_tensor,
)


def checkpoint(config: Path, scratch: Path) -> Path:
    """Write the peers' random checkpoint once."""
    from safetensors.torch import save_file

    from so8t_helpers.phi3.shape import read_shape, weight_path

    folder = scratch / "phi35-random"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in config.iterdir():
        shutil.copy(file, folder)
    shape, generator = read_shape(config), torch.Generator(device="cuda").manual_seed(0)
    names = ["model.embed_tokens", "model.norm", "lm_head"]
    for i in range(shape.num_layers):
        names += [weight_path(i, target) for target in TARGETS]
        names += [f"model.layers.{i}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm")]
    tensors = {f"{n}.weight": random_tensor(shape, f"{n}.weight", generator).cpu() for n in names}
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").rename(folder / "model.safetensors")
    torch.cuda.empty_cache()
    return folder


def plain_loop(model: Any, started: float) -> dict[str, Any]:
    """The loop that any peer's model runs in: autocast to bf16, paged 8-bit AdamW."""
    from bitsandbytes.optim import PagedAdamW8bit

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW8bit(trainable, lr=1e-4)
    batches = []
    for seed in range(ACCUMULATION):
        ids = torch.from_numpy(np.concatenate(documents(LENGTH, model.config.vocab_size, seed)))[None].cuda()
        labels = ids.clone()
        labels[:, ::3] = -100
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    model.train()
    losses = []

    def step(_: int) -> None:
        total = 0.0
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss / ACCUMULATION
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(total), 4))

    found = measure(step, LENGTH, ACCUMULATION, started)
    return found | {"trainable": sum(p.numel() for p in trainable), "losses": losses}


def unsloth(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's generic path with its own gradient checkpointing; no gates, no PET."""
    folder = checkpoint(config, scratch)
    started = time.perf_counter()
    import unsloth

    four = arguments["bits"] == 4
    model, _ = unsloth.FastModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=four, load_in_8bit=not four
    )
    model = unsloth.FastModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        finetune_vision_layers=False,
    )
    return plain_loop(model, started) | {"version": unsloth.__version__}


def libraries(config: Path, scratch: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Transformers, PEFT and bitsandbytes as their documentation puts them together."""
    from peft import (
        LoraConfig,
        OFTConfig,
        get_peft_model,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = checkpoint(config, scratch)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = TARGETS
    if arguments["oft"]:  # what a PEFT user has instead of a gate; it cannot go with LoRA on the same linear
        model = inject_adapter_in_model(OFTConfig(oft_block_size=8, target_modules=["o_proj"]), model, "oft")
        targets = [t for t in TARGETS if t != "o_proj"]
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets, task_type="CAUSAL_LM"
    )
    return plain_loop(get_peft_model(model, lora), started)
