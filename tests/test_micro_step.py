"""The micro-step against transformers' Phi3 with autograd over the whole model."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Phi3Config, Phi3ForCausalLM

from so8t_helpers import settings
from so8t_helpers.phi3.shape import logit_rows, read_shape
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.settings import PROJECT_ROOT
from so8t_helpers.train import batches, micro_step, pet
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.frozen import load_base
from so8t_helpers.train.gate import gate
from so8t_helpers.train.layers import keep_mask, token_keys
from so8t_helpers.train.micro_step import MicroStep

CPU = torch.device("cpu")
LENGTH, MOST = 48, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi3 with grouped heads and longrope whose long factors this length calls for."""
    path = tmp_path_factory.mktemp("phi3")
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
        },
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Phi3ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


def make(
    folder: Path, dropout: float = 0.0, quantization: str = "none", int8_matmul: str = "weight_only", **plan
) -> tuple[Adapters, MicroStep]:
    chosen = settings.validate(
        {
            "model": {"quantization": quantization, "int8_matmul": int8_matmul},
            "lora": {"r": 4, "alpha": 8, "dropout": dropout},
            "so8t": {"init_scale": 0.3},
            "training": {"sequence_length": LENGTH},
        },
        "test",
    )
    shape = read_shape(folder)
    base = load_base(shape, weight_reader(folder), chosen.model, CPU, torch.float32)
    adapters = Adapters(shape, chosen, CPU)
    with torch.no_grad():  # B starts at zero, which would hide most of LoRA's gradient
        adapters.lora.copy_(
            torch.randn(adapters.lora.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        )
    return adapters, MicroStep(base, adapters, chosen, False, MOST, **plan)


def documents() -> list[batches.Document]:
    rng = np.random.default_rng(0)
    found = []
    for length in (20, 15, 9):
        tokens = rng.integers(1, 128, length)
        targets = np.full(length, batches.IGNORE)
        targets[length // 2 : -1] = tokens[length // 2 + 1 :]
        found.append(batches.Document(tokens, targets))
    return found


def run(adapters: Adapters, step: MicroStep, sequences: list[batches.PackedSequence]) -> tuple[float, float]:
    _, targets, bends = (sum(c) for c in zip(*(s.counts() for s in sequences), strict=True))
    adapters.zero_grad()
    step.begin_step(targets, bends, 0.1, 1.0)
    for sequence in sequences:
        step.load(sequence, 7)
        step.run()
    return step.task_loss.item(), step.pet_loss.item()


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found - reference).norm() / reference.norm()).item()


def reference(folder: Path, adapters: Adapters) -> tuple[float, float, dict]:
    """Losses and gradients by transformers' modules, dense rotations, one document at a time."""
    model, parameters = Phi3ForCausalLM.from_pretrained(folder), {}
    for i, layer in enumerate(model.model.layers):
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            linear = getattr(layer.self_attn if name in ("qkv_proj", "o_proj") else layer.mlp, name)
            a, b = (adapters.matrices[i, name, m].detach().clone().requires_grad_() for m in "ab")
            turn = None
            if name == "o_proj":
                turn = torch.block_diag(*adapters.rotations[i].detach()).requires_grad_()
            parameters[i, name] = (a, b, turn)

            def forward(x, linear=linear, a=a, b=b, turn=turn):
                x = x if turn is None else x @ turn.T
                return x @ linear.weight.T + 2.0 * (x @ a.T @ b.T)

            linear.forward = forward
    task, bend, targets, bends = 0.0, 0.0, 0, 0
    for sample in documents():
        ids = torch.tensor(sample.tokens)[None]
        # Padded to the run's length, for transformers picks long factors by the length that it sees.
        hidden = model.model(functional.pad(ids, (0, LENGTH - ids.shape[1]))).last_hidden_state[
            0, : ids.shape[1]
        ]
        goal = torch.tensor(sample.targets)
        task = task + functional.cross_entropy(model.lm_head(hidden), goal, reduction="sum")
        bend = bend + (hidden[2:] - 2 * hidden[1:-1] + hidden[:-2]).square().mean(-1).sum()
        targets, bends = targets + int((goal >= 0).sum()), bends + len(hidden) - 2
    task, bend = task / targets, bend / bends
    (task + 0.1 * bend).backward()
    return task.item(), bend.item(), parameters


# float32 on both sides, three layers deep, sums in another order: some 1e-7 each, so 1e-5 with room.
BOUND = 1e-5


