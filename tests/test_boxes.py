"""Coordinate forms, offsets and overlap: section 1 of utils.py."""

import math

import pytest
import torch

from model import SSD300
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy


def random_boxes_xy(n, seed=0, dtype=torch.float32):
    """n boxes of positive area inside the image."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.02 + 0.6 * torch.rand(n, 2, generator=generator, dtype=dtype)
    mins = torch.rand(n, 2, generator=generator, dtype=dtype) * (1 - sizes)
    return torch.cat([mins, mins + sizes], dim=1)


def slow_overlap(box_1, box_2):
    """Overlap of two boxes, lists of four numbers in boundary form, in Python's float64."""
    width = min(box_1[2], box_2[2]) - max(box_1[0], box_2[0])
    height = min(box_1[3], box_2[3]) - max(box_1[1], box_2[1])
    shared = max(width, 0) * max(height, 0)
    area_1 = (box_1[2] - box_1[0]) * (box_1[3] - box_1[1])
    area_2 = (box_2[2] - box_2[0]) * (box_2[3] - box_2[1])
    return shared / (area_1 + area_2 - shared)


# ----------------------------------------------------------------------------------------------
# Forms
# ----------------------------------------------------------------------------------------------


def test_boundary_and_center_size_form_by_hand():
    boxes_xy = torch.tensor([[0.25, 0.5, 0.75, 0.625], [0, 0, 1, 1], [10, 20, 40, 100]])
    boxes_cxcy = torch.tensor([[0.5, 0.5625, 0.5, 0.125], [0.5, 0.5, 1, 1], [25, 60, 30, 80]])
    assert torch.equal(xy_to_cxcy(boxes_xy), boxes_cxcy)
    assert torch.equal(cxcy_to_xy(boxes_cxcy), boxes_xy)


def test_forms_keep_leading_dimensions_and_dtype():
    for shape in ((4,), (0, 4), (2, 3, 4)):
        boxes = torch.rand(shape, dtype=torch.float64)
        assert cxcy_to_xy(boxes).shape == xy_to_cxcy(boxes).shape == shape
        assert cxcy_to_xy(boxes).dtype == xy_to_cxcy(boxes).dtype == torch.float64
        torch.testing.assert_close(xy_to_cxcy(cxcy_to_xy(boxes)), boxes)


def test_offsets_by_hand():
    # The centre is half a prior's width to the right of the prior's, and as high; it is twice as wide, a
    # fourth as high: (0.5 / 0.1, 0, ln 2 / 0.2, ln 0.25 / 0.2).
    prior_cxcy = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box_cxcy = torch.tensor([[0.6, 0.5, 0.4, 0.1]])
    offsets = torch.tensor([[5.0, 0.0, math.log(2) / 0.2, math.log(0.25) / 0.2]])
    torch.testing.assert_close(cxcy_to_gcxgcy(box_cxcy, prior_cxcy), offsets)
    torch.testing.assert_close(gcxgcy_to_cxcy(offsets, prior_cxcy), box_cxcy)


def test_a_prior_has_no_offset_from_itself():
    priors_cxcy = SSD300.create_prior_boxes()
    assert torch.equal(cxcy_to_gcxgcy(priors_cxcy, priors_cxcy), torch.zeros(8732, 4))
    assert torch.equal(gcxgcy_to_cxcy(torch.zeros(2, 8732, 4), priors_cxcy), priors_cxcy.expand(2, -1, -1))


def test_encoding_and_decoding_undo_each_other():
    priors_cxcy = SSD300.create_prior_boxes()
    boxes_cxcy = xy_to_cxcy(random_boxes_xy(3 * 8732).view(3, 8732, 4))
    offsets = cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy)
    torch.testing.assert_close(gcxgcy_to_cxcy(offsets, priors_cxcy), boxes_cxcy, rtol=1e-5, atol=1e-6)
    offsets = 3 * torch.randn(3, 8732, 4, generator=torch.Generator().manual_seed(1))
    again = cxcy_to_gcxgcy(gcxgcy_to_cxcy(offsets, priors_cxcy), priors_cxcy)
    torch.testing.assert_close(again, offsets, rtol=1e-5, atol=1e-4)


