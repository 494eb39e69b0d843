"""Block-diagonal SO(8) rotations: the gate in front of o_proj, its angles, its file.

A gate on d features is d/8 blocks. Block b holds 28 numbers a_b, the upper triangle (row by row) of a
skew-symmetric 8x8 matrix A_b, and rotates its eight features by R_b = exp(A_b), which lies in SO(8). The gate
maps a column x to R x, so a linear layer behind it sees W R x, and baking is exactly W' = W @ R.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from so8t_helpers.run.files import atomic_path, reading
from so8t_helpers.settings import SettingsError

BLOCK = 8
FREE = BLOCK * (BLOCK - 1) // 2  # 28 free numbers in a skew-symmetric 8x8 matrix
GATES_FILE = "so8t_gates.safetensors"
_AT_A_TIME = 1024  # matrices of 16 x 16 whose exponentials are computed together
_ROWS, _COLS = torch.triu_indices(BLOCK, BLOCK, offset=1)


def count_blocks(hidden_size: int) -> int:
    """Return the number of 8x8 blocks of a hidden size.

    Raises:
        SettingsError: if 8 does not divide it.
    """
    if hidden_size % BLOCK:
        raise SettingsError(
            f"hidden_size {hidden_size}: SO(8) gates need a multiple of {BLOCK}; set so8t.enabled: false"
        )
    return hidden_size // BLOCK


def skew(free: Tensor) -> Tensor:
    """Build skew-symmetric matrices. free (..., 28) -> A (..., 8, 8) with A = -A^T."""
    upper = free.new_zeros(*free.shape[:-1], BLOCK, BLOCK)
    upper[..., _ROWS, _COLS] = free
    return upper - upper.transpose(-1, -2)


def rotation(free: Tensor) -> Tensor:
    """R = exp(A). free (..., 28) -> R (..., 8, 8), orthogonal with determinant +1; differentiable."""
    return torch.matrix_exp(skew(free))


def power(free: Tensor, t: float) -> Tensor:
    """R(t) = exp(t A): the same planes, t times the angles; 0 is no rotation. Shapes as `rotation`."""
    return rotation(t * free)


def free_gradient(free: Tensor, by_rotation: Tensor) -> Tensor:
    """Send a gradient by R = exp(A) back to the free numbers, exactly.

    The adjoint of exp's derivative is the upper right block of exp([[A^T, G], [0, A^T]]) (Mathias 1996, A
    chain rule for matrix functions), as in autograd; but a few layers' matrices at a time, since 32 layers of
    the real size would take 150 MiB on top of everything else at the end of a step.

    Args:
        free: (..., 28). by_rotation: (..., 8, 8), G.

    Returns:
        (..., 28), the gradient by `free`.
    """
    parts = []
    together = (free.flatten(0, -2).split(_AT_A_TIME), by_rotation.flatten(0, -3).split(_AT_A_TIME))
    for numbers, gradient in zip(*together, strict=True):
        wide = free.new_zeros(len(numbers), 2 * BLOCK, 2 * BLOCK)
        wide[:, :BLOCK, :BLOCK] = wide[:, BLOCK:, BLOCK:] = skew(numbers).transpose(-1, -2)
        wide[:, :BLOCK, BLOCK:] = gradient
        by_a = torch.matrix_exp(wide)[:, :BLOCK, BLOCK:]
        parts.append(by_a[:, _ROWS, _COLS] - by_a[:, _COLS, _ROWS])
    return torch.cat(parts).view(free.shape)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Apply the gate, block by block: y_b = R_b x_b.

    Args:
        x: (..., d) activations.
        blocks: (d/8, 8, 8) rotations.
    """
    parts = x.unflatten(-1, (-1, 1, BLOCK))  # (..., d/8, 1, 8)
    return (parts @ blocks.transpose(-1, -2)).flatten(-3)  # row vector times R^T is R x


