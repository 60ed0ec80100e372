"""Train a network of the SSD family.

    python train.py                                            the paper's recipe, from ImageNet weights
    python train.py --checkpoint=checkpoint_ssd300.pth.tar     go on where a stopped run was
    torchrun --nproc_per_node=4 train.py                       the same run on 4 GPUs

Reads the lists that create_data_lists.py wrote into `data_folder`. Writes the checkpoint, and beside it the log
(checkpoint_ssd300.csv), a row every `log_every` iterations and before each saving, and one for each evaluation.
Any parameter below can be overridden on the command line with --name=value. A run that goes on from its checkpoint
takes them from there; what is given on the command line counts more.
"""

import contextlib
import copy
import csv
import datetime
import io
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from datasets import PascalVOCDataset, TrainingBatches
from eval import check_metric, evaluate, make_test_loader
from model import NETWORKS, SSD300, MultiBoxLoss, load_pretrained, model_from_checkpoint, model_state
from utils import exit_with_message, load_checkpoint, override_parameters, printable, script_parameters

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
keep_difficult = True  # also train on objects that are marked as difficult, as the Caffe code does
augment = ("distort", "zoom_out", "crop", "flip")  # which of these; (): none, to check that a network can overfit
skip_corrupt = False  # True: leave out images that are missing or damaged, instead of stopping
workers = min(4, utils.count_cores())  # processes that prepare images; 0: the training process itself

# Model
network = "ssd300_vgg16"  # a row of NETWORKS in model.py, such as "ssd300_tiny"; a checkpoint brings its own
pretrained = "IMAGENET1K_V1"  # weights of the base: or "IMAGENET1K_FEATURES" (VGG-16), a file, "" for random ones
freeze_up_to = ""  # last layer of the base that is not trained, such as "conv5_3": faster, safer with few images
finetune_from = ""  # a checkpoint to start from, of any classes; the class heads of new classes start anew
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
ema_decay = 0.0  # such as 0.999, of a moving average of the weights, which is then evaluated and saved; 0: none
seed = 0  # of the initial weights, the order of the images and their augmentation

# Loss
threshold = 0.5  # overlap from which a prior matches an object
neg_pos_ratio = 3.0  # hardest negatives for each positive
alpha = 1.0  # weight of the localisation loss
n_negatives_without_objects = 0  # hardest negatives of an image without (remaining) objects; the paper: 0

# Speed
device = ""  # "cpu", "cuda:1", "mps", ...; "": the accelerator if there is one, else the CPU
bf16 = True  # bfloat16 autocast, where the hardware has units for it (CUDA, XPU; from torch 2.12 on CPUs, too)
compile_model = True  # torch.compile, on CUDA only

# Logging
save_to = "checkpoint_ssd300.pth.tar"  # the best one by mAP gets the same name with "best_" before it
overwrite = False  # True: a run that starts anew may replace these, and the log
save_every = 1000  # iterations; 0: only at the end. (After an evaluation it is saved in any case.)
evaluate_every = 0  # iterations between evaluations on the VAL lists, else TEST; the last is at the end; 0: never
metric = "11 points"  # by which the best is chosen: VOC2007's; or "area", VOC2010's; or "coco", COCO's AP
log_every = 10  # iterations between two rows of the log

# torchrun numbers the processes, over all machines and on each one; number 0 writes files and prints.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
N_PROCESSES = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def main():
    """Train by the parameters above, from the start or from a checkpoint."""
    check_parameters()
    torch_device = start_process(device)
    label_map = utils.load_label_map(data_folder)
    model, optimizer, start = start_or_resume(label_map, torch_device)  # start: how far the run was before
    progress = Progress(start, iterations, minutes, log_every, evaluate_every, save_every)
    if progress.is_complete():  # all iterations are done, or the minutes are over
        end = f"of {iterations}" if start.iteration >= iterations else f"and its {minutes:g} minutes are over"
        print_once(f"nothing to do: {checkpoint} is at iteration {start.iteration} {end}")
        return

    # What learns, and how.
    average = start_average(model, start.averaged_weights) if ema_decay else None
    criterion = MultiBoxLoss(model.priors_cxcy, threshold, neg_pos_ratio, alpha, n_negatives_without_objects)
    learning_rate = LearningRate(lr, warmup, schedule, decay_lr_at, decay_lr_by, iterations, minutes)

    # The images.
    dataset = PascalVOCDataset(
        data_folder, "TRAIN", keep_difficult, seed, skip_corrupt, augment, model.input_size, model.antialias
    )
    batches = TrainingBatches(len(dataset), batch_size, seed, start.iteration, iterations, RANK, N_PROCESSES)
    check_numbers_of_objects(dataset, model)
    loader = make_train_loader(dataset, batches, workers, torch_device)
    evaluation_loader = None
    if evaluate_every:
        evaluation_loader = make_evaluation_loader(data_folder, batch_size, workers, model, skip_corrupt)

    # What the run says and writes.
    describe_run(model, dataset, evaluation_loader, start)
    goes_on = is_own_file(checkpoint, save_to)  # False: a new run, or one that resumes from another file
    if RANK == 0 and not goes_on:
        # Delete the best checkpoint of an older run, or it would be taken for this run's. (If there is one, then
        # overwrite is True: check_parameters() has looked.)
        Path(best_path(save_to)).unlink(missing_ok=True)
    log = TrainingLog(log_path(save_to), goes_on, dataset, batches, progress)

    settings = {**script_parameters(globals()), "network": model.network}  # a resumed run's network is the checkpoint's
    hint = f"if {save_to} was saved before, --checkpoint={save_to} goes on from there"
    with ending_cleanly(log, hint):  # an error ends the program with a message and the hint
        train(
            model, average, criterion, optimizer, learning_rate, loader, evaluation_loader, progress, log,
            bf16=bf16, compile_model=compile_model, grad_clip=grad_clip, ema_decay=ema_decay, metric=metric,
            save_to=save_to, settings=settings,
        )  # fmt: skip
        describe_end(progress)
    if N_PROCESSES > 1:
        torch.distributed.destroy_process_group()