def test_encoding_is_finite_and_undone_at_the_extremes_of_float32():
    tiny = torch.finfo(torch.float32).tiny  # 1.2e-38
    smallest_subnormal = tiny * torch.finfo(torch.float32).eps  # 1.4e-45: the smallest number above 0
    above_half = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    boxes_xy = torch.tensor(
        [
            [0.0, 0.0, 1.0, 1.0],
            [0.0, 0.0, tiny, tiny],
            [0.0, 0.0, smallest_subnormal, 1.0],
            [0.5, 0.5, above_half, above_half],
            [1 - 2**-24, 0.0, 1.0, 1.0],
            [0.0, 0.0, 1e4, 1e4],
        ]
    )
    assert (boxes_xy[:, 2:] > boxes_xy[:, :2]).all()  # the numbers survived float32
    priors_cxcy = SSD300.create_prior_boxes()[::97]
    boxes_cxcy = xy_to_cxcy(boxes_xy)[:, None].expand(-1, len(priors_cxcy), -1)
    offsets = cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy)
    assert offsets.isfinite().all()
    decoded = gcxgcy_to_cxcy(offsets, priors_cxcy)
    # A relative error of 6e-8 in ln(size / prior), 104 at most, is 6e-6 in the size.
    normal = boxes_cxcy[..., 2:] >= tiny
    torch.testing.assert_close(decoded[..., 2:][normal], boxes_cxcy[..., 2:][normal], rtol=3e-5, atol=0)
    torch.testing.assert_close(decoded[..., :2], boxes_cxcy[..., :2], rtol=1e-6, atol=1e-7)


# ----------------------------------------------------------------------------------------------
# Overlap
# ----------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    box = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    others = torch.tensor(
        [
            [0.0, 0.0, 4.0, 2.0],  # the same: 8 / 8
            [2.0, 0.0, 6.0, 2.0],  # shifted by half its width: 4 / (8 + 8 - 4)
            [1.0, 0.5, 3.0, 1.5],  # inside: 2 / 8
            [4.0, 0.0, 8.0, 2.0],  # shares an edge
            [4.0, 2.0, 5.0, 3.0],  # shares a corner
            [9.0, 9.0, 10.0, 10.0],  # far away in both directions: two negative sides are no area
        ]
    )
    assert find_intersection(box, others).tolist() == [[8, 4, 2, 0, 0, 0]]
    torch.testing.assert_close(find_jaccard_overlap(box, others), torch.tensor([[1, 1 / 3, 1 / 4, 0, 0, 0]]))


def test_overlap_of_boxes_without_area_is_zero():
    point, line = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5]
    boxes = torch.tensor([point, line, [0.0, 0.0, 1.0, 1.0]])
    assert find_jaccard_overlap(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_overlap_of_no_boxes():
    boxes, none = torch.rand(3, 4), torch.zeros(0, 4)
    assert find_jaccard_overlap(boxes, none).shape == (3, 0)
    assert find_jaccard_overlap(none, boxes).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_against_a_slow_reference(dtype):
    boxes_1, boxes_2 = random_boxes_xy(40, 1, dtype), random_boxes_xy(50, 2, dtype)
    overlap = find_jaccard_overlap(boxes_1, boxes_2)
    expected = [[slow_overlap(b1, b2) for b2 in boxes_2.tolist()] for b1 in boxes_1.tolist()]
    assert overlap.dtype == dtype
    torch.testing.assert_close(overlap, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=1e-6)
    assert (overlap > 0.5).any() and (overlap == 0).any()


def test_overlap_of_batches():
    boxes_1, boxes_2 = random_boxes_xy(30, 3).view(2, 3, 5, 4), random_boxes_xy(42, 4).view(2, 3, 7, 4)
    overlap = find_jaccard_overlap(boxes_1, boxes_2)
    assert overlap.shape == (2, 3, 5, 7)
    for i in range(2):
        for j in range(3):
            assert torch.equal(overlap[i, j], find_jaccard_overlap(boxes_1[i, j], boxes_2[i, j]))
    # One set may serve all of a batch, as the priors do.
    shared = find_jaccard_overlap(boxes_1, boxes_2[0, 0])
    assert torch.equal(shared[1, 2], find_jaccard_overlap(boxes_1[1, 2], boxes_2[0, 0]))


def test_overlap_leaves_its_arguments_alone():
    boxes_1, boxes_2 = random_boxes_xy(5, 5), random_boxes_xy(6, 6)
    copies = boxes_1.clone(), boxes_2.clone()
    find_jaccard_overlap(boxes_1, boxes_2)
    assert torch.equal(boxes_1, copies[0]) and torch.equal(boxes_2, copies[1])
