"""The loss: matching, mining, values and gradients against a slow reference, and several processes."""

import math
import os
import subprocess
import sys

import pytest
import torch
from benchmark_plain import plain_encode, plain_match, plain_multibox_loss
from helpers import REPO

from model import SSD300, MultiBoxLoss, assign_own_priors, match_priors, mine_hard_negatives, stack_objects
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


# Matching


@pytest.mark.parametrize("n_levels", [2**24, 4, 1])  # hardly any ties, many ties, nothing but ties
def test_own_priors_are_those_of_the_best_pairs(n_levels):
    generator = torch.Generator().manual_seed(n_levels)
    for counts in ([3, 0, 6], [1], [0, 0], [6, 6, 5, 4], [0, 1, 2]) * 5:
        overlap = torch.randint(n_levels, (sum(counts), 9), generator=generator) / n_levels
        numbers = torch.arange(sum(counts)).split(counts)
        padded = [torch.cat([n, torch.full((max(1, *counts) - len(n),), sum(counts))]) for n in numbers]
        own_priors = assign_own_priors(overlap.clone(), torch.stack(padded))
        for members in numbers:
            left = overlap[members]
            for pair in left.gather(1, own_priors[members][:, None])[:, 0].argsort(descending=True, stable=True):
                prior = own_priors[members][pair]
                assert left[pair, prior] == left.max() >= 0  # none of those that are left overlap more
                left[pair], left[:, prior] = -1, -1


def test_more_objects_than_priors_is_an_error():
    with pytest.raises(ValueError, match=r"5 objects.*4 priors"):
        match_one_image(torch.rand(5, 4).sort(dim=1).values, random_priors(4, 0))


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


def test_image_without_objects_is_all_background():
    assert set(match_one_image(torch.zeros(0, 4), PRIORS_CXCY)) == {-1}
    objects = stack_objects([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, CPU)
    assert (match_priors(objects, cxcy_to_xy(PRIORS_CXCY), 0.5) == 0).all()  # T = 0: number 0 is "no object"


def test_an_object_gets_the_same_prior_in_whatever_batch_it_is():
    _, _, boxes, labels = random_batch([2, 40, 5], 4, PRIORS_CXCY, 1)  # with many equal overlaps
    together = match_priors(stack_objects(boxes, labels, CPU), cxcy_to_xy(PRIORS_CXCY), 0.5)
    alone = match_priors(stack_objects(boxes[:1], labels[:1], CPU), cxcy_to_xy(PRIORS_CXCY), 0.5)
    assert torch.equal(torch.where(together[:1] == 47, 2, together[:1]), alone)


# Mining


def test_mining_takes_the_hardest_negatives():
    torch.manual_seed(0)
    n_priors = 50
    losses = 3 * torch.rand(4, n_priors)
    is_positive = torch.rand(4, n_priors) < torch.tensor([0.1, 0.0, 0.5, 1.0])[:, None]
    n_positives = is_positive.sum(dim=1)
    is_hard = mine_hard_negatives(losses, is_positive, 3 * n_positives[:, None])
    for image in range(4):
        negatives = [prior for prior in range(n_priors) if not is_positive[image, prior]]
        hardest = sorted(negatives, key=lambda prior: -losses[image, prior])[: 3 * n_positives[image]]
        assert is_hard[image].nonzero().flatten().tolist() == sorted(hardest)
    assert is_hard.sum(dim=1).tolist() == [3 * n_positives[0], 0, n_priors - n_positives[2], 0]


# The loss


SETTINGS = [
    {},
    {"threshold": 0.3, "neg_pos_ratio": 1, "alpha": 2.5},
    {"threshold": 0.9, "n_negatives_without_objects": 7},
    {"neg_pos_ratio": 1000},  # more than there are
    {"neg_pos_ratio": 0, "n_negatives_without_objects": 200},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_against_a_plain_reference_in_float64(settings):
    priors_cxcy = random_priors(300, 2)
    locs, scores, boxes, labels = random_batch([2, 0, 13, 1, 5], 6, priors_cxcy, 3)
    ours = loss_and_gradients(MultiBoxLoss(priors_cxcy, **settings), locs, scores, boxes, labels)

    def plain(*batch):
        return plain_multibox_loss(*batch, priors_cxcy.double(), **settings)

    boxes = [image_boxes.double() for image_boxes in boxes]
    theirs = loss_and_gradients(plain, locs.double(), scores.double(), boxes, labels)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 0
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5 * their.abs().max().item())


@pytest.mark.parametrize("spread", [1, 1e4])
def test_loss_of_the_real_size(spread):
    # Two objects at one prior would leave one of them a choice between others of the same overlap.
    locs, scores, boxes, labels = random_batch([2, 0, 12], 21, PRIORS_CXCY, 4, crowded=False)
    batch = locs, spread * scores, boxes, labels
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
    torch.testing.assert_close(loss, losses.topk(2, dim=1).values.sum() / (4 / 3))  # 4 negatives: 4 / 3 positives
    assert (d_locs == 0).all() and (d_scores.abs().sum(dim=2) > 0).sum(dim=1).tolist() == [2, 2]


def test_perfect_predictions_cost_nothing():
    _, _, boxes, labels = random_batch([2, 3], 4, PRIORS_CXCY, 6)
    objects = stack_objects(boxes, labels, CPU)
    matched = match_priors(objects, cxcy_to_xy(PRIORS_CXCY), 0.5)
    locs = torch.stack([plain_encode(objects.boxes_xy[image], PRIORS_CXCY) for image in matched])
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


@pytest.mark.parametrize("neg_pos_ratio", [3, 0])
def test_batches_weigh_alike_whatever_share_of_their_images_has_objects(neg_pos_ratio):
    criterion = MultiBoxLoss(PRIORS_CXCY, neg_pos_ratio=neg_pos_ratio, n_negatives_without_objects=50)
    losses, norms = [], []
    for n_with_objects in (8, 1, 0):
        _, _, boxes, labels = random_batch([3] * n_with_objects + [0] * (8 - n_with_objects), 4, PRIORS_CXCY, 20)
        zeros = torch.zeros(8, 8732, 4), torch.zeros(8, 8732, 4)
        loss, _, d_scores = loss_and_gradients(criterion, *zeros, boxes, labels)
        losses.append(float(loss))
        norms.append(float(d_scores.norm()))
    assert max(losses) < 4 * min(losses) and max(norms) < 4 * min(norms)
    assert losses[2] == pytest.approx(max(neg_pos_ratio, 1) * math.log(4))


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


def test_predictions_that_are_not_numbers_show_in_the_loss():
    locs, scores, boxes, labels = random_batch([3, 1], 5, PRIORS_CXCY, 11)
    for image in range(2):
        bad = scores.clone()
        bad[image, 1234, 2] = torch.nan
        assert MultiBoxLoss(PRIORS_CXCY)(locs, bad, boxes, labels).isnan()


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
