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
from phi3_folders import small_folder
from transformers import Phi3ForCausalLM

from so8t_helpers.phi3.shape import LINEARS, read_shape, weight_path
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.settings import PROJECT_ROOT, ModelSettings, SettingsError, validate
from so8t_helpers.train import int8, outliers
from so8t_helpers.train.batches import Document
from so8t_helpers.train.frozen import TensorCoreWeight, dequantize, frozen_linear, load_base, quantize
from so8t_helpers.train.machine import look_at_machine
from so8t_helpers.train.outliers import APART, keep_apart

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
def test_each_number_is_off_by_half_a_step_of_its_token_at_most(features: int):
    x, kept = spread(30, features), torch.ones(features)
    x[3] = 0
    kept[7] = 0
    q, scales = int8.quantize_tokens(x, kept)
    # Half a step, and what float32 makes of 127 times the largest over itself.
    assert ((q * scales[:, None] - x * kept).abs() <= 0.5001 * scales[:, None]).all()
    assert (q[3] == 0).all()
    assert (q[:, 7] == 0).all()
    assert (q.abs().amax(1).double()[[0, 1, 2, 4]] == 127).all()


@pytest.mark.parametrize(("out", "into", "rank"), [(192, 128, 8), (200, 576, 0), (1536, 2100, 4)])
def test_both_products_equal_float64_on_the_rounded_numbers(out: int, into: int, rank: int):
    x, grad, low, factor = spread(40, into), draw(40, out), draw(40, rank), draw(out, rank)
    rows = torch.randint(-127, 128, (out, into), generator=GENERATOR, dtype=torch.int8)
    scale, kept = torch.rand(out, generator=GENERATOR) + 0.01, (torch.arange(into) % 9 > 0).float()
    w = rows.double() * scale.double()[:, None]

    def rounded(values: torch.Tensor, column_scale: torch.Tensor) -> torch.Tensor:
        q, scales = int8.quantize_tokens(values, column_scale)
        return q.double() * scales.double()[:, None]

    # Integer sums are exact; float32 rounds them, their product with two scales and the sum: some 1e-7.
    found = int8.product(x, rows, scale, kept, low, factor)
    assert relative(found, rounded(x, kept) @ w.T + low.double() @ factor.double().T) < 1e-6
    by_x = int8.input_gradient(grad, rows, rows[:0], scale)
    assert relative(by_x, rounded(grad, scale) @ rows.double()) < 1e-6
    # Of 1,536 normal numbers, times scales, the largest is some 5: a step is 1/25; over sqrt(12) 1.2%.
    assert 1e-3 < relative(by_x, grad.double() @ w) < 0.018


def test_features_that_stand_apart_keep_the_others_exact():
    """Three features a thousand times the rest: rounded together they leave the rest nothing."""
    x, w = draw(50, 192), draw(96, 192)
    large = torch.tensor([5, 60, 130])
    x[:, large] *= 1000
    stored = quantize(w, "int8", "tensor_core")
    assert isinstance(stored, TensorCoreWeight)
    exact = x.double() @ dequantize(stored, torch.float64).T
    small = x.index_fill(1, large, 0.0).double() @ dequantize(stored, torch.float64).T
    apart = frozen_linear(x, stored.apart(large))
    # Of 189 normal numbers the largest is some 2.8: a step is 1/45 of one; over sqrt(12) 0.6%.
    assert (apart.double() - exact).norm() < 0.009 * small.norm()
    assert (frozen_linear(x, stored).double() - exact).norm() > small.norm()