def train(
    model, average, criterion, optimizer, learning_rate,  # what learns, and how
    loader, evaluation_loader,  # the images
    progress, log,  # how far it is
    bf16, compile_model, grad_clip, ema_decay, metric, save_to,  # parameters, explained at the top of this file
    settings,
):  # fmt: skip
    """Train until the last iteration is done, the time is over, or a signal comes. Then a checkpoint is saved, too.

    average: a copy of the model, for the moving average of its weights; None: there is none.
    loader: yields a batch for each iteration that is left. evaluation_loader: None if the run never evaluates.
    settings: a dict of all parameters of the run, which its checkpoints hold.
    """
    torch_device = model.mean.device
    use_bf16 = bf16 and utils.has_bf16_units(torch_device)
    memory_format = utils.fastest_memory_format(torch_device, model)
    parallel_model = wrap_model(model, compile_model)  # the same weights: the model, compiled, or on several GPUs
    stop_signal = StopSignal()
    progress.start_clock()
    for images, boxes, labels, _ in loader:
        # One step.
        rate = learning_rate.at(progress.iteration, progress.seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]  # 1; for biases, bias_lr_factor (SGD)
        images = model.normalize(images).contiguous(memory_format=memory_format)  # (N, 3, 300, 300)
        with torch.autocast(torch_device.type, torch.bfloat16, enabled=use_bf16):
            predicted_locs, predicted_scores = parallel_model(images)  # (N, 8732, 4), (N, 8732, C)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        if grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        if average is not None:
            update_average(average, model, ema_decay, progress.iteration)
        progress.count_iteration(stop_signal)  # and see whether Ctrl-C was pressed: then it is time to stop
        log.add(loss, criterion.conf_loss, criterion.loc_loss)

        # What is it time for?
        if progress.is_time_to_log():
            log.flush(rate)  # an error if a loss is not finite; nothing is saved then
        if progress.is_time_to_evaluate():
            evaluate_and_save_best(
                model, average, optimizer, evaluation_loader, metric, progress, log, save_to, settings
            )
        if progress.is_time_to_save():  # also after an evaluation, and at the end. (Only the last one must succeed.)
            save(save_to, model, average, optimizer, progress, settings, must_succeed=progress.is_time_to_stop())
            progress.start_clock()  # on from here: the time since count_iteration() was not spent on training
        if progress.is_time_to_stop():
            break
    log.finish()


# --- Before the loop: parameters, processes, model, optimizer, data -------------------------------


def set_parameters(arguments):
    """Set the parameters above from the command line (a list of strings), and from the checkpoint of a stopped run."""
    given = override_parameters(globals(), arguments)
    path = checkpoint or finetune_from
    if not path:
        return
    saved = load_checkpoint(path)
    settings = saved.get("parameters")
    settings = settings if isinstance(settings, dict) else {}  # converted weights have none
    its_network = saved.get("network", "ssd300_vgg16")
    if "network" in given and network != its_network:
        raise ValueError(f"--network={network} does not go with {path}, which has an {its_network}: leave it out")
    if "pretrained" in given and pretrained not in ("", settings.get("pretrained")):
        raise ValueError(f"--pretrained={pretrained} does not go with {path}, which brings all weights: leave it out")
    if checkpoint and "finetune_from" in given and finetune_from:
        raise ValueError("--checkpoint goes on with a run, --finetune_from starts one: give one of them")
    if checkpoint:
        own_file = Path(checkpoint)
        last_name = Path(str(settings.get("save_to"))).name
        if own_file.name == f"best_{last_name}":
            own_file = own_file.with_name(last_name)
        new_file = save_to if "save_to" in given else str(own_file)
        is_best = Path(checkpoint).resolve() == Path(best_path(new_file)).resolve()
        if is_best and not overwrite:
            check_last(Path(new_file), saved)
        # These are this call's own. (Device and workers do not change the steps, and another machine has others.)
        own = {
            "save_to": str(own_file), "checkpoint": checkpoint, "overwrite": overwrite, "device": device,
            "workers": workers,
        }  # fmt: skip
        settings = {**settings, **own}
        for note in utils.restore_parameters(globals(), settings, given):
            print_once(f"note: {note}")


