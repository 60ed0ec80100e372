"""Exported networks: what comes out is what the model finds, for bytes and floats, for one image and several."""

import json
import sys

import export
import numpy as np
import pytest
import torch
from helpers import LABEL_MAP

import detect
from datasets import prepare
from model import SSD300, load_model, model_state
from utils import save_checkpoint

# The exporters' own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def save_model(path, network, scale):
    """A model of random weights, with an input and a limit of its own. `scale` is of the heads' weights: the
    scores should differ, but not be so high that many are 1."""
    torch.manual_seed(0)
    inputs = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "antialias": False}
    model = SSD300(4, network, max_size_offset=1.0, **inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("pred_convs") and name.endswith("weight"):
                parameter.mul_(scale)
    model.label_map = LABEL_MAP
    save_checkpoint(model_state(model), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("export") / "tiny.pth.tar", "ssd300_tiny", 1.0)


@pytest.fixture
def run(monkeypatch):
    """Call main() with parameters as from the command line."""

    def run(checkpoint, **parameters):
        defaults = {"checkpoint": str(checkpoint), "find_objects": False, "batch_size": 0, "uint8_input": True}
        for name, value in {**defaults, **parameters}.items():
            monkeypatch.setattr(export, name, value)
        export.main()

    return run


def need(suffix):
    for package in ("onnx", "onnxscript", "onnxruntime") if suffix == ".onnx" else ():
        pytest.importorskip(package)


def read_metadata(path):
    """What goes along with an exported network, by name."""
    if path.suffix == ".onnx":
        import onnx

        return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    extra = dict.fromkeys([f"{name}.json" for name in export.describe(SSD300(2, "ssd300_tiny"))], "")
    torch.export.load(path, extra_files=extra)
    return {name.removesuffix(".json"): json.loads(text) for name, text in extra.items()}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_without_detection_a_file_carries_what_decodes_it(checkpoint, run, tmp_path, suffix):
    """With NumPy alone, from the file alone: the input made, the best prior's box computed."""
    need(suffix)
    path, photo = tmp_path / f"ssd{suffix}", tmp_path / "photo.png"
    export.draw_sample(np.random.default_rng(7))[0].save(photo)
    run(checkpoint, save_to=str(path), batch_size=1, images=str(photo), uint8_input=False)
    known, model = read_metadata(path), load_model(checkpoint)
    assert known["label_map"] == LABEL_MAP and known["network"] == "ssd300_tiny"
    assert known["input_size"] == 300 and known["antialias"] is False
    inputs = prepare(export.read_images(str(photo)), model)
    pixels = inputs * torch.tensor(known["std"]).view(3, 1, 1) + torch.tensor(known["mean"]).view(3, 1, 1)
    assert ((pixels * 255) - (pixels * 255).round()).abs().max() < 1e-3
    offsets, scores = (part.detach().numpy() for part in export.load_exported(path.read_bytes(), suffix)(inputs))

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
    need(".onnx")
    checkpoint = save_model(tmp_path / "lite.pth.tar", "ssdlite320_mobilenet_v3_large", 1.0)
    run(checkpoint, save_to=str(tmp_path / "lite.onnx"), batch_size=2)
    assert "takes uint8 images, 2 at a time\nchecked on 4 images" in capsys.readouterr().out
    assert read_metadata(tmp_path / "lite.onnx")["input_size"] == 320


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_finding_objects(checkpoint, run, tmp_path, suffix):
    """Objects of several classes, an image without any, and batches of several sizes."""
    need(suffix)
    path, model = tmp_path / f"ssd{suffix}", load_model(checkpoint)
    pixels = torch.stack([torch.from_numpy(np.array(image.resize((300, 300)))) for image in export.read_images("")[:3]])
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    pixels[1] = 110  # a grey image: its best score is the limit, so nothing is found there
    limits = {"max_overlap": 0.3, "top_k": 40}
    with torch.no_grad():
        predictions = model(model.normalize(pixels))
    _, _, scores = model.detect_objects(*predictions, min_score=0.0, **limits)
    limits["min_score"] = float(scores[1].max()) + 1e-3
    run(checkpoint, save_to=str(path), find_objects=True, **limits)
    exported = export.load_exported(path.read_bytes(), suffix)
    found = list(zip(*model.detect_objects(*predictions, **limits), strict=True))  # image by image
    assert len(found[1][1]) == 0 and 3 <= len(found[0][1]) <= 40
    assert len(set(found[0][1].tolist() + found[2][1].tolist())) > 1
    for images in ((0, 1, 2), (2,), (1,), (1, 0)):
        boxes, labels, scores = exported(pixels[list(images)])
        assert boxes.shape == (len(images), 40, 4) and labels.dtype == torch.int64
        for i, image in enumerate(images):
            n = len(found[image][1])
            assert (labels[i] > 0).sum() == n
            assert not boxes[i, n:].any() and not labels[i, n:].any() and not scores[i, n:].any()
            torch.testing.assert_close(scores[i, :n], found[image][2], rtol=1e-4, atol=1e-5)
            assert export.count_same(found[image], (boxes[i], labels[i], scores[i]), 1e-4) == (n, n, n)


def test_suppression_by_hand():
    """suppress_by_nms() alone: of two boxes that overlap by 0.6 the better stays, in each class and image."""
    boxes_xy = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.24], [0.5, 0.5, 0.6, 0.6]]).expand(2, 3, 4)
    class_scores = torch.tensor([[[0.5, 0.6, 0.2], [0.7, 0.6, 0.0]], [[0.9, 0.05, 0.3], [0.1, 0.1, 0.1]]])
    expected = torch.tensor([[[0.0, 0.6, 0.2], [0.7, 0.0, 0.0]], [[0.9, 0.0, 0.3], [0.0, 0.0, 0.0]]])
    assert torch.equal(export.suppress_by_nms(boxes_xy, class_scores, 0.1, 0.5, 3), expected)
    expected[0, 0, 0], expected[0, 1, 1] = 0.5, 0.6
    assert torch.equal(export.suppress_by_nms(boxes_xy, class_scores, 0.1, 0.7, 3), expected)


