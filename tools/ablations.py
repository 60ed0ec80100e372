"""What each choice of SSD is worth: train a small network with one choice changed at a time.

    python create_data_lists.py --train_data=BCCD --output_folder=bccd       any data set with TRAIN and TEST lists
    python tools/ablations.py --data_folder=bccd --output_folder=ablations_bccd
    python tools/ablations.py                                                the generated pictures of `make demo`
    python tools/ablations.py --choices=flip_only,no_crop --seeds=0,1,2      some of the choices, three runs of each

A run of 2,000 iterations takes 7 to 30 minutes on one CPU core. All runs have the same data, iterations and recipe.
The run without a change, the baseline, is repeated with several seeds: how far they lie apart is the spread, and a
choice whose difference is within it has shown nothing. (Of choices that change nothing, one in twenty lies outside all
the same.)

Adds a row to results.csv in `output_folder` after every run, and prints a table at the end, a row a choice. Started
again, it goes on with the runs that are missing.
Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo

import model
import train
from utils import exit_with_message, find_jaccard_overlap, override_parameters

# Data
data_folder = "demo/lists"  # where create_data_lists.py, or the demo, wrote its lists
output_folder = "ablations"

# Runs
choices = ()  # names of CHOICES; (): all
seeds = (0,)  # of the runs of each choice: initial weights, the order of the images, their augmentation
baseline_seeds = (0, 1, 2, 3, 4)  # of the baselines; two or more
iterations = 2000  # of each run
network = "ssd300_tiny"
run = ""  # "name,seed": do this one run in this process (what the script calls itself with)

RECIPE = {  # of train.py; results.csv does not name it, so another one needs another output_folder
    "batch_size": 8, "workers": 0, "optimizer_name": "adamw", "lr": 3e-3, "warmup": 30, "schedule": "cosine",
    "grad_clip": 10.0, "pretrained": "", "save_every": 0, "overwrite": True,
}  # fmt: skip

# --- The choices ----------------------------------------------------------------------------------


def leave_out_ratios(left_out):
    """Leave some aspect ratios out of all source maps."""
    architecture = model.NETWORKS[network]
    sources = []
    for source in architecture.sources:
        ratios = tuple(ratio for ratio in source.aspect_ratios if ratio not in left_out)
        sources.append(source._replace(aspect_ratios=ratios))
    model.NETWORKS[network] = architecture._replace(sources=tuple(sources))


def leave_out_extra_square():
    """Take the second prior of each cell away, the extra square one."""
    create_all = model.SSD300.create_prior_boxes

    def create_prior_boxes(network):
        is_kept = []
        for source in model.NETWORKS[network].sources:
            of_a_cell = [True, False] + [True] * (len(source.aspect_ratios) - 1)
            is_kept += of_a_cell * source.grid**2
        return create_all(network)[torch.tensor(is_kept)]

    model.SourceMap.n_priors = property(lambda source: len(source.aspect_ratios))
    model.SSD300.create_prior_boxes = staticmethod(create_prior_boxes)


def leave_out_step_1():
    """Match by step 2 alone: an object that no prior overlaps by the threshold has none."""

    def match_priors(boxes_xy, priors_xy, threshold):
        if len(boxes_xy) == 0:
            return torch.full((len(priors_xy),), model.BACKGROUND)
        best_overlap, best_object = find_jaccard_overlap(boxes_xy, priors_xy).max(dim=0)  # (P,) each
        return torch.where(best_overlap >= threshold, best_object, model.BACKGROUND)

    model.match_priors = match_priors


def leave_out_l2_norm():
    """Do not normalise conv4_3. Its factors stay; divided by where they start, they change nothing at first."""
    start = 20 / model.NETWORKS[network].divisor ** 0.5
    model.l2_normalize = lambda features: features.float() / start


class Choice(NamedTuple):
    """One change: parameters of train.py, or a function that changes model.py."""

    words: str
    parameters: dict
    change_model: object  # None: the parameters are all
    paper: float | None = None  # mAP on VOC2007 test in the paper's table 2


CHOICES = {
    "baseline": Choice("everything as it is", {}, None, paper=74.3),
    "flip_only": Choice("flips as the only augmentation", {"augment": "flip"}, None, paper=65.5),
    "no_zoom_out": Choice("no zoom-out", {"augment": "distort,crop,flip"}, None),
    "no_crop": Choice("no crop", {"augment": "distort,zoom_out,flip"}, None),
    "negatives_1": Choice("1 negative per positive, not 3", {"neg_pos_ratio": 1}, None),
    "negatives_all": Choice("all negatives", {"neg_pos_ratio": 10_000}, None),
    "no_step_1": Choice("matching without step 1", {}, leave_out_step_1),
    "squares_only": Choice("square priors only", {}, partial(leave_out_ratios, (2, 1 / 2, 3, 1 / 3)), paper=71.6),
    "no_thirds": Choice("without the ratios 3 and 1/3", {}, partial(leave_out_ratios, (3, 1 / 3)), paper=73.7),
    "no_extra_square": Choice("no extra square prior", {}, leave_out_extra_square),
    "no_l2_norm": Choice("no L2 norm on conv4_3", {}, leave_out_l2_norm),
}

# --- The runs -------------------------------------------------------------------------------------


def main():
    if run:
        train_once(*run.split(","))
        return
    names = choose()
    folder = Path(output_folder).resolve()
    lists = Path(data_folder).resolve()
    if not (lists / "label_map.json").is_file():
        raise FileNotFoundError(f"{lists}: no data lists; `make demo` makes demo/lists, create_data_lists.py others")
    wanted = [("baseline", str(seed)) for seed in baseline_seeds]
    wanted += [(name, str(seed)) for seed in seeds for name in names]
    settings = {"data_folder": lists, "output_folder": folder, "iterations": iterations, "network": network}
    for name, seed in wanted:
        if seed not in read_results(folder, lists).get(name, {}):
            demo.run("tools/ablations.py", **settings, run=f"{name},{seed}")
    print_table(read_results(folder, lists))


def choose():
    """The names of the choices to run, without the baseline. Raises ValueError for parameters that cannot be."""
    if network not in model.NETWORKS:
        raise ValueError(f"network is {network!r}; it must be one of {', '.join(model.NETWORKS)}")
    unknown = sorted(set(choices) - set(CHOICES))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a choice; these are: {', '.join(CHOICES)}")
    if len(set(baseline_seeds)) < 2:
        raise ValueError("baseline_seeds needs two seeds or more: the spread is that of the baselines")
    names = [name for name in choices or CHOICES if name != "baseline"]
    if "no_l2_norm" in names and not model.NETWORKS[network].l2_norm:
        raise ValueError(f"no_l2_norm: {network} has no L2 norm; name the other choices with --choices")
    return names


def train_once(name, seed):
    """Train and evaluate with one choice changed, and add a line to results.csv."""
    choice = CHOICES[name]
    if choice.change_model:
        choice.change_model()
    folder = Path(output_folder)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    parameters = {
        **RECIPE, "data_folder": data_folder, "save_to": folder / "runs" / f"{name}_{seed}.pth.tar", "network": network,
        "seed": seed, "iterations": iterations, "evaluate_every": iterations, **choice.parameters,
    }  # fmt: skip
    override_parameters(vars(train), [f"--{key}={value}" for key, value in parameters.items()])
    train.main()
    with open(folder / "runs" / f"{name}_{seed}.csv", newline="") as file:
        score = [row["mAP"] for row in csv.DictReader(file) if row["mAP"]][-1]
    with open(folder / "results.csv", "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["choice", "seed", "iterations", "network", "data_folder", "mAP"])
        writer.writerow([name, seed, iterations, network, data_folder, score])


# --- The table ------------------------------------------------------------------------------------


def read_results(folder, lists):
    """The results so far of runs with these settings: by choice a dict of seed, a string, to mAP."""
    path = folder / "results.csv"
    if not path.is_file():
        return {}
    settings = (str(iterations), network, str(lists))
    results = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if (row["iterations"], row["network"], row["data_folder"]) == settings:
                results.setdefault(row["choice"], {})[row["seed"]] = float(row["mAP"])
    return results


# Student's t of 95%, by degrees of freedom: the baselines less one.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def find_spread(baselines, n_runs):
    """How far the mean of so many runs is from that of the baselines by chance alone, at most, 19 times in 20."""
    t = STUDENT_T[min(len(baselines) - 1, 9)]
    return t * statistics.stdev(baselines) * (1 / n_runs + 1 / len(baselines)) ** 0.5


def make_rows(results):
    """The rows of the table, a dict a choice that has a result, in the order of CHOICES. The baselines come first."""
    baselines = list(results["baseline"].values())
    rows = []
    for name in [name for name in CHOICES if name in results]:
        scores = list(results[name].values())
        difference = statistics.mean(scores) - statistics.mean(baselines)
        if name == "baseline":
            words = ""
        elif abs(difference) <= find_spread(baselines, len(scores)):
            words = "within the spread"
        else:
            words = f"{difference:+.3f}"
        rows.append({
            "what is changed": CHOICES[name].words,
            "mAP, mean": f"{statistics.mean(scores):.3f}",
            "each run": " ".join(f"{score:.3f}" for score in scores),
            "difference": words,
            "the paper": str(CHOICES[name].paper or ""),
        })  # fmt: skip
    return rows


def print_table(results):
    """Print the table of the results, in Markdown."""
    rows = make_rows(results)
    print(f"\n| {' | '.join(rows[0])} |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    baselines = list(results["baseline"].values())
    spread = find_spread(baselines, 1)
    print(f"\n{network}, {iterations} iterations of {RECIPE['batch_size']} images.")
    print(f"The spread, of {len(baselines)} baselines: ±{spread:.3f} for a choice with one run.")
    print("The paper: docs/experiments.md. Its baseline has no zoom-out.")


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
