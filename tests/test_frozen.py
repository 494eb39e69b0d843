"""Frozen weights and their products, judged in float64 with the dequantised weight."""

from __future__ import annotations

import math
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import ModelSettings
from so8t_helpers.train.frozen import adapted_product, dequantize, frozen_linear, hold, load_base, quantize
from tests.phi3_folders import small_folder

GENERATOR = torch.Generator().manual_seed(3)


STORED = {"int8": ("int8",), "nf4": ("nf4",), "tensor_core": ("int8", "tensor_core")}
ROUNDED = 0.014  # what 8 bits for 128 to 192 normal numbers cost, see test_int8


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found.double() - reference).norm() / reference.norm()).item()


def test_int8_rows_are_those_of_bitsandbytes():
    weight = draw(96, 160).half()
    weight[5] = 0
    rows, absmax, _ = bnb.int8_vectorwise_quant(weight)
    stored = quantize(weight, "int8")
    assert torch.equal(stored.rows, rows)
    torch.testing.assert_close(
        stored.scale[:, 0] * 127, absmax.float().where(absmax > 0, torch.tensor(127.0))
    )


def test_nf4_dequantises_as_bitsandbytes_does():
    weight = draw(64, 128)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(dequantize(quantize(weight, "nf4"), torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("held", [False, True], ids=["each", "held"])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(
    # float32 sums of 160 products: some 1e-7; bf16 keeps 8 bits of weights and sums, so some 2^-9 each.
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)],
)
def test_product_and_gradients_equal_float64(kind: str, dtype: torch.dtype, bound: float, held: bool):
    weight, rank, s = quantize(draw(192, 128), *STORED[kind]), 8, 2.0
    x, low = draw(40, 128).to(dtype).requires_grad_(), draw(40, rank).to(dtype).requires_grad_()
    b, upstream = draw(192, rank).requires_grad_(), draw(40, 192).to(dtype)
    multiplied = hold(weight, b.detach(), s, dtype) if held else weight
    y = adapted_product(x, low, b, multiplied, s)
    y.backward(upstream)

    w, g = dequantize(weight, torch.float64), upstream.double()
    products_bound = max(bound, ROUNDED if kind == "tensor_core" else 0.0)
    assert relative(y, x.double() @ w.T + s * low.double() @ b.double().T) < products_bound
    assert relative(x.grad, g @ w) < products_bound
    assert relative(low.grad, s * g @ b.double()) < bound
    assert relative(b.grad, s * g.T @ low.double()) < bound
    assert b.grad.dtype == torch.float32


@pytest.mark.parametrize("held", [False, True], ids=["each", "held"])
@pytest.mark.parametrize("kind", STORED)
def test_the_product_compiles_whole_with_gradients_and_without(kind: str, held: bool):
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    stored = quantize(draw(64, 64), *STORED[kind])
    x, a_x, b = (draw(*shape).requires_grad_() for shape in ((9, 64), (9, 4), (64, 4)))
    weight = hold(stored, b.detach(), 2.0, torch.float32) if held else stored
    compiled = torch.compile(adapted_product, fullgraph=True, dynamic=False, backend="aot_eager")
    plain = adapted_product(x, a_x, b, weight, 2.0)
    for found in (compiled(x, a_x, b, weight, 2.0), torch.no_grad()(compiled)(x, a_x, b, weight, 2.0)):
        torch.testing.assert_close(found, plain)
    upstream = torch.ones(9, 64)
    expected = torch.autograd.grad(plain, (x, a_x, b), upstream)
    found = torch.autograd.grad(compiled(x, a_x, b, weight, 2.0, False), (x, a_x, b), upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("held", [False, True], ids=["each", "held"])
@pytest.mark.parametrize("kind", ["int8", "tensor_core"])
def test_gradients_do_not_need_the_product_itself(kind: str, held: bool):
    weight = quantize(draw(64, 64), *STORED[kind])
    grads = []
    for wanted in (True, False):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(n, generator=generator).requires_grad_() for n in ((9, 64), (9, 4), (64, 4))]
        multiplied = hold(weight, leaves[2].detach(), 1.0, torch.float32) if held else weight
        adapted_product(*leaves, multiplied, 1.0, wanted).backward(torch.ones(9, 64))
        grads.append([leaf.grad for leaf in leaves])
    for with_product, without in zip(*grads, strict=True):
        assert torch.equal(with_product, without)


@pytest.mark.parametrize("kind", ["int8", "tensor_core"])
def test_only_the_stored_weight_is_saved_for_the_backward_pass(kind: str):
    weight, saved = quantize(draw(64, 64), *STORED[kind]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(draw(4, 64).requires_grad_(), weight)
    assert not [t for t in saved if t.is_floating_point() and t.shape == (64, 64)]
    assert any(t.dtype == torch.int8 for t in saved)


def test_llm_int8_multiplies_the_same_weight():
    original = draw(64, 128)
    x = draw(8, 128)
    ours = frozen_linear(x, quantize(original, "int8"))
    theirs = frozen_linear(x, quantize(original, "int8", "llm_int8"))
    # LLM.int8 rounds activations to 8 bits, about 1% of their size; a product that does not is another one.
    assert 1e-4 < relative(theirs, ours.double()) < 0.02


def test_a_weight_that_stays_whole_takes_the_compute_dtype():
    assert quantize(draw(8, 8), "none", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_with_a_value_that_is_no_number_is_refused_by_the_tensors_name(
    tmp_path: Path, name: str, value: float
):
    folder = small_folder(tmp_path / "base", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors")
    cpu, shape = torch.device("cpu"), read_shape(folder)
    with pytest.raises(StageError, match=f"model.base: {name} holds a value that is no number"):
        load_base(shape, weight_reader(folder), ModelSettings(), cpu, torch.float32)
