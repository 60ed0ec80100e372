"""Slow and obvious versions of what the repo computes, one simple operation after the other: the tests compare.

Shapes in comments: N images, P priors, C classes (background = 0 included).
"""

import math

import torch
import torch.nn.functional as F

from model import MAX_COORDINATE
from utils import cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy


def plain_multibox_loss(
    predicted_locs,
    predicted_scores,
    boxes,
    labels,
    priors_cxcy,
    threshold=0.5,
    neg_pos_ratio=3,
    alpha=1.0,
    n_negatives_without_objects=0,
):
    """What `MultiBoxLoss` computes, image by image, in the float type of the predictions.

    predicted_locs: (N, P, 4) offsets; predicted_scores: (N, P, C), before the softmax.
    boxes: list of N tensors (n_objects, 4), boundary form, fractional. labels: list of N tensors (n_objects,).
    priors_cxcy: (P, 4), center-size form, fractional. The parameters are those of `MultiBoxLoss`.
    Returns a scalar.
    """
    n_images, n_priors, n_classes = predicted_scores.shape
    priors_cxcy = priors_cxcy.to(predicted_locs.dtype)
    true_classes = torch.zeros(n_images, n_priors, dtype=torch.int64)
    true_locs = torch.zeros(n_images, n_priors, 4, dtype=predicted_locs.dtype)
    for i in range(n_images):
        if len(labels[i]) == 0:
            continue
        image_boxes = boxes[i].to(predicted_locs.dtype)
        matched, positive = plain_match(image_boxes, priors_cxcy, threshold)
        true_classes[i] = torch.where(positive, labels[i][matched], 0)
        true_locs[i] = plain_encode(image_boxes[matched], priors_cxcy)

    positives = true_classes > 0  # (N, P)
    n_positives = positives.sum(dim=1)  # (N,)
    loc_loss = F.smooth_l1_loss(predicted_locs[positives], true_locs[positives], reduction="sum")

    conf_losses = F.cross_entropy(predicted_scores.view(-1, n_classes), true_classes.view(-1), reduction="none")
    conf_losses = conf_losses.view(n_images, n_priors)
    negative_losses = conf_losses.clone()
    negative_losses[positives] = 0.0
    negative_losses, _ = negative_losses.sort(dim=1, descending=True)
    n_negatives = n_positives * neg_pos_ratio
    n_negatives[n_positives == 0] = n_negatives_without_objects
    hardest = torch.arange(n_priors).expand_as(negative_losses) < n_negatives.unsqueeze(1)
    conf_loss = conf_losses[positives].sum() + negative_losses[hardest].sum()
    # Negatives of images without objects weigh as much as those beside positives.
    n_without = int(n_negatives[n_positives == 0].clamp(max=n_priors).sum())
    divisor = max(1, int(n_positives.sum()), n_without / (neg_pos_ratio or 1))
    return (conf_loss + alpha * loc_loss) / divisor


def plain_match(boxes_xy, priors_cxcy, threshold):
    """Match the priors with the objects of one image: best pairs first, then all overlaps from the threshold on.

    boxes_xy: (n_objects, 4), boundary form, fractional. priors_cxcy: (P, 4).
    Returns for each prior the index of its object, (P,) int64, and whether it is positive, (P,) bool.
    """
    overlap = plain_overlap(boxes_xy, priors_cxcy)  # (n_objects, P)
    best_overlap, matched = overlap.max(dim=0)  # (P,)
    positive = best_overlap >= threshold
    for _ in range(len(boxes_xy)):
        own, prior = divmod(int(overlap.argmax()), overlap.shape[1])
        matched[prior] = own
        positive[prior] = True
        overlap[own] = -1.0
        overlap[:, prior] = -1.0
    return matched, positive


def plain_overlap(boxes_xy, priors_cxcy):
    """Intersection over union of each box with each prior, (n_objects, P)."""
    priors_xy = torch.cat([priors_cxcy[:, :2] - priors_cxcy[:, 2:] / 2, priors_cxcy[:, :2] + priors_cxcy[:, 2:] / 2], 1)
    mins = torch.max(boxes_xy[:, None, :2], priors_xy[:, :2])  # (n_objects, P, 2)
    maxs = torch.min(boxes_xy[:, None, 2:], priors_xy[:, 2:])
    intersection = (maxs - mins).clamp(min=0).prod(dim=2)  # (n_objects, P)
    areas = (boxes_xy[:, 2:] - boxes_xy[:, :2]).prod(dim=1)[:, None]  # (n_objects, 1)
    return intersection / (areas + priors_cxcy[:, 2:].prod(dim=1) - intersection)


