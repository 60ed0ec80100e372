"""The loss: matching, mining, values and gradients against slow references, and no waiting for a GPU."""

import contextlib
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from benchmark_plain import plain_match, plain_multibox_loss
from conftest import REPO

from model import (
    SSD300,
    MultiBoxLoss,
    assign_own_priors,
    find_hardness,
    match_priors,
    mine_priors,
    stack_objects,
)
from utils import cxcy_to_xy, find_jaccard_overlap, xy_to_cxcy

PRIORS_CXCY = SSD300.create_prior_boxes()
CPU = torch.device("cpu")


def random_priors(n, seed):
    """n priors without the symmetries of SSD300's, whose overlaps with an object are often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=generator), 0.1 + 0.5 * torch.rand(n, 2, generator=generator)], 1)


def random_batch(counts, n_classes, priors_cxcy, seed, crowded=True):
    """Predictions and objects for images with these numbers of objects, each near a prior; if crowded, two objects
    are near the same one."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for n in counts:
        chosen = torch.randint(len(priors_cxcy), (n,), generator=generator)
        if crowded:
            chosen = chosen[torch.arange(n) // 2]
        # Shifted, and larger than the prior: a box inside two priors of one area would overlap both alike.
        centers, sizes = priors_cxcy[chosen].split(2, dim=1)
        centers = centers + 0.1 * sizes * (torch.rand(n, 2, generator=generator) - 0.5)
        sizes = sizes * (1 + 0.2 * torch.rand(n, 2, generator=generator))
        boxes.append(cxcy_to_xy(torch.cat([centers, sizes], dim=1)))
        labels.append(torch.randint(1, n_classes, (n,), generator=generator))
    locs = 3 * torch.randn(len(counts), len(priors_cxcy), 4, generator=generator)
    scores = 3 * torch.randn(len(counts), len(priors_cxcy), n_classes, generator=generator)
    return locs, scores, boxes, labels


def loss_and_gradients(criterion, locs, scores, boxes, labels):
    locs, scores = locs.clone().requires_grad_(), scores.clone().requires_grad_()
    loss = criterion(locs, scores, boxes, labels)
    loss.backward()
    return loss.detach(), locs.grad, scores.grad


def match_one_image(boxes_xy, priors_cxcy, threshold=0.5):
    """The index of each prior's object, -1 for background, in an image between two others."""
    other_xy, label = torch.tensor([[0.1, 0.1, 0.6, 0.7]]), torch.tensor([1])
    boxes = [other_xy, boxes_xy, other_xy.repeat(2, 1)]
    objects = stack_objects(boxes, [label.repeat(len(b)) for b in boxes], CPU)
    matched = match_priors(objects, cxcy_to_xy(priors_cxcy), threshold)
    assert matched.shape == (3, len(priors_cxcy)) and matched.dtype == torch.int64
    return torch.where(matched[1] == len(boxes_xy) + 3, -1, matched[1] - 1).tolist()


# ----------------------------------------------------------------------------------------------
# Matching
# ----------------------------------------------------------------------------------------------


def slow_greedy(overlap):
    """The own prior of each object by the plain algorithm: overlap is a list of lists, object by prior."""
    own_priors = {}
    while len(own_priors) < len(overlap):
        _, own, prior = max(
            (value, -own, -prior)
            for own, row in enumerate(overlap)
            for prior, value in enumerate(row)
            if own not in own_priors and prior not in own_priors.values()
        )
        own_priors[-own] = -prior
    return [own_priors[own] for own in range(len(overlap))]


def assert_is_greedy(overlap, own_priors):
    """Whether own_priors is a result of the greedy algorithm, also where ties leave it a choice."""
    assert len(set(own_priors)) == len(own_priors)
    left, priors_left = set(range(len(overlap))), set(range(len(overlap[0])))
    for own in sorted(left, key=lambda own: -overlap[own][own_priors[own]]):
        highest = max(overlap[i][prior] for i in left for prior in priors_left)
        assert overlap[own][own_priors[own]] == highest
        left.remove(own)
        priors_left.remove(own_priors[own])


def batch_of_overlaps(counts, n_priors, n_levels, generator):
    """What assign_own_priors() takes, for random images; overlaps have n_levels values."""
    n_all = sum(counts)
    overlap = torch.randint(n_levels, (n_all, n_priors), generator=generator) / n_levels
    numbers = torch.full((len(counts), max(1, *counts)), n_all)
    first = 0
    for image, count in enumerate(counts):
        numbers[image, :count] = torch.arange(first, first + count)
        first += count
    return overlap, numbers


@pytest.mark.parametrize("n_levels", [2**24, 4, 1])  # hardly any ties, many ties, nothing but ties
def test_own_priors_against_a_slow_reference(n_levels):
    generator, rng = torch.Generator().manual_seed(n_levels), random.Random(n_levels)
    for _ in range(25):
        n_priors = rng.randint(6, 12)
        counts = [rng.randint(0, 6) for _ in range(rng.randint(2, 5))]
        overlap, numbers = batch_of_overlaps(counts, n_priors, n_levels, generator)
        untouched = overlap.clone()
        own_priors = assign_own_priors(overlap, numbers).tolist()
        assert torch.equal(overlap, untouched) and len(own_priors) == sum(counts)
        for row in numbers.tolist():
            members = [number for number in row if number < sum(counts)]
            table = [overlap[number].tolist() for number in members]
            if table:
                assert_is_greedy(table, [own_priors[number] for number in members])
                if n_levels == 2**24:
                    assert [own_priors[number] for number in members] == slow_greedy(table)


def test_more_objects_than_priors_is_an_error():
    with pytest.raises(ValueError, match=r"5 objects.*4 priors"):
        match_one_image(torch.rand(5, 4).sort(dim=1).values, random_priors(4, 0))


def test_two_objects_that_share_their_best_prior_both_get_one():
    priors_cxcy = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.6, 0.6, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]])
    first, second = [0.4, 0.4, 0.8, 0.8], [0.4, 0.42, 0.8, 0.8]  # both overlap prior 1 most; the first fits better
    # Prior 0 ([0.1, 0.3] twice) and prior 2 ([0.85, 0.95] twice) touch neither.
    matched = match_one_image(torch.tensor([second, first]), priors_cxcy)
    assert matched[1] == 1  # the better one owns it ...
    assert sorted(matched) == [-1, 0, 1]  # ... and the other got one of those that are left


