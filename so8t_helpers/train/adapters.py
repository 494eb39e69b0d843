"""What is trained: LoRA on the linears and SO8T gates in front of o_proj, float32, and their files.

All LoRA numbers lie in one flat vector, and so do their gradients: the optimizer, the norm, the reduction
over several cards and a checkpoint each handle one tensor. The matrices A and B are views into it.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from so8t_helpers.phi3.lora_folder import WEIGHTS_FILE, read_matrices, write_adapter
from so8t_helpers.phi3.shape import LINEARS, Phi3Shape, weight_path
from so8t_helpers.phi3.source import local_base
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.run.origin import llama_source
from so8t_helpers.settings import LoraSettings, Settings, SettingsError, resolve
from so8t_helpers.so8 import rotation
from so8t_helpers.train.frozen import Base
from so8t_helpers.train.layers import AdaptedLinear, LayerTensors, LoraFactors


def check_targets(lora: LoraSettings) -> list[str]:
    """Return the linears that get a LoRA, in the model's order.

    Raises:
        SettingsError: if a name matches none of Phi-3's linears; it would silently train nothing.
    """
    unknown = [name for name in lora.target_modules if name not in LINEARS]
    if unknown or not lora.target_modules:
        raise SettingsError(
            f"lora.target_modules: {unknown or 'an empty list'} matches no linear of Phi-3; "
            f"it has {', '.join(LINEARS)} (q_proj, k_proj, v_proj are fused into qkv_proj)"
        )
    return [name for name in LINEARS if name in lora.target_modules]


def gated_layers(settings: Settings, shape: Phi3Shape) -> list[int]:
    """Return the layers that get a gate.

    Raises:
        SettingsError: a layer that the model does not have, or a hidden size that 8 does not divide.
    """
    if not settings.so8t.enabled:
        return []
    rotation.count_blocks(shape.hidden_size)
    chosen = settings.so8t.layer_indices
    layers = list(range(shape.num_layers)) if chosen is None else sorted(set(chosen))
    wrong = [i for i in layers if not 0 <= i < shape.num_layers]
    if wrong or not layers:
        raise SettingsError(
            f"so8t.layer_indices: {wrong or 'an empty list'}; the model has layers 0 to "
            f"{shape.num_layers - 1}; null means all, so8t.enabled: false means none"
        )
    return layers


def check_adapters(settings: Settings, shape: Phi3Shape | None) -> None:
    """Look at what the settings say of LoRA and gates, and at the folder to go on from.

    Args:
        shape: the base's; None where the base is not here yet and only what needs no base is looked at.

    Raises:
        SettingsError, StageError: an unknown layer or linear, a file that is missing or does not fit.
    """
    targets = check_targets(settings.lora)
    if shape is not None:
        gated_layers(settings, shape)
        full = min((min(shape.linear_shape(name)), weight_path(0, name)) for name in targets)
        if settings.lora.r > full[0]:
            raise SettingsError(
                f"lora.r: {settings.lora.r} is more than {full[1]} has, {full[0]}; choose less"
            )
    if settings.training.continue_from:
        start = resolve(settings.training.continue_from)
        read_stored(start, settings, shape) if shape else stored_weights(start)


def stored_weights(folder: Path) -> Path:
    """Return the weights file of a LoRA folder to go on from. Raises SettingsError: there is none."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise SettingsError(f"training.continue_from: no {WEIGHTS_FILE} in {folder}")
    return path


def read_stored(
    folder: Path, settings: Settings, shape: Phi3Shape
) -> tuple[dict[tuple[str, str], TensorPlace], rotation.Gates | None]:
    """Return what lies in a folder to go on from: where the matrices are, and the gates.

    Raises:
        SettingsError, StageError: a file is missing, or does not fit the model and the settings.
    """
    path = stored_weights(folder)
    stored, expected, r = read_matrices(path), {}, settings.lora.r
    for side, i, linear in itertools.product("ab", range(shape.num_layers), check_targets(settings.lora)):
        out, into = shape.linear_shape(linear)
        expected[weight_path(i, linear), side] = (r, into) if side == "a" else (out, r)
    wrong = [key for key, size in expected.items() if key not in stored or stored[key].shape != size]
    if wrong or len(stored) != len(expected):
        raise SettingsError(
            f"{path}: does not fit lora.r and lora.target_modules of this profile (first: {wrong[:1]})"
        )
    layers = gated_layers(settings, shape)
    if not layers:
        return stored, None
    gates = rotation.load_gates(folder / rotation.GATES_FILE)
    if gates.layers != layers or gates.free.shape[1] != rotation.count_blocks(shape.hidden_size):
        raise SettingsError(f"{folder}: its gates are on layers {gates.layers}, not {layers}")
    return stored, gates