@pytest.mark.parametrize("find_objects", [True, False])
def test_a_wrong_export_is_noticed_and_not_written(checkpoint, run, tmp_path, monkeypatch, find_objects):
    def load(contents, suffix):
        """In place of an exported network: the model itself, a hundredth off."""
        detector = export.make_detector(".pt2") if find_objects else None
        network = export.Network(load_model(checkpoint), True, detector)
        return lambda images: [part * factor if part.is_floating_point() else part for part in network(images)]

    monkeypatch.setattr(export, "export", lambda *_: b"new")
    monkeypatch.setattr(export, "load_exported", load)
    parameters = {"save_to": str(tmp_path / "ssd.pt2"), "find_objects": find_objects, "min_score": 0.1}
    (tmp_path / "ssd.pt2").write_bytes(b"old")
    factor = 1.01
    with pytest.raises(ValueError, match="the exported network is not the model, and was not written: checked on 4"):
        run(checkpoint, **parameters)
    assert (tmp_path / "ssd.pt2").read_bytes() == b"old"
    factor = 1.0
    run(checkpoint, **parameters)
    assert (tmp_path / "ssd.pt2").read_bytes() == b"new"


def test_a_full_disk_leaves_nothing(checkpoint, run, tmp_path, monkeypatch):
    def fail(path, contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_file", fail)
    monkeypatch.setattr(export, "export", lambda *_: b"new")
    monkeypatch.setattr(export, "load_exported", lambda *_: export.Network(load_model(checkpoint), True))
    with pytest.raises(OSError, match=r"ssd\.pt2: could not be written .*No space left"):
        run(checkpoint, save_to=str(tmp_path / "ssd.pt2"))
    assert list(tmp_path.iterdir()) == []


def test_batches_of_the_check():
    pixels = torch.arange(6)[:, None, None, None]
    assert [batch.flatten().tolist() for batch in export.split_batches(pixels, 4)] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert [batch.flatten().tolist() for batch in export.split_batches(pixels, 0)] == [[0], [1, 2, 3, 4], [5]]
    assert [len(batch) for batch in export.split_batches(pixels[:1], 0)] == [1]


def test_parameters_that_are_wrong(checkpoint, run, monkeypatch):
    for error, parameters, message in (
        (ValueError, {"save_to": "ssd.h5"}, r"save_to is 'ssd\.h5'.*\.onnx or \.pt2"),
        (ValueError, {"save_to": "ssd.pt2", "top_k": 0}, "top_k=0 1 or more"),
        (FileNotFoundError, {"save_to": "ssd.pt2", "top_k": 1, "images": "nowhere"}, "nowhere"),
        (FileNotFoundError, {"save_to": "no/such/ssd.pt2"}, "no/such/ssd.pt2: there is no folder no/such"),
        (FileNotFoundError, {"save_to": "ssd.pt2", "checkpoint": "missing.pth"}, "missing.pth"),
    ):
        with pytest.raises(error, match=message):
            run(**{"checkpoint": checkpoint, **parameters})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime: pip install -r requirements-dev\.txt"):
        run(checkpoint, save_to="ssd.onnx")


def test_defaults_agree():
    import eval as evaluation

    limits = {module.max_overlap for module in (export, detect, evaluation) if hasattr(module, "max_overlap")}
    assert limits == {0.45}