def test_an_owner_keeps_its_prior_from_a_better_match():
    # Both objects overlap prior 0 most. The better one owns it; the other owns prior 1, which the better one
    # overlaps more, and by more than the threshold.
    priors_cxcy = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.55, 0.4, 0.4], [0.1, 0.1, 0.05, 0.05]])
    objects_xy = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.3, 0.2, 0.7, 0.6]])
    overlap = find_jaccard_overlap(objects_xy, cxcy_to_xy(priors_cxcy))
    assert overlap[0, 0] > overlap[1, 0] > overlap[1, 1] and overlap[0, 1] > overlap[1, 1]
    assert overlap[0, 1] > 0.7
    assert match_one_image(objects_xy, priors_cxcy) == [0, 1, -1]


def test_threshold_by_hand():
    # Two priors of 4 x 2 cells of the 8 x 8 image; the object covers 4 x 2 as well, shifted by 0 and 1 cell:
    # overlaps 1 and 6 / 10.
    priors_cxcy = xy_to_cxcy(torch.tensor([[0, 0, 4, 2], [1, 0, 5, 2], [4, 4, 8, 8]]) / 8)
    box_xy = torch.tensor([[0, 0, 4, 2]]) / 8
    assert match_one_image(box_xy, priors_cxcy, threshold=0.5) == [0, 0, -1]
    assert match_one_image(box_xy, priors_cxcy, threshold=0.61) == [0, -1, -1]
    # At the threshold itself (2 / 4, exact in floats) it is a match.
    half = xy_to_cxcy(torch.tensor([[0, 0, 4, 2], [0, 0, 2, 2], [4, 4, 8, 8]]) / 8)
    assert match_one_image(box_xy, half, threshold=0.5) == [0, 0, -1]


def test_an_object_that_hardly_overlaps_anything_has_a_prior_all_the_same():
    priors_cxcy = SSD300.create_prior_boxes()
    matched = match_one_image(torch.tensor([[0.501, 0.501, 0.502, 0.502]]), priors_cxcy)
    assert matched.count(0) == 1 and matched.count(-1) == 8731


