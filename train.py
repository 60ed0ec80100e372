"""Train SSD300.

    python train.py                                            the paper's recipe, from ImageNet weights
    python train.py --checkpoint=checkpoint_ssd300.pth.tar     go on where a stopped run was
    torchrun --nproc_per_node=4 train.py                       the same run on 4 GPUs

Reads the lists that create_data_lists.py wrote into `data_folder`. Writes the checkpoint and a log (CSV).
Any parameter below can be overridden on the command line with --name=value.
"""

import contextlib
import csv
import datetime
import io
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset, TrainingBatches
from eval import evaluate, make_test_loader
from model import (
    SSD300,
    MultiBoxLoss,
    fastest_memory_format,
    has_bf16_units,
    load_other_classes,
    load_pretrained,
    model_from_checkpoint,
    model_state,
)
from utils import (
    advice_for,
    exit_with_message,
    load_checkpoint,
    override_parameters,
    printable,
    save_checkpoint,
    script_parameters,
    write_file,
)

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
keep_difficult = True  # also train on objects that are marked as difficult, as the Caffe code does
augment = True  # False: images are only resized, as in evaluation (to check that a network can learn a few by heart)
skip_corrupt = False  # True: leave out images that cannot be decoded, instead of stopping
workers = 4  # processes that prepare images; 0: the training process itself

# Model
pretrained = "IMAGENET1K_V1"  # or "IMAGENET1K_FEATURES", a file with a VGG-16 state dict, or "" for random
freeze_vgg = False  # True: conv1_1 to conv5_3 stay as they are: faster (on a CPU three times), safer with few images
finetune_from = ""  # a checkpoint to start from, of any classes; the class heads of other classes start anew
checkpoint = ""  # a checkpoint of the same run, to resume it; "": start anew

# Optimisation: the paper's recipe for Pascal VOC 2007 + 2012
batch_size = 32  # images an iteration, over all GPUs
iterations = 120_000  # in all, those before a resume included
lr = 1e-3  # of the weights
bias_lr_factor = 2.0  # learning rate of the biases, as a multiple of the weights'
momentum = 0.9
weight_decay = 5e-4  # of the weights; biases have none
warmup = 500  # iterations over which the learning rate rises linearly to `lr`; 0: none
decay_lr_at = (80_000, 100_000)  # iterations at which the learning rate is multiplied by `decay_lr_by`
decay_lr_by = 0.1
grad_clip = 0.0  # largest norm of the gradient, all parameters together; 0: not clipped
seed = 0  # of the initial weights, the order of the images and their augmentation

# Loss
threshold = 0.5  # overlap from which a prior matches an object
neg_pos_ratio = 3  # hardest background priors for each matched one
alpha = 1.0  # weight of the localisation loss
# Hardest background priors of an image without objects; the paper has none. (An image whose objects were all left
# out, by keep_difficult = False, counts as one.)
n_negatives_without_objects = 0

# Speed
bf16 = True  # bfloat16 autocast, where the hardware has units for it (CUDA; CPUs with AVX512-BF16 or AMX)
compile_model = True  # torch.compile, on CUDA only

# Logging
save_to = "checkpoint_ssd300.pth.tar"  # the best one by mAP gets the same name with "best_" before it
save_every = 1000  # iterations; 0: at the end only
evaluate_every = 0  # iterations between evaluations on the TEST lists; 0: never
log_file = "train_log.csv"  # "": none; a run that starts anew writes over that of an earlier one
log_every = 10  # iterations between two rows of the log