def test_what_stands_apart_is_what_is_large_in_a_model(tmp_path: Path):
    """By the inputs that transformers' own Phi3 has, one document at a time."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = small_folder(tmp_path / "base", dtype=torch.float32, **sizes)
    chosen, shape, cpu = ModelSettings(int8_matmul="tensor_core"), read_shape(folder), torch.device("cpu")
    base = load_base(shape, weight_reader(folder), chosen, cpu, torch.float32)
    documents = torch.randint(0, shape.vocab_size, (3, 30), generator=GENERATOR)
    keep_apart(base, [Document(one.numpy(), one.numpy()) for one in documents])

    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}
    for i in range(shape.num_layers):
        for name in LINEARS:
            module = model.get_submodule(weight_path(i, name))
            kept = seen.setdefault(f"{i} {name}", [])
            module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
    with torch.no_grad():
        for document in documents:
            model(document[None])
    for i, layer in enumerate(base.linears):
        for name, weight in layer.items():
            assert isinstance(weight, TensorCoreWeight)
            largest = torch.cat(seen[f"{i} {name}"]).abs().amax(0)
            # int8 rows move activations by a percent or two: what is clearly among the largest must be found.
            clearly = (largest > 1.1 * largest.topk(APART).values[-1]).nonzero().flatten().tolist()
            assert len(clearly) > APART // 8
            assert set(clearly) <= set(weight.features.tolist())
            assert torch.equal(weight.columns, weight.rows[:, weight.features])


def test_of_a_long_document_the_beginning_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = small_folder(tmp_path / "base", dtype=torch.float32)
    shape, tokens = read_shape(folder), torch.randint(0, 1000, (300,), generator=GENERATOR).numpy()
    monkeypatch.setattr(outliers, "_TOKENS", 100)
    found = []
    for length in (300, 100):
        chosen = ModelSettings(int8_matmul="tensor_core")
        base = load_base(shape, weight_reader(folder), chosen, torch.device("cpu"), torch.float32)
        keep_apart(base, [Document(tokens[:length], tokens[:length])])
        found.append([weight.features for layer in base.linears for weight in layer.values()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_is_not_rounded_away(value: float):
    """The loss scale is lowered by what is not finite in the gradients."""
    x = draw(3, 256)
    x[1, 200] = value
    rows = torch.randint(-127, 128, (8, 256), generator=GENERATOR, dtype=torch.int8)
    y = int8.product(x, rows, torch.ones(8), torch.ones(256), x.new_empty(3, 0), x.new_empty(8, 0))
    assert y.isfinite().all(1).tolist() == [True, False, True]


def test_the_machine_says_that_it_multiplies_8_bits_or_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    chosen = validate({"model": {"int8_matmul": "tensor_core"}, "training": {"precision": "bf16"}}, "test")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "8-bit products" in look_at_machine(chosen).summary
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    by_auto = validate({"model": {"int8_matmul": "auto"}, "training": {"precision": "bf16"}}, "test")
    with pytest.raises(SettingsError, match=r"tensor_core needs a card of .* 8\.0, and this one has 7\.5"):
        look_at_machine(chosen)
    machine = look_at_machine(by_auto)
    assert machine.model.int8_matmul == "weight_only"
    assert "8-bit ones need a card of compute capability 8.0" in machine.summary
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    machine = look_at_machine(by_auto)
    assert machine.model.int8_matmul == "tensor_core"
    assert "8-bit products by auto" in machine.summary
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="tensor_core needs Triton"):
        look_at_machine(chosen)
    assert "8-bit ones need Triton" in look_at_machine(by_auto).summary
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look_at_machine(by_auto).model.int8_matmul == "weight_only"


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
    kept = (torch.arange(into) % 7 > 0).float()
    directions = (x, kept, rows, scale, *low), (grad, scale, turned, None, None, None)
    for values, column_scale, *others in directions:
        found, wanted = (part.quantize_tokens(values, column_scale) for part in (int8_kernel, int8))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        found, wanted = (part.scaled_product(*found, *others, dtype) for part in (int8_kernel, int8))
        assert found.dtype == dtype
        # Float32 sums in the same order; a rounding to fp16 may fall the other way.
        off = 1e-3 if dtype == torch.float16 else 1e-6
        assert (found.double() - wanted.double()).norm() <= off * wanted.double().norm()
    q, scales = int8_kernel.quantize_tokens(grad, scale)
    assert torch.equal(int8_kernel.turned_product(q, scales, rows, dtype), found)
x, ones = draw(3, 256), torch.ones(256)
x[0, 3], x[2, 200] = float("inf"), float("nan")
assert int8_kernel.quantize_tokens(x, ones)[1].isnan().tolist() == [True, False, True]
q, scales = int8_kernel.quantize_tokens(draw(4, 256), ones)
rows = torch.randint(-127, 128, (16, 256), generator=generator, dtype=torch.int8)
arguments = (q, scales, rows, torch.ones(16), None, None, torch.bfloat16)
torch.library.opcheck(int8_kernel.quantize_tokens, (draw(4, 256), ones))
torch.library.opcheck(int8_kernel.scaled_product, arguments)
torch.library.opcheck(int8_kernel.turn, (rows,))
others = (*int8_kernel.quantize_tokens(draw(4, 16), torch.ones(16)), rows, torch.bfloat16)
torch.library.opcheck(int8_kernel.turned_product, others)
for product, given in (int8_kernel.scaled_product, arguments), (int8_kernel.turned_product, others):
    with FlopCounterMode(display=False) as mode:  # by which a compiled layer decides what to keep
        product(*given)
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
@pytest.mark.parametrize("rank", [0, 96], ids=["gradient", "forward"])
@pytest.mark.parametrize("capability", SHARED)
def test_the_product_compiles_to_int8_instructions_for(
    capability: int, rank: int, features: int, compile_ahead
):
    from so8t_helpers.train import int8_kernel

    tile = int8_kernel.tile_of(divmod(capability, 10))
    fixed = int8_kernel.constants(features, rank > 0, rank, tile)
    fixed |= {} if rank else dict.fromkeys(("row_scale", "low", "factor"))
    types = {"q": "*i8", "weight": "*i8", "scales": "*fp32", "row_scale": "*fp32"}
    types |= {"low": "*bf16", "factor": "*bf16", "out": "*bf16"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = compile_ahead(int8_kernel.product_kernel, capability, types, fixed, **options)
    ptx = compiled.asm["ptx"]
    kinds = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if capability == 90 else r"mma\.sync\S*\.s32\.s8\.s8\.s32"
    assert re.search(kinds, ptx)
    assert bool(re.search(r"mma\S*\.bf16", ptx)) == (
        rank > 0
    )  # LoRA's half and what stands apart are in the same kernel
    assert compiled.metadata.shared <= SHARED[capability]


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_the_small_kernels_compile_for(capability: int, compile_ahead):
    from so8t_helpers.train import int8_kernel

    types = {"x": "*bf16", "column_scale": "*fp32", "q": "*i8", "scales": "*fp32"}
    compiled = compile_ahead(int8_kernel._quantize_kernel, capability, types, {"BLOCK": 4096})
    assert "cvt.rni" not in compiled.asm["ptx"]  # rounding is an addition
    types = {"weight": "*i8", "turned": "*i8"}
    compiled = compile_ahead(int8_kernel._turn_kernel, capability, types, {"SIZE": 128})
    assert compiled.metadata.shared <= SHARED[capability]
