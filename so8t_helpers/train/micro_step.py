"""One micro-step: forward and backward of one packed sequence, written out half a layer at a time.

There is no autograd graph over the whole model. The forward loop keeps the input of each half of a layer; the
backward loop walks them in reverse, runs each again with gradients on and differentiates it at once. So
recomputing, keeping activations where memory allows, compiling each half once for all layers and capturing
the whole as one CUDA graph are the same few lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from so8t_helpers.phi3.lora_folder import lora_scale
from so8t_helpers.phi3.shape import logit_rows, rope_tables
from so8t_helpers.settings import Settings
from so8t_helpers.train import pet
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.batches import IGNORE, PackedSequence
from so8t_helpers.train.frozen import Base, hold
from so8t_helpers.train.layers import LayerConfig, Packed, attention_half, mlp_half, rms_norm, token_keys
from so8t_helpers.train.offload import DeviceInputs, HostInputs
from so8t_helpers.train.segment import Segment, keeping_little

_NORM_CHUNK = 4096  # tokens whose final norm is differentiated at a time, with five float32 copies of them


def token_loss(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a few tokens and its gradient by the logits: softmax minus one-hot.

    The gradient is computed on the way forward, as in Liger's fused linear cross-entropy (Hsu et al. 2024).

    Args:
        logits: (n, vocab). targets: (n,), IGNORE where there is no loss.
        factor: () float32 on the gradient, which without it would be too small for fp16.

    Returns:
        Scalar float32, the sum over tokens; (n, vocab) in the logits' dtype.
    """
    counted = targets != IGNORE
    index = torch.where(counted, targets, 0)[:, None]
    values = logits.float()
    log_norm = values.logsumexp(-1, keepdim=True)
    total = ((log_norm - values.gather(1, index))[:, 0] * counted).sum()
    gradient = values.sub_(log_norm).exp_()
    gradient -= (torch.arange(gradient.shape[1], device=gradient.device) == index).float()
    return total, gradient.mul_((counted * factor)[:, None]).to(logits.dtype)


class MicroStep:
    """Runs packed sequences through the model and adds up gradients.

    Attributes:
        task_loss, pet_loss: () float32 on the device, sums over micro-steps of the normalised losses;
            `begin_step` clears them. Reading them waits for the device, so the loop reads once a step.
        segments: what is run again and differentiated at a time: the attention and the MLP half of a layer,
            the latter in `tiles` parts of the tokens. So neither half's last product is run again, and the
            activations of one are gone when the other's come. The last `keep` keep theirs.
        loss_rows: tokens whose logits exist at a time.
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
        lora = settings.lora
        scale = lora_scale(lora.r, lora.alpha, lora.rslora)
        self.config = LayerConfig(base.shape, scale, lora.dropout, varlen, v_apart=tiles > 1)
        layers = [adapters.layer(base, i) for i in range(base.shape.num_layers)]
        self.segments = [
            Segment(function, layer, self.config, count, linears)
            for layer in layers
            for function, count, linears in (
                (attention_half, 1, ("qkv", "o")),
                (mlp_half, tiles, ("gate_up", "down")),
            )
        ]
        self.first_kept = len(self.segments) - keep
        self.loss_rows = logit_rows(len(base.head))
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
        self.per_target, self.per_pet_position, self.pet_lambda, self.loss_scale = (
            torch.ones((), device=device) for _ in range(4)
        )
        self.task_loss, self.pet_loss = (torch.zeros((), device=device) for _ in range(2))
        self.token_loss = token_loss
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin_step(self, targets: int, pet_positions: int, pet_lambda: float, loss_scale: float) -> None:
        """Set what holds for all micro-steps of one optimizer step: what the sums are divided by."""
        self.per_target.fill_(1 / max(targets, 1))
        self.per_pet_position.fill_(1 / max(pet_positions, 1))
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
        """Compile both halves once; all layers share the code."""
        # Each training of a process adds versions of the same functions; Dynamo gives up at the ninth, and
        # with fullgraph that ends the training (seen at the fifth one of a process).
        dynamo = torch._dynamo.config
        dynamo.recompile_limit, dynamo.accumulated_recompile_limit = 1024, 8192
        compiled = {
            function: torch.compile(function, fullgraph=True, dynamic=False)
            for function in {segment.function for segment in self.segments}
        }
        held = torch.compile(hold, fullgraph=True, dynamic=False)
        for segment in self.segments:
            segment.function, segment.hold = compiled[segment.function], held
        self.token_loss = torch.compile(token_loss, fullgraph=True, dynamic=False)

    def capture(self, adapters: Adapters) -> None:
        """Record the whole micro-step as one CUDA graph, which `run` then replays: no launch overhead.

        It is recorded on padding, and what that adds to gradients and losses is cleared.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets cuBLAS and the allocator settle
                self._forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        torch._C._cuda_clearCublasWorkspaces()  # those of the side stream, 32 MiB each on Hopper
        torch.cuda.empty_cache()  # the graph has a pool of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._forward_backward()
        adapters.zero_grad()

    def run(self) -> None:
        """Forward and backward over what is loaded; adds to the gradients and the losses."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._forward_backward()

    def _forward_backward(self) -> None:
        keys = token_keys(self.rows, self.seed)
        packed = Packed(self.cos[self.positions], self.sin[self.positions], self.bounds, keys)
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # (input, output) that hold a segment's activations
        self.inputs.begin()
        x = self.embedded
        for i, segment in enumerate(self.segments):
            if i >= self.first_kept:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad(), keeping_little(segment.layer.qkv.weight):
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
        weight, eps = self.base.final_norm, self.base.shape.rms_eps
        chunks = [slice(start, start + _NORM_CHUNK) for start in range(0, len(x), _NORM_CHUNK)]
        hidden = torch.empty_like(x)
        for rows in chunks:
            hidden[rows] = rms_norm(x[rows], weight, eps)
        grad = self._losses(hidden)
        del hidden
        for rows in chunks:
            leaf = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = rms_norm(leaf, weight, eps)
            torch.autograd.backward(out, grad[rows])
            assert leaf.grad is not None
            grad[rows] = leaf.grad
        return grad

    def _losses(self, hidden: Tensor) -> Tensor:
        """Add up both losses; return the gradient (T, d) of the scaled total by the final norm's output.

        Logits, and float32 copies of the hidden states, exist for one chunk of tokens at a time.
        """
        grad = torch.empty_like(hidden)
        valid = pet.valid_positions(self.documents)
        relative = self.pet.enabled and self.pet.relative
        scale = pet.inverse_scale(hidden, valid, self.loss_rows) if relative else None
        for start in range(0, len(hidden), self.loss_rows):
            end = min(start + self.loss_rows, len(hidden))
            logits = hidden[start:end] @ self.base.head.t()  # (chunk, vocab)
            task, gradient = self.token_loss(
                logits, self.targets[start:end], self.per_target * self.loss_scale
            )
            self.task_loss += task * self.per_target
            gradient = gradient @ self.base.head
            if self.pet.enabled:
                penalty, by_hidden = pet.penalty_and_gradient(hidden, valid, start, end, self.pet, scale)
                self.pet_loss += penalty * self.per_pet_position
                gradient = gradient + by_hidden * (self.pet_lambda * self.per_pet_position * self.loss_scale)
            grad[start:end] = gradient
        return grad
