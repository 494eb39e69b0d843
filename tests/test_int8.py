"""Products of 8-bit numbers: the torch form against float64, the kernels against the torch form."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from so8t_helpers.settings import PROJECT_ROOT, SettingsError, validate
from so8t_helpers.train import int8
from so8t_helpers.train.machine import look_at_machine

GENERATOR = torch.Generator().manual_seed(11)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system"
)
# Bytes of shared memory that one program may have, by compute capability (CUDA's programming guide).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def spread(tokens: int, features: int) -> torch.Tensor:
    """Activations whose features differ in size by orders of magnitude, as a real model's do."""
    return draw(tokens, features) * torch.exp(2 * draw(features))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("features", [128, 576, 100])
def test_each_number_is_off_by_half_a_step_of_its_group_at_most(features: int):
    x = spread(30, features)
    x[3] = 0
    q, scales = int8.quantize_groups(x)
    steps = scales.t().repeat_interleave(128, dim=1)[:, :features]
    # Half a step, and what float32 makes of 127 times the largest over itself.
    assert ((q * steps - x).abs() <= 0.5001 * steps).all()
    assert (q[3] == 0).all()
    for start in range(0, features, 128):
        assert (q[:, start : start + 128].abs().amax(1).double()[[0, 1, 2, 4]] == 127).all()


@pytest.mark.parametrize(("out", "into", "rank"), [(192, 128, 8), (200, 576, 0), (1536, 100, 4)])
def test_both_products_equal_float64_on_the_rounded_numbers(out: int, into: int, rank: int):
    x, grad, a_x, b = spread(40, into), draw(40, out), draw(40, rank), draw(out, rank)
    rows = torch.randint(-127, 128, (out, into), generator=GENERATOR, dtype=torch.int8)
    scale = torch.rand(out, generator=GENERATOR) + 0.01
    w = rows.double() * scale.double()[:, None]

    def rounded(values: torch.Tensor, column_scale: torch.Tensor | None = None) -> torch.Tensor:
        q, scales = int8.quantize_groups(values, column_scale)
        steps = scales.t().repeat_interleave(128, dim=1)[:, : values.shape[1]]
        return q.double() * steps.double()

    # Integer sums are exact; float32 sums of 12 groups at most leave some 1e-7.
    found = int8.product(x, rows, scale, a_x, b)
    assert relative(found, rounded(x) @ w.T + a_x.double() @ b.double().T) < 1e-6
    by_x = int8.input_gradient(grad, int8.turn(rows), scale)
    assert relative(by_x, rounded(grad, scale) @ rows.double()) < 1e-6
    # Of 128 normal numbers the largest is some 2.7: a step is 1/47, rounding costs that over sqrt(12), 0.6%.
    assert 1e-3 < relative(by_x, grad.double() @ w) < 0.012


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_is_not_rounded_away(value: float):
    """The loss scale is lowered by what is not finite in the gradients."""
    x = draw(3, 256)
    x[1, 200] = value
    rows = torch.randint(-127, 128, (8, 256), generator=GENERATOR, dtype=torch.int8)
    y = int8.product(x, rows, torch.ones(8), x.new_empty(3, 0), x.new_empty(8, 0))
    assert y.isfinite().all(1).tolist() == [True, False, True]


def test_the_machine_says_that_it_multiplies_8_bits_or_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    chosen = validate({"model": {"int8_matmul": "tensor_core"}, "training": {"precision": "bf16"}}, "test")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "8-bit products" in look_at_machine(chosen).summary
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SettingsError, match=r"tensor_core needs a card of .* 8\.0, and this one has 7\.5"):
        look_at_machine(chosen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="tensor_core needs Triton"):
        look_at_machine(chosen)


