"""SO(8): against scipy and numpy in float64, the order of W @ R, gradients, files."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import special_ortho_group

from so8t_helpers.settings import SettingsError
from so8t_helpers.so8 import rotation

EXACT = 1e-12  # float64: a few hundred roundings of 1e-16 in an 8x8 exponential


def free(*shape: int, scale: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, rotation.FREE, generator=generator, dtype=torch.float64) * scale


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_skew_fills_the_upper_triangle_row_by_row():
    matrix = rotation.skew(torch.arange(1.0, 29.0))
    assert matrix[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert matrix[1, 2:].tolist() == [8, 9, 10, 11, 12, 13]
    assert torch.equal(matrix, -matrix.T)


@given(st.integers(0, 10_000), st.floats(1e-4, 3.0))
def test_rotation_is_scipys_exponential_and_in_so8(seed: int, scale: float):
    numbers = free(scale=scale, seed=seed)
    found = rotation.rotation(numbers).numpy()
    # The scale enters through the squarings in the exponential: each doubles the rounding.
    bound = EXACT * max(1.0, scale * 10)
    assert np.abs(found - scipy.linalg.expm(rotation.skew(numbers).numpy())).max() < bound
    assert np.abs(found.T @ found - np.eye(8)).max() < bound
    assert np.linalg.det(found) == pytest.approx(1.0)


def test_powers_rotate_the_same_planes_by_so_many_times_the_angles():
    x = free(3)
    r, half = rotation.rotation(x), rotation.power(x, 0.5)
    for power, product in ((0.0, torch.eye(8).double().expand(3, 8, 8)), (2.0, r @ r), (-1.0, r.mT)):
        torch.testing.assert_close(rotation.power(x, power), product, rtol=0, atol=EXACT)
    torch.testing.assert_close(half @ half, r, rtol=0, atol=EXACT)


def test_small_matrices_are_not_symmetric():
    """The other tests tell R from its transpose only because of this."""
    blocks = rotation.rotation(free(4))
    assert (blocks - blocks.transpose(-1, -2)).abs().amax() > 0.1


@pytest.mark.parametrize("scale", [1e-5, 0.05, 0.5, 2.0])
def test_principal_angles_are_those_of_the_eigenvalues(scale: float):
    numbers = free(16, scale=scale)
    found = rotation.principal_angles(numbers).numpy()
    eigenvalues = np.linalg.eigvals(rotation.rotation(numbers).numpy())
    expected = np.sort(np.abs(np.angle(eigenvalues)), axis=-1)[:, ::-1][:, ::2]
    assert (np.diff(found, axis=-1) <= 0).all()
    # float32 holds an angle up to pi to 2.4e-7.
    np.testing.assert_allclose(found, expected, atol=3e-7)


@pytest.mark.parametrize(
    ("sigma", "theta"),
    [(0.0, 0.0), (1.0, 1.0), (math.pi, math.pi), (math.pi + 0.5, math.pi - 0.5), (7.0, 7 - 2 * math.pi)],
)
def test_angles_fold_back_at_the_edge(sigma: float, theta: float):
    numbers = torch.zeros(rotation.FREE, dtype=torch.float64)
    numbers[0] = sigma  # turns the plane of features 0 and 1
    assert rotation.principal_angles(numbers).tolist() == pytest.approx([theta, 0, 0, 0], abs=1e-6)


def test_rotate_is_r_times_the_column():
    blocks = rotation.rotation(free(3))
    x = normal(2, 5, 24)
    found = rotation.rotate(x, blocks)
    dense = torch.block_diag(*blocks)
    torch.testing.assert_close(found, torch.einsum("ij,abj->abi", dense, x), atol=EXACT, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_baking_is_w_times_r_and_not_its_transpose():
    blocks = rotation.rotation(free(3))
    weight = normal(10, 24)
    x = normal(7, 24)
    baked = rotation.bake_rotation(weight, blocks)
    gated = rotation.rotate(x, blocks) @ weight.T
    torch.testing.assert_close(baked, weight @ torch.block_diag(*blocks), atol=EXACT, rtol=0)
    torch.testing.assert_close(x @ baked.T, gated, atol=EXACT, rtol=0)
    wrong = x @ rotation.bake_rotation(weight, blocks.transpose(-1, -2)).T
    assert (wrong - gated).abs().max() > 0.1


def test_gradients():
    numbers = free(2).requires_grad_()
    x = normal(3, 16).requires_grad_()
    assert torch.autograd.gradcheck(rotation.rotation, (numbers,))
    assert torch.autograd.gradcheck(lambda n, v: rotation.rotate(v, rotation.rotation(n)), (numbers, x))


def test_orthogonality_error():
    assert rotation.orthogonality_error(rotation.rotation(free(5))) < EXACT
    # (2*1)^T (2*1) - 1 = 3*1, whose squared norm is 8 * 9.
    assert rotation.orthogonality_error(2 * torch.eye(8).expand(4, 8, 8)) == 72


def test_initial_numbers_are_drawn_as_told():
    first, again = (rotation.initial_free(4, 512, 0.05, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (4, 64, 28)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    # 7168 draws: the standard error of their deviation is 0.8%.
    assert first.std().item() == pytest.approx(0.05, rel=0.04)


def test_hidden_size_must_hold_whole_blocks():
    assert rotation.count_blocks(3072) == 384
    with pytest.raises(SettingsError, match=r"hidden_size 3076.*multiple of 8"):
        rotation.count_blocks(3076)


def test_geodesic_distance_is_the_norm_of_the_logarithm():
    start, end = rotation.rotation(free(6)), rotation.rotation(free(6, seed=1))
    relative = (start.transpose(-1, -2) @ end).numpy()
    expected = [np.linalg.norm(scipy.linalg.logm(matrix)) for matrix in relative]
    np.testing.assert_allclose(rotation.geodesic_distance(start, end), expected, rtol=1e-6)  # float32 result
    assert rotation.geodesic_distance(start, start).max() == 0


@pytest.mark.parametrize("angle", [1e-7, 0.3, 3.0])
def test_geodesic_distance_of_one_plane(angle: float):
    numbers = torch.zeros(rotation.FREE, dtype=torch.float64)
    numbers[5] = angle
    found = rotation.geodesic_distance(torch.eye(8, dtype=torch.float64), rotation.rotation(numbers))
    assert found.item() == pytest.approx(math.sqrt(2) * angle, rel=1e-6)


def test_haar_density_is_that_of_random_rotations():
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    assert torch.trapezoid(rotation.haar_angle_density(theta), theta).item() == pytest.approx(1, abs=1e-9)
    matrices = special_ortho_group.rvs(8, size=4000, random_state=0)
    angles = np.abs(np.angle(np.linalg.eigvals(matrices))).ravel()
    counts, edges = np.histogram(angles, bins=12, range=(0, math.pi), density=True)
    middles = torch.tensor((edges[1:] + edges[:-1]) / 2)
    # 16,000 different angles in 12 bins: 3% a bin; a flat density would miss by up to 70%.
    np.testing.assert_allclose(counts, rotation.haar_angle_density(middles), rtol=0.1)


def test_gates_come_back_from_their_file(tmp_path: Path):
    path = tmp_path / rotation.GATES_FILE
    gates = rotation.Gates(free(3, 4).float(), [2, 11, 10])
    rotation.save_gates(path, gates)
    loaded = rotation.load_gates(path)
    assert loaded.layers == [2, 11, 10]
    assert loaded.hidden_size == 32
    assert torch.equal(loaded.free, gates.free)


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="no gates file"):
        rotation.load_gates(tmp_path / "none.safetensors")
    save_file({"layers.0.free": torch.zeros(4, 28)}, tmp_path / "other.safetensors")
    with pytest.raises(SettingsError, match="expected so8t-gates version 1"):
        rotation.load_gates(tmp_path / "other.safetensors")


def test_the_gradient_by_the_free_numbers_is_exact():
    """Against autograd through torch's exponential in float64, with more matrices than one chunk holds."""
    generator = torch.Generator().manual_seed(9)
    free = torch.randn(3, 500, 28, generator=generator, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(3, 500, 8, 8, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(rotation.rotation(free), free, slope)
    found = rotation.free_gradient(free.detach(), slope)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)  # float64 rounding of the same series
