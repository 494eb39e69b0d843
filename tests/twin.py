"""The training once more, by the libraries: transformers' Phi3, peft's LoRA, gates as hooks, PET, AdamW.

It takes from `train/` the packed batches alone; rates, clipping, PET and rotations are written again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.settings import Settings
from so8t_helpers.so8 import rotation
from so8t_helpers.train import batches
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.batches import PackedSequence


class Gate(nn.Module):
    """y = R x on the input of o_proj, R = exp(A) block by block."""

    def __init__(self, free: Tensor):
        super().__init__()
        self.free = nn.Parameter(free)  # (d/8, 28)

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, columns = torch.triu_indices(8, 8, offset=1)
        upper = torch.zeros(len(self.free), 8, 8, dtype=self.free.dtype)
        upper = upper.index_put((torch.arange(len(self.free))[:, None], rows, columns), self.free)
        blocks = torch.matrix_exp(upper - upper.transpose(1, 2))
        parts = inputs[0].unflatten(-1, (-1, 8))  # (1, T, d/8, 8)
        return (torch.einsum("bij,...bj->...bi", blocks, parts).flatten(-2), *inputs[1:])


@dataclass
class Twin:
    """The libraries' model with adapters on it; `losses` and `pet` gather one number a step."""

    model: nn.Module
    gates: dict[int, Gate]
    losses: list[float] = field(default_factory=list)
    pet: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Compared:
    """A training of ours (`metrics`) beside the libraries'; `off` and `theirs_off` as `distance` has it."""

    metrics: pd.DataFrame
    exact: Twin
    theirs: Twin
    off: float
    theirs_off: float


def make_twin(folder: Path, settings: Settings, adapter: dict[str, Tensor], dtype: torch.dtype) -> Twin:
    """Load the base in `dtype` and start from the numbers of `adapter` (PEFT's keys, `layers.N.free`)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    lora = settings.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=0.0,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                parameter.data = adapter[name.replace(".default", "")].to(dtype).clone()
    gates = {}
    for i, layer in enumerate(model.model.layers):
        if f"layers.{i}.free" in adapter:
            gates[i] = Gate(adapter[f"layers.{i}.free"].to(dtype).clone())
            layer.self_attn.o_proj.register_forward_pre_hook(gates[i])
    return Twin(peft, gates)


def numbers(twin: Twin) -> dict[str, Tensor]:
    """Return what is trained, under the names of our files."""
    found = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in twin.model.named_parameters()
        if ".lora_" in name
    }
    return found | {f"layers.{i}.free": gate.free.detach() for i, gate in twin.gates.items()}


def train_twin(
    twin: Twin, settings: Settings, steps: Iterable[tuple[list[PackedSequence], float, float]]
) -> None:
    """Train; each step gives its sequences, the learning rate and PET's lambda."""
    named = [(name, p) for name, p in twin.model.named_parameters() if p.requires_grad]
    named += [("free", gate.free) for gate in twin.gates.values()]
    trained = [parameter for _, parameter in named]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained], weight_decay=0.0)
    own = {"lora_B": settings.lora.b_rate, "free": settings.so8t.learning_rate}
    base = twin.model.get_base_model()
    for sequences, rate, weight in steps:
        optimizer.zero_grad()
        targets = sum(int((s.targets >= 0).sum()) for s in sequences)
        middles = sum(len(document) - 2 for s in sequences for document in _documents(s))
        task_loss = pet_loss = 0.0
        for sequence in sequences:
            # Positions that begin anew part the documents: without a cache transformers masks between them.
            hidden = base.model(
                input_ids=sequence.tokens[None], position_ids=sequence.positions[None], use_cache=False
            ).last_hidden_state[0]
            # In float64: torch's own float32 cross-entropy on the CPU is off by 2e-5 with a large vocabulary.
            logits = base.lm_head(hidden).double()
            task = functional.cross_entropy(logits, sequence.targets, reduction="sum") / targets
            bends = [
                (hidden[d][2:] - 2 * hidden[d][1:-1] + hidden[d][:-2]).square().mean(-1).sum()
                for d in _documents(sequence)
                if len(d) > 2
            ]
            pet = torch.stack(bends).sum() / middles
            if settings.pet.relative:
                inner = torch.cat([hidden[d][1:-1] for d in _documents(sequence) if len(d) > 2])
                pet = pet / inner.detach().square().mean()
            (task + weight * pet).backward()
            task_loss, pet_loss = task_loss + task.item(), pet_loss + pet.item()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained))
        for parameter in trained:
            parameter.grad *= min(1.0, settings.training.max_grad_norm / (norm + 1e-6))
        for (name, _), group in zip(named, optimizer.param_groups, strict=True):
            chosen = next((value for part, value in own.items() if part in name and value), None)
            group["lr"] = rate * chosen / settings.training.learning_rate if chosen else rate
        optimizer.step()
        twin.losses.append(task_loss)
        twin.pet.append(pet_loss)


def _documents(sequence: PackedSequence) -> list[Tensor]:
    """Return the rows of each document, padding left out."""
    count = int(sequence.documents.max()) + 1
    return [torch.nonzero(sequence.documents == i)[:, 0] for i in range(count)]


def files(settings: Settings) -> dict[str, Tensor]:
    folder = settings.run_dir / "02_train" / "adapter"
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / rotation.GATES_FILE)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far numbers are from the exact ones, over how far those came from the start."""
    off = sum((found[k].double() - exact[k].double()).square().sum() for k in exact)
    moved = sum((exact[k].double() - start[k].double()).square().sum() for k in exact)
    return float((off / moved).sqrt())


def packed(
    settings: Settings, folder: Path, metrics: pd.DataFrame
) -> Iterator[tuple[list[PackedSequence], float, float]]:
    """The batches as 02_train lays them out, with the rate and lambda that it recorded for each step."""
    rows = read_jsonl(Path(str(settings.training.dataset_dir)) / "train.jsonl")
    tokenizer = load_tokenizer(folder)
    length = settings.training.sequence_length
    samples = batches.tokenize(rows, tokenizer, length)
    plan = batches.plan(settings, samples)
    for number, groups in enumerate(plan.steps):
        sequences = [
            batches.build_sequence(
                [samples[i] for i in chosen], length, tokenizer.pad_token_id or 0, plan.most_documents
            )
            for group in groups
            for chosen in group
        ]
        yield sequences, metrics["lr"][number], metrics["pet_lambda"][number]


def compare(settings: Settings, folder: Path, scratch: Path) -> Compared:
    """Hold a finished 02_train against the libraries' training, in float32 and in float64, from its start."""
    metrics = pd.read_parquet(settings.run_dir / "02_train" / "metrics.parquet")
    Adapters(read_shape(folder), settings, torch.device("cpu")).save(scratch)
    start = load_file(scratch / "adapter_model.safetensors") | load_file(scratch / rotation.GATES_FILE)
    steps = list(packed(settings, folder, metrics))
    twins = {dtype: make_twin(folder, settings, start, dtype) for dtype in (torch.float32, torch.float64)}
    for twin in twins.values():
        train_twin(twin, settings, steps)
    exact, theirs = twins[torch.float64], twins[torch.float32]
    off = distance(files(settings), numbers(exact), start)
    return Compared(metrics, exact, theirs, off, distance(numbers(theirs), numbers(exact), start))
