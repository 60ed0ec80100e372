"""Write a trained network as ONNX or as a torch.export program, and check that it finds what the model finds.

    python tools/export.py                                              checkpoint_ssd300.pth.tar -> ssd300.onnx
    python tools/export.py --save_to=ssd300.pt2                         for torch.export.load()
    python tools/export.py --find_objects=True --images="photos/*.jpg"  boxes, labels and scores come out

Reads a checkpoint of any of the networks. The suffix of `save_to` is the format. ONNX needs what
requirements-dev.txt lists; to load a .pt2 file that finds objects, `import torchvision` first (its nms is called).
Any parameter below can be overridden on the command line with --name=value.

What goes in and comes out (N images, any number; S the side of the input, P priors, C classes, background included;
fewer than top_k objects if P * (C - 1) is less):

    images   (N, 3, S, S)      uint8, RGB
    offsets  (N, P, 4)         float32, from the priors        }
    scores   (N, P, C)         float32, before the softmax     }  without find_objects
    boxes    (N, top_k, 4)     float32, boundary form, fractional, not clipped to the image  }
    labels   (N, top_k)        int64; 0 where no object is left: box and score are 0, too    }  with it
    scores   (N, top_k)        float32, falling                                              }

What is needed to use them goes along, as JSON: label_map, network, input_size, antialias (whether images are shrunk
with antialiasing), and for decoding the offsets priors_cxcy, center_variance, size_variance and max_size_offset (the
highest offset of a size, null: any). In an ONNX file these are keys of its metadata, in a .pt2 file extra files named
"label_map.json" and so on. A box is

    center = offset * center_variance * prior's size + prior's center
    size = exp(offset * size_variance) * prior's size
"""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import nms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from make_sample import draw_sample

from datasets import prepare
from detect import list_images, open_image
from model import MAX_COORDINATE, load_model, model_state
from utils import (
    CENTER_VARIANCE,
    SIZE_VARIANCE,
    cxcy_to_xy,
    exit_with_message,
    gcxgcy_to_cxcy,
    override_parameters,
    write_files,
)

checkpoint = "checkpoint_ssd300.pth.tar"
save_to = "ssd300.onnx"  # a file that ends in .onnx or .pt2
find_objects = False  # True: boxes, labels and scores of objects come out, as eval.py finds them

# The objects that the network finds
min_score = 0.01  # lower scores are no objects
max_overlap = 0.45  # of two boxes of a class that overlap more than this, the better one stays
top_k = 200  # objects in an image, of all classes together

# The check
images = ""  # a file, a folder, or a pattern with * or ?; "": four generated images

TOLERANCE = 1e-3  # how far numbers may be apart, as a part of the number if this is above 1
MIN_FOUND = 0.99  # objects that have to be the same: an overlap of just max_overlap can go either way


def main():
    path = Path(save_to)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"save_to is {save_to!r}; its suffix is the format, .onnx or .pt2")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(
            f"save_to={save_to} needs the packages {', '.join(missing)}: pip install -r requirements-dev.txt; "
            "a name that ends in .pt2 needs none of them"
        )
    model = load_model(checkpoint).to(memory_format=torch.contiguous_format)  # no runtime needs channels last
    inputs = torch.cat([prepare([image], model) for image in read_images(images)])
    contents = export(model, path.suffix)
    report = check(model, load_exported(contents, path.suffix), inputs)
    write_files(path.parent, {path.name: contents})
    print(f"{save_to}: {len(contents) / 1e6:.0f} MB\n{report}")


# --- What is exported -----------------------------------------------------------------------------