def count_parameters(settings: Settings, shape: Phi3Shape) -> tuple[int, int]:
    """Return how many numbers are trained: LoRA's, and the gates'. Raises SettingsError: as `Adapters`."""
    one_rank = sum(sum(shape.linear_shape(linear)) for linear in check_targets(settings.lora))
    gates = len(gated_layers(settings, shape)) * rotation.count_blocks(shape.hidden_size) * rotation.FREE
    return settings.lora.r * one_rank * shape.num_layers, gates


class Adapters:
    """LoRA and gates of a model.

    Attributes:
        lora: (N,) float32, all A and then all B; `lora.grad` collects their gradients.
        count_a: how many of its numbers are A's.
        matrices: A (r, in) and B (out, r) by layer, linear, and "a" or "b": leaves that are views of `lora`.
        free: (gated layers, d/8, 28) float32, the free numbers of the rotations.
        rotations: (gated layers, d/8, 8, 8), exp of them, cut off from `free`: micro-steps see this matrix
            alone, and its gradient goes back through the exponential once an optimizer step.
    """

    def __init__(self, shape: Phi3Shape, settings: Settings, device: torch.device):
        self.shape, self.settings = shape, settings
        self.targets = check_targets(settings.lora)
        self.layers = gated_layers(settings, shape)
        drawn, free = self._draw()
        self.count_a = sum(matrix.numel() for (_, _, side), matrix in drawn.items() if side == "a")
        self.lora = nn.Parameter(torch.cat([matrix.flatten() for matrix in drawn.values()]).to(device))
        self.lora.grad = torch.zeros_like(self.lora)
        sizes = [matrix.numel() for matrix in drawn.values()]
        self.matrices: dict[tuple[int, str, str], Tensor] = {}
        parts = zip(self.lora.data.split(sizes), self.lora.grad.split(sizes), strict=True)
        for (key, matrix), (values, grad) in zip(drawn.items(), parts, strict=True):
            self.matrices[key] = values.view(matrix.shape).requires_grad_()
            self.matrices[key].grad = grad.view(matrix.shape)
        self.free = nn.Parameter(free.to(device))
        self.rotations = rotation.rotation(self.free.detach()) if self.layers else self.free.detach().clone()
        self.rotations.grad = torch.zeros_like(self.rotations)
        self._leaves = [r.requires_grad_() for r in self.rotations.unbind()]
        for leaf, grad in zip(self._leaves, self.rotations.grad, strict=False):
            leaf.grad = grad

    def _draw(self) -> tuple[dict[tuple[int, str, str], Tensor], Tensor]:
        """Return where a training of these settings starts: all A, then all B, and the gates' numbers."""
        shape, lora = self.shape, self.settings.lora
        generator = torch.Generator().manual_seed(self.settings.run.seed)
        drawn: dict[tuple[int, str, str], Tensor] = {}
        places = list(itertools.product(range(shape.num_layers), self.targets))
        for layer, linear in places:
            # As PEFT: Kaiming uniform with a = sqrt(5), which is U(+-1/sqrt(in)); B is zero.
            into = shape.linear_shape(linear)[1]
            bound, a = 1 / math.sqrt(into), torch.empty(lora.r, into)
            drawn[layer, linear, "a"] = a.uniform_(-bound, bound, generator=generator)
        for layer, linear in places:
            drawn[layer, linear, "b"] = torch.zeros(shape.linear_shape(linear)[0], lora.r)
        if not self.layers:
            return drawn, torch.zeros(0)
        start = self.settings.so8t.init_scale
        return drawn, rotation.initial_free(len(self.layers), shape.hidden_size, start, generator)

    def begin(self, settings: Settings) -> None:
        """Start anew, in place, for another training of adapters of the same shape.

        A micro-step, and its graph, hold their addresses and can go on using them.
        """
        self.settings = settings
        drawn, free = self._draw()
        with torch.no_grad():
            for key, view in self.matrices.items():
                view.copy_(drawn[key])
            self.free.copy_(free)
        self.refresh_rotations()
        self.zero_grad()

    def groups(self) -> list[tuple[nn.Parameter, float]]:
        """Return what the optimizer updates, each with its rate over LoRA's: A and B, the gates' numbers.

        A and B are one where they have one rate. LoRA+ (Hayou et al. 2024) gives B a larger one.
        """
        chosen, rate = self.settings, self.settings.training.learning_rate
        found = [(self.lora, 1.0)]
        if chosen.lora.b_rate is not None:
            assert self.lora.grad is not None
            found = []
            for part, own in ((slice(self.count_a), rate), (slice(self.count_a, None), chosen.lora.b_rate)):
                parameter = nn.Parameter(self.lora.data[part])
                parameter.grad = self.lora.grad[part]
                found.append((parameter, own / rate))
        if self.layers:
            found.append((self.free, (chosen.so8t.learning_rate or rate) / rate))
        return found

    def refresh_rotations(self, t: float = 1.0) -> None:
        """Compute R(t) = exp(t A) of all gates at once, in place: graphs hold it. t = 1 is the gate's own."""
        if self.layers:
            self.rotations.copy_(rotation.power(self.free.detach(), t))

    def collect_rotation_gradient(self) -> Tensor:
        """Send the rotations' gradient back through the exponential into `free.grad`; add the guard's.

        Returns:
            Scalar: the orthogonality error of the rotations (about 1e-13 in float32, a diagnostic).
        """
        if not self.layers:
            return torch.zeros(())
        leaf = self.rotations.detach().requires_grad_()
        with torch.enable_grad():
            error = rotation.orthogonality_error(leaf)
        (guard,) = torch.autograd.grad(error * self.settings.so8t.orthogonal_reg, leaf)
        assert self.rotations.grad is not None
        self.free.grad = rotation.free_gradient(self.free.detach(), self.rotations.grad + guard)
        return error.detach()

    def gradients(self) -> list[Tensor]:
        """Return what micro-steps add up: LoRA's flat gradient, and the rotations' where there are gates."""
        assert self.lora.grad is not None and self.rotations.grad is not None
        return [self.lora.grad, self.rotations.grad] if self.layers else [self.lora.grad]

    def zero_grad(self) -> None:
        """Clear the gradients in place: captured graphs hold their addresses."""
        for gradient in self.gradients():
            gradient.zero_()

    def layer(self, base: Base, i: int) -> LayerTensors:
        """Put together the tensors of decoder layer i."""

        def adapted(number: int, name: str) -> AdaptedLinear:
            factors = [self.matrices[i, name, side] for side in "ab"] if name in self.targets else None
            salt = torch.tensor(len(LINEARS) * i + number, dtype=torch.int32, device=base.device)
            return AdaptedLinear(base.linears[i][name], LoraFactors(*factors) if factors else None, salt)

        norm1, norm2 = base.norms[i]
        qkv, o, gate_up, down = itertools.starmap(adapted, enumerate(LINEARS))
        leaf = self._leaves[self.layers.index(i)] if i in self.layers else None
        return LayerTensors(norm1, qkv, o, norm2, gate_up, down, leaf)

    def save(self, folder: Path) -> None:
        """Write a standard PEFT LoRA folder, with the gates in their own file beside it."""
        base = self.settings.model.base
        if llama_source(base) is not None:  # others load the adapter onto the imported folder
            base = str(local_base(self.settings))
        write_adapter(folder, self.matrices, self.settings.lora, self.targets, base)
        if self.layers:
            rotation.save_gates(folder / rotation.GATES_FILE, rotation.Gates(self.free, self.layers))

    def load(self, folder: Path) -> None:
        """Go on from such a folder.

        Raises:
            SettingsError, StageError: a file is missing, or does not fit the model and the settings.
        """
        stored, gates = read_stored(folder, self.settings, self.shape)
        with torch.no_grad():
            for (i, linear, side), view in self.matrices.items():
                view.copy_(stored[weight_path(i, linear), side].read())
            if gates is not None:
                self.free.copy_(gates.free)
        self.refresh_rotations()