def check_last(path, best):
    """ValueError if the last checkpoint of a run is further on than the best one, from which it is to go on."""
    if not path.is_file():
        return
    try:
        last = load_checkpoint(path)["iteration"]
    except (LookupError, ValueError):
        return  # damaged: the best one may replace it
    if last > best.get("iteration", last):
        advice = f"--checkpoint={path} goes on there, --overwrite=True replaces it, --save_to names another file"
        raise ValueError(f"{path} is at iteration {last}, further than {checkpoint}: {advice}")


def check_parameters():
    """Refuse now what would fail, or go wrong, only later."""
    positive = [("batch_size", batch_size), ("iterations", iterations), ("lr", lr), ("log_every", log_every)]
    not_negative = [
        ("workers", workers), ("bias_lr_factor", bias_lr_factor), ("momentum", momentum), ("warmup", warmup),
        ("weight_decay", weight_decay), ("grad_clip", grad_clip), ("neg_pos_ratio", neg_pos_ratio), ("alpha", alpha),
        ("n_negatives_without_objects", n_negatives_without_objects), ("save_every", save_every),
        ("evaluate_every", evaluate_every), ("minutes", minutes), ("ema_decay", ema_decay), ("threshold", threshold),
        ("decay_lr_by", decay_lr_by), *(("decay_lr_at", at) for at in decay_lr_at),
    ]  # fmt: skip
    for name, value in positive:
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be more than 0")
    for name, value in not_negative:
        if isinstance(value, str) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    if momentum >= 1:
        raise ValueError(f"momentum is {momentum}; it must be less than 1, such as 0.9")
    if ema_decay >= 1:
        raise ValueError(f"ema_decay is {ema_decay}; it must be less than 1, such as 0.999")
    if optimizer_name not in ("sgd", "adamw"):
        raise ValueError(f"optimizer_name is {optimizer_name!r}; it must be 'sgd' or 'adamw'")
    if schedule not in ("steps", "cosine"):
        raise ValueError(f"schedule is {schedule!r}; it must be 'steps' or 'cosine'")
    if sync_batch_norm and N_PROCESSES > 1 and utils.choose_device(device).type != "cuda":
        raise ValueError("sync_batch_norm is True, which needs CUDA: --sync_batch_norm=False goes on without it")
    check_metric(metric, 0.5)
    check_files(save_to, checkpoint, overwrite)
    if not checkpoint and is_own_file(finetune_from, save_to):
        raise ValueError(f"finetune_from is {finetune_from}, which this run would replace: name another --save_to")


def check_files(save_to, checkpoint, overwrite):
    """ValueError if a run cannot write its files, or if they are there already and are not its own."""
    folder = Path(save_to).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(save_to).is_dir():
        raise ValueError(f"save_to is {save_to!r}: no file can be written there; make the folder, or name another")
    files = [save_to, best_path(save_to), log_path(save_to)]
    for path in files:
        if Path(path).exists() and not is_own_file(checkpoint, save_to) and not overwrite:
            to_resume = f"--checkpoint={save_to} goes on with its run, " if Path(save_to).exists() else ""
            advice = f"{to_resume}--overwrite=True replaces it, --save_to names another file"
            raise ValueError(f"{path} is there already: {advice}")


def is_own_file(path, save_to):
    """Whether the checkpoint that a run starts from, if there is one, is a file that the run saves to."""
    files = [Path(name).resolve() for name in (save_to, best_path(save_to))]
    return bool(path) and Path(path).resolve() in files


def best_path(save_to):
    """Where the best checkpoint by mAP goes: beside the last one."""
    return str(Path(save_to).with_name(f"best_{Path(save_to).name}"))


def log_path(save_to):
    """Where the log goes: checkpoint_ssd300.csv for checkpoint_ssd300.pth.tar."""
    return re.sub(r"\.(pth\.tar|pth|pt)$", "", save_to) + ".csv"


def check_numbers_of_objects(dataset, model):
    """ValueError, naming the image, if one has more objects than there are priors to predict them."""
    n_objects = np.diff(dataset.starts)  # of each image
    n_priors = len(model.priors_cxcy)
    most = n_objects.argmax()
    if n_objects[most] > n_priors:
        has = f"{dataset.image_paths[most]} has {n_objects[most]} objects"
        raise ValueError(
            f"{has}, more than the {n_priors} priors of {model.network}: cut it into tiles, or leave it out"
        )


def start_process(device_name):
    """Join the other processes, if there are any; returns this one's torch.device."""
    torch_device = set_up_device(device_name, LOCAL_RANK)
    if N_PROCESSES > 1:  # while the first one evaluates, the others wait: longer than the ten minutes of the default
        backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return torch_device


def set_up_device(name="", local_rank=0):
    """The torch.device of a process, with PyTorch's settings for speed. name: as for `choose_device()`."""
    torch_device = utils.choose_device(name)
    if torch_device.type != "cuda":
        return torch_device
    if torch_device.index is None:
        torch_device = torch.device("cuda", local_rank)
    torch.cuda.set_device(torch_device)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: the fastest algorithms pay off
    torch.set_float32_matmul_precision("high")  # TF32, where autocast leaves float32
    return torch_device


def max_over_processes(*values):
    """An all-reduce of the maximum, of each value. The processes meet on the CPU, so no GPU is waited for."""
    values = torch.tensor(values, dtype=torch.float64)
    if N_PROCESSES > 1:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.tolist()