class Network(nn.Module):
    """The model, normalisation before it and, if the parameter find_objects says so, detection after it.

    suppress: which candidates stay, `suppress_by_nms()` or `suppress_in_onnx()`.
    """

    def __init__(self, model, suppress):
        super().__init__()
        self.model = model
        self.suppress = suppress

    def forward(self, images):
        predicted_locs, predicted_scores = self.model(self.model.normalize(images))
        if find_objects:
            return self.detect_objects(predicted_locs, predicted_scores)
        return predicted_locs, predicted_scores

    def detect_objects(self, predicted_locs, predicted_scores):
        """`SSD300.detect_objects()` without its loops and lists, which cannot be exported: tensors of fixed length.

        Offsets (N, P, 4), scores (N, P, C) -> boxes (N, top_k, 4), labels (N, top_k), scores (N, top_k).
        """
        offsets_gcxgcy = self.model.limit_sizes(predicted_locs)
        boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(offsets_gcxgcy, self.model.priors_cxcy))  # (N, P, 4)
        boxes_xy = boxes_xy.nan_to_num().clamp(-MAX_COORDINATE, MAX_COORDINATE)
        class_scores = F.softmax(predicted_scores, dim=2)[:, :, 1:].transpose(1, 2)  # (N, C - 1, P)
        kept = self.suppress(boxes_xy, class_scores)
        kept = kept.flatten(1)  # (N, (C - 1) * P)
        scores, place = kept.topk(min(top_k, kept.shape[1]))  # (N, top_k) or fewer; place = class * P + prior
        n_priors = boxes_xy.shape[1]
        prior = place % n_priors
        is_object = scores > 0
        labels = torch.where(is_object, place // n_priors + 1, 0)
        boxes_xy = boxes_xy.gather(1, prior[:, :, None].expand(-1, -1, 4))  # (N, top_k, 4)
        return torch.where(is_object[:, :, None], boxes_xy, 0.0), labels, scores


def suppress_by_nms(boxes_xy, class_scores):
    """Set the scores of all candidates to 0 but of those that no better one of their class suppresses.

    boxes_xy: (N, P, 4) float32. class_scores: (N, C - 1, P) float32. Returns (N, C - 1, P) float32.
    """
    n_images, n_classes, _ = class_scores.shape
    image, label, prior = (class_scores > min_score).nonzero(as_tuple=True)  # (K,) each
    scores = class_scores[image, label, prior]
    # One call for all images and classes, moved apart as in model.py's suppress_in_each_class(). Two boxes are added in
    # two more places, for torch.export takes nms() to return two or more.
    boxes_xy = boxes_xy.double()
    distance = boxes_xy.max() - boxes_xy.min() + 1
    place = torch.cat([image * n_classes + label, n_images * n_classes + torch.arange(2)])  # (K + 2,)
    boxes = torch.cat([boxes_xy[image, prior], boxes_xy[0, :2]]) + (place * distance)[:, None]  # (K + 2, 4)
    kept = nms(boxes, F.pad(scores, (0, 2)).double(), max_overlap)
    survives = torch.zeros_like(place).index_put((kept,), place.new_ones(()))[:-2]  # (K,), 1 or 0
    return torch.zeros_like(class_scores).index_put((image, label, prior), scores * survives)


def suppress_in_onnx(boxes_xy, class_scores):
    """`suppress_by_nms()` in ONNX's own operators: it can be exported, but not run in PyTorch.

    Beyond the top_k best of a class, survivors are left out.
    """
    make = torch.onnx.ops.symbolic  # an operator, its inputs, and what the exporter has to know of its output
    limits = (torch.tensor([top_k]), torch.tensor([max_overlap]), torch.tensor([min_score]))
    # How many are selected is known at run time only. The exporter takes a shape that says so: that of all candidates.
    shape = (class_scores > min_score).nonzero().shape  # (K, 3)
    selected = make("NonMaxSuppression", (boxes_xy, class_scores, *limits), dtype=torch.int64, shape=shape)
    scores = make("GatherND", (class_scores, selected), dtype=torch.float32, shape=shape[:1])  # (K,)
    zeros = torch.zeros_like(class_scores)
    return make("ScatterND", (zeros, selected, scores), dtype=torch.float32, shape=zeros.shape)


@torch.no_grad()
def export(model, suffix):
    """A model, on the CPU, with what belongs to it, as the bytes of a file of one of the formats."""
    suppress = suppress_in_onnx if suffix == ".onnx" else suppress_by_nms
    network = Network(model, suppress).eval().requires_grad_(False)
    example = torch.zeros(2, 3, model.input_size, model.input_size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("n_images")}}
    metadata = {name: json.dumps(value) for name, value in describe(model).items()}
    if suffix == ".pt2":
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        buffer = io.BytesIO()
        extra_files = {f"{name}.json": value for name, value in metadata.items()}
        torch.export.save(program, buffer, extra_files=extra_files)
        return buffer.getvalue()
    program = torch.onnx.export(
        network,
        (example,),
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=["boxes", "labels", "scores"] if find_objects else ["offsets", "scores"],
        opset_version=18,  # the lowest that torch's exporter writes
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()


def describe(model):
    """What goes along with a network: see the top of this file."""
    known = model_state(model)
    del known["model"]  # the weights
    known["priors_cxcy"] = known["priors_cxcy"].tolist()
    return {
        **known,
        "input_size": model.input_size,
        "center_variance": CENTER_VARIANCE,
        "size_variance": SIZE_VARIANCE,
    }


# --- The check ------------------------------------------------------------------------------------


def read_images(images):
    """The pictures to check on, as PIL images: those that a path or pattern names, or four generated ones."""
    if images:
        return (open_image(path) for path in list_images(images))  # one at a time: they may be large
    return [draw_sample(np.random.default_rng((0, number)))[0] for number in range(4)]


def load_exported(contents, suffix):
    """Load an exported network from the bytes of its file, as a function from a tensor of images to tensors."""
    if suffix == ".pt2":
        return torch.export.load(io.BytesIO(contents)).module()
    import onnxruntime  # needed for ONNX only

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def check(model, exported, inputs):
    """Compare what an exported network says with what the model says: objects, or offsets and scores of all priors.

    exported: from `load_exported()`. inputs: (n, 3, S, S) float32, from `prepare()`.
    Returns a sentence that says how alike they are; raises ValueError if they are not.
    """
    largest = 0.0  # difference of an offset or score
    counts = torch.zeros(3, dtype=torch.int64)
    for batch in (inputs[:1], *inputs[1:].split(4)):  # one image alone, then the others in batches
        if len(batch) == 0:
            continue
        pixels = ((batch * model.std + model.mean) * 255).round().byte()  # undoes normalize()
        ours = model(batch)
        theirs = exported(pixels)
        if find_objects:
            ours = model.detect_objects(*ours, min_score, max_overlap, top_k)
            for our, their in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
                counts += torch.tensor(count_same(our, their))
        else:
            largest = max(largest, *map(relative_difference, ours, theirs))
    n_same, n_ours, n_theirs = counts.tolist()
    if find_objects:
        report = f"it finds {n_theirs} objects, the model {n_ours}; {n_same} are the same"
    else:
        report = f"offsets and scores differ from the model's by {largest:.1e} at most"
    report = f"checked on {len(inputs)} images: {report}"
    if largest > TOLERANCE or n_same < MIN_FOUND * max(n_ours, n_theirs):
        raise ValueError(f"the exported network is not the model, and was not written: {report}")
    return report


def relative_difference(ours, theirs):
    """Largest difference of two tensors, as a part of the largest number if that is above 1; NaN differs infinitely."""
    difference = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1)
    return float(difference.nan_to_num(torch.inf))


def count_same(ours, theirs):
    """How many objects of an image are the same, and how many there are of each side.

    ours: boxes (n, 4), labels (n,), scores (n,). theirs: the same of another length, label 0 where there is none.
    """
    boxes, labels, scores = ours
    is_object = theirs[1] > 0
    their_boxes, their_labels, their_scores = [part[is_object] for part in theirs]
    # Each of ours, in the rows, beside each of theirs, in the columns.
    same_box = boxes[:, None].isclose(their_boxes, rtol=TOLERANCE, atol=TOLERANCE).all(dim=2)
    same_label = labels[:, None] == their_labels
    same_score = (scores[:, None] - their_scores).abs() <= TOLERANCE
    is_same = same_box & same_label & same_score
    return int(is_same.any(dim=1).sum()), len(labels), len(their_labels)


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
