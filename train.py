"""Train a network of the SSD family.

    python train.py                                            the paper's recipe, from ImageNet weights
    python train.py --checkpoint=checkpoint_ssd300.pth.tar     go on where a stopped run was
    torchrun --nproc_per_node=4 train.py                       the same run on 4 GPUs

Reads the lists that create_data_lists.py wrote into `data_folder`. Writes the checkpoint and a log (CSV).
Any parameter below can be overridden on the command line with --name=value.
"""

import datetime
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from datasets import PascalVOCDataset, TrainingBatches
from eval import evaluate, make_test_loader
from model import NETWORKS, SSD300, MultiBoxLoss, load_pretrained, model_from_checkpoint, model_state
from utils import exit_with_message, load_checkpoint, override_parameters, printable, script_parameters

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
keep_difficult = True  # also train on objects that are marked as difficult, as the Caffe code does
augment = ("distort", "zoom_out", "crop", "flip")  # which of these; (): none, to check that a network learns by heart
skip_corrupt = False  # True: leave out images that cannot be decoded, instead of stopping
workers = 4  # processes that prepare images; 0: the training process itself

# Model
network = "ssd300_vgg16"  # a row of NETWORKS in model.py, such as "ssd300_tiny"; a checkpoint brings its own
pretrained = "IMAGENET1K_V1"  # weights of the base: or "IMAGENET1K_FEATURES" (VGG-16), a file, "" for random ones
freeze_base = False  # True: pretrained layers stay as they are: three times as fast on a CPU, safer with few images
finetune_from = ""  # a checkpoint to start from, of any classes; the class heads of other classes start anew
checkpoint = ""  # a checkpoint of the same run, to resume it; "": start anew

# Optimisation: the paper's recipe for Pascal VOC 2007 + 2012
batch_size = 32  # images an iteration, over all GPUs
iterations = 120_000  # in all, those before a resume included
minutes = 0.0  # of training after which the run ends if it has not before; the schedule follows the clock. 0: no clock
optimizer_name = "sgd"  # or "adamw"
lr = 1e-3  # of the weights
bias_lr_factor = 2.0  # SGD's learning rate of the convolutions' biases, as a multiple of the weights'
momentum = 0.9  # AdamW's first beta
weight_decay = 5e-4  # of the weights; biases and batch normalisation have none
warmup = 500  # iterations over which the learning rate rises linearly to `lr`; 0: none
schedule = "steps"  # down at decay_lr_at; or "cosine": down to 0 along half a wave
decay_lr_at = (80_000, 100_000)  # iterations at which the learning rate is multiplied by `decay_lr_by`
decay_lr_by = 0.1
grad_clip = 0.0  # largest norm of the gradient, all parameters together; 0: not clipped
sync_batch_norm = False  # True: batch normalisation looks at the batch of all GPUs, not at each one's share
seed = 0  # of the initial weights, the order of the images and their augmentation

# Loss
threshold = 0.5  # overlap from which a prior matches an object
neg_pos_ratio = 3  # hardest background priors for each matched one
alpha = 1.0  # weight of the localisation loss
# Hardest background priors of an image without objects, or all of whose objects were left out; the paper: 0
n_negatives_without_objects = 0

# Speed
bf16 = True  # bfloat16 autocast, where the hardware has units for it (CUDA; CPUs with AVX512-BF16 or AMX)
compile_model = True  # torch.compile, on CUDA only

# Logging
save_to = "checkpoint_ssd300.pth.tar"  # the best one by mAP gets the same name with "best_" before it
overwrite = False  # True: a run that starts anew may replace these two
save_every = 1000  # iterations; 0: at the end only
evaluate_every = 0  # iterations between evaluations on the TEST lists, the last of which is at the end; 0: never
log_file = "train_log.csv"  # "": none; a run that starts anew writes over that of an earlier one
log_every = 10  # iterations between two rows of the log