@pytest.mark.parametrize("n_objects", [1, 2, 7, 100])
def test_matching_against_a_slow_reference(n_objects):
    for seed in range(3):
        priors_cxcy = random_priors(400, seed)
        _, _, (boxes_xy,), _ = random_batch([n_objects], 2, priors_cxcy, seed)
        expected, positive = plain_match(boxes_xy.double(), priors_cxcy.double(), 0.5)
        expected = torch.where(positive, expected, -1).tolist()
        assert match_one_image(boxes_xy, priors_cxcy) == expected
        assert set(range(n_objects)) <= set(expected)  # every object has a prior


def test_a_hundred_objects_in_one_image():
    _, _, (boxes_xy,), _ = random_batch([100], 2, PRIORS_CXCY, 0)
    matched = match_one_image(boxes_xy, PRIORS_CXCY)
    assert set(matched) == set(range(-1, 100))
    overlap = find_jaccard_overlap(boxes_xy, cxcy_to_xy(PRIORS_CXCY))  # (100, P)
    above = (overlap >= 0.5).any(dim=0)
    matched = torch.tensor(matched)
    assert (matched[above] >= 0).all()
    assert ((matched >= 0) & ~above).sum() <= 100  # only as some object's own


def test_image_without_objects_is_all_background():
    assert set(match_one_image(torch.zeros(0, 4), PRIORS_CXCY)) == {-1}
    objects = stack_objects([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, CPU)
    assert (match_priors(objects, cxcy_to_xy(PRIORS_CXCY), 0.5) == 0).all()  # T = 0: number 0 is "no object"


def test_stacked_objects():
    boxes = [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(3, 4)]
    labels = [torch.tensor([5, 6]), torch.zeros(0, dtype=torch.int64), torch.tensor([7, 8, 9])]
    objects = stack_objects(boxes, labels, CPU)
    assert torch.equal(objects.boxes_xy[:5], torch.cat(boxes))
    assert objects.boxes_xy[5].tolist() == [0, 0, 1, 1]
    assert objects.labels.tolist() == [5, 6, 7, 8, 9, 0]
    assert objects.images.tolist() == [0, 0, 2, 2, 2]
    assert objects.numbers.tolist() == [[0, 1, 5], [5, 5, 5], [2, 3, 4]]


# ----------------------------------------------------------------------------------------------
# Mining
# ----------------------------------------------------------------------------------------------


def test_mining_takes_the_hardest_negatives():
    torch.manual_seed(0)
    n_priors, n_classes = 50, 4
    scores = 3 * torch.randn(4, n_priors, n_classes)
    is_positive = torch.rand(4, n_priors) < torch.tensor([0.1, 0.0, 0.5, 1.0])[:, None]
    n_negatives = 3 * is_positive.sum(dim=1, keepdim=True)
    rows, does_count = mine_priors(scores, is_positive, n_negatives)
    rows = rows[does_count].tolist()
    assert len(set(rows)) == len(rows)
    n_taken = []
    for image in range(4):
        taken = {row - n_priors * image for row in rows if row // n_priors == image}
        positives = set(is_positive[image].nonzero().flatten().tolist())
        losses = [-math.log(scores[image, prior].double().softmax(0)[0]) for prior in range(n_priors)]
        negatives = sorted(set(range(n_priors)) - positives, key=lambda prior: -losses[prior])
        assert taken == positives | set(negatives[: 3 * len(positives)])
        n_taken.append((len(positives), len(taken) - len(positives)))
    (few, many), no, (half, rest), every = n_taken
    assert many == 3 * few > 0 and no == (0, 0) and rest == n_priors - half < 3 * half and every == (n_priors, 0)


# ----------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------


def slow_loss(locs, scores, boxes, labels, priors_cxcy, threshold, neg_pos_ratio, alpha, n_without_objects):
    """The loss in plain Python on lists of floats, image by image, prior by prior, coordinate by coordinate."""
    total, n_positives = 0.0, 0
    priors = priors_cxcy.double().tolist()
    for image in range(len(boxes)):
        objects_xy = boxes[image].double()
        if len(objects_xy):
            overlap = find_jaccard_overlap(objects_xy, cxcy_to_xy(priors_cxcy.double())).tolist()
            own_priors = slow_greedy(overlap)
        positives, negative_losses = 0, []
        for p, (c_x, c_y, width, height) in enumerate(priors):
            matched = None
            if len(objects_xy):
                best = max(range(len(overlap)), key=lambda i: overlap[i][p])
                matched = own_priors.index(p) if p in own_priors else best if overlap[best][p] >= threshold else None
            label = 0 if matched is None else int(labels[image][matched])
            exps = [math.exp(score) for score in scores[image, p].double().tolist()]
            conf_loss = -math.log(exps[label] / sum(exps))
            if matched is None:
                negative_losses.append(conf_loss)
                continue
            positives += 1
            total += conf_loss
            x_min, y_min, x_max, y_max = objects_xy[matched].tolist()
            true = [
                ((x_min + x_max) / 2 - c_x) / width * 10,
                ((y_min + y_max) / 2 - c_y) / height * 10,
                math.log((x_max - x_min) / width) * 5,
                math.log((y_max - y_min) / height) * 5,
            ]
            for predicted, wanted in zip(locs[image, p].double().tolist(), true, strict=True):
                difference = abs(predicted - wanted)
                total += alpha * (difference**2 / 2 if difference < 1 else difference - 0.5)
        n_hard = neg_pos_ratio * positives if positives else n_without_objects
        total += sum(sorted(negative_losses, reverse=True)[:n_hard])
        n_positives += positives
    return total / max(1, n_positives)


SETTINGS = [
    {},
    {"threshold": 0.3, "neg_pos_ratio": 1, "alpha": 2.5},
    {"threshold": 0.9, "n_negatives_without_objects": 7},
    {"neg_pos_ratio": 1000},  # more than there are
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_against_plain_python(settings):
    priors_cxcy = random_priors(60, 0)
    batch = random_batch([3, 0, 1, 8], 4, priors_cxcy, 1)
    loss = MultiBoxLoss(priors_cxcy, **settings)(*batch)
    values = {"threshold": 0.5, "neg_pos_ratio": 3, "alpha": 1.0, "n_negatives_without_objects": 0, **settings}
    expected = slow_loss(*batch, priors_cxcy, *values.values())
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_against_a_plain_reference(settings, at_hand, monkeypatch):
    """In float64, as a CPU and as a GPU goes about it (the GPU's way runs on the CPU, too)."""
    monkeypatch.setattr("model.is_at_hand", lambda tensor: at_hand)
    priors_cxcy = random_priors(300, 2)
    locs, scores, boxes, labels = random_batch([2, 0, 13, 1, 5], 6, priors_cxcy, 3)
    ours = loss_and_gradients(MultiBoxLoss(priors_cxcy, **settings), locs, scores, boxes, labels)

    def plain(*batch):
        return plain_multibox_loss(*batch, priors_cxcy.double(), **settings)

    boxes = [image_boxes.double() for image_boxes in boxes]
    theirs = loss_and_gradients(plain, locs.double(), scores.double(), boxes, labels)
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 0
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5 * their.abs().max().item())


def test_loss_of_the_real_size():
    # Two objects at one prior would leave one of them a choice between others of the same overlap.
    batch = random_batch([2, 0, 12], 21, PRIORS_CXCY, 4, crowded=False)
    ours = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), *batch)
    theirs = loss_and_gradients(lambda *b: plain_multibox_loss(*b, PRIORS_CXCY), *batch)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


