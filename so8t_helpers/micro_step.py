"""One micro-step: forward and backward of one packed sequence, written out layer by layer.

There is no autograd graph over the whole model. The forward loop keeps each layer's input; the backward loop
walks the layers in reverse, runs each again with gradients on and differentiates it at once. So recomputing,
keeping activations where memory allows, compiling each layer once for all and capturing the whole as one
CUDA graph are the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from so8t_helpers import pet
from so8t_helpers.adapters import Adapters
from so8t_helpers.layer_inputs import DeviceInputs, HostInputs
from so8t_helpers.model import Base
from so8t_helpers.packing import IGNORE, PackedSequence
from so8t_helpers.phi3 import (
    Layer,
    LayerConfig,
    Packed,
    attention_half,
    decoder_layer,
    mlp_half,
    rms_norm,
    rope_tables,
)
from so8t_helpers.settings import Settings

_LOSS_CHUNK = 512  # tokens whose logits exist at a time: 512 x 32,064 float32 is 63 MiB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies over tokens; logits exist for one chunk at a time.

    The gradient of the hidden states is computed on the way forward, as in Liger's fused linear
    cross-entropy (Hsu et al. 2024): softmax minus one-hot, times the head.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        grad = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), _LOSS_CHUNK):
            part = slice(start, start + _LOSS_CHUNK)
            counted = targets[part] != IGNORE
            index = torch.where(counted, targets[part], 0)[:, None]
            logits = (hidden[part] @ head.t()).float()  # (chunk, vocab)
            log_norm = logits.logsumexp(-1, keepdim=True)
            total += ((log_norm - logits.gather(1, index))[:, 0] * counted).sum()
            slope = logits.sub_(log_norm).exp_()
            slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
            slope *= counted[:, None]
            grad[part] = slope.to(hidden.dtype) @ head
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad.float() * upstream).to(grad.dtype), None, None


@dataclass
class Segment:
    """A piece of the model that maps (T, d) to (T, d), run in `tiles` equal parts of the tokens."""

    function: Callable[..., Tensor]
    layer: Layer
    config: LayerConfig
    tiles: int

    def __call__(self, x: Tensor, packed: Packed) -> Tensor:
        return self.function(x, self.layer, packed, self.config)

    def forward_only(self, x: Tensor, packed: Packed) -> Tensor:
        """Run without gradients, tile by tile."""
        if self.tiles == 1:
            return self(x, packed)
        out = torch.empty_like(x)
        for rows in self._tiles(x):
            out[rows] = self(x[rows], _rows_of(packed, rows))
        return out

    def recompute_and_differentiate(self, x: Tensor, grad: Tensor, packed: Packed) -> Tensor:
        """Run again with gradients on and differentiate at once; `grad` becomes the gradient of x."""
        for rows in self._tiles(x):
            leaf = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = self.function(leaf, self.layer, _rows_of(packed, rows), self.config, False)
            torch.autograd.backward(out, grad[rows])
            assert leaf.grad is not None
            if self.tiles == 1:
                return leaf.grad
            grad[rows] = leaf.grad
        return grad

    def _tiles(self, x: Tensor) -> list[slice]:
        size = len(x) // self.tiles
        return [slice(start, start + size) for start in range(0, len(x), size)]


def _rows_of(packed: Packed, rows: slice) -> Packed:
    """Narrow what depends on the token; bounds and positions stay, since only whole sequences attend."""
    return packed._replace(rows=packed.rows[rows])


class MicroStep:
    """Runs packed sequences through the model and adds up gradients.

    Attributes:
        task_loss, pet_loss: () float32 on the device, sums over micro-steps of the normalised losses;
            `begin_step` clears them. Reading them waits for the device, so the loop reads once a step.
        segments: what is run again and differentiated at a time: whole layers; with `tiles`, attention and
            MLP apart, the MLP in that many parts of the tokens. The last `keep` keep their activations.
    """

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        settings: Settings,
        varlen: bool,
        most_documents: int,
        keep: int = 0,
        tiles: int = 1,
        on_host: bool = False,
    ):
        length = settings.training.sequence_length
        self.base, self.pet = base, settings.pet
        device = base.device
        self.config = LayerConfig(
            base.shape, settings.lora.alpha / settings.lora.r, settings.lora.dropout, varlen
        )
        layers = [adapters.layer(base, i) for i in range(base.shape.num_layers)]
        functions = (attention_half, mlp_half) if tiles > 1 else (decoder_layer,)
        self.segments = [
            Segment(function, layer, self.config, tiles if function is mlp_half else 1)
            for layer in layers
            for function in functions
        ]
        self.first_kept = len(self.segments) - keep
        self.cos, self.sin = rope_tables(base.shape, length, device)
        # Static buffers: a captured graph reads from fixed addresses.
        total = length * settings.training.batch_size
        self.embedded = torch.zeros(total, base.shape.hidden_size, dtype=base.dtype, device=device)
        count = len(self.segments)
        self.inputs = HostInputs(count, self.embedded) if on_host else DeviceInputs(count)
        self.targets = torch.full((total,), IGNORE, device=device)
        self.positions = torch.zeros(total, dtype=torch.int64, device=device)
        self.documents = torch.full((total,), -1, dtype=torch.int32, device=device)
        size = (most_documents + 2) * settings.training.batch_size
        self.bounds = torch.full((size,), total, dtype=torch.int32, device=device)
        self.bounds[0] = 0
        self.rows = torch.arange(total, dtype=torch.int32, device=device)[:, None]
        self.seed = torch.zeros((), dtype=torch.int32, device=device)
        self.per_target, self.per_bend, self.pet_lambda, self.loss_scale = (
            torch.ones((), device=device) for _ in range(4)
        )
        self.task_loss, self.pet_loss = (torch.zeros((), device=device) for _ in range(2))
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin_step(self, targets: int, bends: int, pet_lambda: float, loss_scale: float) -> None:
        """Set what holds for all micro-steps of one optimizer step: what the sums are divided by."""
        self.per_target.fill_(1 / max(targets, 1))
        self.per_bend.fill_(1 / max(bends, 1))
        self.pet_lambda.fill_(pet_lambda)
        self.loss_scale.fill_(loss_scale)
        self.task_loss.zero_()
        self.pet_loss.zero_()

    def load(self, sequence: PackedSequence, seed: int) -> None:
        """Copy one sequence into the buffers; the embedding is looked up on the host."""
        pinned = self.base.device.type == "cuda"
        rows = torch.empty(self.embedded.shape, dtype=self.embedded.dtype, pin_memory=pinned)
        torch.index_select(self.base.embedding, 0, sequence.tokens, out=rows)
        pairs = (
            (self.embedded, rows),
            (self.targets, sequence.targets),
            (self.positions, sequence.positions),
            (self.documents, sequence.documents),
            (self.bounds, sequence.bounds),
        )
        for buffer, value in pairs:
            buffer.copy_(value.pin_memory() if pinned and value is not rows else value, non_blocking=True)
        self.seed.fill_(seed)

    def compile(self) -> None:
        """Compile each kind of segment once; all layers share the code."""
        compiled = {
            function: torch.compile(function, fullgraph=True, dynamic=False)
            for function in {segment.function for segment in self.segments}
        }
        for segment in self.segments:
            segment.function = compiled[segment.function]

    def capture(self, adapters: Adapters) -> None:
        """Record the whole micro-step as one CUDA graph, which `run` then replays: no launch overhead.

        It is recorded on padding, and what that adds to gradients and losses is cleared.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets cuBLAS and the allocator settle
                self._walk()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the graph has a pool of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._walk()
        adapters.zero_grad()

    def run(self) -> None:
        """Forward and backward over what is loaded; adds to the gradients and the losses."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._walk()

    def _walk(self) -> None:
        packed = Packed(self.cos[self.positions], self.sin[self.positions], self.bounds, self.rows, self.seed)
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # (input, output) that hold a segment's activations
        self.inputs.begin()
        x = self.embedded
        for i, segment in enumerate(self.segments):
            if i >= self.first_kept:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad():
                    out = segment(leaf, packed)
                kept[i] = (leaf, out)
                x = out.detach()
            else:
                self.inputs.save(i, x)
                with torch.no_grad():
                    x = segment.forward_only(x, packed)
        grad = self._head(x)
        del x  # with long sequences every (T, d) that stays through the backward loop counts
        for i in reversed(range(len(self.segments))):
            if i in kept:
                leaf, out = kept.pop(i)
                torch.autograd.backward(out, grad)
                assert leaf.grad is not None
                grad = leaf.grad
            else:
                grad = self.segments[i].recompute_and_differentiate(self.inputs.load(i), grad, packed)

    def _head(self, x: Tensor) -> Tensor:
        """Final norm and both losses. x (T, d) -> gradient (T, d) of the scaled total."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            hidden = rms_norm(leaf, self.base.final_norm, self.base.shape.rms_eps)
            task = _ChunkedCrossEntropy.apply(hidden, self.base.head, self.targets) * self.per_target
            total = task
            if self.pet.enabled:
                bend = pet.penalty_sum(hidden, pet.valid_positions(self.documents), self.pet) * self.per_bend
                total = task + self.pet_lambda * bend
                self.pet_loss += bend.detach()
            self.task_loss += task.detach()
            torch.autograd.backward(total * self.loss_scale)
        assert leaf.grad is not None
        return leaf.grad
