"""Which machine, which way to run the micro-step, and how many layers keep their activations."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch

from so8t_helpers.adapters import Adapters
from so8t_helpers.micro_step import MicroStep
from so8t_helpers.model import Base
from so8t_helpers.packing import PackedSequence
from so8t_helpers.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """Where and how the training runs.

    Attributes:
        mode: "graph", "compile" or "plain".
        varlen: whether the variable-length flash attention can be used.
        summary: one line for the log and the report: what was chosen and why.
    """

    device: torch.device
    name: str
    dtype: torch.dtype
    mode: str
    varlen: bool
    summary: str


def look_at_machine(settings: Settings) -> Machine:
    """Choose device, dtype and speed by what the machine can do.

    Raises:
        SettingsError: if the settings ask for a speed or a precision that it cannot do.
    """
    training = settings.training
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = _DTYPES[training.precision]
    if not cuda and dtype == torch.float16:
        raise SettingsError("training.precision: fp16 needs a CUDA card; use fp32 (or bf16) on the CPU")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    varlen, why_not = _varlen(device, dtype)
    compiler = cuda and importlib.util.find_spec("triton") is not None
    llm_int8 = settings.model.quantization == "int8" and settings.model.int8_matmul == "llm_int8"
    if not cuda:
        best, reason = "plain", "no CUDA card"
    elif llm_int8:
        best, reason = "plain", "LLM.int8's own product synchronises with the host"
    elif not varlen:
        best, reason = "plain", why_not
    else:
        best, reason = "graph", "compiled layers" if compiler else "uncompiled layers: no Triton here"
    mode = best if training.speed == "auto" else training.speed
    order = ("plain", "compile", "graph")
    if order.index(mode) > order.index(best):
        raise SettingsError(f"training.speed: {mode} is not possible here ({reason}); use auto")
    if mode == "compile" and not compiler:
        raise SettingsError("training.speed: compile needs Triton, which is not installed; use auto")
    summary = f"speed {mode} on {name} in {training.precision} ({reason})"
    return Machine(device, name, dtype, mode, varlen, summary)


def _varlen(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "no CUDA card"
    if dtype == torch.float32:
        return False, "flash attention needs fp16 or bf16"
    if torch.cuda.get_device_capability() < (8, 0):
        return False, "flash attention needs compute capability 8.0"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False, "this torch has no variable-length attention"
    return True, ""


def build_micro_step(base: Base, adapters: Adapters, settings: Settings, machine: Machine) -> Any:
    """Return the micro-step as the machine runs it best; it has begin_step, load and run."""
    keep = 0 if settings.training.gradient_checkpointing else base.shape.num_layers
    step = MicroStep(base, adapters, settings, keep, machine.varlen)
    if machine.mode == "plain":
        return step
    if importlib.util.find_spec("triton") is not None and sys.platform != "win32":
        step.layer_function = torch.compile(step.layer_function, fullgraph=True, dynamic=False)
    return CapturedMicroStep(step, adapters) if machine.mode == "graph" else step


class CapturedMicroStep:
    """A micro-step recorded once as a CUDA graph and replayed: no launch overhead."""

    def __init__(self, step: MicroStep, adapters: Adapters):
        self.step, self.adapters = step, adapters
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def task_loss(self) -> torch.Tensor:
        return self.step.task_loss

    @property
    def pet_loss(self) -> torch.Tensor:
        return self.step.pet_loss

    def begin_step(self, targets: int, bends: int, pet_lambda: float, loss_scale: float) -> None:
        """See `MicroStep.begin_step`."""
        self.step.begin_step(targets, bends, pet_lambda, loss_scale)

    def load(self, sequence: PackedSequence, seed: int) -> None:
        """See `MicroStep.load`."""
        self.step.load(sequence, seed)

    def run(self) -> None:
        """Replay the graph; the first call warms up, captures, and clears what the warm-up added."""
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets cuBLAS and the allocator settle
                self.step.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step.run()
        self.adapters.zero_grad()
        self.step.task_loss.zero_()
        self.step.pet_loss.zero_()