def test_batch_without_objects():
    locs, scores, boxes, labels = random_batch([0, 0], 5, PRIORS_CXCY, 5)
    loss, d_locs, d_scores = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), locs, scores, boxes, labels)
    assert loss == 0 and (d_locs == 0).all() and (d_scores == 0).all()
    criterion = MultiBoxLoss(PRIORS_CXCY, n_negatives_without_objects=2)
    loss, d_locs, d_scores = loss_and_gradients(criterion, locs, scores, boxes, labels)
    losses = -scores.log_softmax(dim=2)[:, :, 0]
    torch.testing.assert_close(loss, losses.topk(2, dim=1).values.sum())  # divided by 1
    assert (d_locs == 0).all() and (d_scores.abs().sum(dim=2) > 0).sum(dim=1).tolist() == [2, 2]


def test_perfect_predictions_cost_nothing():
    _, _, boxes, labels = random_batch([2, 3], 4, PRIORS_CXCY, 6)
    objects = stack_objects(boxes, labels, CPU)
    matched = match_priors(objects, cxcy_to_xy(PRIORS_CXCY), 0.5)
    boxes_cxcy = xy_to_cxcy(objects.boxes_xy[matched])
    locs = torch.cat(
        [
            (boxes_cxcy[..., :2] - PRIORS_CXCY[:, :2]) / PRIORS_CXCY[:, 2:] * 10,
            (boxes_cxcy[..., 2:] / PRIORS_CXCY[:, 2:]).log() * 5,
        ],
        dim=2,
    )
    scores = 50.0 * torch.nn.functional.one_hot(objects.labels[matched], 4)
    assert MultiBoxLoss(PRIORS_CXCY)(locs, scores, boxes, labels) < 1e-6


