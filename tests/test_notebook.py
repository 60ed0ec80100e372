"""The notebook: committed without outputs, and its cells run one after the other, without Jupyter."""

import ast
import json

import torch
from helpers import REPO
from PIL import Image

from model import SSD300, model_state
from utils import make_label_map, save_checkpoint

CELLS = json.loads((REPO / "notebooks" / "detect.ipynb").read_text(encoding="utf-8"))["cells"]
CODE_CELLS = [cell for cell in CELLS if cell["cell_type"] == "code"]


def save_model(path):
    """A network that, whatever the picture, finds one circle: the square prior of the last map."""
    model = SSD300(5, "ssd300_tiny")
    model.label_map = make_label_map(["circle", "rectangle", "star", "triangle"])
    with torch.no_grad():
        for name, parameter in model.pred_convs.named_parameters():
            parameter.zero_()
            if name.startswith("cl_") and name.endswith("bias"):
                parameter.view(-1, 5)[:, 0] = 10  # background, at all priors
        model.pred_convs.cl_conv11_2.bias[:2] = torch.tensor([0.0, 5.0])  # but for the first of the last map
    save_checkpoint(model_state(model), path)


def run_cell(source, namespace):
    """Run a cell; returns what Jupyter would show below it: the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_its_cells_are_without_outputs_and_run(sample, tmp_path, monkeypatch, capsys):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE_CELLS)
    for name in ("notebooks", "demo"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo/sample").symlink_to(sample)
    save_model(tmp_path / "demo/checkpoint_ssd300.pth.tar")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.syspath_prepend(tmp_path)  # the notebook adds to the path
    namespace = {"__name__": "__main__"}
    shown = [run_cell("".join(cell["source"]), namespace) for cell in CODE_CELLS]
    photo = Image.open(sample / "JPEGImages" / "test_00004.jpg")
    assert "<object>" in (sample / "Annotations" / "test_00004.xml").read_text()  # there is something to find
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert [picture.size for picture in pictures] == [photo.size, photo.size]
    assert all(picture.tobytes() != photo.convert("RGB").tobytes() for picture in pictures)
    assert shown[1] == {0: "background", 1: "circle", 2: "rectangle", 3: "star", 4: "triangle"}
    assert (torch.Size([1, 8732, 4]), torch.Size([1, 8732, 5])) in shown
    width, height = photo.size
    expected = torch.tensor([[0.05 * width, 0.05 * height, 0.95 * width, 0.95 * height]])
    torch.testing.assert_close(namespace["boxes_xy_pixels"], expected)
    printed = capsys.readouterr().out
    assert "ssd300_tiny: images of 300 x 300 pixels, 8732 priors" in printed
    assert "circle       0.97" in printed  # e^5 / (e^5 + 4)
    assert "min_score 0.5   max_overlap 0.9   1 objects" in printed
    assert 1 < len(namespace["positive"]) < 100