@needs_triton
def test_the_kernels_compute_the_same():
    """In Triton's interpreter, which needs no card; it knows fp16 but not bf16."""
    code = """
import itertools, torch
from torch.utils.flop_counter import FlopCounterMode
from so8t_helpers.train import int8, int8_kernel
generator = torch.Generator().manual_seed(5)
draw = lambda *shape: torch.randn(shape, generator=generator)
for (tokens, out, into, rank), dtype in itertools.product(
    ((70, 200, 576, 80), (130, 16, 256, 0)), (torch.float16, torch.float32)
):
    # Slices of wider rows; token and row counts that fill no tile, features that fill no group.
    x, grad = ((draw(tokens, n + 32) * torch.exp(draw(n + 32))).to(dtype)[:, :n] for n in (into, out))
    rows = torch.randint(-127, 128, (out, into), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, generator=generator) + 0.1
    low = [draw(tokens, rank).to(dtype), draw(out, rank).to(dtype)] if rank else [None, None]
    turned = int8_kernel.turn(rows)
    assert torch.equal(turned, rows.t())
    directions = (x, None, rows, scale, *low), (grad, scale, turned, None, None, None)
    for values, column_scale, *others in directions:
        found, wanted = (part.quantize_groups(values, column_scale) for part in (int8_kernel, int8))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        found, wanted = (part.grouped_product(*found, *others, dtype) for part in (int8_kernel, int8))
        assert found.dtype == dtype
        # Float32 sums in the same order; a rounding to fp16 may fall the other way.
        off = 1e-3 if dtype == torch.float16 else 1e-6
        assert (found.double() - wanted.double()).norm() <= off * wanted.double().norm()
x = draw(2, 256)
x[0, 3], x[1, 200] = float("inf"), float("nan")
assert int8_kernel.quantize_groups(x, None)[1].isnan().tolist() == [[True, False], [False, True]]
q, scales = int8_kernel.quantize_groups(draw(4, 256), None)
rows = torch.randint(-127, 128, (16, 256), generator=generator, dtype=torch.int8)
arguments = (q, scales, rows, torch.ones(16), None, None, torch.bfloat16)
torch.library.opcheck(int8_kernel.quantize_groups, (draw(4, 256), torch.ones(256)))
torch.library.opcheck(int8_kernel.grouped_product, arguments)
torch.library.opcheck(int8_kernel.turn, (rows,))
with FlopCounterMode(display=False) as mode:  # by which a compiled layer decides what to keep
    int8_kernel.grouped_product(*arguments)
assert mode.get_total_flops() == 2 * 4 * 256 * 16
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=PROJECT_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def compile_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Compile a kernel for a compute capability; for this no card is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(kernel, capability: int, types: dict[str, str], fixed: dict, **options):
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if n not in fixed}
        source = ASTSource(kernel, signature, fixed, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    return compiled


@needs_triton
@pytest.mark.parametrize("features", [3072, 576])
@pytest.mark.parametrize("rank", [0, 64], ids=["gradient", "forward"])
@pytest.mark.parametrize("capability", SHARED)
def test_the_product_compiles_to_int8_instructions_for(
    capability: int, rank: int, features: int, compile_ahead
):
    from so8t_helpers.train import int8_kernel

    tile = int8_kernel.tile_of(divmod(capability, 10))
    fixed = int8_kernel.constants(features, rank > 0, rank, tile)
    fixed |= {} if rank else dict.fromkeys(("row_scale", "low", "b"))
    types = {"q": "*i8", "weight": "*i8", "scales": "*fp32", "row_scale": "*fp32"}
    types |= {"low": "*bf16", "b": "*bf16", "out": "*bf16"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = compile_ahead(int8_kernel.product_kernel, capability, types, fixed, **options)
    ptx = compiled.asm["ptx"]
    kinds = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    assert re.search(kinds, ptx)
    assert bool(re.search(r"mma\S*\.bf16", ptx)) == (rank > 0)  # LoRA's half is in the same kernel
    assert compiled.metadata.shared <= SHARED[capability]


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_the_small_kernels_compile_for(capability: int, compile_ahead):
    from so8t_helpers.train import int8_kernel

    types = {"x": "*bf16", "column_scale": "*fp32", "q": "*i8", "scales": "*fp32"}
    fixed = {"SCALED": True, "ROWS": 16, "GROUP": 128}
    compiled = compile_ahead(int8_kernel._quantize_kernel, capability, types, fixed)
    assert "cvt.rni" not in compiled.asm["ptx"]  # rounding is an addition
    types = {"weight": "*i8", "turned": "*i8"}
    compiled = compile_ahead(int8_kernel._turn_kernel, capability, types, {"SIZE": 128})
    assert compiled.metadata.shared <= SHARED[capability]
