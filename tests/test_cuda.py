"""What runs on CUDA, checked without a GPU: devices, waits, compilation. Last, what needs a real one.

The scripts' own functions run on a pretended GPU: tensors of "cuda" have shapes, types and devices but no values
(torch's FakeTensorMode), those of the CPU are real. So an operation on tensors of two devices is an error, and a place
where the host would have to wait for the GPU's values is seen: MAY_WAIT lists those that are meant to.
"""

import contextlib
import functools
import signal
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, finish, run_script, script, start, training
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

import model
import train
from datasets import PascalVOCDataset
from model import NETWORKS, SSD300, MultiBoxLoss
from utils import load_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
# Where the host may wait for the GPU (file, function), why, and the value that it is given there.
MAY_WAIT = {
    ("train.py", "start_or_resume"): None,  # the model goes to the GPU
    ("train.py", "flush"): 0.5,  # the losses, for the log and the check that they are finite: every `log_every`
    ("train.py", "save"): True,  # whether the weights are finite, before a checkpoint is written
    ("model.py", "model_state"): 0.5,  # mean and deviation of the input, for a checkpoint
    ("model.py", "__init__"): None,  # the priors, for the matching on the CPU
    ("eval.py", "detect_all"): None,  # the detections of an image, for the metric
    ("eval.py", "<listcomp>"): None,  # the same
    # Detection, of each image: how many candidates there are, and how many of the best ones survive
    ("model.py", "detect_objects"): None,
    ("model.py", "find_best"): None,
    ("model.py", "suppress_in_each_class"): None,
}


class PretendedGPU(TorchDispatchMode):
    """Runs what has to do with "cuda" on fake tensors; `waits` collects (file, function, line, what) of each wait."""

    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), []
        self.float64_in = set()  # functions of the repo in which float64 gets to the GPU

    def wait(self, what):
        """Note a wait; returns the value that the host is given, None where it is not meant to wait."""
        frames = repo_frames()
        if not frames:  # a test puts something on the device
            return None
        site = Path(frames[-1].filename).name, frames[-1].name
        self.waits.append((*site, frames[-1].line, what))
        return MAY_WAIT.get(site)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = kwargs.get("device") or CPU
        if func is aten._pin_memory.default:
            return pin(args[0].clone())
        if func is aten.is_pinned.default:
            return hasattr(args[0], "is_pretended_pinned")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and torch.device(device).type == "cpu":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # which brings composed operations here
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten._to_copy.default and isinstance(args[0], FakeTensor) and kwargs.get("device") == CPU:
            self.wait("copied to the CPU")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default or func is aten.copy_.default:
            source = args[0] if func is aten._to_copy.default else args[1]
            quick = hasattr(source, "is_pretended_pinned") and (kwargs.get("non_blocking") or True in args[2:])
            if not isinstance(source, FakeTensor) and source.ndim and not quick:
                self.wait("copied to the GPU from memory that is not pinned, or blocking")
        elif any(not isinstance(tensor, FakeTensor) and tensor.ndim for tensor in tensors):
            self.wait(f"{func} gets a tensor of the CPU")
        if "index_put" in func.name() and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.wait("a boolean mask as an index")
        if func.name().startswith("aten::_fused_"):  # optimizers; some have no fake version
            assert all(tensor.device == CUDA for tensor in tensors)
            return None
        try:
            with self.fake:
                results = func(*args, **kwargs)
            if any(isinstance(leaf, FakeTensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(results)):
                self.float64_in |= {frame.name for frame in repo_frames()[-1:]}
            return results
        except (DataDependentOutputException, DynamicOutputShapeException):
            value = self.wait(str(func))
            with self.fake:
                if func is aten.nonzero.default:  # one is found
                    return torch.zeros(1, args[0].ndim, dtype=torch.int64, device=CUDA)
                if func is torch.ops.torchvision.nms.default:  # it survives
                    return torch.zeros(1, dtype=torch.int64, device=CUDA)
            if value is None or func is not aten._local_scalar_dense.default:
                raise
            return value


def repo_frames():
    """The calls of the repo's functions that led here, the last one last."""
    return [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == REPO]


def pin(tensor):
    tensor.is_pretended_pinned = True
    return tensor


def backward(loss):
    """loss.backward(), node by node: autograd's engine asks a real GPU for its streams."""
    gradients = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        while gradients:
            node = max(gradients, key=lambda node: node._sequence_nr())  # the last one that was made
            results = node(*gradients.pop(node))
            results = results if isinstance(results, tuple) else (results,)
            for (parent, slot), gradient in zip(node.next_functions, results, strict=False):  # no parents: a parameter
                if parent is None or gradient is None:
                    continue
                expected = parent._input_metadata[slot]
                assert gradient.device == expected.device
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)  # as the engine does
                slots = gradients.setdefault(parent, [None] * len(parent._input_metadata))
                slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient


@pytest.fixture
def gpu(monkeypatch):
    """A PretendedGPU that is in use; what would ask for a real one is replaced."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is there")
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    pretended = PretendedGPU()
    iterate = DataLoader.__iter__

    def list_of(tensor):  # one wait; FakeTensor itself would ask for the values one by one
        value = pretended.wait("tolist")
        return np.full(tensor.shape, value).tolist()

    def batches(loader):
        return (tree_map(pin if loader.pin_memory else lambda part: part, batch) for batch in iterate(loader))

    monkeypatch.setattr(FakeTensor, "tolist", list_of)
    monkeypatch.setattr(DataLoader, "__iter__", batches)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and copied
    replaces = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a real parameter by a fake one
    with pretended, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument")
        yield pretended
    torch._C._set_only_lift_cpu_tensors(lifts)
    torch.__future__.set_overwrite_module_params_on_conversion(replaces)


@pytest.mark.parametrize("waits, action", [
    (True, lambda x: x.sum().item()), (True, lambda x: x.tolist()), (True, lambda x: bool((x > 0).any())),
    (True, lambda x: x[x > 0]), (True, lambda x: x.nonzero()), (True, lambda x: x.cpu()),
    (True, lambda x: x.index_put_((x > 0,), torch.ones((), device=CUDA))),
    (True, lambda x: torch.tensor([1, 2], device=CUDA)), (True, lambda x: torch.ones(3).to(CUDA)),
    (True, lambda x: torch.ones(3).to(CUDA, non_blocking=True)),
    (True, lambda x: x[torch.tensor([1, 2])]), (True, lambda x: x + torch.ones(3)),
    (False, lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True)),
    (False, lambda x: torch.where(x > 0, x, 0) + torch.arange(3, device=CUDA) * 2.5),
    (False, lambda x: x.topk(2).values.cumsum(0)),
])  # fmt: skip
def test_a_wait_or_a_wrong_device_is_seen(gpu, monkeypatch, waits, action):
    """The check itself. Nobody may wait here."""
    monkeypatch.setattr("test_cuda.REPO", Path(__file__).parent)
    x = torch.zeros(3, device=CUDA)
    with contextlib.suppress(RuntimeError, TypeError):
        assert action(x) is not None
    assert bool(gpu.waits) == waits, gpu.waits


@pytest.mark.parametrize(("bf16", "optimizer_name"), [(False, "sgd"), (True, "adamw")])
@pytest.mark.parametrize("network", NETWORKS)
def test_training_and_evaluation(gpu, run_main, monkeypatch, lists, tmp_path, network, bf16, optimizer_name):
    """train.py's own loop on the pretended GPU, with log, checkpoint and evaluation."""
    monkeypatch.setattr(train.utils, "save_checkpoint", lambda state, path: None)
    monkeypatch.setattr(train, "start_process", lambda device: CUDA)
    seen, normalize = [], SSD300.normalize
    monkeypatch.setattr(SSD300, "normalize", lambda *given: seen.append(given) or normalize(*given))
    run_main(train, network=network, data_folder=str(lists), pretrained="", bf16=bf16, optimizer_name=optimizer_name,
             batch_size=3, iterations=2, workers=0, log_every=2, evaluate_every=2, grad_clip=1.0, compile_model=False,
             save_to=str(tmp_path / "c.pth.tar"))  # fmt: skip
    unexpected = [wait for wait in gpu.waits if wait[:2] not in MAY_WAIT]
    assert not unexpected, "the host waits for the GPU in\n" + "\n".join(map(str, unexpected))
    places = [wait[1] for wait in gpu.waits]
    assert places.count("flush") == 1  # every `log_every`
    assert places.count("detect_objects") == places.count("suppress_in_each_class") == 4  # of each image
    assert places.count("detect_all") + places.count("<listcomp>") == 12  # boxes, labels, scores of each image
    assert gpu.float64_in <= {"suppress_in_each_class"}  # which MPS, without float64, leaves to the CPU
    size, trained = NETWORKS[network].input_size, seen[0][0]
    assert [images.shape for _, images in seen] == [(n, 3, size, size) for n in (3, 3, 3, 1)]
    for name, parameter in trained.named_parameters():
        assert parameter.device == parameter.grad.device == CUDA and parameter.grad.dtype == torch.float32, name
    assert next(trained.base.parameters()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("n_objects", [(0, 0), (1, 3), (0, 5)])
def test_loss_never_waits(gpu, n_objects):
    """Forward and backward, also of images without objects, lists on the CPU."""
    locs = torch.zeros(2, 8732, 4, device=CUDA, requires_grad=True)
    scores = torch.zeros(2, 8732, 5, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    boxes = [torch.tensor([[0.1, 0.1, 0.5, 0.5]]).repeat(n, 1) for n in n_objects]
    criterion = MultiBoxLoss(SSD300.create_prior_boxes(), n_negatives_without_objects=5).to(CUDA)
    gpu.waits.clear()
    backward(criterion(locs, scores, boxes, [torch.ones(n, dtype=torch.int64) for n in n_objects]))
    assert gpu.waits == []
    assert locs.grad.shape == locs.shape and scores.grad.dtype == scores.dtype


def test_detections_from_mps_are_made_on_the_cpu(monkeypatch):
    """MPS has no float64."""

    class Reached(Exception):
        pass

    def softmax(scores, dim):
        raise Reached(scores.device.type)

    monkeypatch.setattr(model.F, "softmax", softmax)
    with FakeTensorMode():
        shapes = ((1, 20, 4), (1, 20, 3), (20, 4))
        predictions = [torch.zeros(shape, device="mps") for shape in shapes]
        with pytest.raises(Reached, match=r"^cpu$"):
            model.detect_objects(*predictions, 0.1, 0.45, 10)


# --- Compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["ssd300_tiny", "ssd512_vgg16", "ssdlite320_mobilenet_v3_large"])
def test_one_graph_for_the_whole_run(network):
    """As train.py compiles it, whose batches have one size: no break in the graph, none anew after an evaluation."""
    torch._dynamo.reset()  # on the device "meta", which has no values: nothing can depend on them
    counter, size = CompileCounterWithBackend("aot_eager"), NETWORKS[network].input_size
    ssd = SSD300(5, network=network).to("meta")
    compiled = torch.compile(ssd, fullgraph=True, backend=counter)
    for _ in range(2):
        ssd.train()
        for _ in range(2):
            locs, scores = compiled(torch.zeros(2, 3, size, size, device="meta"))
            (locs.sum() + scores.sum()).backward()
        with torch.inference_mode():
            ssd.eval()(torch.zeros(1, 3, size, size, device="meta"))
    assert counter.frame_count == 1


# --- On a real GPU: `make gpu-check` --------------------------------------------------------------

real_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: `make gpu-check` where one is")


@real_gpu
@torch.no_grad()
def test_network_loss_and_detection_are_those_of_the_cpu(lists, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert_close = functools.partial(torch.testing.assert_close, check_device=False, check_dtype=False)
    torch.manual_seed(0)
    dataset, model = PascalVOCDataset(lists, "TEST"), SSD300(5, network="ssd300_tiny").eval()
    images, boxes, labels, _ = dataset.collate_fn([dataset[i] for i in range(4)])
    criterion = MultiBoxLoss(model.priors_cxcy)
    locs, scores = model(model.normalize(images))
    loss, found = criterion(locs, scores, boxes, labels), model.detect_objects(locs, scores, 0.01, 0.45, 200)
    model.to(CUDA)
    assert_close(model(model.normalize(images)), (locs, scores), rtol=1e-3, atol=1e-3)
    locs, scores = locs.to(CUDA), scores.to(CUDA)
    assert_close(criterion.to(CUDA)(locs, scores, boxes, labels), loss, rtol=1e-5, atol=1e-5)
    assert_close(model.detect_objects(locs, scores, 0.01, 0.45, 200), found, rtol=1e-4, atol=1e-5)


@real_gpu
def test_the_step_never_waits(request):
    """torch's own check of what the pretended GPU found above."""
    torch.manual_seed(0)
    model = SSD300(5, network="ssd300_tiny").to(CUDA)
    criterion = MultiBoxLoss(model.priors_cxcy).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.zeros(2, 3, 300, 300, dtype=torch.uint8).pin_memory()
    boxes, labels = [torch.tensor([[0.1, 0.1, 0.5, 0.5]])] * 2, [torch.tensor([1])] * 2
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    for mode in ("default", "error", "error"):  # the first step sets up the libraries
        torch.cuda.set_sync_debug_mode(mode)
        loss = criterion(*model(model.normalize(images)), boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@real_gpu
@pytest.mark.parametrize("network", NETWORKS)
def test_a_short_run_of_each_network(lists, tmp_path, network):
    settings = {"network": network, "iterations": 4, "evaluate_every": 4, "compile_model": network == "ssd300_tiny"}
    run_script(training(lists, **settings), tmp_path)
    run_script(script("eval.py", data_folder=lists, checkpoint="last.pth.tar", workers=0), tmp_path)


@real_gpu
@pytest.mark.parametrize("settings", [{}, {"optimizer_name": "adamw"}, {"freeze_up_to": "conv5_3", "iterations": 4}])
def test_a_run_resumes(lists, tmp_path, settings):
    """On the GPU, as far as it goes, and then on the CPU; a base that was frozen has no momentum yet."""
    settings = {"compile_model": False, **settings}
    run_script(training(lists, **{"iterations": 8, **settings}), tmp_path)
    again = {**settings, "checkpoint": "last.pth.tar", "freeze_up_to": ""}
    run_script(training(lists, **{**again, "iterations": 10}), tmp_path)
    run_script(["env", "CUDA_VISIBLE_DEVICES=", *training(lists, **{**again, "iterations": 12})], tmp_path)
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 12


@real_gpu
def test_out_of_memory_says_what_to_change(lists, tmp_path):
    code = "import torch, sys, runpy; torch.cuda.set_per_process_memory_fraction(0.0005); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python, *arguments = training(lists, batch_size=512, compile_model=False)
    code, output = finish(start([python, "-c", code, *arguments], tmp_path))
    assert code == 1 and "--batch_size" in output and "Traceback" not in output, output
