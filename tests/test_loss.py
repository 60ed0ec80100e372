"""The loss: matching, mining, values and gradients against a slow reference, and several processes."""

import functools
import math

import pytest
import torch
from oracles import plain_match, plain_multibox_loss

from model import SSD300, MultiBoxLoss, match_priors, mine_hard_negatives
from utils import cxcy_to_xy, xy_to_cxcy

PRIORS_CXCY = SSD300.create_prior_boxes()


def random_priors(n, seed):
    """n priors without the symmetries of SSD300's, whose overlaps with an object are often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=generator), 0.1 + 0.5 * torch.rand(n, 2, generator=generator)], 1)


def random_batch(counts, n_classes, priors_cxcy, seed, crowded=True):
    """Predictions and objects for images with these numbers of objects, each near a prior; if crowded, two near one."""
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


def assert_all_close(ours, theirs, rtol):
    """Loss and gradients agree; of gradients near 0 only to 1e-5 of the largest."""
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 0
        torch.testing.assert_close(our, their, rtol=rtol, atol=1e-5 * their.abs().max().item())


def match(boxes_xy, priors_cxcy, threshold=0.5):
    """The index of each prior's object, -1 for background."""
    matched = match_priors(boxes_xy, cxcy_to_xy(priors_cxcy), threshold)
    assert matched.shape == (len(priors_cxcy),) and matched.dtype == torch.int64
    return matched.tolist()


def test_more_objects_than_priors_is_an_error():
    with pytest.raises(ValueError, match=r"5 objects.*4 priors"):
        match(torch.rand(5, 4).sort(dim=1).values, random_priors(4, 0))


OWNER = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.55, 0.4, 0.4], [0.1, 0.1, 0.05, 0.05]])  # priors, cxcy
CELLS = xy_to_cxcy(torch.tensor([[0, 0, 4, 2], [1, 0, 5, 2], [0, 0, 2, 2], [4, 4, 8, 8]]) / 8)


@pytest.mark.parametrize("priors_cxcy, boxes_xy, threshold, matched", [
    # Both objects overlap prior 0 most. The better one owns it; the other owns prior 1, which the better one
    # overlaps more, and by more than the threshold.
    (OWNER, [[0.3, 0.3, 0.7, 0.7], [0.3, 0.2, 0.7, 0.6]], 0.5, [0, 1, -1]),
    # Overlaps 1, 6/10, 2/4 (the threshold itself is a match) and 0.
    *((CELLS, [[0.0, 0.0, 0.5, 0.25]], threshold, matched) for threshold, matched in
      ((0.5, [0, 0, 0, -1]), (0.51, [0, 0, -1, -1]), (0.61, [0, -1, -1, -1]))),
    # An object that hardly overlaps anything has a prior all the same.
    (CELLS, [[0.9, 0.1, 0.901, 0.11], [0.501, 0.501, 0.502, 0.502]], 0.5, [0, -1, -1, 1]),
    # So has one that overlaps nothing: the first prior that is left.
    (CELLS, [[0.0, 0.0, 0.5, 0.25], [0.9, 0.1, 0.901, 0.11]], 0.9, [0, 1, -1, -1]),
    (CELLS, cxcy_to_xy(CELLS).flip(0), 0.9, [3, 2, 1, 0]),  # as many objects as priors
    (CELLS, torch.zeros(0, 4), 0.5, [-1, -1, -1, -1]),
])  # fmt: skip
def test_matching_by_hand(priors_cxcy, boxes_xy, threshold, matched):
    assert match(torch.as_tensor(boxes_xy), priors_cxcy, threshold) == matched


@pytest.mark.parametrize("n_objects", [1, 2, 7, 100])
def test_matching_against_a_slow_reference(n_objects):
    for seed in range(3):
        priors_cxcy = random_priors(400, seed)
        _, _, (boxes_xy,), _ = random_batch([n_objects], 2, priors_cxcy, seed)
        expected, positive = plain_match(boxes_xy.double(), priors_cxcy.double(), 0.5)
        expected = torch.where(positive, expected, -1).tolist()
        assert match(boxes_xy, priors_cxcy) == expected
        assert set(range(n_objects)) <= set(expected)  # every object has a prior


def test_of_equal_overlaps_the_first_object_and_the_first_prior():
    twice = torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.2, 0.2, 0.4, 0.4], [0.6, 0.6, 0.8, 0.8]])
    priors_cxcy = xy_to_cxcy(torch.stack([twice[2], twice[0], twice[2], twice[0], twice[0]]))
    assert match(twice, priors_cxcy) == [2, 0, 2, 1, 0]