def test_order_of_objects_and_of_images_does_not_matter():
    locs, scores, boxes, labels = random_batch([6, 0, 3], 5, PRIORS_CXCY, 7)
    criterion = MultiBoxLoss(PRIORS_CXCY)
    loss, d_locs, d_scores = loss_and_gradients(criterion, locs, scores, boxes, labels)
    orders = [torch.randperm(len(b), generator=torch.Generator().manual_seed(8)) for b in boxes]
    assert orders[0].tolist() != sorted(orders[0].tolist())
    shuffled = [b[o] for b, o in zip(boxes, orders, strict=True)], [b[o] for b, o in zip(labels, orders, strict=True)]
    again = loss_and_gradients(criterion, locs, scores, *shuffled)
    images = [2, 0, 1]
    turned = loss_and_gradients(
        criterion, locs[images], scores[images], [boxes[i] for i in images], [labels[i] for i in images]
    )
    for one, two, three in zip((loss, d_locs, d_scores), again, turned, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one[images] if one.dim() else one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_finite_at_the_smallest_and_largest_boxes(dtype):
    tiny = torch.finfo(torch.float32).tiny
    extremes = [
        [0.0, 0.0, 1.0, 1.0],
        [0.0, 0.0, tiny, tiny],
        [0.0, 0.0, 1.0, 1e-30],
        [1 - 2**-24, 1 - 2**-24, 1.0, 1.0],
        [0.5, 0.5, 0.5 + 2**-24, 0.5 + 2**-24],
        [0.0, 0.999, 1.0, 1.0],
    ]
    boxes = [torch.tensor([box]) for box in extremes] + [torch.tensor(extremes)]
    boxes[4][0, 2:] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert all((b[:, 2:] > b[:, :2]).all() for b in boxes[:-1])
    labels = [torch.ones(len(b), dtype=torch.int64) for b in boxes]
    locs = torch.randn(len(boxes), 8732, 4).to(dtype)
    scores = (30 * torch.randn(len(boxes), 8732, 3)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), locs, scores, boxes, labels)
    assert all(result.isfinite().all() for result in results)
    assert [result.dtype for result in results] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0])
def test_hardness_ranks_as_the_confidence_loss_does(spread):
    """With a spread of 60 some losses are above 88, where the exponential function overflows."""
    scores = spread * torch.randn(2, 500, 5, generator=torch.Generator().manual_seed(1))
    losses = -scores.double().log_softmax(dim=2)[:, :, 0]
    assert (losses.max() > 89) == (spread == 60)
    hardness = find_hardness(scores)
    assert hardness.dtype == torch.float32 and hardness.isfinite().all()
    in_order = losses.gather(1, hardness.argsort(dim=1))
    assert (in_order.diff(dim=1) > -1e-5 * (1 + in_order[:, 1:])).all()


def test_half_precision_predictions_are_computed_in_float32():
    locs, scores, boxes, labels = random_batch([4, 1], 5, PRIORS_CXCY, 9)
    criterion = MultiBoxLoss(PRIORS_CXCY)
    half = locs.bfloat16(), scores.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, d_locs, d_scores = loss_and_gradients(criterion, *half, boxes, labels)
    expected = loss_and_gradients(criterion, half[0].float(), half[1].float(), boxes, labels)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(d_locs, expected[1].bfloat16())
    torch.testing.assert_close(d_scores, expected[2].bfloat16())


