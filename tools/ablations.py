"""What each choice of SSD is worth: train the small network with one choice switched off at a time.

    python tools/ablations.py                                all choices, two seeds: about 20 minutes on 2 CPU cores
    python tools/ablations.py --choices=no_crop,no_colours   some of them (and the baseline)
    python tools/ablations.py --iterations=1000 --seeds=0,1,2

Every run trains `ssd300_tiny` on the same generated pictures for the same number of iterations, and evaluates it on
the same 200 others. Writes each result to `output_folder`/results.csv as it comes, goes on where it was stopped, and
prints the table of the README.
Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import model  # noqa: E402 (the path to it has to be set first)
from utils import find_jaccard_overlap, override_parameters  # noqa: E402

# Data: made where it is missing
output_folder = "ablations"
n_train = 1000  # generated pictures to train on
n_test = 200  # and to evaluate on

# Runs
choices = ()  # names of CHOICES; (): all
seeds = (0, 1)  # of the weights, the order of the pictures and their augmentation
iterations = 300  # of each run, batches of 8
processes = 2  # runs at a time, with one thread each
run = ""  # "name,seed": do this one run in this process (what the script calls itself with)

NETWORK = "ssd300_tiny"


def change_row(**changes):
    """A patch that changes the network's row in the table."""

    def patch():
        model.NETWORKS[NETWORK] = model.NETWORKS[NETWORK]._replace(**changes)

    return patch


def change_sources(change):
    """A patch that changes each source map of the network's row: a function of its place and of the map."""

    def patch():
        row = model.NETWORKS[NETWORK]
        sources = tuple(change(place, source) for place, source in enumerate(row.sources))
        model.NETWORKS[NETWORK] = row._replace(sources=sources)

    return patch


def leave_out_extra_priors():
    """A patch: each cell loses its second prior, the extra square one."""
    create = model.SSD300.create_prior_boxes
    model.SourceMap.n_priors = property(lambda source: len(source.aspect_ratios))

    def create_without(network="ssd300_vgg16"):
        keep = []
        for source in model.NETWORKS[network].sources:
            cell = [place != 1 for place in range(len(source.aspect_ratios) + 1)]
            keep += cell * source.grid**2
        return create(network)[keep]

    model.SSD300.create_prior_boxes = staticmethod(create_without)


def leave_out_ownership():
    """A patch: step 1 of matching gives no prior to an object that it overlaps by less than the threshold."""
    match_priors = model.match_priors

    def match_without_ownership(objects, priors_xy, threshold):
        matched = match_priors(objects, priors_xy, threshold)  # (N, P)
        overlaps = find_jaccard_overlap(objects.boxes_xy, priors_xy).gather(0, matched)  # (N, P)
        return matched.masked_fill(overlaps < threshold, len(objects.images))

    model.match_priors = match_without_ownership


def leave_out_l2_norm():
    """A patch: conv4_3 is not normalised; its factors stay, and start where they change nothing."""
    start = 20 / model.NETWORKS[NETWORK].divisor ** 0.5
    model.l2_normalize = lambda features: features.float() / start


def scale_of_first_map(scale):
    return change_row(scales=(scale, *model.NETWORKS[NETWORK].scales[1:]))


# name: (words for the table, parameters of train.py, patch or None)
CHOICES = {
    "baseline": ("everything as it is", {}, None),
    "no_zoom_out": ("no zoom-out", {"augment": "distort,crop,flip"}, None),
    "no_crop": ("no crop", {"augment": "distort,zoom_out,flip"}, None),
    "no_colours": ("no change of colours", {"augment": "zoom_out,crop,flip"}, None),
    "no_augmentation": ("no augmentation at all", {"augment": ""}, None),
    "negatives_1": ("1 negative per positive", {"neg_pos_ratio": 1}, None),
    "negatives_10": ("10 negatives per positive", {"neg_pos_ratio": 10}, None),
    "negatives_all": ("all negatives", {"neg_pos_ratio": 10_000}, None),
    "no_ownership": ("matching without step 1", {}, leave_out_ownership),
    "no_extra_prior": ("no extra square prior", {}, leave_out_extra_priors),
    "squares_only": ("aspect ratio 1 only", {}, change_sources(lambda _, s: s._replace(aspect_ratios=(1,)))),
    "first_scale_007": ("conv4_3's scale 0.07 instead of 0.1", {}, scale_of_first_map(0.07)),
    "first_scale_015": ("conv4_3's scale 0.15 instead of 0.1", {}, scale_of_first_map(0.15)),
    "no_l2_norm": ("no L2 norm on conv4_3", {}, leave_out_l2_norm),
    "no_batch_norm": ("no batch normalisation", {}, change_row(base="vgg16")),
    "mean_l1": ("smooth L1 averaged over the four offsets", {"alpha": 0.25}, None),
}