def test_an_object_gets_the_same_prior_in_whatever_batch_it_is():
    _, _, boxes, labels = random_batch([2, 40, 5], 4, PRIORS_CXCY, 1)  # with many equal overlaps
    criterion = MultiBoxLoss(PRIORS_CXCY)
    together, _, _ = criterion.make_targets(boxes, labels)
    for i in range(3):
        alone, _, _ = criterion.make_targets(boxes[i : i + 1], labels[i : i + 1])
        assert torch.equal(together[i], alone[0])


def test_hard_negatives_by_hand():
    conf_losses = torch.tensor([[0.5, 9.0, 2.0, 1.0], [3.0, 4.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    is_positive = torch.tensor([[False, True, False, False], [True, False, False, False], [False] * 4])
    mined = mine_hard_negatives(conf_losses, is_positive, torch.tensor([[2.0], [9.0], [0.0]]))
    # Two of the first image, without its positive; all of the second, whose positive counts nothing; none of the third.
    assert mined.tolist() == [[2.0, 1.0, 0.0, 0.0], [4.0, 2.0, 0.0, 0.0], [0.0] * 4]


def test_the_parts_of_the_loss_are_kept():
    locs, scores, boxes, labels = random_batch([3, 1], 5, PRIORS_CXCY, 12)
    criterion = MultiBoxLoss(PRIORS_CXCY, alpha=2.5)
    loss = criterion(locs.requires_grad_(), scores.requires_grad_(), boxes, labels)
    assert loss == criterion.conf_loss + 2.5 * criterion.loc_loss
    assert criterion.conf_loss > 0 and criterion.loc_loss > 0
    assert not criterion.conf_loss.requires_grad and not criterion.loc_loss.requires_grad
    far_off = criterion(locs.detach() + 10, scores, boxes, labels)
    assert far_off > loss and criterion.loc_loss > 10


@pytest.mark.parametrize("settings", [
    {}, {"threshold": 0.3, "neg_pos_ratio": 1, "alpha": 2.5}, {"threshold": 0.9, "n_negatives_without_objects": 7},
    {"neg_pos_ratio": 1000}, {"n_negatives_without_objects": 1000},  # more than there are
    {"neg_pos_ratio": 0, "n_negatives_without_objects": 200}, {"neg_pos_ratio": 2.5},  # of 3 positives 8, not 7
])  # fmt: skip
def test_loss_and_gradients_against_a_plain_reference_in_float64(settings):
    priors_cxcy = random_priors(300, 2)
    locs, scores, boxes, labels = random_batch([2, 0, 13, 1, 5], 6, priors_cxcy, 3)
    ours = loss_and_gradients(MultiBoxLoss(priors_cxcy, **settings), locs, scores, boxes, labels)
    plain = functools.partial(plain_multibox_loss, priors_cxcy=priors_cxcy.double(), **settings)
    theirs = loss_and_gradients(plain, locs.double(), scores.double(), [b.double() for b in boxes], labels)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    assert_all_close([our.double() for our in ours], theirs, 1e-5)


@pytest.mark.parametrize("spread", [1, 1e4])
def test_loss_of_the_real_size(spread):
    # Two objects at one prior would leave one of them a choice between others of the same overlap.
    locs, scores, *objects = random_batch([2, 0, 12], 21, PRIORS_CXCY, 4, crowded=False)
    batch = locs, spread * scores, *objects
    plain = functools.partial(plain_multibox_loss, priors_cxcy=PRIORS_CXCY)
    assert_all_close(loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), *batch), loss_and_gradients(plain, *batch), 1e-4)


def test_batch_without_objects():
    locs, scores, boxes, labels = random_batch([0, 0], 5, PRIORS_CXCY, 5)
    loss, d_locs, d_scores = loss_and_gradients(MultiBoxLoss(PRIORS_CXCY), locs, scores, boxes, labels)
    assert loss == 0 and (d_locs == 0).all() and (d_scores == 0).all()
    criterion = MultiBoxLoss(PRIORS_CXCY, n_negatives_without_objects=2)
    loss, d_locs, d_scores = loss_and_gradients(criterion, locs, scores, boxes, labels)
    losses = -scores.log_softmax(dim=2)[:, :, 0]
    torch.testing.assert_close(loss, losses.topk(2, dim=1).values.sum() / (4 / 3))  # 4 negatives: 4 / 3 positives
    assert (d_locs == 0).all() and (d_scores.abs().sum(dim=2) > 0).sum(dim=1).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_finite_at_the_smallest_and_largest_boxes_and_computed_in_float32(dtype):
    tiny, above_half = torch.finfo(torch.float32).tiny, torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    extremes = torch.tensor([[0, 0, 1, 1], [0, 0, tiny, tiny], [0, 0, 1, 1e-30], [0.5, 0.5, above_half, above_half]])
    assert (extremes[:, 2:] > extremes[:, :2]).all()  # the numbers survived float32
    boxes = [*extremes.split(1), extremes]
    labels = [torch.ones(len(b), dtype=torch.int64) for b in boxes]
    locs, scores = torch.randn(5, 8732, 4).to(dtype), (30 * torch.randn(5, 8732, 3)).to(dtype)
    criterion = MultiBoxLoss(PRIORS_CXCY)
    with torch.autocast("cpu", torch.bfloat16):
        results = loss_and_gradients(criterion, locs, scores, boxes, labels)
    assert all(result.isfinite().all() for result in results)
    assert [result.dtype for result in results] == [torch.float32, dtype, dtype]
    expected = loss_and_gradients(criterion, locs.float(), scores.float(), boxes, labels)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value.to(result.dtype))