# torchrun numbers the processes, over all machines and on each one; number 0 writes files and prints.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
N_PROCESSES = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def main():
    check_parameters()
    device = start_process()
    model, optimizer, begin = start_or_resume(utils.load_label_map(data_folder), device)
    dataset = PascalVOCDataset(
        data_folder, "TRAIN", keep_difficult, seed, skip_corrupt, augment, model.input_size, model.antialias
    )
    if evaluate_every:
        make_test_loader(data_folder, 1, 0, model)  # lists that cannot be read are an error now, not later
    is_over = begin.iteration >= iterations or 0 < 60 * minutes <= begin.seconds
    if is_over and not begin.to_evaluate:
        say(f"nothing to do: {checkpoint} is at iteration {begin.iteration} of {iterations}")
        return
    last = begin.iteration if is_over else iterations  # if it is over, an evaluation is to be made up for
    batches = TrainingBatches(len(dataset), batch_size, seed, begin.iteration, last, RANK, N_PROCESSES)
    criterion = MultiBoxLoss(model.priors_cxcy, threshold, neg_pos_ratio, alpha, n_negatives_without_objects)
    describe_run(model, dataset, begin)
    log = TrainingLog(dataset, batches)
    try:
        with exit_with_message(f"if {save_to} was saved before, --checkpoint={save_to} goes on from there"):
            train(model, criterion.to(device), optimizer, batches, log, begin)
    finally:
        log.close()
        # Workers that an error left behind: they ignore SIGTERM, with which Python would end them.
        # Torch's handler would take their death for an error. (Windows has no such signal.)
        signal.signal(getattr(signal, "SIGCHLD", signal.SIGTERM), signal.SIG_DFL)
        for process in multiprocessing.active_children():
            process.kill()
    if N_PROCESSES > 1:
        torch.distributed.destroy_process_group()


def train(model, criterion, optimizer, batches, log, begin):
    """Train until the last iteration, the end of the time, or a signal; each way the end saves a checkpoint."""
    device = model.mean.device
    use_bf16, memory_format = bf16 and utils.has_bf16_units(device), utils.fastest_memory_format(device, model)
    network = wrap_network(model)
    run = Run(model, optimizer, log, begin)
    loader = make_train_loader(log.dataset, batches, device)
    for iteration, (images, boxes, labels, _) in zip(batches.iterations, loader, strict=True):
        set_learning_rate(optimizer, iteration, run.seconds)
        images = model.normalize(images).contiguous(memory_format=memory_format)  # (N, 3, 300, 300)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            predicted_locs, predicted_scores = network(images)  # (N, 8732, 4), (N, 8732, C)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        if run.ends_after(iteration, loss):  # logs, saves and evaluates when it is time to
            break
    run.finish()


# --- Before the loop: processes, model, optimizer, data -------------------------------------------


def check_parameters():
    """Refuse now what would fail, or go wrong, only later."""
    positive = ("batch_size", "iterations", "lr", "log_every")  # losses are checked as often as they are logged
    not_negative = ("workers", "bias_lr_factor", "momentum", "weight_decay", "warmup", "grad_clip", "neg_pos_ratio")
    not_negative += ("alpha", "n_negatives_without_objects", "save_every", "evaluate_every", "minutes")
    for name in positive + not_negative:
        if not 0 <= globals()[name] < math.inf or (name in positive and globals()[name] == 0):
            least = "more than 0" if name in positive else "0 or more"
            raise ValueError(f"{name} is {globals()[name]}; it must be {least}")
    for name, known in (("optimizer_name", ("sgd", "adamw")), ("schedule", ("steps", "cosine"))):
        if globals()[name] not in known:
            raise ValueError(f"{name} is {globals()[name]!r}; it must be one of {', '.join(known)}")
    if sync_batch_norm and not torch.cuda.is_available():
        raise ValueError("sync_batch_norm is True; PyTorch has it on CUDA only")
    folder = Path(save_to).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(save_to).is_dir():
        raise ValueError(f"save_to is {save_to!r}: no file can be written there; make the folder, or name another")
    for path in (save_to, best_path()):
        if Path(path).exists() and not checkpoint and not overwrite:
            advice = f"--checkpoint={path} goes on with its run, --overwrite=True replaces it"
            raise ValueError(f"{path} is there already: {advice}, --save_to names another file")
        utils.remove_leftovers(path)