def print_once(text):
    """Print a line, in the main process only, without breaking the progress bar."""
    if RANK == 0:
        tqdm.write(text, file=sys.stdout)


class Start(NamedTuple):
    """Where a run starts: anew, or where the checkpoint was that it resumes."""

    weights: str  # where they come from, in words
    iteration: int = 0
    seconds: float = 0.0  # of training before
    best_map: float = -1.0
    averaged_weights: dict | None = None  # the state dict of the moving average, if the checkpoint has one


def start_or_resume(label_map, torch_device):
    """Build model and optimizer, from `checkpoint`, from `finetune_from`, or anew; returns both and a Start."""
    torch.manual_seed(seed)
    if checkpoint:
        saved = load_checkpoint(checkpoint)
        model = model_from_checkpoint(saved, checkpoint)
        check_resumable(saved, label_map, checkpoint)
    elif finetune_from:
        saved = load_checkpoint(finetune_from)
        model = model_from_checkpoint(saved, finetune_from, label_map)
        new = [name for name in label_map if name not in saved["label_map"]]
        heads = f"the class heads start anew for {printable(', '.join(new))}" if new else "the class heads included"
        start = Start(f"{finetune_from}, of a checkpoint with {len(saved['label_map'])} classes; {heads}")
    else:
        model = SSD300(len(label_map), network)
        start = Start(load_base(model, pretrained))
    model.label_map = label_map
    if freeze_up_to:
        model.freeze_base(freeze_up_to)
    model = model.to(torch_device, memory_format=utils.fastest_memory_format(torch_device, model)).train()
    if sync_batch_norm and N_PROCESSES > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, torch_device, optimizer_name, lr, momentum, weight_decay, bias_lr_factor)
    if checkpoint:
        start = restore_training_state(saved, model, optimizer, checkpoint, metric, save_to)
        check_same_iteration(start)
    return model, optimizer, start


def load_base(model, weights):
    """Start a new model's base from pretrained weights, if there are any; returns in words what it starts from."""
    is_narrow = NETWORKS[model.network].divisor > 1  # nobody has trained a narrow network on ImageNet
    if not weights or (is_narrow and weights == "IMAGENET1K_V1"):
        return "random"
    # The first process of each machine downloads them; the others then find them in its cache.
    if LOCAL_RANK == 0:
        load_pretrained(model, weights)
    max_over_processes(0)  # wait for it
    if LOCAL_RANK > 0:
        load_pretrained(model, weights)
    return f"{weights} for the base, the rest random"


def check_resumable(saved, label_map, path):
    """Refuse a checkpoint of another data set, one without a training state, or a metric that would lose its best."""
    advice = f"--finetune_from={path} starts from its weights"
    if saved["label_map"] != label_map:
        before = printable(", ".join(saved["label_map"]))
        now = printable(", ".join(label_map))
        raise ValueError(f"{path} has the classes {before}; {data_folder} has {now}; {advice}")
    if "optimizer" not in saved:
        raise ValueError(f"{path} holds weights only; {advice}")
    if metric != metric_of(saved) and evaluate_every and Path(best_path(save_to)).exists() and not overwrite:
        found = f"{best_path(save_to)} is the best by the metric {metric_of(saved)}; one that is chosen by {metric}"
        raise ValueError(f"{found} would replace it: name another file with --save_to, or say --overwrite=True")


def metric_of(saved):
    """The metric by which the run of a checkpoint chose its best model."""
    settings = saved.get("parameters")
    return settings.get("metric", "11 points") if isinstance(settings, dict) else "11 points"


def restore_training_state(saved, model, optimizer, path, metric, save_to):
    """Bring back the weights in training, the optimizer's state, random states and position; returns the Start."""
    averaged_weights = None
    try:
        if "training_model" in saved:  # then "model" holds the moving average
            averaged_weights = saved["model"]
            utils.check_finite(saved["training_model"])
            model.load_state_dict(saved["training_model"])
        restore_optimizer(optimizer, saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
        iteration = saved["iteration"]
        best_map = saved["best_map"]
        seconds = saved.get("seconds", 0.0)
        if [type(iteration), type(best_map), type(seconds)] != [int, float, float] or iteration < 0:
            raise ValueError(f"iteration {iteration!r}, best_map {best_map!r}, seconds {seconds!r}")
        is_same_metric = metric_of(saved) == metric
        has_best_file = is_own_file(path, save_to) and Path(best_path(save_to)).exists()
        if not (is_same_metric and has_best_file):
            best_map = -1.0  # not to be compared, or of a file that is elsewhere
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its training state cannot be restored ({printable(error)})"
        raise ValueError(f"{path}: {reason}; --finetune_from={path} starts from its weights") from error
    return Start(f"resumed from {path} at iteration {iteration}", iteration, seconds, best_map, averaged_weights)


def check_same_iteration(start):
    """ValueError if the processes resume at different iterations: only the first machine of a run saves."""
    last, negative = max_over_processes(start.iteration, -start.iteration)
    first = -negative  # the lowest number is the highest of the negative ones
    if first != last:
        iterations = f"{first:.0f} to {last:.0f}"
        raise ValueError(f"the processes resume at iterations {iterations}: give all machines the same checkpoint")


def restore_optimizer(optimizer, saved):
    """Load an optimizer's state, in the memory format of this machine; its settings, such as the weight decay, stay as
    they are in this run. ValueError if it does not fit."""
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    entries = {"momentum_buffer"} if is_sgd else {"step", "exp_avg", "exp_avg_sq"}
    if any(set(state) != entries for state in saved["state"].values()):
        raise ValueError(f"it was not saved by {'sgd' if is_sgd else 'adamw'}")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # This run's settings come before the state: if they say "fused", AdamW's `step` is put on the GPU, too.
    groups = [{**group, **own} for group, own in zip(saved["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
            elif name != "step":
                raise ValueError(f"{name} has another shape than its parameter")
    # Layers that were frozen before have no momentum yet. Fused SGD wants it of all parameters or of none.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if is_sgd and group["momentum"] and parameter.requires_grad:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def make_optimizer(model, torch_device, name="sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4, bias_lr_factor=2.0):
    """SGD with momentum, or AdamW. Weights of convolutions decay; their biases and what batch normalisation learns,
    which only shift and scale, do not. In SGD the biases learn faster, as in the Caffe code."""
    weights = []
    biases = []
    norms = []
    for module in model.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                norms.append(parameter)
            elif parameter_name == "bias":
                biases.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"params": weights, "lr_factor": 1.0, "weight_decay": weight_decay},
        {"params": biases, "lr_factor": bias_lr_factor if name == "sgd" else 1.0, "weight_decay": 0.0},
    ]
    if norms:
        groups.append({"params": norms, "lr_factor": 1.0, "weight_decay": 0.0})
    is_fused = torch_device.type == "cuda"
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=is_fused)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=is_fused)