def main():
    folder = Path(output_folder).resolve()
    if run:
        name, seed = run.split(",")
        train_once(folder, name, int(seed))
        return
    unknown = set(choices) - set(CHOICES)
    if unknown:
        raise SystemExit(f"error: {', '.join(sorted(unknown))}: not a choice; these are: {', '.join(CHOICES)}")
    make_lists(folder)
    results = folder / "results.csv"
    names = ["baseline", *(name for name in choices or CHOICES if name != "baseline")]
    wanted = [(name, int(seed)) for seed in seeds for name in names]
    done = read_results(results)
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda job: start_run(*job), [job for job in wanted if job not in done]))
    print(results_table(read_results(results), names))


def make_lists(folder):
    """Draw the pictures and make their lists, if that has not been done."""
    if not (folder / "lists" / "label_map.json").is_file():
        sample = folder / "sample"
        call("tools/make_sample.py", output_folder=sample, n_train=n_train, n_test=n_test)
        call("create_data_lists.py", train_data=sample, output_folder=folder / "lists")


def call(script, **parameters):
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in parameters.items())]
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def start_run(name, seed):
    """One run in a process of its own."""
    call("tools/ablations.py", output_folder=Path(output_folder).resolve(), iterations=iterations, run=f"{name},{seed}")
    print(f"{name}, seed {seed}: done", flush=True)


def train_once(folder, name, seed):
    """Train and evaluate with one choice changed, and add a line to results.csv."""
    import train

    _, parameters, patch = CHOICES[name]
    if patch is not None:
        patch()
    log = folder / f"{name}_{seed}.csv"
    arguments = {
        "data_folder": folder / "lists", "save_to": folder / f"{name}_{seed}.pth.tar", "log_file": log,
        "network": NETWORK, "seed": seed, "batch_size": 8, "iterations": iterations, "workers": 0,
        "optimizer_name": "adamw", "lr": 3e-3, "warmup": 30, "schedule": "cosine", "grad_clip": 10.0,
        "save_every": 0, "evaluate_every": iterations, "overwrite": True, **parameters,
    }  # fmt: skip
    override_parameters(vars(train), [f"--{key}={value}" for key, value in arguments.items()])
    train.main()
    with open(log, newline="") as file:
        score = [row["mAP"] for row in csv.DictReader(file) if row["mAP"]][-1]
    with open(folder / "results.csv", "a", newline="") as file:
        csv.writer(file).writerow([name, seed, iterations, score])


def read_results(path):
    """The results so far of runs with this number of iterations: (name, seed) -> mAP."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if int(row[2]) == iterations]
    return {(name, int(seed)): float(score) for name, seed, _, score in rows}


def results_table(results, names):
    """The table of the README, in Markdown."""
    lines = ["| choice | mAP, mean | seeds | difference |", "|---|---|---|---|"]
    base = statistics.mean(score for (name, _), score in results.items() if name == "baseline")
    for name in names:
        scores = [score for (other, _), score in sorted(results.items()) if other == name]
        mean = statistics.mean(scores)
        each = " ".join(f"{score:.3f}" for score in scores)
        difference = "" if name == "baseline" else f"{mean - base:+.3f}".replace("-", "−")
        lines.append(f"| {CHOICES[name][0]} | {mean:.3f} | {each} | {difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
