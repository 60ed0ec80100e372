"""detect_objects() gives what the plain algorithm gives, to the last bit, on every kind of input."""

import pytest
import torch
from benchmark import trained_like_predictions
from benchmark_plain import plain_detect_objects

import model as module
from model import SSD300, detect_objects
from utils import cxcy_to_gcxgcy, cxcy_to_xy, xy_to_cxcy

PRIORS_CXCY = SSD300.create_prior_boxes()


def assert_same(results, expected):
    """Both are three lists of as many tensors, which are equal bit for bit."""
    for ours, theirs in zip(results, expected, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def predictions_of(boxes_xy, scores):
    """Predictions that decode to given boxes and scores, from priors that are those boxes.

    boxes_xy: list of P boxes. scores: P lists of C scores, which are turned into shares of their sum.
    Returns offsets (1, P, 4), scores before the softmax (1, P, C), and priors (P, 4).
    """
    priors_cxcy = xy_to_cxcy(torch.tensor(boxes_xy))
    return torch.zeros(1, len(boxes_xy), 4), torch.tensor([scores]).log(), priors_cxcy


# By hand


def test_a_worse_box_of_the_same_class_is_suppressed_and_others_stay():
    # Overlap of the first two: 0.09 / 0.15 = 0.6, of the first and the third: 0.06 / 0.18 = 1 / 3.
    boxes_xy = [[0.1, 0.1, 0.5, 0.4], [0.2, 0.1, 0.6, 0.4], [0.3, 0.1, 0.7, 0.4]]
    locs, scores, priors = predictions_of(boxes_xy, [[0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.4, 0.5, 0.1]])
    boxes, labels, kept_scores = detect_objects(locs, scores, priors, 0.15, 0.45, 10)
    torch.testing.assert_close(boxes[0], torch.tensor([boxes_xy[0], boxes_xy[2]]))
    assert labels[0].tolist() == [1, 1]
    torch.testing.assert_close(kept_scores[0], torch.tensor([0.7, 0.5]))


def test_a_suppressed_box_suppresses_none():
    # Each of three boxes overlaps the next one by 0.6; the first suppresses the second, so the third stays.
    boxes_xy = [[0.1, 0.1, 0.5, 0.4], [0.2, 0.1, 0.6, 0.4], [0.3, 0.1, 0.7, 0.4]]
    locs, scores, priors = predictions_of(boxes_xy, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    assert len(detect_objects(locs, scores, priors, 0.01, 0.45, 10)[0][0]) == 2
    assert len(detect_objects(locs, scores, priors, 0.01, 0.65, 10)[0][0]) == 3
    assert len(detect_objects(locs, scores, priors, 0.01, 0.3, 10)[0][0]) == 1


def test_classes_do_not_suppress_each_other_and_one_prior_may_show_several():
    locs, scores, priors = predictions_of([[0.1, 0.1, 0.5, 0.4]] * 2, [[0.1, 0.5, 0.4], [0.2, 0.2, 0.6]])
    boxes, labels, kept_scores = detect_objects(locs, scores, priors, 0.01, 0.45, 10)
    assert labels[0].tolist() == [2, 1]
    torch.testing.assert_close(kept_scores[0], torch.tensor([0.6, 0.5]))
    torch.testing.assert_close(boxes[0], torch.tensor([[0.1, 0.1, 0.5, 0.4]] * 2))


def test_overlap_equal_to_the_limit_does_not_suppress():
    boxes_xy = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.5]]  # overlap: exactly 1/2
    locs, scores, priors = predictions_of(boxes_xy, [[0.1, 0.9], [0.2, 0.8]])
    assert len(detect_objects(locs, scores, priors, 0.01, 0.5, 10)[0][0]) == 2
    assert len(detect_objects(locs, scores, priors, 0.01, 0.499, 10)[0][0]) == 1


def test_score_equal_to_the_limit_is_no_candidate():
    locs, scores = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)  # every class has exactly 1/4
    priors = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    assert len(detect_objects(locs, scores, priors, 0.25, 0.45, 10)[0][0]) == 0
    assert len(detect_objects(locs, scores, priors, 0.2499, 0.45, 10)[0][0]) == 6