def best_path():
    """Where the best checkpoint by mAP goes."""
    return str(Path(save_to).with_name(f"best_{Path(save_to).name}"))


def start_process():
    """Join the other processes, if there are any; returns this one's torch.device."""
    device = set_up_device(LOCAL_RANK)
    if N_PROCESSES > 1:  # while the first one evaluates, the others wait: longer than the ten minutes of the default
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return device


def set_up_device(local_rank=0):
    """The device of a process, with PyTorch's settings for speed."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: the fastest algorithms pay off
    torch.set_float32_matmul_precision("high")  # TF32, where autocast leaves float32
    return device


def highest_of_all(*values):
    """The highest of each value over all processes. They meet on the CPU, so no GPU is waited for."""
    values = torch.tensor(values, dtype=torch.float64)
    if N_PROCESSES > 1:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.tolist()


def say(text):
    """Print a line, in the main process only, without breaking the progress bar."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)


class Begin(NamedTuple):
    """Where a run begins: anew, or where the checkpoint was that it resumes."""

    weights: str  # where they come from, in words
    iteration: int = 0
    seconds: float = 0.0  # of training before
    best_map: float = -1.0
    to_evaluate: bool = False  # whether the model is still to be evaluated before it goes on


def start_or_resume(label_map, device):
    """Build model and optimizer, from `checkpoint`, from `finetune_from`, or anew; returns both and a Begin."""
    torch.manual_seed(seed)
    saved = load_checkpoint(checkpoint or finetune_from) if checkpoint or finetune_from else None
    if checkpoint:
        model = model_from_checkpoint(saved, checkpoint)
        check_resumable(saved, label_map)
    elif finetune_from:
        model = model_from_checkpoint(saved, finetune_from, label_map)
        same = label_map == saved["label_map"]
        heads = "the class heads included" if same else "but for the class heads, which start anew"
        n_classes = len(saved["label_map"])
        begin = Begin(f"{finetune_from}: weights taken over from a checkpoint with {n_classes} classes, {heads}")
    else:
        model = SSD300(len(label_map), network)
        begin = Begin(load_base(model))
    model.label_map = label_map
    if freeze_base:
        model.freeze_base()
    model = model.to(device, memory_format=utils.fastest_memory_format(device, model)).train()
    if sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, device)
    if checkpoint:
        begin = restore_training_state(saved, optimizer)
    return model, optimizer, begin


def load_base(model):
    """Start a new model's base from pretrained weights, if there are any; returns in words what it starts from."""
    if not pretrained or (NETWORKS[network].divisor > 1 and pretrained == "IMAGENET1K_V1"):
        return "random"  # nobody has trained a narrow network on ImageNet: for it, too, if the default is untouched
    # The first process of each machine downloads them; the others then find them in its cache.
    for is_turn in (LOCAL_RANK == 0, LOCAL_RANK > 0):
        if is_turn:
            load_pretrained(model, pretrained)
        highest_of_all(0)  # wait for the others
    return f"{pretrained} for the base, the rest random"


