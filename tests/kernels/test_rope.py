import pytest
import torch
from semantic_diffusion_adapter.kernels.rope import axis_dims, box_positions, patch_positions, rotary_angles, rotate


@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 48, 64, 80, 128])
def test_the_axes_fill_the_head(head_dim):
    dims = axis_dims(head_dim)
    assert sum(dims) == head_dim and all(d > 0 and d % 2 == 0 for d in dims) and dims[0] == dims[1]


def test_a_head_without_room_for_three_axes_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        axis_dims(6)


def test_rotation_equals_complex_multiplication():
    dims = axis_dims(32)
    x = torch.randn(2, 3, 5, 32, dtype=torch.float64).float()
    angles = rotary_angles(torch.randn(5, 3) * 10, dims)
    oracle = torch.view_as_complex(x.unflatten(-1, (16, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, angles), torch.view_as_real(oracle).flatten(-2))


def test_scores_depend_on_position_differences_only():
    dims = axis_dims(32)
    q, k = torch.randn(1, 32), torch.randn(1, 32)
    a, b, shift = torch.tensor([[3.0, 5.0, 1.0]]), torch.tensor([[7.0, 2.0, 3.0]]), torch.tensor([[4.0, -2.5, 1.0]])

    def score(p, r):
        return (rotate(q, rotary_angles(p, dims)) * rotate(k, rotary_angles(r, dims))).sum()

    torch.testing.assert_close(score(a, b), score(a + shift, b + shift), rtol=1e-4, atol=1e-4)
    for axis in range(3):  # every axis matters
        moved = b.clone()
        moved[0, axis] += 1
        assert (score(a, b) - score(a, moved)).abs() > 1e-3


def test_a_box_of_one_patch_stands_on_that_patch():
    rows, cols = 3, 4
    boxes = torch.tensor([[c / cols, r / rows, (c + 1) / cols, (r + 1) / rows] for r in range(rows) for c in range(cols)])
    levels = torch.full((rows * cols,), 2)
    torch.testing.assert_close(box_positions(boxes, levels, (rows, cols)), patch_positions((rows, cols), 2))


def test_half_precision_keeps_its_dtype_and_the_angle():
    x = torch.randn(4, 32)
    angles = rotary_angles(torch.full((4, 3), 31.0), axis_dims(32))
    half = rotate(x.bfloat16(), angles)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), rotate(x, angles), rtol=0.02, atol=0.03)