def test_equal_scores_rank_by_prior_then_by_class():
    centers = [0.1, 0.3, 0.5, 0.7]
    priors = torch.tensor([[center, 0.5, 0.1, 0.1] for center in centers])
    locs, scores = torch.zeros(1, 4, 4), torch.zeros(1, 4, 3)
    boxes, labels, _ = detect_objects(locs, scores, priors, 0.01, 0.45, 5)
    assert labels[0].tolist() == [1, 2, 1, 2, 1]
    torch.testing.assert_close(cxcy_to_xy(priors)[[0, 0, 1, 1, 2]], boxes[0])


def test_top_k_keeps_the_best_of_all_classes():
    boxes_xy = [[i / 10, 0.0, i / 10 + 0.05, 0.05] for i in range(5)]
    shares = [[0.5, 0.3, 0.2], [0.4, 0.1, 0.5], [0.2, 0.2, 0.6], [0.2, 0.7, 0.1], [0.85, 0.05, 0.1]]
    locs, scores, priors = predictions_of(boxes_xy, shares)
    _, labels, kept_scores = detect_objects(locs, scores, priors, 0.01, 0.45, 3)
    assert labels[0].tolist() == [1, 2, 2]
    torch.testing.assert_close(kept_scores[0], torch.tensor([0.7, 0.6, 0.5]))


def test_max_candidates_applies_before_suppression():
    # The best two of the class are the same box, so with two candidates only one object is left.
    boxes_xy = [[0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.5, 0.4], [0.1, 0.1, 0.5, 0.4]]
    locs, scores, priors = predictions_of(boxes_xy, [[0.4, 0.6], [0.1, 0.9], [0.2, 0.8]])
    assert len(detect_objects(locs, scores, priors, 0.01, 0.45, 10)[0][0]) == 2
    boxes, _, _ = detect_objects(locs, scores, priors, 0.01, 0.45, 10, max_candidates=2)
    torch.testing.assert_close(boxes[0], torch.tensor([[0.1, 0.1, 0.5, 0.4]]))


def test_nothing_found_gives_empty_tensors():
    assert detect_objects(torch.zeros(0, 5, 4), torch.zeros(0, 5, 3), torch.ones(5, 4), 0.1, 0.45, 10) == ([], [], [])
    locs, scores = torch.zeros(2, len(PRIORS_CXCY), 4), torch.zeros(2, len(PRIORS_CXCY), 21)
    boxes, labels, kept_scores = detect_objects(locs, scores, PRIORS_CXCY, 0.5, 0.45, 200)
    for i in range(2):
        assert boxes[i].shape == (0, 4) and boxes[i].dtype == torch.float32
        assert labels[i].shape == (0,) and labels[i].dtype == torch.int64
        assert kept_scores[i].shape == (0,) and kept_scores[i].dtype == torch.float32


def test_images_of_one_batch_do_not_touch_each_other():
    locs, scores = random_predictions(3, 500, 6, seed=1)
    priors = PRIORS_CXCY[:500]
    scores[1] = 0.0
    scores[1, :, 0] = 20.0  # nothing in the second image
    together = detect_objects(locs, scores, priors, 0.05, 0.45, 50)
    assert [len(labels) for labels in together[1]] == [50, 0, 50]
    for i in range(3):
        alone = detect_objects(locs[i : i + 1], scores[i : i + 1], priors, 0.05, 0.45, 50)
        assert_same([[part[i]] for part in together], alone)


# Against the plain algorithm


def random_predictions(n_images, n_priors, n_classes, seed):
    """Offsets and scores as of a network that has learned little."""
    generator = torch.Generator().manual_seed(seed)
    locs = torch.randn(n_images, n_priors, 4, generator=generator)
    return locs, torch.randn(n_images, n_priors, n_classes, generator=generator) * 2


