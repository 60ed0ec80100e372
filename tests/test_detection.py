"""detect_objects() gives what the plain algorithm gives, to the last bit, on every kind of input."""

import pytest
import torch
from benchmark import trained_like_predictions
from oracles import plain_detect_objects

import model as module
from model import SSD300, detect_objects, hide_classes
from utils import cxcy_to_gcxgcy, xy_to_cxcy

PRIORS_CXCY = SSD300.create_prior_boxes()


def assert_same(results, expected):
    """Both are three lists of as many tensors, which are equal bit for bit."""
    for ours, theirs in zip(results, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def detect_as_plain(*arguments):
    """What detect_objects() gives, which must be what the plain algorithm gives."""
    results = detect_objects(*arguments)
    assert_same(results, plain_detect_objects(*arguments))
    return results


ROW = [[0.1, 0.1, 0.5, 0.4], [0.2, 0.1, 0.6, 0.4], [0.3, 0.1, 0.7, 0.4]]  # neighbours overlap by 0.6, the ends by 1/3
HALVES = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.25, 0.5]]  # overlap by exactly 1/2
CHAIN = [[i / 4, 0.0, i / 4 + 1.0, 1.0] for i in range(100)]  # each overlaps the next by 0.6
APART = [[i / 10, 0.0, i / 10 + 0.05, 0.05] for i in range(5)]
ONE_CLASS = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]  # shares of background and class
SHARES = [[0.5, 0.3, 0.2], [0.4, 0.1, 0.5], [0.2, 0.2, 0.6], [0.2, 0.7, 0.1], [0.85, 0.05, 0.1]]


@pytest.mark.parametrize("boxes_xy, shares, parameters, found", [
    # A worse box of the same class is suppressed, and suppresses none itself; others stay.
    (ROW, [[0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.4, 0.5, 0.1]], {"min_score": 0.15}, [(0, 1), (2, 1)]),
    (ROW, ONE_CLASS, {"max_overlap": 0.65}, [(0, 1), (1, 1), (2, 1)]),
    (ROW, ONE_CLASS, {"max_overlap": 0.3}, [(0, 1)]),
    (CHAIN, [[0.5 + i / 1000, 0.5 - i / 1000] for i in range(100)], {}, [(i, 1) for i in range(0, 100, 2)]),
    # Classes do not suppress each other, and one prior may show several.
    (ROW[:1] * 2, [[0.1, 0.5, 0.4], [0.2, 0.2, 0.6]], {}, [(1, 2), (0, 1)]),
    ([[-3.0, -3.0, -1.0, -1.0]] * 2, [[0.1, 0.5, 0.4], [0.2, 0.2, 0.6]], {}, [(1, 2), (0, 1)]),
    # An overlap equal to the limit does not suppress; a score equal to the limit is not a candidate.
    (HALVES, ONE_CLASS[:2], {"max_overlap": 0.5}, [(0, 1), (1, 1)]),
    (HALVES, ONE_CLASS[:2], {"max_overlap": 0.499}, [(0, 1)]),
    (APART[:2], [[0.25] * 4] * 2, {"min_score": 0.25}, []), (APART[:1], ONE_CLASS[:1], {"min_score": 1.0}, []),
    (APART[:2], [[0.25] * 4] * 2, {"min_score": 0.2499}, [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]),
    # The best of all classes; equal scores rank by prior, then by class.
    (APART, SHARES, {"top_k": 3}, [(3, 1), (2, 2), (1, 2)]),
    (APART, [[0.25] * 4] * 5, {"top_k": 5}, [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]),
    # The best two are the same box, so with two candidates only one object is left.
    ([APART[4], ROW[0], ROW[0]], [[0.4, 0.6], *ONE_CLASS[:2]], {}, [(1, 1), (0, 1)]),
    ([APART[4], ROW[0], ROW[0]], [[0.4, 0.6], *ONE_CLASS[:2]], {"max_candidates": 2}, [(1, 1)]),
    ([[-0.2, -0.1, 0.5, 1.3]], ONE_CLASS[:1], {}, [(0, 1)]),  # not clipped to the image
])  # fmt: skip
def test_detections_by_hand(boxes_xy, shares, parameters, found):
    """The priors are the boxes. found: prior and label of each detection, the best first."""
    parameters = {"min_score": 0.01, "max_overlap": 0.45, "top_k": 50} | parameters
    boxes_xy, shares = torch.tensor(boxes_xy), torch.tensor(shares)
    locs, scores = torch.zeros(1, len(boxes_xy), 4), shares.log()[None]
    boxes, labels, kept_scores = detect_objects(locs, scores, xy_to_cxcy(boxes_xy), **parameters)
    assert labels[0].tolist() == [label for _, label in found]
    torch.testing.assert_close(boxes[0], boxes_xy[[prior for prior, _ in found]])
    torch.testing.assert_close(kept_scores[0], torch.tensor([shares[pair] for pair in found]))