def start_average(model, weights):
    """A copy of the model for the moving average. weights: the average so far, a state dict; None: the model's own."""
    average = copy.deepcopy(model)
    average.load_state_dict(weights or model.state_dict())
    return average


def make_train_loader(dataset, batches, workers, torch_device):
    """One loader for the whole run: no pause between epochs, in which workers would start anew."""
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, worker_init_fn=ignore_signals,
        num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=torch_device.type == "cuda",
        timeout=600 if workers else 0,  # seconds; for workers that hang. A dead one is noticed at once.
        generator=torch.Generator(),  # the loader's own: else it would draw from the one whose state is saved
    )  # fmt: skip


def make_evaluation_loader(data_folder, batch_size, workers, model, skip_corrupt):
    """The VAL lists, or where there are none the TEST lists, in order."""
    split = "VAL" if Path(data_folder, "VAL_images.json").exists() else "TEST"
    share = math.ceil(batch_size / N_PROCESSES)  # images that this process trains on at a time: they fit into memory
    loader = make_test_loader(data_folder, share, workers, model, skip_corrupt, split)
    loader.worker_init_fn = ignore_signals  # this and the generator: as in make_train_loader()
    loader.generator = torch.Generator()
    return loader


def ignore_signals(_worker):
    """Ctrl-C, and a cluster's SIGTERM, may reach the workers too; it is the main process that decides to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def ending_cleanly(log, hint):
    """However training ends: the log is closed, an error becomes a message with advice, and no worker is left over."""
    try:
        with exit_with_message(hint), contextlib.closing(log):
            yield
    finally:
        end_workers()


def end_workers():
    """Kill what an error may have left over: Python sends its processes SIGTERM, which these ignore, and waits."""
    utils.stop_watching_workers()
    for process in multiprocessing.active_children():
        process.kill()


def wrap_model(model, compile_model):
    """The model as the loop calls it: compiled, and with its gradients averaged over all processes."""
    is_cuda = model.mean.is_cuda
    wrapped = model
    if N_PROCESSES > 1:
        device_ids = [model.mean.device.index] if is_cuda else None
        # Buffers need no broadcast: the statistics of batch normalisation, the only ones that change, are not
        # used in training. The first process evaluates with its own, and saves them.
        wrapped = DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return torch.compile(wrapped) if compile_model and is_cuda else wrapped


def describe_run(model, dataset, evaluation_loader, start):
    """Say what is trained on what, for how long, and what looks like a mistake."""
    names = printable(", ".join(name for name in dataset.label_map if name != "background"))
    n_weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    kind = "bfloat16" if bf16 and utils.has_bf16_units(model.mean.device) else "float32"
    print_once(f"data     {data_folder}: {len(dataset)} images, {len(dataset.labels)} objects")
    print_once(f"classes  {len(dataset.label_map) - 1}: {names}")
    devices = f"{N_PROCESSES} x {model.mean.device}"
    print_once(f"network  {model.network}, {n_weights:.1f} million weights, {kind}, {devices}")
    print_once(f"weights  {start.weights}")
    if minutes:
        used = f", {start.seconds / 60:.1f} of them used" if start.seconds else ""
        length = f"{minutes:g} minutes{used}, in batches of {batch_size} images from iteration {start.iteration} on"
    else:
        epochs = iterations * batch_size / len(dataset)
        length = f"iterations {start.iteration} to {iterations} of {batch_size} images, {epochs:.1f} epochs in all"
    print_once(f"run      {length}")
    averaging = f", averaged weights (ema_decay {ema_decay})" if ema_decay else ""
    print_once(f"         {optimizer_name}, lr {lr:g}, {schedule}, warm-up {warmup}{averaging}")
    print_once(f"saves    {save_to}, the log in {log_path(save_to)}")
    if evaluation_loader is not None and evaluation_loader.dataset.split == "TEST":
        print_once("warning: without VAL lists the best model is chosen on TEST: its score there then flatters")
    if warmup > iterations:
        print_once(f"warning: the warm-up, {warmup}, is longer than the run; --warmup={iterations // 10} is usual")


# --- Within the loop: progress, signals, learning rate, average; evaluate, save -------------------


class Progress:
    """How far a run is, and what it is time for. All processes of the run get the same answers."""

    def __init__(self, start, iterations, minutes, log_every, evaluate_every, save_every):
        """start: a Start, which says how far the run was before. The others are explained at the top of this file."""
        self.iteration = start.iteration  # iterations so far; also the number of the next one, counted from 0
        self.seconds = start.seconds  # of training so far
        self.best_map = start.best_map  # highest mAP of the evaluations so far; -1: there was none
        self.stopped_by = 0  # number of the signal that came to stop the run; 0: none came
        self.clock = 0.0  # what time.perf_counter() said when `seconds` was last counted
        self.iterations = iterations
        self.minutes = minutes
        self.log_every = log_every
        self.evaluate_every = evaluate_every
        self.save_every = save_every

    def start_clock(self):
        """Count seconds from now on: what the program did before was not training."""
        self.clock = time.perf_counter()

    def count_iteration(self, stop_signal):
        """Count the iteration that was just done, and its seconds, and see whether a signal came.

        The processes must stop after the same iteration, and soon: torchrun kills them 30 s after a signal. So after
        each one they agree on the highest of their seconds, and on the highest of their signals' numbers.
        """
        now = time.perf_counter()
        step_seconds = now - self.clock
        self.clock = now
        self.iteration += 1
        seconds, number = max_over_processes(self.seconds + step_seconds, stop_signal.received)
        self.seconds = seconds
        self.stopped_by = int(number)

    def is_complete(self):
        """Whether the last iteration is done, or the time is over."""
        is_time_over = self.minutes > 0 and self.seconds >= 60 * self.minutes  # minutes = 0: there is no clock
        return self.iteration >= self.iterations or is_time_over

    def is_time_to_stop(self):
        return self.is_complete() or self.stopped_by > 0

    def is_time_to_evaluate(self):
        """Every so many iterations and at the end; never after a signal, for it would take too long."""
        if self.evaluate_every == 0 or self.stopped_by > 0:
            return False
        return self.is_complete() or self.iteration % self.evaluate_every == 0

    def is_time_to_save(self):
        """Every so many iterations, after each evaluation, and at the end."""
        is_turn = self.save_every > 0 and self.iteration % self.save_every == 0
        return is_turn or self.is_time_to_evaluate() or self.is_time_to_stop()

    def is_time_to_log(self):
        """Every so many iterations, and before a checkpoint is saved."""
        return self.iteration % self.log_every == 0 or self.is_time_to_save()


class StopSignal:
    """Takes note of SIGINT (Ctrl-C) or SIGTERM: the run then ends after the iteration, with a checkpoint."""

    def __init__(self):
        self.received = 0  # the number of the signal; 0: none came
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number, _frame):
        """A second Ctrl-C ends the process at once. SIGTERM may well come twice, from a cluster and from torchrun."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