@pytest.mark.parametrize(
    "plan", [{}, {"keep": 1}, {"keep": 6}, {"tiles": 3}], ids=["recompute", "keep 1", "keep all", "tiles"]
)
def test_losses_and_gradients_equal_transformers(folder: Path, plan: dict, monkeypatch: pytest.MonkeyPatch):
    if "tiles" in plan:  # a long sequence meets its losses and the final norm in chunks, too
        monkeypatch.setattr(micro_step, "_NORM_CHUNK", 20)
    adapters, step = make(folder, **plan)
    if "tiles" in plan:
        step.loss_rows = 20
    task, bend = run(adapters, step, [batches.build_sequence(documents(), LENGTH, 0, MOST)])
    wanted_task, wanted_bend, parameters = reference(folder, adapters)
    assert task == pytest.approx(wanted_task, rel=BOUND)
    assert bend == pytest.approx(wanted_bend, rel=BOUND)
    for (i, name), (a, b, turn) in parameters.items():
        assert relative(adapters.matrices[i, name, "a"].grad, a.grad) < BOUND
        assert relative(adapters.matrices[i, name, "b"].grad, b.grad) < BOUND
        if turn is not None:
            blocks = torch.stack([turn.grad[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] for k in range(8)])
            assert relative(adapters.rotations.grad[i], blocks) < BOUND


def test_rows_of_logits_follow_the_vocabulary():
    rows = {vocabulary: logit_rows(vocabulary) for vocabulary in (900, 32064, 49152, 100352, 200064, 2**30)}
    assert rows == {900: 512, 32064: 512, 49152: 256, 100352: 128, 200064: 64, 2**30: 64}


@pytest.mark.parametrize("relative_pet", [False, True])
def test_losses_and_their_gradient_are_the_same_whatever_the_chunk(folder: Path, relative_pet: bool):
    """Against autograd in float64 over all tokens at once."""
    _, step = make(folder)
    step.pet = step.pet.model_copy(update={"relative": relative_pet})
    sequence = batches.build_sequence(documents(), LENGTH, 0, MOST)
    _, targets, bends = sequence.counts()
    step.load(sequence, 7)
    hidden = torch.randn(LENGTH, 64, generator=torch.Generator().manual_seed(3))

    leaf = hidden.double().requires_grad_()
    logits = leaf @ step.base.head.double().t()
    task = functional.cross_entropy(logits, step.targets, ignore_index=batches.IGNORE, reduction="sum")
    valid = pet.valid_positions(step.documents)
    states = leaf
    if relative_pet:
        squares = leaf.detach().square().mean(-1)[1:-1][valid]
        states = leaf * squares.mean().rsqrt()
    bend = (states[2:] - 2 * states[1:-1] + states[:-2]).square().mean(-1)[valid].sum()
    (task / targets + 0.1 * bend / bends).backward()

    for rows in (1, 7, 16, 48, 512):
        step.loss_rows = rows
        step.begin_step(targets, bends, 0.1, 1.0)
        found = step._losses(hidden)
        assert step.task_loss.item() == pytest.approx(task.item() / targets, rel=BOUND)
        assert step.pet_loss.item() == pytest.approx(bend.item() / bends, rel=BOUND)
        assert relative(found.double(), leaf.grad) < BOUND


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_packed_and_unpacked_give_the_same(folder: Path, quantization: str):
    packed = [batches.build_sequence(documents(), LENGTH, 0, MOST)]
    alone = [batches.build_sequence([sample], LENGTH, 0, MOST) for sample in documents()]
    found = []
    for sequences in (packed, alone):
        adapters, step = make(folder, quantization=quantization)
        found.append((*run(adapters, step, sequences), adapters.lora.grad.clone(), adapters.rotations.grad))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=BOUND)
    assert relative(found[0][2], found[1][2]) < BOUND
    assert relative(found[0][3], found[1][3]) < BOUND


def test_products_of_8_bits_are_the_same_recomputed_and_kept_and_near_the_others(folder: Path):
    packed = [batches.build_sequence(documents(), LENGTH, 0, MOST)]
    found = {}
    for name, int8_matmul, plan in (
        ("weight only", "weight_only", {}),
        ("recompute", "tensor_core", {}),
        ("keep", "tensor_core", {"keep": 6}),
        ("tiles", "tensor_core", {"tiles": 3}),
    ):
        adapters, step = make(folder, quantization="int8", int8_matmul=int8_matmul, **plan)
        found[name] = run(adapters, step, packed)[0], adapters.lora.grad, adapters.rotations.grad
    assert found["recompute"][0] == found["keep"][0]
    # A last bit that differs with the tile's size rounds a few numbers to the next step.
    for name, bound in (("keep", BOUND), ("tiles", 5e-3)):
        for gradient, wanted in zip(found[name][1:], found["recompute"][1:], strict=True):
            assert relative(gradient, wanted) < bound
    # Each product is off by 0.6%: three layers of four, some 2% together.
    assert found["recompute"][0] == pytest.approx(found["weight only"][0], rel=0.02)
    for gradient, wanted in zip(found["recompute"][1:], found["weight only"][1:], strict=True):
        assert 1e-3 < relative(gradient, wanted) < 0.05