def test_nothing_found_gives_empty_tensors():
    assert detect_objects(torch.zeros(0, 5, 4), torch.zeros(0, 5, 3), torch.ones(5, 4), 0.1, 0.45, 10) == ([], [], [])
    results = detect_objects(torch.zeros(2, 8732, 4), torch.zeros(2, 8732, 21), PRIORS_CXCY, 0.5, 0.45, 200)
    assert_same(results, [[torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0)] * 2])


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
    locs = torch.randn(n_images, n_priors, 4, generator=generator) * choose(0.0, 0.3, 1.0, 4.0, 30.0)
    scores = torch.randn(n_images, n_priors, n_classes, generator=generator) * choose(0.0, 1.0, 3.0)
    if choose(True, False):  # equal scores, equal boxes, overlaps that are simple fractions
        scores, locs = scores.round(), locs.round()
        priors = (priors * 8).round().clamp(min=1) / 8
    min_score, max_overlap = choose(0.0, 0.01, 0.2, 0.5), choose(0.0, 0.25, 1 / 3, 0.45, 0.5, 0.75, 1.0)
    top_k, max_candidates = choose(1, 3, 10, 40), choose(None, None, 1, 3, 20)
    return locs, scores, priors, min_score, max_overlap, top_k, max_candidates


@pytest.mark.parametrize("seeds, constants", [
    (range(800), {}),
    (range(10_000, 10_300), {"FIRST_CANDIDATES": 1}),  # so that often more have to be looked at
])  # fmt: skip
def test_small_random_cases(monkeypatch, seeds, constants):
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    for seed in seeds:
        detect_as_plain(*random_case(seed))


@pytest.mark.parametrize("max_candidates", [None, 100])
def test_predictions_of_a_trained_kind(max_candidates):
    locs, scores = trained_like_predictions(1, PRIORS_CXCY)
    assert len(detect_as_plain(locs, scores, PRIORS_CXCY, 0.01, 0.45, 200, max_candidates)[0][0]) == 200


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
    results = detect_as_plain(locs, scores, priors, 0.01, 0.45, 200)
    assert len(results[0][0]) == {"clustered": 80, "identical": 20}.get(kind, 200)


@pytest.mark.parametrize("size", [1e2, 1e4, 3e38, float("inf")])
def test_extreme_offsets_give_finite_boxes(size):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (1, 200, 4), generator=generator).float()
    scores = torch.randn(1, 200, 4, generator=generator)
    boxes, _, kept_scores = detect_objects(signs * size, scores, PRIORS_CXCY[-200:], 0.01, 0.45, 1000)
    assert len(boxes[0]) > 100 and boxes[0].isfinite().all() and kept_scores[0].isfinite().all()
    assert (boxes[0][:, 2:] >= boxes[0][:, :2]).all()


def test_scores_that_are_not_numbers_are_not_candidates():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_background_gets_the_probability_of_hidden_classes(dtype):
    scores = random_predictions(2, 50, 5, seed=7)[1].to(dtype)
    before = scores.clone()
    shares = hide_classes(scores, [4, 2]).softmax(dim=2)
    expected = before.float().softmax(dim=2)
    assert torch.equal(scores, before) and shares[:, :, [2, 4]].max() == 0
    torch.testing.assert_close(shares[:, :, [1, 3]], expected[:, :, [1, 3]])
    torch.testing.assert_close(shares[:, :, 0], expected[:, :, [0, 2, 4]].sum(dim=2))


@pytest.mark.parametrize("first_candidates", [1, 5])
def test_suppression_looks_at_twice_as_many_until_enough_survive(monkeypatch, first_candidates):
    """Three objects, 40 candidates each: the best two of each look at more and more of them."""
    monkeypatch.setattr(module, "FIRST_CANDIDATES", first_candidates)
    looks, one_look = [], module.suppress_in_each_class
    monkeypatch.setattr(
        module, "suppress_in_each_class", lambda *given: looks.append(len(given[0])) or one_look(*given)
    )
    boxes_xy = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.4, 0.4, 0.6, 0.6], [0.7, 0.7, 0.9, 0.9]]).repeat_interleave(40, 0)
    scores = torch.linspace(0.9, 0.1, 120)
    kept = module.suppress(boxes_xy, torch.ones(120, dtype=torch.int64), scores, 0.45, top_k=2)
    assert kept.tolist() == [0, 40]
    assert looks == {1: [2, 4, 8, 16, 32, 64], 5: [10, 20, 40, 80]}[first_candidates]


@pytest.mark.parametrize("locs, scores, parameters, message", [
    ((2, 7, 4), (2, 8, 3), {}, r"shapes \(\(2, 7, 4\), \(2, 8, 3\)\) are not \(N, 8, 4\)"),
    ((2, 8, 4), (1, 8, 3), {}, r"shapes \(\(2, 8, 4\), \(1, 8, 3\)\) are not"),
    ((2, 8, 4), (2, 8), {}, r"shapes \(\(2, 8, 4\), \(2, 8\)\)"), ((2, 8, 4), (2, 8, 1), {}, "C of 2 or more"),
    *(((2, 8, 4), (2, 8, 3), {name: value}, f"{name} is {value}")
      for name, value in (("min_score", float("nan")), ("min_score", 50), ("top_k", 0), ("max_candidates", 0),
                          ("max_overlap", -0.1))),
])  # fmt: skip
def test_arguments_that_make_no_sense(locs, scores, parameters, message):
    parameters = {"min_score": 0.1, "max_overlap": 0.45, "top_k": 10} | parameters
    with pytest.raises(ValueError, match=message):
        detect_objects(torch.zeros(locs), torch.zeros(scores), torch.ones(8, 4), **parameters)