@pytest.mark.parametrize("boxes_xy, labels, message", [
    *(([[0.1, 0.1, 0.5, 0.5]], labels, r"image 1 .* go from 1 to 4") for labels in ([0], [5], [-1], [-100])),
    ([[0.1, 0.1, 0.5, 0.5]], [1, 2], r"are \(1, 4\) and \(2,\)"), ([], [], r"are \(0,\) and \(0,\) torch.float32"),
    ([[0.1, 0.1, 0.5, 0.5]], [1.0], "torch.float32, not"), ([[0.1, 0.1, 0.5, 0.5, 1]], [1], r"are \(1, 5\)"),
    *(([[0.1, 0.1, x_max, 0.5]], [1], "image 1 .* has no finite area") for x_max in (0.1, 0.0, math.nan, math.inf)),
])  # fmt: skip
def test_objects_that_would_spoil_the_loss_are_named(boxes_xy, labels, message):
    locs, scores, boxes, all_labels = random_batch([2, 1], 5, PRIORS_CXCY, 5)
    with pytest.raises(ValueError, match=message):
        MultiBoxLoss(PRIORS_CXCY)(
            locs, scores, [boxes[0], torch.tensor(boxes_xy)], [all_labels[0], torch.tensor(labels)]
        )


@pytest.mark.parametrize("neg_pos_ratio", [3, 0])
def test_batches_weigh_alike_whatever_share_of_their_images_has_objects(neg_pos_ratio):
    criterion = MultiBoxLoss(PRIORS_CXCY, neg_pos_ratio=neg_pos_ratio, n_negatives_without_objects=50)
    batches = [random_batch([3] * n + [0] * (8 - n), 4, PRIORS_CXCY, 20) for n in (8, 1, 0)]  # images with objects
    results = [loss_and_gradients(criterion, *torch.zeros(2, 8, 8732, 4), *objects) for _, _, *objects in batches]
    losses, norms = [float(loss) for loss, *_ in results], [float(d_scores.norm()) for *_, d_scores in results]
    assert max(losses) < 4 * min(losses) and max(norms) < 4 * min(norms)
    assert losses[2] == pytest.approx(max(neg_pos_ratio, 1) * math.log(4))


def test_predictions_that_are_not_numbers_show_in_the_loss():
    locs, scores, boxes, labels = random_batch([3, 1], 5, PRIORS_CXCY, 11)
    scores[1, 1234, 2] = torch.nan
    assert MultiBoxLoss(PRIORS_CXCY)(locs, scores, boxes, labels).isnan()


@pytest.mark.parametrize("counts", [[6, 9, 3, 1, 0, 1], [0] * 6])  # unlike in the two processes; or no object at all
def test_two_processes_take_the_step_of_one(monkeypatch, counts):
    """One after the other here; test_train.py has a run of two."""
    priors_cxcy = random_priors(500, 14)
    criterion = MultiBoxLoss(priors_cxcy, n_negatives_without_objects=7)
    batch = random_batch(counts, 5, priors_cxcy, 15)
    loss, *gradients = loss_and_gradients(criterion, *batch)
    shares = [[part[images] for part in batch] for images in (slice(3), slice(3, 6))]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    counted = []  # what the first process adds to each sum, then the second
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: counted.append(count.clone()))
    for share in shares:
        criterion(*share)
    half = len(counted) // 2
    sums = [one + other for one, other in zip(counted[:half], counted[half:], strict=True)]
    results = []
    for share in shares:
        left = iter(sums)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, left=left: count.copy_(next(left)))
        results.append(loss_and_gradients(criterion, *share))
    # DistributedDataParallel takes the mean over the processes.
    assert_all_close([(results[0][0] + results[1][0]) / 2], [loss], 1e-5)
    for whole, *parts in zip(gradients, *(result[1:] for result in results), strict=True):
        torch.testing.assert_close(torch.cat(parts) / 2, whole, rtol=1e-5, atol=1e-7)