def test_dropout_is_the_same_recomputed_and_kept_and_new_with_the_seed(folder: Path):
    packed = [batches.build_sequence(documents(), LENGTH, 0, MOST)]
    losses = {}
    for name, plan in {"recompute": {}, "keep": {"keep": 6}, "tiles": {"tiles": 3}}.items():
        adapters, step = make(folder, dropout=0.2, **plan)
        losses[name] = run(adapters, step, packed)[0]
    assert losses["recompute"] == losses["keep"]
    assert losses["tiles"] == pytest.approx(losses["keep"], rel=BOUND)
    step.begin_step(1, 1, 0.0, 1.0)
    step.load(packed[0], 8)
    step.run()
    other = step.task_loss.item()
    step.begin_step(1, 1, 0.0, 1.0)
    step.load(packed[0], 7)
    step.run()
    assert step.task_loss.item() != other


def test_the_mask_keeps_the_right_share_without_pattern():
    rows, p = torch.arange(2000, dtype=torch.int32)[:, None], 0.05

    def dropped(seed: int, salt: int) -> torch.Tensor:
        seed_, salt_ = (torch.tensor(n, dtype=torch.int32) for n in (seed, salt))
        return ~keep_mask(token_keys(rows, seed_), salt_, 512, p)

    def surprise(both: torch.Tensor) -> float:
        """Standard errors between the share of features dropped in both and p^2."""
        share = both.float().mean().item()
        return abs(share - p * p) / (p * p * (1 - p * p) / both.numel()) ** 0.5

    masks = [dropped(seed, salt) for seed in (1, 2, 3 << 20) for salt in (0, 1, 4)]
    for mask in masks:
        # A million draws: the standard error of the share is 2.2e-4, of a row's or column's about 1e-2.
        assert mask.float().mean().item() == pytest.approx(p, abs=1e-3)
        assert mask.float().mean(0).std().item() == pytest.approx((0.95 * p / 2000) ** 0.5, rel=0.2)
        assert mask.float().mean(1).std().item() == pytest.approx((0.95 * p / 512) ** 0.5, rel=0.2)
        # Neighbours in either direction are dropped together as often as chance has it.
        pairs = [(mask[:-n], mask[n:]) for n in (1, 2, 64)] + [
            (mask[:, :-n], mask[:, n:]) for n in (1, 8, 64)
        ]
        assert max(surprise(one & other) for one, other in pairs) < 5
    assert max(surprise(one & other) for one, other in itertools.combinations(masks, 2)) < 5


def test_gate_gradients_are_exact():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    blocks = torch.randn(8, 8, 8, generator=generator)
    turned = gate(x.float().requires_grad_(), blocks)
    dense = torch.block_diag(*blocks.double())
    assert relative(turned.double(), x @ dense.T) < 1e-6  # float32 sums of eight products

    leaf, free = x.float().requires_grad_(), blocks.clone().requires_grad_()
    upstream = torch.randn(5, 64, generator=generator)
    gate(leaf, free).backward(upstream)
    wanted = torch.stack(
        [
            (upstream.double()[:, s].T @ x.float().double()[:, s])
            for s in (slice(8 * b, 8 * b + 8) for b in range(8))
        ]
    )
    assert relative(leaf.grad.double(), upstream.double() @ dense) < 1e-6
    assert relative(free.grad.double(), wanted) < 1e-6


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system")
def test_the_kernels_turn_as_float64_does():
    """In Triton's interpreter, which needs no card; it knows fp16 but not bf16."""
    code = """
import torch
from so8t_helpers.train import gate_kernel
generator = torch.Generator().manual_seed(5)
for tokens in (1, 70, 600):
    # Slices of wider rows, as they come out of a fused product; token counts that fill no tile.
    x, grad = (torch.randn(tokens, 160, generator=generator).half()[:, :128] for _ in range(2))
    blocks = torch.randn(16, 8, 8, generator=generator)
    dense = torch.block_diag(*blocks.double())
    back, outer = gate_kernel.rotate_backward(grad, x, blocks)
    parts = [(t.double().unflatten(1, (16, 8)).permute(1, 2, 0)) for t in (grad, x)]
    wanted = parts[0] @ parts[1].transpose(1, 2)
    # Rounded once to fp16: half a unit in the last place, and a few 1e-7 before that of the float32 sums.
    rotated = gate_kernel.rotate(x, blocks)
    for found, exact in ((rotated, x.double() @ dense.T), (back, grad.double() @ dense)):
        assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-11 + 1e-6).all()
    assert (outer.double() - wanted).norm() < 1e-6 * wanted.norm()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_rotations_send_their_gradient_back_through_the_exponential(folder: Path):
    adapters, _ = make(folder)
    weight = torch.randn(adapters.rotations.shape, generator=torch.Generator().manual_seed(4))
    adapters.zero_grad()
    adapters.rotations.grad.copy_(weight)
    adapters.collect_rotation_gradient()
    step = 1e-6
    free = adapters.free.detach().double()
    from so8t_helpers.so8.rotation import rotation

    for index in [(0, 0, 0), (1, 3, 13), (2, 7, 27)]:
        moved = [free.clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = sum(
            sign * (rotation(m) * weight.double()).sum() for sign, m in zip((1, -1), moved, strict=True)
        )
        assert adapters.free.grad[index].item() == pytest.approx((slope / (2 * step)).item(), rel=1e-4)