class LearningRate(NamedTuple):
    """The learning rate of every iteration: a linear warm-up, then down in steps, or along half a cosine."""

    lr: float
    warmup: int
    schedule: str  # "steps" or "cosine"
    decay_lr_at: tuple
    decay_lr_by: float
    iterations: int
    minutes: float  # 0: no clock

    def at(self, iteration, seconds):
        """The rate of an iteration, counted from 0, after so many seconds of training."""
        position = iteration
        if self.minutes:
            # After half of the minutes the schedule is half way, as after half of the iterations. The run ends by
            # whichever comes first, so whichever is further counts.
            share_of_time = seconds / (60 * self.minutes)
            position = max(iteration, share_of_time * self.iterations)
        if self.schedule == "cosine":
            factor = (1 + math.cos(math.pi * min(1.0, position / self.iterations))) / 2
        else:
            n_steps = sum(position >= at for at in self.decay_lr_at)
            factor = self.decay_lr_by**n_steps
        if iteration < self.warmup:  # it counts steps, whatever the clock says
            factor *= (iteration + 1) / self.warmup
        return self.lr * factor


@torch.no_grad()
def update_average(average, model, decay, iteration):
    """Move the averaged weights a little towards the model's. (The statistics of batch normalisation are averages.)"""
    decay = min(decay, (1 + iteration) / (10 + iteration))  # shorter at the start: the first weights are soon forgotten
    for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)  # decay * averaged + (1 - decay) * parameter
    for averaged, buffer in zip(average.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)


def evaluate_and_save_best(model, average, optimizer, loader, metric, progress, log, save_to, settings):
    """Evaluate, and save the checkpoint as the best one if its mean average precision is higher than any before."""
    try:
        mean_ap = evaluate_and_log(model if average is None else average, loader, metric, progress, log)
    except Exception:  # an image that cannot be read must not cost the training so far
        save(save_to, model, average, optimizer, progress, settings)
        raise
    if mean_ap > progress.best_map:
        best_before = progress.best_map
        progress.best_map = mean_ap  # first, because the checkpoint holds it
        is_saved = save(best_path(save_to), model, average, optimizer, progress, settings)
        if not is_saved:  # the file holds an older model, which a later one has to beat
            progress.best_map = best_before