def plain_encode(boxes_xy, priors_cxcy):
    """Offsets of boxes from priors, both (P, 4): the paper's equation 2 with the Caffe code's variances."""
    centers = (boxes_xy[:, :2] + boxes_xy[:, 2:]) / 2
    sizes = boxes_xy[:, 2:] - boxes_xy[:, :2]
    g_centers = (centers - priors_cxcy[:, :2]) / (priors_cxcy[:, 2:] * 0.1)
    return torch.cat([g_centers, (sizes / priors_cxcy[:, 2:]).log() / 0.2], dim=1)


def plain_detect_objects(
    predicted_locs, predicted_scores, priors_cxcy, min_score, max_overlap, top_k, max_candidates=None
):
    """What `detect_objects()` returns, by a loop over images, over classes and over boxes."""
    all_boxes, all_labels, all_scores = [], [], []
    for locs, scores in zip(predicted_locs, predicted_scores.softmax(dim=2), strict=True):
        decoded = cxcy_to_xy(gcxgcy_to_cxcy(locs, priors_cxcy)).clamp(-MAX_COORDINATE, MAX_COORDINATE)  # (P, 4)
        boxes, labels, kept_scores, priors = [], [], [], []
        for label in range(1, scores.shape[1]):
            order = scores[:, label].argsort(descending=True, stable=True)
            order = order[scores[order, label] > min_score][:max_candidates]  # candidates, by falling score
            overlap = find_jaccard_overlap(decoded[order].double(), decoded[order].double())
            suppressed = torch.zeros(len(order), dtype=torch.bool)
            for candidate in range(len(order)):
                if not suppressed[candidate]:
                    suppressed[candidate + 1 :] |= overlap[candidate, candidate + 1 :] > max_overlap
            kept = order[~suppressed]
            boxes.append(decoded[kept])
            labels.append(torch.full((len(kept),), label))
            kept_scores.append(scores[kept, label])
            priors.append(kept)
        boxes, labels, kept_scores = torch.cat(boxes), torch.cat(labels), torch.cat(kept_scores)
        # Equal scores rank by prior, then by class.
        by_prior = torch.cat(priors).argsort(stable=True)
        best = by_prior[kept_scores[by_prior].argsort(descending=True, stable=True)][:top_k]
        all_boxes.append(boxes[best])
        all_labels.append(labels[best])
        all_scores.append(kept_scores[best])
    return all_boxes, all_labels, all_scores


def plain_calculate_mAP(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, n_classes, threshold=0.5
):
    """Average precision (11 points) of each class, by a loop over its detections, with tensors.

    The lists are those of `calculate_mAP()`; labels are 1 to n_classes - 1.
    Returns an (n_classes - 1,) tensor, NaN for a class without an object that is not difficult.
    """
    det_images = torch.cat([torch.full((len(labels),), i) for i, labels in enumerate(det_labels)])
    true_images = torch.cat([torch.full((len(labels),), i) for i, labels in enumerate(true_labels)])
    det_boxes, det_labels, det_scores = torch.cat(det_boxes), torch.cat(det_labels), torch.cat(det_scores)
    true_boxes, true_labels = torch.cat(true_boxes), torch.cat(true_labels)
    difficult = torch.cat(true_difficulties).bool()
    average_precisions = torch.full((n_classes - 1,), math.nan, dtype=torch.float64)
    for label in range(1, n_classes):
        of_class = true_labels == label
        boxes, images, is_difficult = true_boxes[of_class], true_images[of_class], difficult[of_class]
        n_easy = int((~is_difficult).sum())
        if n_easy == 0:
            continue
        found = torch.zeros(len(boxes), dtype=torch.bool)
        detections = (det_labels == label).nonzero()[:, 0]
        detections = detections[det_scores[detections].argsort(descending=True, stable=True)]
        true = torch.zeros(len(detections), dtype=torch.float64)
        false = torch.zeros(len(detections), dtype=torch.float64)
        for i, detection in enumerate(detections):
            here = (images == det_images[detection]).nonzero()[:, 0]
            if len(here) == 0:
                false[i] = 1
                continue
            overlap, best = find_jaccard_overlap(det_boxes[detection][None], boxes[here])[0].max(dim=0)
            if overlap < threshold:
                false[i] = 1
            elif not is_difficult[here[best]]:
                if found[here[best]]:
                    false[i] = 1
                else:
                    found[here[best]] = True
                    true[i] = 1
        true, false = true.cumsum(0), false.cumsum(0)
        recall, precision = true / n_easy, true / (true + false).clamp(min=1)
        points = [precision[recall >= i * 0.1].max(dim=0).values if (recall >= i * 0.1).any() else 0 for i in range(11)]
        average_precisions[label - 1] = sum(points) / 11
    return average_precisions