def main():
    check_parameters()
    rank, world_size, device = start_processes()
    dataset = PascalVOCDataset(
        data_folder, "TRAIN", keep_difficult, seed, skip_corrupt, None if augment else ()
    )
    if evaluate_every:
        make_test_loader(data_folder, batch_size, workers)  # lists that cannot be read are an error now, not later
    model, optimizer, start, best_map, to_evaluate = start_or_resume(dataset.label_map, device)
    if start > iterations or (start == iterations and not to_evaluate):
        say(f"nothing to do: {checkpoint} is at iteration {start} of {iterations}")
        return
    batches = TrainingBatches(len(dataset), batch_size, seed, start, iterations, rank, world_size)
    criterion = MultiBoxLoss(model.priors_cxcy, threshold, neg_pos_ratio, alpha, n_negatives_without_objects)
    log = TrainingLog(dataset, batches, is_main=rank == 0)
    try:
        if to_evaluate:  # the run was stopped or killed before it came to that
            best_map = evaluate_and_keep_best(model, optimizer, log, start, best_map)
            save(save_to, model, optimizer, start, best_map)
        train(model, criterion.to(device), optimizer, batches, log, best_map)
    except (RuntimeError, MemoryError, OSError) as error:
        advice = advice_for(error)
        if advice is None:
            raise
        kept = f"Nothing is lost since {save_to} was saved last, if it was; go on with --checkpoint={save_to}"
        raise SystemExit(f"error: {advice}\n{kept}\n{error}") from error
    finally:
        log.close()
        log.report_skipped()
        end_workers()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(model, criterion, optimizer, batches, log, best_map):
    """Train until the last iteration, or until a signal asks to stop; saves a checkpoint in both cases."""
    device = model.mean.device
    use_bf16, memory_format = bf16 and has_bf16_units(device), fastest_memory_format(device, model.network)
    network = wrap_network(model)
    stop = StopRequest()
    loader = make_train_loader(log.dataset, batches, device)
    done = batches.iterations.start
    for iteration, (images, boxes, labels, _) in zip(batches.iterations, loader, strict=True):
        set_learning_rate(optimizer, iteration)
        images = model.normalize(images).contiguous(memory_format=memory_format)  # (N, 3, 300, 300)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            predicted_locs, predicted_scores = network(images)  # (N, 8732, 4), (N, 8732, C)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        log.add(loss)

        done = iteration + 1  # iterations
        ends, stops = done == iterations, stop.is_requested_alone()
        if ends or stops or any(is_due(done, every) for every in (log_every, save_every, evaluate_every)):
            log.flush(done, optimizer)  # stops here if a loss was not finite: before anything is saved
            stops = stop.is_requested_anywhere(device)
        evaluates = is_due(done, evaluate_every)
        if ends or stops or evaluates or is_due(done, save_every):
            save(save_to, model, optimizer, done, best_map, to_evaluate=evaluates)
        if evaluates and not stops:  # saved before: an evaluation that fails costs nothing
            best_map = evaluate_and_keep_best(model, optimizer, log, done, best_map)
            save(save_to, model, optimizer, done, best_map)
        if stops:
            break
    log.gather_skipped(device)
    stop.exit_if_requested(done)


def is_due(done, every):
    """Whether something that happens `every` so many iterations (0: never) is to happen now."""
    return every > 0 and done % every == 0


def end_workers():
    """End the loaders' processes that an error left behind.

    They ignore SIGTERM (see `ignore_signals()`), with which Python would end them at exit, to wait for ever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the death of a worker for an error
    for process in multiprocessing.active_children():
        process.kill()


# ----------------------------------------------------------------------------------------------
# Before the loop: processes, model, optimizer, data
# ----------------------------------------------------------------------------------------------


def check_parameters():
    """Refuse now what would fail, or go wrong, only later."""
    not_negative = ("workers", "bias_lr_factor", "momentum", "weight_decay", "warmup", "grad_clip", "neg_pos_ratio")
    not_negative += ("alpha", "n_negatives_without_objects", "save_every", "evaluate_every")
    for name in not_negative:
        if not 0 <= globals()[name] < math.inf:
            raise ValueError(f"{name} is {globals()[name]}; it must be 0 or more")
    for name in ("batch_size", "iterations", "lr"):
        if not 0 < globals()[name] < math.inf:
            raise ValueError(f"{name} is {globals()[name]}; it must be more than 0")
    folder = Path(save_to).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(save_to).is_dir():
        raise ValueError(f"save_to is {save_to!r}: no file can be written there; make the folder, or name another")
    if log_every < 1:
        raise ValueError(f"log_every is {log_every}; losses are checked as often as they are logged: 1 or more")


def start_processes():
    """Find this process's place and device; torchrun tells both, and without it there is one process.

    Returns rank, world_size and a torch.device.
    """
    device = set_up_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        return 0, 1, device
    # While the first process evaluates, the others wait for it: longer than the ten minutes of the default.
    timeout = datetime.timedelta(hours=2)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def set_up_device(local_rank=0):
    """The device of a process, with PyTorch's settings for speed."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # all batches have one shape: the fastest algorithms pay off
    torch.set_float32_matmul_precision("high")  # TF32, where autocast leaves float32
    return device


