"""Exported networks: what comes out is what the model finds, for bytes and floats, for one image and several."""

import json
import sys

import export
import pytest
import standin
import torch

import model as model_module
from model import SSD300, load_model, model_state
from utils import make_label_map, save_checkpoint

LABEL_MAP = make_label_map(["cat", "dog", "teapot"])

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of the exporters


def make_checkpoint(path, scale):
    """A model of random weights, with an input and a limit of its own. `scale` is of the heads' weights: the
    scores should differ, but not be so high that many are 1."""
    torch.manual_seed(0)
    model = SSD300(4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), max_size_offset=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("pred_convs") and name.endswith("weight"):
                parameter.mul_(scale)
    model.label_map = LABEL_MAP
    save_checkpoint(model_state(model), path)


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """SSD300 itself."""
    path = tmp_path_factory.mktemp("large") / "checkpoint.pth.tar"
    make_checkpoint(path, 2.0)
    return path


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch):
    """The stand-in for SSD300, for what does not depend on the network."""
    for name in ("SOURCE_MAPS", "VGGBase", "AuxiliaryConvolutions", "l2_normalize"):
        monkeypatch.setattr(model_module, name, getattr(model_module, name))
    monkeypatch.setattr(SSD300, "__init__", SSD300.__init__)
    standin.shrink_network()
    make_checkpoint(tmp_path / "small.pth.tar", 0.2)
    return tmp_path / "small.pth.tar"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call main() with parameters as from the command line."""

    def run(checkpoint, **parameters):
        defaults = {"checkpoint": str(checkpoint), "find_objects": False, "batch_size": 0, "uint8_input": True}
        for name, value in {**defaults, **parameters}.items():
            monkeypatch.setattr(export, name, value)
        export.main()

    return run


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def find_with_model(checkpoint, pixels, **limits):
    model = load_model(checkpoint)
    with torch.no_grad():
        predictions = model(model.normalize(pixels))
        return predictions, model.detect_objects(*predictions, **limits)


def test_ssd300_as_onnx(large_checkpoint, run, tmp_path, capsys):
    need_onnx()
    import onnx
    import onnxruntime

    path = str(tmp_path / "ssd.onnx")
    image = tmp_path / "photo.png"
    picture, _ = export.draw_sample(export.np.random.default_rng(7))
    picture.save(image)
    run(large_checkpoint, save_to=path, batch_size=1, images=str(image))
    assert "takes uint8 images, 1 at a time" in capsys.readouterr().out
    pixels = export.read_images(str(image))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape) for entry in [*session.get_inputs(), *session.get_outputs()]] == [
        ("images", [1, 3, 300, 300]), ("offsets", [1, 8732, 4]), ("scores", [1, 8732, 4])]  # fmt: skip
    (offsets, scores), _ = find_with_model(large_checkpoint, pixels, min_score=0.5, max_overlap=0.5, top_k=1)
    theirs = session.run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(theirs[0]), offsets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(theirs[1]), scores, rtol=1e-4, atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["label_map"]) == LABEL_MAP


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_finding_objects(small_checkpoint, run, tmp_path, suffix):
    """Objects of several classes, an image without any, and batches of several sizes."""
    if suffix == ".onnx":
        need_onnx()
    path = str(tmp_path / f"ssd{suffix}")
    pixels = export.read_images("")[:3]
    pixels[1] = 110  # a grey image: its best score is the limit, so nothing is found there
    limits = {"max_overlap": 0.3, "top_k": 40}
    _, (_, _, scores) = find_with_model(small_checkpoint, pixels, min_score=0.0, **limits)
    limits["min_score"] = float(scores[1].max()) + 1e-3
    run(small_checkpoint, save_to=path, find_objects=True, **limits)
    exported = export.load_exported(path)
    _, found = find_with_model(small_checkpoint, pixels, **limits)
    found = list(zip(*found, strict=True))  # image by image
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


def test_normalised_input_and_label_map_of_pt2(small_checkpoint, run, tmp_path, capsys):
    path = tmp_path / "ssd.pt2"
    run(small_checkpoint, save_to=str(path), uint8_input=False, batch_size=3)  # the check's 4 images fill two
    assert "takes normalised float32 images, 3 at a time" in capsys.readouterr().out
    extra = {"label_map.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["label_map.json"]) == LABEL_MAP
    model, images = load_model(small_checkpoint), torch.randn(3, 3, 300, 300)
    with torch.no_grad():
        for ours, theirs in zip(model(images), program(images), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_suppression_by_hand():
    """suppress_by_nms() alone: of two boxes that overlap by 0.6 the better stays, in each class and image."""
    boxes_xy = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.0, 0.0, 0.4, 0.24], [0.5, 0.5, 0.6, 0.6]]).expand(2, 3, 4)
    class_scores = torch.tensor([[[0.5, 0.6, 0.2], [0.7, 0.6, 0.0]], [[0.9, 0.05, 0.3], [0.1, 0.1, 0.1]]])
    expected = torch.tensor([[[0.0, 0.6, 0.2], [0.7, 0.0, 0.0]], [[0.9, 0.0, 0.3], [0.0, 0.0, 0.0]]])
    assert torch.equal(export.suppress_by_nms(boxes_xy, class_scores, 0.1, 0.5, 3), expected)
    expected[0, 0, 0], expected[0, 1, 1] = 0.5, 0.6
    assert torch.equal(export.suppress_by_nms(boxes_xy, class_scores, 0.1, 0.7, 3), expected)


@pytest.mark.parametrize("find_objects", [True, False])
def test_a_wrong_export_is_noticed_and_removed(small_checkpoint, run, tmp_path, monkeypatch, find_objects):
    def load(path):
        """In place of an exported network: the model itself, a hundredth off."""
        detector = export.make_detector(".pt2") if find_objects else None
        network = export.Network(load_model(small_checkpoint), True, detector)
        return lambda images: [part * factor if part.is_floating_point() else part for part in network(images)]

    monkeypatch.setattr(export, "export", lambda network, path, batch_size: (tmp_path / "ssd.pt2").touch())
    monkeypatch.setattr(export, "load_exported", load)
    parameters = {"save_to": str(tmp_path / "ssd.pt2"), "find_objects": find_objects, "min_score": 0.5}
    factor = 1.0
    run(small_checkpoint, **parameters)
    assert (tmp_path / "ssd.pt2").exists()
    factor = 1.01
    with pytest.raises(ValueError, match="the exported network is not the model: checked on 4 images"):
        run(small_checkpoint, **parameters)
    assert not (tmp_path / "ssd.pt2").exists()


def test_batches_of_the_check():
    pixels = torch.arange(6)[:, None, None, None]
    assert [batch.flatten().tolist() for batch in export.split_batches(pixels, 4)] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert [batch.flatten().tolist() for batch in export.split_batches(pixels, 0)] == [[0], [1, 2, 3, 4], [5]]
    assert [len(batch) for batch in export.split_batches(pixels[:1], 0)] == [1]


def test_parameters_out_of_range(large_checkpoint, run, monkeypatch):
    with pytest.raises(ValueError, match=r"save_to is 'ssd\.h5'.*\.onnx or \.pt2"):
        run(large_checkpoint, save_to="ssd.h5")
    with pytest.raises(ValueError, match="top_k=0 1 or more"):
        run(large_checkpoint, save_to="ssd.pt2", top_k=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(large_checkpoint, save_to="ssd.pt2", top_k=1, images="nowhere")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxscript, onnxruntime: pip install -r requirements-dev\.txt"):
        run(large_checkpoint, save_to="ssd.onnx")


def test_the_check_takes_real_photos(real_data, small_checkpoint, run, tmp_path, capsys):
    photos = real_data / "voc_photos" / "VOC2012" / "JPEGImages"
    run(small_checkpoint, save_to=str(tmp_path / "small.pt2"), images=str(photos))
    assert len(export.read_images(str(photos))) == 4
    assert "4 images" in capsys.readouterr().out