def side_by_side(blocks: Tensor, group: int) -> Tensor:
    """Put blocks on the diagonal of wider ones. (d/8, 8, 8) -> (d/group, group, group)."""
    count = group // BLOCK
    wide = blocks.new_zeros(len(blocks) // count, count, BLOCK, count, BLOCK)
    wide.diagonal(dim1=1, dim2=3).copy_(blocks.unflatten(0, (-1, count)).permute(0, 2, 3, 1))
    return wide.view(-1, group, group)


def bake_rotation(weight: Tensor, blocks: Tensor) -> Tensor:
    """W' = W @ R with block-diagonal R. weight (out, d), blocks (d/8, 8, 8) -> (out, d)."""
    if len(blocks) % 2 == 0:  # half of two side by side is zeros, and they are twice as fast
        blocks = side_by_side(blocks, 2 * BLOCK)
    columns = weight.unflatten(-1, (len(blocks), -1)).transpose(0, 1)  # (d/16, out, 16)
    return (columns @ blocks).transpose(0, 1).flatten(-2)


def principal_angles(free: Tensor) -> Tensor:
    """Principal angles of R = exp(A), in radians within [0, pi], largest first.

    The eigenvalues of a rotation in SO(8) are four pairs exp(+-i theta). They are exp of those of A, which
    are +-i sigma with sigma the singular values of A, each twice (A is normal). So theta is sigma, folded
    into [0, pi]. Taking them from A in float64 avoids the eigenvalues of a non-symmetric matrix.

    Args:
        free: (..., 28).

    Returns:
        (..., 4) float32.
    """
    sigma = torch.linalg.svdvals(skew(free.double()))[..., ::2]  # (..., 4): one of each equal pair
    circle = 2 * torch.pi
    folded = torch.remainder(sigma, circle)
    folded = torch.minimum(folded, circle - folded)
    return folded.sort(dim=-1, descending=True).values.float()


def geodesic_distance(start: Tensor, end: Tensor) -> Tensor:
    """Length of the shortest way from one rotation to another: the Frobenius norm of log(start^T end).

    With phi the principal angles of start^T end it is sqrt(2 * sum phi^2). The singular values of end - start
    are 2 sin(phi/2), each twice: no cosine, so a distance near zero keeps its digits.

    Args:
        start: (..., 8, 8).
        end: (..., 8, 8).

    Returns:
        (...) in radians, from 0 to pi * sqrt(8).
    """
    chords = torch.linalg.svdvals(end.double() - start.double())  # (..., 8)
    angles = 2 * torch.asin((chords / 2).clamp(max=1))
    return angles.square().sum(-1).sqrt().float()


def haar_angle_density(theta: Tensor) -> Tensor:
    """Density of one principal angle, drawn at random from the four, of a Haar-random rotation in SO(8).

    Weyl's integration formula makes the cosines a determinantal process; its kernel on the diagonal is
    (4 + cos 2t + cos 4t + cos 6t) / pi for four angles (Meckes, The Random Matrix Theory of the Classical
    Compact Groups, 2019, chapter 3).

    Args:
        theta: (...) radians within [0, pi].
    """
    return (4 + torch.cos(2 * theta) + torch.cos(4 * theta) + torch.cos(6 * theta)) / (4 * torch.pi)


def orthogonality_error(blocks: Tensor) -> Tensor:
    """Mean over blocks of the squared Frobenius norm of R^T R - 1. blocks (..., 8, 8) -> scalar."""
    identity = torch.eye(BLOCK, dtype=blocks.dtype, device=blocks.device)
    return (blocks.transpose(-1, -2) @ blocks - identity).square().sum((-1, -2)).mean()


def initial_free(layers: int, hidden_size: int, init_scale: float, generator: torch.Generator) -> Tensor:
    """Draw a gate's numbers from N(0, init_scale^2). -> (layers, d/8, 28) float32, on generator.device."""
    shape = (layers, count_blocks(hidden_size), FREE)
    return torch.randn(shape, generator=generator, device=generator.device) * init_scale


@dataclass(frozen=True)
class Gates:
    """The gates of a model.

    Attributes:
        free: (len(layers), d/8, 28) float32, the free numbers of each block.
        layers: index of the decoder layer of each row of `free`.
    """

    free: Tensor
    layers: list[int]

    @property
    def hidden_size(self) -> int:
        return self.free.shape[1] * BLOCK

    def rotations(self) -> dict[int, Tensor]:
        """Each gated layer's R, (d/8, 8, 8), as it is baked: exponentiated in float64, rounded to float32."""
        pairs = zip(self.layers, self.free, strict=True)
        return {layer: rotation(free.double()).float() for layer, free in pairs}


def save_gates(path: Path, gates: Gates) -> None:
    """Write gates as safetensors: one float32 tensor `layers.N.free` of shape (d/8, 28) for each layer."""
    tensors = {
        f"layers.{layer}.free": gates.free[i].detach().float().cpu().contiguous()
        for i, layer in enumerate(gates.layers)
    }
    metadata = {
        "format": "so8t-gates",
        "version": "1",
        "convention": "y = (W + sBA) R x, R = exp(A), bake W' = (W + sBA) @ R; free = upper triangle of A",
        "hidden_size": str(gates.hidden_size),
        "layers": json.dumps(gates.layers),
    }
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, metadata=metadata)
        _sort_header(scratch)


def _sort_header(path: Path) -> None:
    """Sort a safetensors file's header: the library writes metadata in an order that no two files share."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[size:])


def load_gates(path: Path) -> Gates:
    """Read gates back.

    Raises:
        SettingsError, StageError: if the file is missing or cut short, or is not one of ours.
    """
    if not path.is_file():
        raise SettingsError(f"no gates file {path}; 02_train writes it beside the LoRA adapter")
    with reading(path, "the gates of a training"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != "so8t-gates" or metadata.get("version") != "1":
            raise SettingsError(f"{path}: expected so8t-gates version 1, found metadata {metadata}")
        layers = [int(layer) for layer in json.loads(metadata["layers"])]
        free = torch.stack([file.get_tensor(f"layers.{layer}.free") for layer in layers])
    return Gates(free, layers)
