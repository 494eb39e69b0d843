"""Which machine, which way to run the micro-step, and what is kept, recomputed or moved to the host."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from so8t_helpers.phi3.shape import LINEARS, Phi3Shape, logit_rows
from so8t_helpers.settings import ModelSettings, Settings, SettingsError
from so8t_helpers.train.adapters import Adapters, count_parameters
from so8t_helpers.train.frozen import Base
from so8t_helpers.train.micro_step import MicroStep

log = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TILE = 4096  # tokens of the MLP at a time, for sequences longer than twice that
_MARGIN = 0.6 * 2**30  # bytes that kept layers leave free: allocator's fragments, cuBLAS, the display
_SPEEDS = ("plain", "compile", "graph")


@dataclass(frozen=True)
class Machine:
    """Where and how the training runs.

    Attributes:
        mode: "graph", "compile" or "plain".
        varlen: whether the variable-length flash attention can be used.
        compiles: whether layers are compiled (graph mode works without, too).
        model: the model's settings, with `int8_matmul: auto` settled.
        summary: one line for the log and the report: what was chosen and why.
    """

    device: torch.device
    dtype: torch.dtype
    mode: str
    varlen: bool
    compiles: bool
    model: ModelSettings
    summary: str


def look_at_machine(settings: Settings) -> Machine:
    """Choose device, dtype and speed by what the machine can do; nothing is changed.

    Raises:
        SettingsError: if the settings ask for a speed or a precision that it cannot do.
    """
    training = settings.training
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dtype = _DTYPES[training.precision]
    if not cuda and dtype == torch.float16:
        raise SettingsError("training.precision: fp16 needs a CUDA card; use fp32 (or bf16) on the CPU")
    why_not_varlen = _why_not_varlen(device, dtype)
    triton = cuda and importlib.util.find_spec("triton") is not None
    product = settings.model.int8_matmul if settings.model.quantization == "int8" else ""
    missing = _why_no_int8_kernels(triton) if cuda else "a card"
    if product == "tensor_core" and cuda and missing:
        raise SettingsError(f"model.int8_matmul: tensor_core needs {missing}; use weight_only")
    products = ", 8-bit products" if product == "tensor_core" else ""
    if product == "auto":
        product = "weight_only" if missing else "tensor_core"
        products = (
            f", weight-only products: 8-bit ones need {missing}" if missing else ", 8-bit products by auto"
        )
    if product == "llm_int8":
        best, reason = "plain", "LLM.int8's own product synchronises with the host"
    elif why_not_varlen:
        best, reason = "plain", why_not_varlen
    else:
        best, reason = "graph", "compiled layers" if triton else "layers not compiled: no Triton here"
    mode = best if training.speed == "auto" else training.speed
    if _SPEEDS.index(mode) > _SPEEDS.index(best):
        raise SettingsError(f"training.speed: {mode} is not possible here ({reason}); use auto")
    if mode == "compile" and not triton:
        raise SettingsError("training.speed: compile needs Triton, which is not installed; use auto")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    summary = f"speed {mode} on {name} in {training.precision} ({reason}{products})"
    model = settings.model.model_copy(update={"int8_matmul": product} if product else {})
    return Machine(device, dtype, mode, not why_not_varlen, triton and mode != "plain", model, summary)


def _why_not_varlen(device: torch.device, dtype: torch.dtype) -> str:
    """Say why the variable-length flash attention cannot be used; nothing where it can."""
    if device.type != "cuda":
        return "no CUDA card"
    if dtype == torch.float32:
        return "flash attention needs fp16 or bf16"
    if torch.cuda.get_device_capability() < (8, 0):
        return "flash attention needs compute capability 8.0"
    return ""


def _why_no_int8_kernels(triton: bool) -> str:
    """Say what a card lacks for products of 8-bit numbers; nothing where it lacks nothing."""
    if not triton:
        return "Triton, which is not installed"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"a card of compute capability 8.0, and this one has {major}.{minor}"


def prepare_allocator(settings: Settings) -> None:
    """Let a card's memory segments grow where sequences are long; call it before anything is on the card.

    Long sequences need large tensors of many sizes; segments that grow hold them without the fragments that
    broke an 11 GiB limit at 49,152 tokens. Windows' driver cannot do it.
    """
    if torch.cuda.is_available() and _is_long(settings) and os.name == "posix":
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _is_long(settings: Settings) -> bool:
    """Whether the MLP is recomputed in tiles of the tokens."""
    return settings.training.sequence_length * settings.training.batch_size > 2 * _TILE


@dataclass(frozen=True)
class MemoryPlan:
    """What happens to activations.

    Attributes:
        keep: the last `keep` halves of layers (attention or MLP) keep theirs, the others are recomputed.
        tiles: parts of the tokens in which the MLP is recomputed; 1 means layers are recomputed whole.
        on_host: layer inputs wait in pinned host memory.
    """

    keep: int
    tiles: int
    on_host: bool

    def describe(self, layers: int) -> str:
        """Say it in words, for the log and the report."""
        if self.keep >= 2 * layers:
            return "activations of all layers kept"
        where = "on the host" if self.on_host else "on the device"
        tiled = f", MLP in {self.tiles} tiles" if self.tiles > 1 else ""
        kept = f"activations of {self.keep / 2:g} of {layers} layers kept"
        return f"{kept}, the others recomputed from inputs {where}{tiled}"


def build_micro_step(
    base: Base, adapters: Adapters, settings: Settings, machine: Machine, most_documents: int
) -> tuple[MicroStep, MemoryPlan]:
    """Return the micro-step as the machine runs it best, and the memory plan it follows.

    Raises:
        SettingsError: if even recomputing everything needs more memory than there is.
    """

    def make(plan: MemoryPlan) -> MicroStep:
        step = MicroStep(
            base, adapters, settings, machine.varlen, most_documents, plan.keep, plan.tiles, plan.on_host
        )
        if machine.compiles:
            step.compile()
        return step

    if machine.device.type == "cuda":
        plan = _measure_plan(make, base.shape, settings, adapters)
        while (step := _start(make, plan, machine, adapters)) is None:
            # The graph's own pool is packed less well than the trial's was.
            plan = replace(plan, keep=max(0, plan.keep - 4))
    else:
        plan = _host_plan(base.shape, settings)
        step = make(plan)
    log.info("%s", plan.describe(base.shape.num_layers))
    return step, plan


def _start(
    make: Callable[[MemoryPlan], MicroStep], plan: MemoryPlan, machine: Machine, adapters: Adapters
) -> MicroStep | None:
    """Make the micro-step and capture it; None where memory ran out and fewer layers can be kept."""
    try:
        step = make(plan)
        if machine.mode == "graph" and plan.tiles == 1:  # long sequences have no launch overhead to save
            step.capture(adapters)
        return step
    except torch.cuda.OutOfMemoryError:
        if plan.keep == 0:
            raise
    _clean(adapters)
    return None


def kept_bytes(shape: Phi3Shape, settings: Settings) -> int:
    """Return what one layer that keeps its activations keeps, by a count of what autograd saves."""
    # Saved for one token and layer: inputs of norms, products and dropouts, q, k, v, both halves of the MLP.
    features = 11 * shape.hidden_size + 2 * shape.linear_shape("qkv_proj")[0] + 6 * shape.intermediate_size
    size = _DTYPES[settings.training.precision].itemsize
    return features * size * settings.training.sequence_length * settings.training.batch_size


# Resident before any weight: torch, transformers, the tokenizer; 0.85 were seen on two cores.
_LIBRARIES = 1.0 * 2**30
# What the resident size grew by a token, over `kept_bytes`: the backward pass's own, and fragments.
_OVER_KEPT = 1.3
_LOGIT_COPIES = 5  # of a chunk in float32: logits, their exponentials, one-hot targets, the gradient
_LORA_BYTES = 20  # a number: weight, gradient, AdamW's two moments, copies of a part
_WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.6}


def host_memory(shape: Phi3Shape, settings: Settings) -> int:
    """Estimate the resident memory of a training without a card, in bytes; rather too much than too little.

    Against 0.9 to 6.7 GiB measured (bases of 4 to 360 M weights, 512 to 2,048 tokens, float32, bf16, int8)
    it was 1.07 to 1.22 times what was used.
    """
    training, size = settings.training, _DTYPES[settings.training.precision].itemsize
    tokens = training.sequence_length * training.batch_size
    shapes = [shape.linear_shape(name) for name in LINEARS]
    linears = shape.num_layers * sum(out * into for out, into in shapes)
    table = shape.vocab_size * shape.hidden_size
    stored = linears * _WEIGHT_BYTES.get(settings.model.quantization, size)
    # Embedding and head are held apart, tied or not; a weight is widened before it is stored or multiplied.
    held = stored + 2 * size * table + 2 * 4 * max(out * into for out, into in shapes)
    kept, layer = _host_plan(shape, settings).keep // 2, kept_bytes(shape, settings)
    again = shape.num_layers - kept
    activations = _OVER_KEPT * layer * (kept + (again > 0)) + again * 2 * tokens * shape.hidden_size * size
    logits = _LOGIT_COPIES * 4 * min(tokens, logit_rows(shape.vocab_size)) * shape.vocab_size
    lora = _LORA_BYTES * count_parameters(settings, shape)[0]
    return int(settings.run.processes * (_LIBRARIES + held + lora + activations + logits))


def _host_plan(shape: Phi3Shape, settings: Settings) -> MemoryPlan:
    """Keep as many layers as fit into half of the free host memory, see `kept_bytes`."""
    training = settings.training
    if not training.gradient_checkpointing:
        return MemoryPlan(2 * shape.num_layers, 1, False)
    automatic = psutil.virtual_memory().available / 2
    budget = automatic if training.memory_gib == "auto" else training.memory_gib * 2**30
    return MemoryPlan(2 * min(shape.num_layers, int(budget // kept_bytes(shape, settings))), 1, False)


def _measure_plan(
    make: Callable[[MemoryPlan], MicroStep], shape: Phi3Shape, settings: Settings, adapters: Adapters
) -> MemoryPlan:
    """Find the plan by trying: the peak with everything recomputed, and what one kept layer adds."""
    training = settings.training
    total = training.sequence_length * training.batch_size
    tiles = 1
    if _is_long(settings):
        tiles = next(n for n in range(-(-total // _TILE), total + 1) if total % n == 0)
    if not training.gradient_checkpointing:
        return MemoryPlan(2 * shape.num_layers, tiles, False)
    free, _ = torch.cuda.mem_get_info()
    budget = float(free + torch.cuda.memory_reserved())
    if training.memory_gib != "auto":
        budget = min(budget, training.memory_gib * 2**30)
    for on_host in (False, True):
        plan = MemoryPlan(0, tiles, on_host)
        peak = _peak(make, plan, adapters)
        if peak <= budget:
            break
    else:
        needed = f"{peak / 2**30:.1f} GiB" if peak < float("inf") else "more"
        raise SettingsError(
            f"training needs {needed} on the card with everything recomputed, "
            f"{budget / 2**30:.1f} GiB are to be had; lower training.sequence_length, "
            "training.batch_size, lora.r, or take model.quantization: nf4"
        )
    if plan.on_host or tiles > 1:
        return plan
    # With few kept layers the peak may lie elsewhere; between four and eight it grows by what layers keep.
    four, eight = (_peak(make, MemoryPlan(2 * n, 1, False), adapters) for n in (4, 8))
    if eight == float("inf"):
        return plan
    each = max(eight - four, 2**20) / 8
    return MemoryPlan(min(2 * shape.num_layers, max(0, int((budget - _MARGIN - peak) / each))), 1, False)


def _peak(make: Callable[[MemoryPlan], MicroStep], plan: MemoryPlan, adapters: Adapters) -> float:
    """Run one micro-step on padding and return the most bytes allocated, infinity where memory ran out."""
    try:
        return _run_once(make(plan))
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    finally:
        _clean(adapters)


def _run_once(step: MicroStep) -> float:
    """A frame of its own: the step must be gone when `_peak` cleans up."""
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _clean(adapters: Adapters) -> None:
    adapters.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