def is_main_process():
    """Whether this is the process that writes files and prints."""
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return is_alone or torch.distributed.get_rank() == 0


def say(text):
    """Print a line, in the main process only, without breaking the progress bar."""
    if is_main_process():
        tqdm.write(text, file=sys.stdout)


def start_or_resume(label_map, device):
    """Build model and optimizer, from `checkpoint`, from `finetune_from`, or anew.

    Returns the model on `device`, the optimizer, the iteration to start at, the best mAP so far, and whether the
    model is still to be evaluated before it goes on.
    """
    torch.manual_seed(seed)
    if checkpoint:
        saved = load_checkpoint(checkpoint)
        model = model_from_checkpoint(saved, checkpoint)
        check_resumable(saved, label_map)
    else:
        saved = None
        model = SSD300(n_classes=len(label_map))
        if finetune_from:
            say(load_weights_only(model, label_map))
        elif pretrained:
            load_pretrained(model, pretrained)
    model.label_map = label_map
    if freeze_vgg:
        model.freeze_base()
    model = model.to(device, memory_format=fastest_memory_format(device, model.network)).train()
    optimizer = make_optimizer(model, device)
    if saved is None:
        return model, optimizer, 0, -1.0, False
    start, best_map = restore_training_state(saved, optimizer)
    say(f"resumed {checkpoint} at iteration {start}")
    to_evaluate = saved.get("to_evaluate") is True and is_due(start, evaluate_every)
    return model, optimizer, start, best_map, to_evaluate


def load_weights_only(model, label_map):
    """Start from the weights of `finetune_from`; returns a sentence that says what was taken over."""
    saved = load_checkpoint(finetune_from)
    try:
        return load_other_classes(model, saved, label_map)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{finetune_from}: a checkpoint that does not fit SSD300: {printable(error)}") from error


def restore_training_state(saved, optimizer):
    """Bring back momentum, random states and position; returns the iteration to start at, and the best mAP.

    Settings, such as the weight decay, stay as they are in this run: they may have been changed for it.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    order = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if [group["params"] for group in saved["optimizer"]["param_groups"]] != order:
            raise ValueError("its optimizer has other groups of parameters")
        for index, state in saved["optimizer"]["state"].items():
            if state["momentum_buffer"].shape != parameters[index].shape:
                raise ValueError(f"momentum {index} has another shape than its parameter")
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in optimizer.state.items():  # in the memory format of this machine, not of the last
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        set_rng_states(saved["rng"])
        start, best_map = saved["iteration"], saved["best_map"]
        if type(start) is not int or start < 0 or type(best_map) is not float:
            raise ValueError(f"iteration {start!r}, best_map {best_map!r}")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}: its training state cannot be restored ({printable(error)}); start from its weights with "
            f"--finetune_from={checkpoint}"
        ) from error
    return start, best_map


def check_resumable(saved, label_map):
    """Refuse a checkpoint of another data set, or one without a training state; tell what has changed."""
    if saved["label_map"] != label_map:
        raise ValueError(
            f"{checkpoint} has {len(saved['label_map'])} classes ({', '.join(saved['label_map'])}), the lists in "
            f"{data_folder} have {len(label_map)} ({', '.join(label_map)}); to start from its weights all the "
            f"same, give it as --finetune_from={checkpoint}"
        )
    if "optimizer" not in saved:
        raise ValueError(f"{checkpoint} holds weights only; start from them with --finetune_from={checkpoint}")
    before = saved.get("parameters")
    for name, value in script_parameters(globals()).items() if isinstance(before, dict) else ():
        if name != "checkpoint" and repr(before.get(name, value)) != repr(value):
            say(f"note: {name} was {before[name]!r} when the checkpoint was saved, now it is {value!r}")


def make_optimizer(model, device):
    """SGD with momentum; biases learn faster and do not decay, as in the Caffe code."""
    named = list(model.named_parameters())
    biases = [parameter for name, parameter in named if name.split(".")[-1] == "bias"]
    weights = [parameter for name, parameter in named if name.split(".")[-1] != "bias"]
    groups = [
        {"params": weights, "lr_factor": 1.0, "weight_decay": weight_decay},
        {"params": biases, "lr_factor": bias_lr_factor, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=device.type == "cuda")


def set_learning_rate(optimizer, iteration):
    """Set the learning rates of an iteration (counted from 0): warm-up, then steps down."""
    n_decays = sum(iteration >= at for at in decay_lr_at)
    warm = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * warm * decay_lr_by**n_decays * group["lr_factor"]


def make_train_loader(dataset, batches, device):
    """One loader for the whole run: no pause between epochs, in which workers would start anew."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate_fn,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        prefetch_factor=4 if workers else None,
        timeout=600 if workers else 0,  # seconds; for workers that hang. A dead one is noticed at once.
        generator=torch.Generator(),  # the loader's own: else it would draw from the one whose state is saved
    )