def evaluate_and_log(model, loader, metric, progress, log):
    """The mean average precision, in all processes; the first one computes it, the others wait."""
    mean_ap = -1.0
    if RANK == 0:
        average_precisions, mean_ap = evaluate(loader, model, metric=metric)
        model.train()
        split = loader.dataset.split
        log.write_evaluation(mean_ap, average_precisions)
        print_once(f"iteration {progress.iteration}: mAP {mean_ap:.4f} on {split}")
        n_skipped = len(loader.dataset.skipped_images())
        if n_skipped:
            print_once(f"{n_skipped} {split} images were missing or damaged; their objects count as missed")
    return max_over_processes(mean_ap)[0]


def save(path, model, average, optimizer, progress, settings, must_succeed=False):
    """Save all that a resumed run needs. Returns whether it worked: a disk may be full, or the file locked.

    must_succeed: whether a failure is an error; else it is a warning, and the run goes on.
    """
    if RANK > 0:
        return True
    for tensor in model.state_dict().values():
        if not tensor.isfinite().all():
            advice = f"{path} is left as it was. Try a lower lr (--lr), a longer --warmup, or --grad_clip=10"
            raise FloatingPointError(f"weights are no longer finite at iteration {progress.iteration}; {advice}")
    state = {
        **model_state(model if average is None else average),
        "optimizer": optimizer.state_dict(),
        "iteration": progress.iteration, "seconds": progress.seconds, "best_map": progress.best_map,
        # Of torch's generators. (Data order and augmentation need none: see datasets.py.)
        "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "parameters": settings,
    }  # fmt: skip
    if average is not None:
        state["training_model"] = model.state_dict()
    try:
        utils.save_checkpoint(state, path)
        return True
    except OSError as error:
        if must_succeed:
            raise
        print_once(f"warning: {error}. The run goes on, and will try to save again")
        return False


def describe_end(progress):
    """Say what was saved and where; end with the exit code of a signal, if one asked for the end."""
    iteration = progress.iteration
    if progress.stopped_by:
        name = signal.Signals(progress.stopped_by).name
        advice = f"go on with --checkpoint={utils.quote(save_to)}"
        if progress.is_complete():
            advice = f"it was the last, and {save_to} is saved; eval.py makes an evaluation that was due"
        print_once(f"stopped by {name} after iteration {iteration}; {advice}")
        raise SystemExit(128 + progress.stopped_by)
    print_once(f"done after iteration {iteration}, {datetime.timedelta(seconds=round(progress.seconds))} of training")
    print_once(f"saved    {save_to}, the log in {log_path(save_to)}")
    best = save_to
    if progress.best_map >= 0 and Path(best_path(save_to)).exists():
        best = best_path(save_to)
        print_once(f"         {best}, the best so far, mAP {progress.best_map:.4f}")
    best = utils.quote(best)
    print_once(f"next     python eval.py --data_folder={utils.quote(data_folder)} --checkpoint={best}")
    print_once(f"         python detect.py --checkpoint={best} --images=YOUR_PHOTOS")


# --- The log --------------------------------------------------------------------------------------

LOG_COLUMNS = ("iteration", "epoch", "loss", "conf_loss", "loc_loss", "lr", "images_per_second", "mAP")


