"""Every linear on a card, forward and back: 8-bit products beside weight-only ones; tiles; a projection."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_gpu_common import LENGTH, RANK

from so8t_helpers.phi3.shape import LINEARS, read_shape
from so8t_helpers.train import int8, outliers
from so8t_helpers.train.frozen import FrozenWeight, adapted_product, quantize

COPIES = 6  # weights of one shape used in turn: a layer's rows are not in the L2 cache when its turn comes
REPEATS = 10

# An RTX 3060 by its vendor's figures: dense tensor rates in operations a second, and bytes a second.
RTX_3060 = {"fp16": 25.6e12, "int8": 102e12, "memory": 360e9}


def timed(work: Callable[[], object]) -> float:
    """Median microseconds of `work`, on a card as a CUDA graph, so that no launch counts."""
    for _ in range(2):  # compiles
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1e6


def linears(config: Path, length: int = LENGTH) -> dict[str, Any]:
    """Microseconds of each linear with LoRA, forward and gradients, weight-only and in 8 bits; of parts."""
    shape, found = read_shape(config), {}
    for name in LINEARS:
        out, into = shape.linear_shape(name)
        found[name] = one_linear(out, into, length)
    return found


def one_linear(out: int, into: int, length: int) -> dict[str, float]:
    """The figures of one shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, a_x = draw(length, into).bfloat16(), draw(length, RANK).bfloat16()
    b, grad = draw(out, RANK), draw(length, out).bfloat16()
    multiply: Callable[..., Tensor] = adapted_product
    if device.type == "cuda":  # as a layer runs it, where dequantising is one kernel
        torch._dynamo.config.recompile_limit = 64
        multiply = torch.compile(adapted_product, fullgraph=True, dynamic=False)

    def product(weight: FrozenWeight) -> Tensor:
        return multiply(x, a_x, b, weight, 2.0)

    def gradients(weight: FrozenWeight) -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), a_x.detach().requires_grad_(), b.detach().requires_grad_()
        y = multiply(*leaves, weight, 2.0, False)
        return torch.autograd.grad(y, leaves, grad)

    found = {}
    for int8_matmul in ("weight_only", "tensor_core"):
        stored = [quantize(draw(out, into), "int8", int8_matmul) for _ in range(COPIES)]
        if int8_matmul == "tensor_core":
            stored = [weight.apart(torch.arange(outliers.APART, device=device)) for weight in stored]
        for direction, function in (("forward", torch.no_grad()(product)), ("gradients", gradients)):
            took = timed(lambda run=function, stored=stored: [run(weight) for weight in stored])
            found[f"{int8_matmul}, {direction}"] = round(took / COPIES, 1)
    rows = [weight.rows for weight in stored]
    found["rounding x"] = round(timed(lambda: int8.quantize_tokens(x, stored[0].kept)), 1)
    found["rounding dy"] = round(timed(lambda: int8.quantize_tokens(grad, stored[0].scale[:, 0])), 1)
    found["turning"] = round(timed(lambda: [int8.turn(one) for one in rows]) / COPIES, 1)
    return found


def tiles(config: Path, length: int = LENGTH) -> dict[str, dict[str, float]]:
    """TOP/s of the product alone for other tiles than the one in use; one that does not fit says why."""
    from so8t_helpers.train import int8_kernel

    candidates = {int8_kernel.tile_of(torch.cuda.get_device_capability())}
    candidates |= {int8_kernel.Tile(*tile) for tile in (
        (128, 128, 128, 4, 3), (128, 128, 128, 4, 2), (128, 128, 128, 8, 3), (128, 128, 64, 4, 4),
        (128, 128, 64, 4, 3), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3), (64, 128, 128, 4, 3),
        (128, 64, 128, 4, 3), (64, 256, 128, 4, 3), (128, 64, 128, 4, 4), (64, 128, 128, 4, 4),
    )}  # fmt: skip
    shapes = {f"{name}, forward": read_shape(config).linear_shape(name) for name in LINEARS}
    shapes |= {f"{name}, gradient": read_shape(config).linear_shape(name)[::-1] for name in LINEARS}
    found: dict[str, dict[str, Any]] = {}
    for name, (m, n) in shapes.items():
        q = torch.randint(-127, 128, (length, n), dtype=torch.int8, device="cuda")
        scales = torch.rand(length, device="cuda")
        weights = torch.randint(-127, 128, (COPIES, m, n), dtype=torch.int8, device="cuda").unbind()
        rank = RANK + outliers.APART if "forward" in name else 0
        low, factor = (torch.randn(size, rank, device="cuda").bfloat16() for size in (length, m))
        row_scale, beside = torch.rand(m, device="cuda"), (low, factor) if rank else (None, None)
        for tile in sorted(candidates):

            def run(tile=tile, q=q, scales=scales, weights=weights, r=row_scale, beside=beside) -> None:
                for weight in weights:
                    int8_kernel.launch(q, scales, weight, r, *beside, torch.bfloat16, tile)

            try:
                result: Any = round(2e-6 * length * m * n * COPIES / timed(run), 1)
            except Exception as error:  # a tile may need more than the card has
                result = str(error)[:100]
            found.setdefault(str(tuple(tile)), {})[name] = result
    return found


def projection(config: Path, length: int = LENGTH) -> dict[str, Any]:
    """A PROJECTION, nothing measured: a micro-step's frozen products on an RTX 3060, everything recomputed.

    Operations over the vendor's dense rates, bytes over its memory bandwidth, no overlap, no other work: the
    rest of a step (head, attention, LoRA, norms) is the same either way and not in it, nor are the shares of
    the peaks that kernels reach.
    """
    shape = read_shape(config)
    rate, sizes = RTX_3060, {name: shape.linear_shape(name) for name in LINEARS}
    seconds = {"weight_only": 0.0, "tensor_core": 0.0}
    for name, (out, into) in sizes.items():
        # The last product of each half is not run again.
        forwards = 1 if name in {"o_proj", "down_proj"} else 2
        operations = 2 * length * out * into * (forwards + 1)
        dequantised = 3 * out * into * (forwards + 1 - (forwards > 1))  # held for both directions of a half
        rounded = 3 * length * (into * forwards + out) + 2 * out * into  # and the rows turned
        seconds["weight_only"] += operations / rate["fp16"] + dequantised / rate["memory"]
        seconds["tensor_core"] += operations / rate["int8"] + rounded / rate["memory"]
    return {
        "what": "a projection from counts and published rates, not a measurement",
        "frozen products, s a micro-step": {k: round(v * shape.num_layers, 3) for k, v in seconds.items()},
        "ratio": round(seconds["weight_only"] / seconds["tensor_core"], 2),
    }