def ignore_signals(_worker):
    """Ctrl-C, and a cluster's SIGTERM, may reach the workers too; it is the main process that decides to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def wrap_network(model):
    """The model as the loop calls it: compiled, and with its gradients averaged over all processes."""
    network = model
    if torch.distributed.is_initialized():
        device_ids = [model.mean.device.index] if model.mean.is_cuda else None
        network = DistributedDataParallel(network, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if compile_model and model.mean.is_cuda:
        network = torch.compile(network)
    return network


# ----------------------------------------------------------------------------------------------
# Within the loop: log, stop, evaluate, save
# ----------------------------------------------------------------------------------------------


class TrainingLog:
    """The progress bar, the CSV file, and the check that every loss is finite.

    Losses stay on the device until `flush()`, so that no iteration waits for the one before it.
    """

    columns = ("iteration", "epoch", "loss", "lr", "images_per_second", "mAP")

    def __init__(self, dataset, batches, is_main):
        self.dataset, self.batches = dataset, batches
        self.losses = []  # scalars on the device, of the iterations since the last flush
        self.file = open_log(log_file, self.columns, batches.iterations.start) if log_file and is_main else None
        self.bar = tqdm(total=batches.iterations.stop, initial=batches.iterations.start, unit="it", disable=not is_main)
        self.flushed_at = time.perf_counter()

    def add(self, loss):
        """Take the loss of the next iteration."""
        self.losses.append(loss.detach())
        self.bar.update()

    def flush(self, done, optimizer):
        """Bring the losses over, check them, show and write their mean. `done`: iterations so far."""
        if not self.losses:
            return
        losses = torch.stack(self.losses)
        if torch.distributed.is_initialized():  # the mean over the processes is the loss of the whole batch
            torch.distributed.all_reduce(losses)
            losses /= torch.distributed.get_world_size()
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
        epoch = done * batch_size / len(self.dataset)
        self.write((done, f"{epoch:.3f}", f"{loss:.6f}", f"{rate:.3e}", f"{speed:.1f}", ""))

    def write(self, row):
        """Append a row to the file. A full disk costs the log, not the run."""
        if self.file is None:
            return
        try:
            csv.writer(self.file).writerow(row)
            self.file.flush()
        except OSError as error:
            say(f"warning: the log ends here, {log_file} cannot be written: {error}; the run goes on")
            self.close_file()

    def stop_at_bad_loss(self, iteration, loss):
        """End the run, naming what was in the batch; the checkpoint on disk is from before."""
        files = sorted({str(self.dataset.image_paths[index]) for _, index in self.batches.batch(iteration)})
        raise FloatingPointError(
            f"the loss of iteration {iteration} is {loss}. {save_to} is as it was saved before. Try a lower lr "
            "(--lr), a longer --warmup, or --grad_clip=10; if it happens again with the same images, look at "
            "their boxes. The images of this batch:\n  " + "\n  ".join(files)
        )

    def gather_skipped(self, device):
        """Bring together what the processes skipped."""
        if torch.distributed.is_initialized():
            is_skipped = self.dataset.skipped.to(device)
            torch.distributed.all_reduce(is_skipped, torch.distributed.ReduceOp.MAX)
            self.dataset.skipped.copy_(is_skipped)

    def report_skipped(self):
        """Say which images were skipped, however the run ends."""
        skipped = self.dataset.skipped_images()
        if skipped:
            say(f"skipped {len(skipped)} images that could not be decoded:\n  " + "\n  ".join(skipped))

    def close(self):
        """Close bar and file."""
        self.bar.close()
        self.close_file()

    def close_file(self):
        """Close the file; on a full disk that fails, too, and nothing is left to be done."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
        self.file = None


