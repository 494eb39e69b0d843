"""Optimizer, schedule, clipping and loss scaling over a few flat vectors: LoRA's A and B, and the gates."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from so8t_helpers.settings import TrainingSettings
from so8t_helpers.train.adapters import Adapters

log = logging.getLogger(__name__)

_FIRST_SCALE, _GROWTH_STEPS = 2.0**16, 200


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(settings.warmup_share * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return settings.learning_rate * shape[settings.schedule]


class Optimizer:
    """AdamW on LoRA (paged 8-bit on a card where asked for) and on the gates (always float32).

    Gates get no weight decay: it would pull every rotation towards the identity.

    Attributes:
        loss_scale: factor on the loss for fp16, 1.0 otherwise; halved when a gradient overflows (and that
            step is left out), doubled after 200 good steps.
    """

    def __init__(self, adapters: Adapters, settings: TrainingSettings):
        self.adapters, self.settings, self.fp16 = adapters, settings, settings.precision == "fp16"
        self.loss_scale = _FIRST_SCALE if self.fp16 else 1.0
        self.good_steps = 0
        self.parts, self.rates = [], []
        for parameter, rate in adapters.groups():
            gates = parameter is adapters.free
            part = torch.optim.AdamW([parameter], weight_decay=0.0, fused=True) if gates else None
            self.parts.append(part or _make(parameter, settings))
            self.rates.append(rate)

    def step(self, rate: float) -> tuple[float, float]:
        """Unscale, clip, update, and refresh the rotations.

        Args:
            rate: LoRA's; the others keep their ratio to it.

        Returns:
            (gradient norm before clipping, orthogonality error); a norm that is not finite means that the
            step was left out.
        """
        error = self.adapters.collect_rotation_gradient()
        gradients = [p.grad for part in self.parts for p in part.param_groups[0]["params"]]
        # One float32 sum over millions of squares comes out too low on the CPU: by 1.1% at 100 million.
        wide = torch.float64 if gradients[0].device.type == "cpu" else None
        norms = [torch.linalg.vector_norm(g, dtype=wide) for g in gradients]
        norm = torch.stack(norms).norm() / self.loss_scale
        value = norm.item()  # the one time a step that the host waits for the device
        if math.isfinite(value):
            factor = min(1.0, self.settings.max_grad_norm / (value + 1e-6)) / self.loss_scale
            for gradient in gradients:
                gradient.mul_(factor)
            for part, ratio in zip(self.parts, self.rates, strict=True):
                part.param_groups[0]["lr"] = rate * ratio
                part.step()
            self.good_steps += 1
            self.adapters.refresh_rotations()
        elif not self.fp16:
            raise FloatingPointError("the gradient is not finite: lower training.learning_rate")
        self._adjust_scale(math.isfinite(value))
        return value, error.item()

    def _adjust_scale(self, good: bool) -> None:
        if not self.fp16:
            return
        if not good:
            self.loss_scale, self.good_steps = max(self.loss_scale / 2, 1.0), 0
        elif self.good_steps and self.good_steps % _GROWTH_STEPS == 0:
            self.loss_scale *= 2

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizers' tensors by name, for a checkpoint."""
        found = {}
        for i, part in enumerate(self.parts):
            for key, value in part.state_dict()["state"].get(0, {}).items():
                found[f"optimizer.{i}.{key}"] = torch.as_tensor(value)
        return found

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take up where `tensors` and `state` (loss_scale, good_steps) left off."""
        self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        for i, part in enumerate(self.parts):
            prefix = f"optimizer.{i}."
            mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if "state1" in mine:  # bitsandbytes counts its steps in a plain number
                mine["step"] = int(mine["step"])  # type: ignore[assignment]
            whole = part.state_dict()
            part.load_state_dict({"state": {0: mine}, "param_groups": whole["param_groups"]})


def _make(parameter: torch.nn.Parameter, settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "paged_adamw_8bit":
        if parameter.device.type == "cuda":
            from bitsandbytes.optim import PagedAdamW8bit  # noqa: PLC0415  (only where there is a card)

            return PagedAdamW8bit([parameter], lr=0.0, weight_decay=settings.weight_decay)
        log.warning("paged 8-bit AdamW needs a CUDA card: 32-bit AdamW is used instead")
    return torch.optim.AdamW([parameter], lr=0.0, weight_decay=settings.weight_decay, fused=True)