def test_confident_predictions_do_not_overflow():
    locs, scores, boxes, labels = random_batch([3, 1], 5, PRIORS_CXCY, 10, crowded=False)
    scores *= 1e4
    ours = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), locs, scores, boxes, labels)
    theirs = loss_and_gradients(lambda *b: plain_multibox_loss(*b, PRIORS_CXCY), locs, scores, boxes, labels)
    assert ours[0].isfinite()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)


def test_predictions_that_are_not_numbers_show_in_the_loss():
    locs, scores, boxes, labels = random_batch([3, 1], 5, PRIORS_CXCY, 11)
    for image in range(2):
        bad = scores.clone()
        bad[image, 1234, 2] = torch.nan
        assert MultiBoxLoss(PRIORS_CXCY)(locs, bad, boxes, labels).isnan()


# ----------------------------------------------------------------------------------------------
# GPUs and several processes
# ----------------------------------------------------------------------------------------------


def test_nothing_depends_on_values_that_a_gpu_would_have_to_tell(monkeypatch):
    """On the meta device, whose tensors have no values, whatever needs one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **keywords: contextlib.nullcontext())
    locs, scores, boxes, labels = random_batch([3, 0, 11], 21, PRIORS_CXCY, 12)
    meta = locs.to("meta").requires_grad_(), scores.to("meta").requires_grad_()
    loss = MultiBoxLoss(PRIORS_CXCY).to("meta")(*meta, boxes, labels)
    assert loss.is_meta and loss.shape == ()
    loss.backward()
    assert meta[0].grad.shape == locs.shape and meta[1].grad.shape == scores.shape
    with pytest.raises((RuntimeError, NotImplementedError)):  # such a need does fail
        meta[0].sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_never_waits_and_agrees_with_the_cpu():
    locs, scores, boxes, labels = random_batch([3, 0, 11, 40], 21, PRIORS_CXCY, 13)
    expected = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), locs, scores, boxes, labels)
    criterion = MultiBoxLoss(PRIORS_CXCY).cuda()
    on_gpu = locs.cuda(), scores.cuda()
    boxes, labels = [b.pin_memory() for b in boxes], [b.pin_memory() for b in labels]
    loss_and_gradients(criterion, *on_gpu, boxes, labels)  # the first call loads kernels, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = loss_and_gradients(criterion, *on_gpu, boxes, labels)
        with torch.autocast("cuda", torch.bfloat16):
            loss_and_gradients(criterion, on_gpu[0].bfloat16(), on_gpu[1].bfloat16(), boxes, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


PROCESS = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = {paths!r}
from model import MultiBoxLoss

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/meeting", rank=rank, world_size=2)
batch = torch.load(folder + "/batch.pt", weights_only=True)
images = slice(0, 3) if rank == 0 else slice(3, 6)
locs, scores = (batch[name][images].clone().requires_grad_() for name in ("locs", "scores"))
criterion = MultiBoxLoss(batch["priors_cxcy"], n_negatives_without_objects=7)
loss = criterion(locs, scores, batch["boxes"][images], batch["labels"][images])
loss.backward()
torch.save((loss.detach(), locs.grad, scores.grad), folder + "/result" + str(rank) + ".pt")
dist.destroy_process_group()
"""


# Rank 0 has most of the objects, rank 1 an image without any; or there is none at all.
@pytest.mark.parametrize("counts", [[6, 9, 3, 1, 0, 1], [0] * 6])
def test_two_processes_take_the_step_of_one(tmp_path, counts):
    priors_cxcy = random_priors(500, 14)
    locs, scores, boxes, labels = random_batch(counts, 5, priors_cxcy, 15)
    batch = {"locs": locs, "scores": scores, "boxes": boxes, "labels": labels, "priors_cxcy": priors_cxcy}
    torch.save(batch, tmp_path / "batch.pt")
    code = PROCESS.format(paths=[str(REPO)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    criterion = MultiBoxLoss(priors_cxcy, n_negatives_without_objects=7)
    loss, *gradients = loss_and_gradients(criterion, locs, scores, boxes, labels)
    assert loss > 0
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]
    # DistributedDataParallel takes the mean over the processes.
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, loss, rtol=1e-5, atol=0)
    for whole, *parts in zip(gradients, *(result[1:] for result in results), strict=True):
        torch.testing.assert_close(torch.cat(parts) / 2, whole, rtol=1e-5, atol=1e-7)