def open_log(path, columns, start):
    """Open the CSV log at iteration `start`, to append rows; None, after a warning, if it cannot be written.

    At iteration 0 the file is a new one. At a later one the rows after that iteration go, since they come
    again, and those before stay: the file is replaced by one rename, so that no failure can lose them.
    """
    header = io.StringIO(newline="")
    csv.writer(header).writerow(columns)
    lines = [header.getvalue().encode()]
    try:
        if start > 0 and Path(path).is_file():
            lines += [line for line in Path(path).read_bytes().splitlines(True) if is_row(line, len(columns), start)]
            write_file(path, b"".join(lines))
        else:
            Path(path).write_bytes(lines[0])
        return open(path, "a", newline="")
    except OSError as error:
        say(f"warning: no log is written, {path} cannot be: {error}; the run goes on")
        return None


def is_row(line, n_columns, last):
    """Whether the bytes of a line are a whole row of the log (a kill may leave half of one), up to `last`."""
    cells = line.split(b",")
    return len(cells) == n_columns and line.endswith(b"\n") and cells[0].isdigit() and int(cells[0][:19]) <= last


class StopRequest:
    """Remembers SIGINT or SIGTERM, so that the run ends after an iteration and not in the middle of one."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, _frame):
        """Take note; a second Ctrl-C ends the process at once. (SIGTERM may well come twice: from a cluster's
        scheduler and from torchrun.)"""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def is_requested_alone(self):
        """Whether this process was asked to stop, and has no others to agree with."""
        return self.signal > 0 and not torch.distributed.is_initialized()

    def is_requested_anywhere(self, device):
        """Whether any process was asked to stop; all of them learn it at the same iteration."""
        if not torch.distributed.is_initialized():
            return self.signal > 0
        request = torch.tensor(self.signal, device=device)
        torch.distributed.all_reduce(request, torch.distributed.ReduceOp.MAX)
        self.signal = int(request)
        return self.signal > 0

    def exit_if_requested(self, done):
        """End the process with the exit code of its signal, once everything is saved."""
        if self.signal:
            name = signal.Signals(self.signal).name
            say(f"stopped by {name} after iteration {done}; go on with --checkpoint={save_to}")
            raise SystemExit(128 + self.signal)


def evaluate_and_keep_best(model, optimizer, log, done, best_map):
    """Evaluate on the TEST lists, and save the model beside the last one if it is the best so far."""
    mean_ap = best_map
    if is_main_process():
        loader = make_test_loader(data_folder, batch_size, workers, skip_corrupt)
        loader.worker_init_fn = ignore_signals
        _, mean_ap = evaluate(loader, model)
        skipped = loader.dataset.skipped_images()
        if skipped:
            say(f"{len(skipped)} TEST images could not be decoded; their objects count as missed")
        log.write((done, f"{done * batch_size / len(log.dataset):.3f}", "", "", "", f"{mean_ap:.6f}"))
        say(f"iteration {done}: mAP {mean_ap:.4f}, best before {max(best_map, 0):.4f}")
        if mean_ap > best_map:
            path = Path(save_to)
            save(path.with_name(f"best_{path.name}"), model, optimizer, done, mean_ap)
        model.train()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    log.flushed_at = time.perf_counter()
    return max(best_map, mean_ap)


def save(path, model, optimizer, done, best_map, to_evaluate=False):
    """Save all that a resumed run needs. `done`: iterations so far; to_evaluate: an evaluation comes next."""
    if not is_main_process():
        return
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise FloatingPointError(
            f"weights are no longer finite at iteration {done}; {path} is left as it was. Try a lower lr (--lr), a "
            "longer --warmup, or --grad_clip=10"
        )
    state = {
        **model_state(model),
        "optimizer": optimizer.state_dict(),
        "iteration": done,
        "to_evaluate": to_evaluate,
        "best_map": best_map,
        "rng": rng_states(),
        "parameters": script_parameters(globals()),
    }
    save_checkpoint(state, path)


def rng_states():
    """States of torch's random number generators. (Data order and augmentation need none: see datasets.py.)"""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_states(states):
    """Restore what `rng_states()` returned; a GPU's state only where there are as many GPUs."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
