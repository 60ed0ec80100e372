"""Exported networks: what comes out is what the model finds, for bytes and floats, for one image and several."""

import json
from unittest.mock import Mock

import export
import numpy as np
import pytest
import torch
from helpers import LABEL_MAP, write_image

import detect
import eval as evaluation
from datasets import prepare
from model import MAX_COORDINATE, SSD300, load_model, model_state
from utils import save_checkpoint

# The exporters' own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def save_model(path, network):
    """A model of random weights, with an input and a limit of its own."""
    torch.manual_seed(0)
    model = SSD300(4, network, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), max_size_offset=1.0, antialias=False)
    model.label_map = LABEL_MAP
    save_checkpoint(model_state(model), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("export") / "tiny.pth.tar", "ssd300_tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture
def run(checkpoint, run_main):
    """Run main() with parameters as from the command line; for ONNX its packages are needed."""

    def run(save_to, **parameters):
        for package in ("onnx", "onnxscript", "onnxruntime") if str(save_to).endswith(".onnx") else ():
            pytest.importorskip(package)
        run_main(export, **{"save_to": str(save_to), "checkpoint": str(checkpoint), **parameters})

    return run


def read_metadata(path):
    """What goes along with an exported network, by name."""
    if path.suffix == ".onnx":
        import onnx

        constants = {tensor.name for tensor in onnx.load(path).graph.initializer}
        weights = {node.input[1] for node in onnx.load(path).graph.node if node.op_type == "Conv"}
        assert len(weights) >= 35 and weights <= constants  # batch normalisation is part of them
        return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    extra = dict.fromkeys([f"{name}.json" for name in export.describe(SSD300(2, "ssd300_tiny"))], "")
    torch.export.load(path, extra_files=extra)
    return {name.removesuffix(".json"): json.loads(text) for name, text in extra.items()}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_without_detection_a_file_carries_what_decodes_it(model, run, tmp_path, suffix):
    """With NumPy alone, from the file alone: the best prior's box computed."""
    path, photo = tmp_path / f"ssd{suffix}", tmp_path / "photo.png"
    export.draw_sample(np.random.default_rng(7))[0].save(photo)
    run(path, images=str(photo))
    known = read_metadata(path)
    expected = {"label_map": LABEL_MAP, "network": "ssd300_tiny", "input_size": 300, "antialias": False}
    assert expected.items() <= known.items()
    inputs = prepare(export.read_images(str(photo)), model)
    pixels = ((inputs * model.std + model.mean) * 255).round().byte()
    offsets, scores = (part.detach().numpy() for part in export.load_exported(path.read_bytes(), suffix)(pixels))
    confidence = np.exp(scores[0]) / np.exp(scores[0]).sum(axis=1, keepdims=True)  # (P, C)
    prior, label = np.unravel_index(confidence[:, 1:].argmax(), confidence[:, 1:].shape)
    prior_cxcy, offset = np.array(known["priors_cxcy"])[prior], offsets[0, prior]
    size = np.exp(np.minimum(offset[2:], known["max_size_offset"]) * known["size_variance"]) * prior_cxcy[2:]
    center = offset[:2] * known["center_variance"] * prior_cxcy[2:] + prior_cxcy[:2]
    with torch.no_grad():
        boxes, labels, found = model.detect_objects(*model(inputs), 0.01, 0.45, 1)
    expected = [*(center - size / 2), *(center + size / 2), label + 1, confidence[prior, label + 1]]
    np.testing.assert_allclose([*boxes[0][0], labels[0][0], found[0][0]], expected, rtol=1e-4, atol=1e-4)


def test_another_network(run, tmp_path, capsys):
    checkpoint = save_model(tmp_path / "lite.pth.tar", "ssdlite320_mobilenet_v3_large")
    run(tmp_path / "lite.onnx", checkpoint=str(checkpoint))
    assert "\nchecked on 4 images" in capsys.readouterr().out
    assert read_metadata(tmp_path / "lite.onnx")["input_size"] == 320


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_finding_objects(model, run, tmp_path, suffix):
    """Objects of several classes, an image without any, and batches of several sizes."""
    path = tmp_path / f"ssd{suffix}"
    pixels = torch.stack([torch.from_numpy(np.array(image.resize((300, 300)))) for image in export.read_images("")[:3]])
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    pixels[1] = 110  # a grey image: its best score is the limit, so nothing is found there
    limits = {"max_overlap": 0.3, "top_k": 40}
    with torch.no_grad():
        predictions = model(model.normalize(pixels))
    limits["min_score"] = float(predictions[1][1].softmax(dim=1)[:, 1:].max()) + 1e-3
    run(path, find_objects=True, **limits)
    exported = export.load_exported(path.read_bytes(), suffix)
    found = list(zip(*model.detect_objects(*predictions, **limits), strict=True))  # image by image
    assert len(found[1][1]) == 0 and 3 <= len(found[0][1]) <= 40
    assert len(set(found[0][1].tolist() + found[2][1].tolist())) > 1
    for images in ((0, 1, 2), (2,), (1,), (1, 0)):
        boxes, labels, scores = exported(pixels[list(images)])
        assert boxes.shape == (len(images), 40, 4) and labels.dtype == torch.int64
        for i, image in enumerate(images):
            n = len(found[image][1])
            assert not boxes[i, n:].any() and not labels[i, n:].any() and not scores[i, n:].any()
            torch.testing.assert_close(scores[i, :n], found[image][2], rtol=1e-4, atol=1e-5)
            assert export.count_same(found[image], (boxes[i], labels[i], scores[i])) == (n, n, n)


@pytest.mark.parametrize("find_objects", [True, False])
def test_a_wrong_export_is_noticed_and_not_written(model, run, tmp_path, monkeypatch, find_objects):
    """In place of the exported network the model itself, a hundredth off; then a full disk; then all is well."""
    path, factor = tmp_path / "ssd.pt2", 1.01
    # Raw predictions are compared as they are: it does not matter that no score is above 1.
    parameters = {"find_objects": find_objects, "min_score": 0.4 if find_objects else 1.0, "top_k": 40}

    def load(contents, suffix):
        network = export.Network(model, export.suppress_by_nms)
        return lambda images: [part * factor if part.is_floating_point() else part for part in network(images)]

    monkeypatch.setattr(export, "export", lambda *_: b"new")
    monkeypatch.setattr(export, "load_exported", load)
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="the exported network is not the model, and was not written: checked on 4"):
        run(path, **parameters)
    factor = 1.0
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"ssd\.pt2 cannot be written .*No space"):
        patch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
        run(path, **parameters)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    run(path, **parameters)
    assert path.read_bytes() == b"new"