def random_case(seed):
    """A small case of any kind: few or many priors, apart or on top of each other, scores distinct or equal."""
    generator = torch.Generator().manual_seed(seed)

    def choose(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    n_images, n_priors, n_classes = choose(1, 1, 2), choose(1, 2, 5, 12, 30), choose(2, 3, 5)
    priors = torch.rand(n_priors, 4, generator=generator) * choose(0.2, 0.5, 1.0) + 0.1
    locs = torch.randn(n_images, n_priors, 4, generator=generator) * choose(0.0, 0.3, 1.0, 4.0)
    scores = torch.randn(n_images, n_priors, n_classes, generator=generator) * choose(0.0, 1.0, 3.0)
    if choose(True, False):  # equal scores, equal boxes, overlaps that are simple fractions
        scores, locs = scores.round(), locs.round()
        priors = (priors * 8).round().clamp(min=1) / 8
    parameters = {
        "min_score": choose(0.0, 0.01, 0.2, 0.5),
        "max_overlap": choose(0.0, 0.25, 1 / 3, 0.45, 0.5, 0.75, 1.0),
        "top_k": choose(1, 3, 10, 40),
        "max_candidates": choose(None, None, 1, 3, 20),
    }
    return locs, scores, priors, parameters


def test_small_random_cases_equal_the_plain_algorithm():
    for seed in range(800):
        locs, scores, priors, parameters = random_case(seed)
        results = detect_objects(locs, scores, priors, **parameters)
        assert_same(results, plain_detect_objects(locs, scores, priors, **parameters))


def test_small_random_cases_equal_the_plain_algorithm_in_many_short_rounds(monkeypatch):
    monkeypatch.setattr(module, "PRIORS_FOR_EACH_OBJECT", 1)
    monkeypatch.setattr(module, "NEW_IN_FIRST_POOL", 2)
    monkeypatch.setattr(module, "NEW_IN_POOL", 3)
    monkeypatch.setattr(module, "STEPS_A_ROUND", 1)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 16)
    for seed in range(10_000, 10_300):
        locs, scores, priors, parameters = random_case(seed)
        results = detect_objects(locs, scores, priors, **parameters)
        assert_same(results, plain_detect_objects(locs, scores, priors, **parameters))


def test_chains_of_suppression_are_followed_to_their_end():
    # Each box overlaps the next by 0.6, so every second one survives: each hangs on all before it.
    n = 100
    boxes_xy = [[i / 4, 0.0, i / 4 + 1.0, 1.0] for i in range(n)]
    shares = [[0.5 + i / 1000, 0.5 - i / 1000] for i in range(n)]
    locs, scores, priors = predictions_of(boxes_xy, shares)
    boxes, _, _ = detect_objects(locs, scores, priors, 0.01, 0.5, n)
    torch.testing.assert_close(boxes[0], torch.tensor(boxes_xy[::2]))


@pytest.mark.parametrize("max_candidates", [None, 100])
def test_predictions_of_a_trained_kind_equal_the_plain_algorithm(max_candidates):
    locs, scores = trained_like_predictions(1, PRIORS_CXCY)
    results = detect_objects(locs, scores, PRIORS_CXCY, 0.01, 0.45, 200, max_candidates)
    assert len(results[0][0]) == 200
    assert_same(results, plain_detect_objects(locs, scores, PRIORS_CXCY, 0.01, 0.45, 200, max_candidates))