class TrainingLog:
    """The progress bar, the CSV file, and the check that every loss is finite.

    Losses stay on the device until `flush()`, so that no iteration waits for the one before it.
    """

    def __init__(self, path, goes_on, dataset, batches, progress):
        """path: the CSV file. goes_on: whether the run goes on in the log of an earlier part of it."""
        self.path = path
        self.dataset = dataset
        self.batches = batches
        self.progress = progress  # of the run: the loop counts its iterations and seconds, the log reads them
        self.class_names = list(dataset.label_map)[1:]  # a column each, for the average precision
        self.columns = [*LOG_COLUMNS, *self.class_names]
        self.losses = []  # since the last flush; (3,) tensors on the device: the loss and its two parts
        self.flushed_at = progress.seconds  # of training, at the last flush
        self.first_flush = None  # iterations and seconds until then: the first ones are slower
        self.has_told_speed = False
        if progress.minutes:
            form = "{l_bar}{bar}| {n:.1f} of {total:.1f} minutes{postfix}"
            self.bar = tqdm(total=progress.minutes, initial=progress.seconds / 60, bar_format=form, disable=RANK > 0)
        else:
            self.bar = tqdm(total=progress.iterations, initial=progress.iteration, unit="it", disable=RANK > 0)
        self.file_mode = "w"  # a new file, made when its first row is written
        if goes_on and progress.iteration > 0 and Path(path).is_file() and RANK == 0:
            self.file_mode = "a"
            self.drop_rows_after(progress.iteration)

    def add(self, loss, conf_loss, loc_loss):
        """Take note of the losses of the iteration that is done."""
        self.losses.append(torch.stack([loss.detach(), conf_loss, loc_loss]))
        if self.progress.minutes:
            minutes = min(self.progress.seconds / 60, self.progress.minutes)
            self.bar.update(minutes - self.bar.n)
        else:
            self.bar.update(1)

    def flush(self, rate):
        """Check the losses since the last flush; show and write their mean. rate: the learning rate now."""
        losses = torch.stack(self.losses)  # (n, 3)
        # The mean over the processes is the loss of the whole batch, since each has divided its own losses by its share
        # of all positives: see MultiBoxLoss.compute_divisor().
        if N_PROCESSES > 1:
            torch.distributed.all_reduce(losses)
            losses /= N_PROCESSES
        losses = losses.tolist()
        self.losses = []
        first = self.progress.iteration - len(losses)  # the iteration of the first one
        for iteration, (loss, _, _) in enumerate(losses, start=first):
            if not math.isfinite(loss):
                self.stop_at_bad_loss(iteration, loss)
        loss = statistics.fmean(row[0] for row in losses)
        conf_loss = statistics.fmean(row[1] for row in losses)
        loc_loss = statistics.fmean(row[2] for row in losses)
        speed = len(losses) * self.batches.batch_size / (self.progress.seconds - self.flushed_at)
        self.flushed_at = self.progress.seconds
        self.bar.set_postfix({"loss": f"{loss:.3f}", "lr": f"{rate:.1e}", "img/s": f"{speed:.1f}"})
        self.write(f"{loss:.6f}", f"{conf_loss:.6f}", f"{loc_loss:.6f}", f"{rate:.3e}", f"{speed:.1f}")
        self.tell_speed()

    def write_evaluation(self, mean_ap, average_precisions):
        """Write the mean average precision, and that of each class: a dict by name, NaN where there is no object."""
        by_class = [average_precisions.get(name, math.nan) for name in self.class_names]
        by_class = ["" if math.isnan(value) else f"{value:.6f}" for value in by_class]
        self.write("", "", "", "", "", f"{mean_ap:.6f}", *by_class)

    def write(self, *fields):
        """Append a row of the columns from the third on. A full disk costs the row, not the run."""
        if RANK > 0:
            return
        epoch = self.progress.iteration * self.batches.batch_size / len(self.dataset)
        row = [self.progress.iteration, f"{epoch:.3f}", *fields]
        row += [""] * (len(self.columns) - len(row))
        rows = [self.columns, row] if self.file_mode == "w" else [row]
        try:
            with open(self.path, self.file_mode, newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.writer(file).writerows(rows)
            self.file_mode = "a"
        except OSError as error:
            print_once(f"warning: {self.path} lacks a row, it cannot be written: {error}; the run goes on")

    def drop_rows_after(self, iteration):
        """Keep the rows up to an iteration. The log may be further on than the checkpoint: then later ones come again.

        What a kill, or a crash of the machine, has left half written or filled with zeros, is removed, too.
        """
        rows = [self.columns]
        text = Path(self.path).read_text(encoding="utf-8", errors="replace")
        for row in csv.reader(text.replace("\0", "").splitlines()):
            if len(row) == len(self.columns) and row[0].isdecimal() and int(row[0]) <= iteration:
                rows.append(row)
        new_text = io.StringIO(newline="")
        csv.writer(new_text).writerows(rows)
        utils.write_file(self.path, new_text.getvalue().encode("utf-8", "backslashreplace"))

    def tell_speed(self):
        """Say once, ten iterations after the first flush, how long an iteration takes, and the rest of the run."""
        done = self.progress.iteration
        if self.first_flush is None:
            self.first_flush = (done, self.progress.seconds)
        first_done, first_seconds = self.first_flush
        if self.has_told_speed or done < first_done + 10:
            return
        self.has_told_speed = True
        step = (self.progress.seconds - first_seconds) / (done - first_done)
        to_go = datetime.timedelta(seconds=round(step * (self.progress.iterations - done)))
        print_once(f"{step:.2f} s an iteration" + ("" if self.progress.minutes else f": about {to_go} to go"))

    def stop_at_bad_loss(self, iteration, loss):
        """End the run, naming what was in the batch; the checkpoint on disk is from before."""
        files = sorted({str(self.dataset.image_paths[index]) for _, index in self.batches.batch(iteration)})
        names = "\n  ".join(printable(file) for file in files)
        raise FloatingPointError(
            f"the loss of iteration {iteration} is {loss}. The checkpoint is as it was saved before. Try a lower --lr, "
            "a longer --warmup, or --grad_clip=10; if it happens again with the same images, look at their boxes. "
            f"The images of this batch:\n  {names}"
        )

    def finish(self):
        """Close the bar at the end of the loop; there all processes bring together which images they skipped."""
        self.bar.close()
        if N_PROCESSES > 1:
            torch.distributed.all_reduce(self.dataset.skipped, torch.distributed.ReduceOp.MAX)

    def close(self):
        """Close the bar, and say which images were skipped, however the run ends."""
        self.bar.close()
        skipped = self.dataset.skipped_images()
        if skipped:
            names = "\n  ".join(printable(path) for path in skipped)
            print_once(f"skipped {len(skipped)} images that were missing or damaged:\n  {names}")


if __name__ == "__main__":
    with exit_with_message():
        set_parameters(sys.argv[1:])
        main()