def test_an_export_of_nothing_but_nan_is_noticed(model):
    inputs = torch.zeros(1, 3, 300, 300)
    with pytest.raises(ValueError, match="the exported network is not the model"):
        export.check(model, lambda pixels: [part * torch.nan for part in model(inputs)], inputs)


def test_images_of_the_check_are_prepared_one_by_one_and_seen_in_small_batches(model, run, tmp_path, monkeypatch):
    for i in range(7):
        write_image(tmp_path / f"{i}.png")
    n_prepared, n_seen = [], []

    def prepare_some(images, model):
        n_prepared.append(len(images))
        return prepare(images, model)

    def network(images):
        n_seen.append(len(images))
        return model(model.normalize(images))

    monkeypatch.setattr(export, "prepare", prepare_some)
    monkeypatch.setattr(export, "export", lambda *_: b"new")
    monkeypatch.setattr(export, "load_exported", lambda *_: network)
    run(tmp_path / "ssd.pt2", images=str(tmp_path))
    assert n_prepared == [1] * 7 and n_seen == [1, 4, 2]


@torch.no_grad()
def test_absurd_offsets_and_more_objects_than_candidates(model, monkeypatch):
    """Boxes end where the model's do, and there are no more rows than pairs of a prior and a class."""
    monkeypatch.setattr(export, "top_k", 10**6)
    locs, scores = torch.full((1, 8732, 4), 1e30), torch.zeros(1, 8732, 4)
    boxes_xy, labels, _ = export.Network(model, lambda _, class_scores: class_scores).detect_objects(locs, scores)
    assert boxes_xy.shape == (1, 8732 * 3, 4) and labels.min() == 1
    assert boxes_xy.abs().max() == MAX_COORDINATE


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"save_to": "ssd.h5"}, r"save_to is 'ssd\.h5'.*\.onnx or \.pt2"), ({"images": "nowhere"}, "nowhere"),
     ({"checkpoint": "missing.pth"}, "missing.pth")],
)  # fmt: skip
def test_parameters_that_are_wrong(run, parameters, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(**{"save_to": "ssd.pt2", **parameters})


def test_onnx_without_its_packages(run_main, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime: pip install -r requirements-dev\.txt"):
        run_main(export, save_to="ssd.onnx")


def test_defaults_agree():
    assert export.max_overlap == detect.max_overlap == evaluation.max_overlap == 0.45