def restore_training_state(saved, optimizer):
    """Bring back the optimizer's state, random states and position; returns the Begin. Settings, such as the weight
    decay, stay as they are in this run: they may have been changed for it."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    entries = {"momentum_buffer"} if optimizer_name == "sgd" else {"step", "exp_avg", "exp_avg_sq"}
    try:
        if any(set(state) != entries for state in saved["optimizer"]["state"].values()):
            raise ValueError(f"it was not saved by {optimizer_name}")
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:  # in the memory format of this machine, not of the one that saved it
                    state[name] = torch.empty_like(parameter).copy_(value)
                elif name != "step":
                    raise ValueError(f"{name} has another shape than its parameter")
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
            for parameter in group["params"] if optimizer_name == "sgd" and momentum else ():
                if parameter.requires_grad:  # it was frozen before, perhaps: fused SGD wants momentum of all or none
                    optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        torch.set_rng_state(saved["rng"]["cpu"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        start, best_map, seconds = saved["iteration"], saved["best_map"], saved.get("seconds", 0.0)
        if [type(start), type(best_map), type(seconds)] != [int, float, float] or start < 0:
            raise ValueError(f"iteration {start!r}, best_map {best_map!r}, seconds {seconds!r}")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its training state cannot be restored ({printable(error)})"
        raise ValueError(f"{checkpoint}: {reason}; --finetune_from={checkpoint} starts from its weights") from error
    to_evaluate = saved.get("to_evaluate") is True and evaluate_every > 0
    return Begin(f"resumed from {checkpoint} at iteration {start}", start, seconds, best_map, to_evaluate)


def check_resumable(saved, label_map):
    """Refuse a checkpoint of another data set, or one without a training state; tell what has changed."""
    advice = f"--finetune_from={checkpoint} starts from its weights"
    if saved["label_map"] != label_map:
        was, now = (f"{len(m)} classes ({printable(', '.join(m))})" for m in (saved["label_map"], label_map))
        raise ValueError(f"{checkpoint} has {was}, {data_folder} has {now}; {advice}")
    if "optimizer" not in saved:
        raise ValueError(f"{checkpoint} holds weights only; {advice}")
    before = saved.get("parameters")
    for name, value in script_parameters(globals()).items() if isinstance(before, dict) else ():
        if name not in ("checkpoint", "network", "overwrite") and repr(before.get(name, value)) != repr(value):
            say(f"note: {name} was {printable(repr(before[name]))} when the checkpoint was saved, now it is {value!r}")


def make_optimizer(model, device):
    """SGD with momentum, or AdamW. Weights of convolutions decay; their biases and what batch normalisation learns,
    which only shift and scale, do not. In SGD the biases learn faster, as in the Caffe code."""
    weights, biases, norms = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
            (norms if is_norm else biases if name == "bias" else weights).append(parameter)
    groups = [
        {"params": weights, "lr_factor": 1.0, "weight_decay": weight_decay},
        {"params": biases, "lr_factor": bias_lr_factor if optimizer_name == "sgd" else 1.0, "weight_decay": 0.0},
        {"params": norms, "lr_factor": 1.0, "weight_decay": 0.0},
    ]
    groups = groups if norms else groups[:2]
    if optimizer_name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=device.type == "cuda")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=device.type == "cuda")


def set_learning_rate(optimizer, iteration, seconds=0.0):
    """Set the learning rates of an iteration (counted from 0): warm-up, then down as `schedule` says. By the clock a
    run may be further, after so many seconds of training, than by its iterations."""
    position = max(iteration, iterations * seconds / (60 * minutes)) if minutes else iteration  # as an iteration
    warm = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
    if schedule == "cosine":
        factor = (1 + math.cos(math.pi * min(1.0, position / iterations))) / 2
    else:
        factor = decay_lr_by ** sum(position >= at for at in decay_lr_at)
    for group in optimizer.param_groups:
        group["lr"] = lr * warm * factor * group["lr_factor"]


def make_train_loader(dataset, batches, device):
    """One loader for the whole run: no pause between epochs, in which workers would start anew."""
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, worker_init_fn=ignore_signals,
        num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=device.type == "cuda",
        timeout=600 if workers else 0,  # seconds; for workers that hang. A dead one is noticed at once.
        generator=torch.Generator(),  # the loader's own: else it would draw from the one whose state is saved
    )  # fmt: skip


def ignore_signals(_worker):
    """Ctrl-C, and a cluster's SIGTERM, may reach the workers too; it is the main process that decides to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def wrap_network(model):
    """The model as the loop calls it: compiled, and with its gradients averaged over all processes."""
    network, is_cuda = model, model.mean.is_cuda
    if N_PROCESSES > 1:
        device_ids = [model.mean.device.index] if is_cuda else None
        # Buffers need no broadcast: the statistics of batch normalisation, the only ones that change, are not
        # used in training. The first process evaluates with its own, and saves them.
        network = DistributedDataParallel(network, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return torch.compile(network) if compile_model and is_cuda else network


def describe_run(model, dataset, begin):
    """Say what is trained on what, for how long, and what looks like a mistake."""
    names = printable(", ".join(name for name in dataset.label_map if name != "background"))
    n_weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    kind = "bfloat16" if bf16 and utils.has_bf16_units(model.mean.device) else "float32"
    epochs = iterations * batch_size / len(dataset)
    say(f"data     {data_folder}: {len(dataset)} images, {len(dataset.labels)} objects")
    say(f"classes  {len(dataset.label_map) - 1}: {names}")
    say(f"network  {model.network}, {n_weights:.1f} million weights, {kind}, {N_PROCESSES} x {model.mean.device}")
    say(f"weights  {begin.weights}")
    say(f"run      iterations {begin.iteration} to {iterations} of {batch_size} images, {epochs:.1f} epochs in all")
    say(f"         {optimizer_name}, lr {lr:g}, {schedule}, warm-up {warmup}")
    if minutes:
        say(f"         by the clock: {begin.seconds / 60:.1f} of its {minutes:g} minutes are used")
    if warmup > iterations:
        say(f"warning: the warm-up of {warmup} iterations is longer than the run; --warmup={iterations // 10} is usual")


# --- Within the loop: log, stop, evaluate, save ---------------------------------------------------


class Run:
    """What comes after each step: the log, the clock, requests to stop, checkpoints, evaluations."""

    def __init__(self, model, optimizer, log, begin):
        self.model, self.optimizer, self.log = model, optimizer, log
        self.done, self.best_map = begin.iteration, begin.best_map
        self.seconds = begin.seconds  # of training, without evaluations; the same in all processes
        self.clock = time.perf_counter()  # when they were counted last
        self.signal = 0  # SIGINT or SIGTERM, once one has come
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        if begin.to_evaluate:  # the run was stopped or killed before it came to that
            self.save(save_to)  # tried once more, not at each resume: it may be what killed the run
            self.evaluate()

    def receive(self, number, _frame):
        """Take note of a signal: the run ends after the iteration. A second Ctrl-C ends the process at once; SIGTERM
        may well come twice, from a cluster's scheduler and from torchrun."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def ends_after(self, iteration, loss):
        """Do what is due after an iteration (counted from 0). Returns whether it was the last."""
        self.done = iteration + 1
        self.log.losses.append(loss.detach())
        self.log.bar.update()
        # All processes agree at every iteration: 30 s after a signal torchrun kills them.
        before, self.clock = self.clock, time.perf_counter()
        self.seconds, stops = highest_of_all(self.seconds + self.clock - before, self.signal)
        if stops:
            self.signal = int(stops)
        ends = stops or self.done == iterations or 0 < 60 * minutes <= self.seconds
        evaluates = evaluate_every > 0 and (self.is_due(evaluate_every) or (ends and not stops))
        saves = ends or evaluates or self.is_due(save_every)
        if saves or self.is_due(log_every):
            self.log.flush(self.done, self.optimizer)  # an error if a loss was not finite: before anything is saved
        if saves:
            self.save(save_to, to_evaluate=evaluates)
        if evaluates and not stops:  # saved before: an evaluation that fails costs nothing
            self.evaluate()
        return ends

    def is_due(self, every):
        """Whether something that happens `every` so many iterations (0: never) is to happen now."""
        return every > 0 and self.done % every == 0

    def evaluate(self):
        """Evaluate on the TEST lists; save the model once more, and beside that if it is the best so far."""
        mean_ap = self.best_map
        if RANK == 0:
            # This process's share of a batch: as much as fits into its memory.
            loader = make_test_loader(data_folder, -(-batch_size // N_PROCESSES), workers, self.model, skip_corrupt)
            loader.worker_init_fn, loader.generator = ignore_signals, torch.Generator()  # as in make_train_loader()
            _, mean_ap = evaluate(loader, self.model)
            self.model.train()
            skipped = loader.dataset.skipped_images()
            if skipped:
                say(f"{len(skipped)} TEST images could not be decoded; their objects count as missed")
            self.log.write(self.done, mean_ap=f"{mean_ap:.6f}")
            say(f"iteration {self.done}: mAP {mean_ap:.4f}, best before {max(self.best_map, 0):.4f}")
        is_best = mean_ap > self.best_map
        (self.best_map,) = highest_of_all(max(self.best_map, mean_ap))  # the others wait here
        for path in (best_path(), save_to) if is_best else (save_to,):
            self.save(path)
        self.log.flushed_at = self.clock = time.perf_counter()

    def save(self, path, to_evaluate=False):
        """Save all that a resumed run needs. to_evaluate: an evaluation comes next."""
        if RANK > 0:
            return
        if not all(bool(tensor.isfinite().all()) for tensor in self.model.state_dict().values()):
            advice = f"{path} is left as it was. Try a lower lr (--lr), a longer --warmup, or --grad_clip=10"
            raise FloatingPointError(f"weights are no longer finite at iteration {self.done}; {advice}")
        state = {
            **model_state(self.model), "optimizer": self.optimizer.state_dict(),
            "iteration": self.done, "seconds": self.seconds, "best_map": self.best_map, "to_evaluate": to_evaluate,
            # Of torch's generators. (Data order and augmentation need none: see datasets.py.)
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "parameters": script_parameters(globals()),
        }  # fmt: skip
        utils.save_checkpoint(state, path)

    def finish(self):
        """Say what was saved and where; end with the exit code of a signal, if one asked for the end."""
        if N_PROCESSES > 1:  # bring together what the processes skipped
            torch.distributed.all_reduce(self.log.dataset.skipped, torch.distributed.ReduceOp.MAX)
        self.log.bar.close()
        if self.signal:
            name = signal.Signals(self.signal).name
            say(f"stopped by {name} after iteration {self.done}; go on with --checkpoint={save_to}")
            raise SystemExit(128 + self.signal)
        best = f"\n         {best_path()}, the best so far, mAP {self.best_map:.4f}" if self.best_map >= 0 else ""
        say(
            f"done after iteration {self.done}, {datetime.timedelta(seconds=round(self.seconds))} of training\n"
            f"saved    {save_to}{f', the log in {log_file}' if log_file else ''}{best}\n"
            f"next     python eval.py --data_folder={data_folder} --checkpoint={save_to}\n"
            f"         python detect.py --checkpoint={save_to} --images=YOUR_PHOTOS"
        )


class TrainingLog:
    """The progress bar, the CSV file, and the check that every loss is finite.

    Losses stay on the device until `flush()`, so that no iteration waits for the one before it.
    """

    columns = ("iteration", "epoch", "loss", "lr", "images_per_second", "mAP")

    def __init__(self, dataset, batches):
        self.dataset, self.batches = dataset, batches
        self.losses = []  # scalars on the device, of the iterations since the last flush
        first, last = batches.iterations.start, batches.iterations.stop
        self.file = start_log(log_file, self.columns, first) if RANK == 0 else ""
        self.bar = tqdm(total=None if minutes else last, initial=first, unit="it", disable=RANK > 0)
        self.flushed_at = time.perf_counter()
        self.first_flush = None  # iterations done, and time; then (): how long the run takes has been said

    def flush(self, done, optimizer):
        """Bring the losses over, check them, show and write their mean. `done`: iterations so far."""
        losses = torch.stack(self.losses)
        if N_PROCESSES > 1:  # the mean over the processes is the loss of the whole batch
            torch.distributed.all_reduce(losses)
            losses /= N_PROCESSES
        losses = losses.tolist()
        self.losses = []
        for iteration, loss in enumerate(losses, start=done - len(losses)):
            if not math.isfinite(loss):
                self.stop_at_bad_loss(iteration, loss)
        now = time.perf_counter()
        speed = len(losses) * batch_size / (now - self.flushed_at)
        self.flushed_at = now
        loss, rate = sum(losses) / len(losses), optimizer.param_groups[0]["lr"]
        self.bar.set_postfix({"loss": f"{loss:.3f}", "lr": f"{rate:.1e}", "img/s": f"{speed:.1f}"})
        self.write(done, loss=f"{loss:.6f}", rate=f"{rate:.3e}", speed=f"{speed:.1f}")
        if self.first_flush is None:
            self.first_flush = done, now  # the iterations before it are slower
        elif self.first_flush and done >= self.first_flush[0] + 10:
            step = (now - self.first_flush[1]) / (done - self.first_flush[0])
            self.first_flush = ()
            to_go = datetime.timedelta(seconds=round(step * (iterations - done)))
            say(f"{step:.2f} s an iteration" if minutes else f"{step:.2f} s an iteration: about {to_go} to go")

    def write(self, done, *, loss="", rate="", speed="", mean_ap=""):
        """Append a row to the file. A full disk costs the log, not the run."""
        epoch = f"{done * batch_size / len(self.dataset):.3f}"
        try:
            if self.file:
                with open(self.file, "a", newline="") as file:
                    file.write(f"{done},{epoch},{loss},{rate},{speed},{mean_ap}\r\n")
        except OSError as error:
            say(f"warning: the log ends here, {self.file} cannot be written: {error}; the run goes on")
            self.file = ""

    def stop_at_bad_loss(self, iteration, loss):
        """End the run, naming what was in the batch; the checkpoint on disk is from before."""
        files = sorted({str(self.dataset.image_paths[index]) for _, index in self.batches.batch(iteration)})
        raise FloatingPointError(
            f"the loss of iteration {iteration} is {loss}. {save_to} is as it was saved before. Try a lower lr "
            "(--lr), a longer --warmup, or --grad_clip=10; if it happens again with the same images, look at "
            "their boxes. The images of this batch:\n  " + "\n  ".join(printable(file, 1000) for file in files)
        )

    def close(self):
        """Close the bar, and say which images were skipped, however the run ends."""
        self.bar.close()
        skipped = self.dataset.skipped_images()
        if skipped:
            names = "\n  ".join(printable(path, 1000) for path in skipped)
            say(f"skipped {len(skipped)} images that could not be decoded:\n  {names}")


def start_log(path, columns, start):
    """Make the CSV log ready for the rows after iteration `start`: a new file, or one without the rows that come again.
    Returns its path, "" if it cannot be written."""
    lines = [f"{','.join(columns)}\r\n".encode()]
    try:
        if path and start > 0 and Path(path).is_file():
            rows = re.finditer(rb"^(\d{1,18})(,[^,\n]*){5}\n", Path(path).read_bytes(), re.MULTILINE)
            lines += [row[0] for row in rows if int(row[1]) <= start]  # whole ones: a kill may leave half a row
            utils.write_file(path, b"".join(lines))
        elif path:
            Path(path).write_bytes(lines[0])
        return path
    except OSError as error:
        say(f"warning: no log is written, {path} cannot be: {error}; the run goes on")
        return ""


class Console:
    """stdout or stderr, silent from when it cannot be written: a full disk, or `| head -1`, does not end a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (None if it was closed)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