@pytest.mark.parametrize("kind", ["random", "clustered", "identical", "equal scores"])
def test_all_priors_and_classes_above_min_score(kind):
    priors, generator = PRIORS_CXCY[5000:7000], torch.Generator().manual_seed(0)
    locs = torch.randn(1, len(priors), 4, generator=generator)
    scores = torch.rand(1, len(priors), 21, generator=generator)
    if kind == "clustered":  # four survivors a class, which need nearly all candidates to be looked at
        corners = torch.tensor([[0.2, 0.2, 0.3, 0.3], [0.8, 0.2, 0.3, 0.3], [0.2, 0.8, 0.3, 0.3], [0.8, 0.8, 0.3, 0.3]])
        locs[0] = cxcy_to_gcxgcy(corners.repeat(len(priors) // 4, 1), priors) + 0.01 * locs[0]
    elif kind == "identical":
        locs[0] = cxcy_to_gcxgcy(torch.tensor([[0.5, 0.5, 0.4, 0.4]]).repeat(len(priors), 1), priors)
    elif kind == "equal scores":
        scores = torch.zeros_like(scores)
    assert scores.softmax(dim=2)[:, :, 1:].min() > 0.01
    results = detect_objects(locs, scores, priors, 0.01, 0.45, 200)
    assert_same(results, plain_detect_objects(locs, scores, priors, 0.01, 0.45, 200))
    assert len(results[0][0]) == {"clustered": 80, "identical": 20}.get(kind, 200)


@pytest.mark.parametrize("size", [1e2, 1e4, 3e38])
def test_extreme_offsets_give_finite_boxes(size):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (1, 200, 4), generator=generator).float()
    scores = torch.randn(1, 200, 4, generator=generator)
    boxes, _, kept_scores = detect_objects(signs * size, scores, PRIORS_CXCY[-200:], 0.01, 0.45, 1000)
    assert len(boxes[0]) > 100
    assert torch.isfinite(boxes[0]).all()
    assert torch.isfinite(kept_scores[0]).all()
    assert (boxes[0][:, 2:] >= boxes[0][:, :2]).all()


def test_large_offsets_that_do_not_overflow_are_left_alone():
    locs, scores = random_predictions(2, 300, 4, seed=3)
    locs *= 30  # sizes of up to exp(20) times the prior's
    results = detect_objects(locs, scores, PRIORS_CXCY[:300], 0.1, 0.45, 200)
    assert_same(results, plain_detect_objects(locs, scores, PRIORS_CXCY[:300], 0.1, 0.45, 200))


def test_boxes_are_not_clipped_to_the_image():
    locs, scores, priors = predictions_of([[-0.2, -0.1, 0.5, 1.3]], [[0.1, 0.9]])
    torch.testing.assert_close(
        detect_objects(locs, scores, priors, 0.01, 0.45, 1)[0][0], torch.tensor([[-0.2, -0.1, 0.5, 1.3]])
    )


def test_scores_that_are_not_numbers_are_no_candidates():
    locs, scores = random_predictions(1, 20, 3, seed=4)
    expected = detect_objects(locs[:, 1:], scores[:, 1:], PRIORS_CXCY[1:20], 0.01, 0.45, 50)
    scores[0, 0, 1] = torch.nan
    assert_same(detect_objects(locs, scores, PRIORS_CXCY[:20], 0.01, 0.45, 50), expected)


def test_half_precision_and_gradients_are_accepted_and_inputs_left_alone():
    locs, scores = (part.bfloat16().requires_grad_() for part in random_predictions(2, 100, 5, seed=5))
    before = locs.detach().clone(), scores.detach().clone()
    results = detect_objects(locs, scores, PRIORS_CXCY[:100], 0.1, 0.45, 20)
    assert_same(results, detect_objects(locs.float(), scores.float(), PRIORS_CXCY[:100], 0.1, 0.45, 20))
    assert torch.equal(locs, before[0]) and torch.equal(scores, before[1])
    assert not results[0][0].requires_grad and results[0][0].dtype == torch.float32


def test_model_detects_with_its_own_priors():
    locs, scores = random_predictions(1, len(PRIORS_CXCY), 4, seed=6)
    results = SSD300(4, "ssd300_tiny").detect_objects(locs, scores, min_score=0.1, max_overlap=0.45, top_k=30)
    assert_same(results, detect_objects(locs, scores, PRIORS_CXCY, 0.1, 0.45, 30))


def test_the_host_waits_once_a_round(monkeypatch):
    waits, rounds, tolist, suppress = [], [], torch.Tensor.tolist, module._suppress
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(1) or tolist(tensor))
    monkeypatch.setattr(module, "_suppress", lambda *arguments: rounds.append(1) or suppress(*arguments))
    for name in ("item", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    detect_objects(*random_predictions(2, len(PRIORS_CXCY), 4, seed=7), PRIORS_CXCY, 0.01, 0.1, 200)
    assert len(waits) == len(rounds) > 1


# Errors


@pytest.mark.parametrize(
    ("locs", "scores", "parameters", "message"),
    [
        ((2, 7, 4), (2, 8, 3), {}, r"predicted_locs are \(N, 8, 4\), not \(2, 7, 4\)"),
        ((2, 8, 4), (1, 8, 3), {}, r"predicted_scores are \(2, 8, n_classes\)"),
        ((2, 8, 4), (2, 8), {}, "predicted_scores"),
        ((2, 8, 4), (2, 8, 1), {}, "n_classes >= 2"),
        ((2, 8, 4), (2, 8, 3), {"top_k": 0}, "top_k is 0"),
        ((2, 8, 4), (2, 8, 3), {"max_candidates": 0}, "max_candidates is 0"),
        ((2, 8, 4), (2, 8, 3), {"max_overlap": -0.1}, "max_overlap is -0.1"),
    ],
)
def test_arguments_that_make_no_sense(locs, scores, parameters, message):
    parameters = {"min_score": 0.1, "max_overlap": 0.45, "top_k": 10} | parameters
    with pytest.raises(ValueError, match=message):
        detect_objects(torch.zeros(locs), torch.zeros(scores), torch.ones(8, 4), **parameters)
