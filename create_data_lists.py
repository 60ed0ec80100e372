"""Make the lists of images and objects that training and evaluation read.

    python create_data_lists.py --download=True               fetch VOC2007 and VOC2012 (2.8 GB) first
    python create_data_lists.py                               VOC2007 + VOC2012 that are already there
    python create_data_lists.py --train_data=/path/to/mine    data of your own, with classes of their own

Reads folders in Pascal VOC's layout (or COCO-style JSON files). Writes into `output_folder`:
{TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json, label_map.json; data_report.txt, which names all that was
dropped or mended; and contact_sheet.jpg, some of the images with their boxes. Any parameter below can be
overridden on the command line with --name=value.
"""

import json
import os
import random
import sys

import torch
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.transforms.functional import to_pil_image

from detect import draw_boxes
from model import SSD300
from utils import (
    class_colors,
    create_data_lists,
    cxcy_to_xy,
    errors_in_words,
    find_jaccard_overlap,
    override_parameters,
    read_image,
    rev_label_map,
)

# Pascal VOC: trainval of both years becomes TRAIN, test of 2007 becomes TEST
voc07_path = "data/VOCdevkit/VOC2007"
voc12_path = "data/VOCdevkit/VOC2012"  # "": train on VOC2007 alone
download = False  # True: fetch what is missing of the two folders above

# Data of your own, in place of VOC
train_data = ""  # a folder in VOC layout or a COCO-style JSON file; "": VOC
test_data = ""  # another such folder or file; "": the same as train_data
image_folder = ""  # where the images of a JSON file are; "": beside it, or in `images` beside it
class_names = ()  # the classes in the order of their labels; (): VOC's 20, or all in your annotations
skip_unknown = False  # True: leave out objects of classes not in class_names, instead of stopping

# Splits
train_split = "trainval"  # name of the list of images in ImageSets/Main, without .txt
test_split = "test"
test_fraction = 0.2  # share of the images that becomes TEST where the data have no split files
seed = 0  # of that division

# Output
output_folder = "data"
check_images = True  # False: do not open the images, only the annotations
report_overlap = 0.5  # the report counts the objects of TRAIN that a prior overlaps so much; 0: not
n_sheet_images = 24  # images of TRAIN on the contact sheet, chosen by the seed; 0: no sheet

# The sheet's images; sizes of objects in the report, as sides of a square in pixels of the 300 x 300 image
SHEET_COLUMNS, SHEET_CELL = 6, (320, 240)
SIZE_LIMITS = (16, 32, 64, 128)


def main():
    """Fetch VOC if asked to, then write the lists."""
    if download and not train_data:
        download_voc()
    try:
        if not train_data:
            check_voc_folders()
        create_data_lists(
            voc07_path,
            voc12_path,
            output_folder,
            check_images,
            train_data=train_data,
            test_data=test_data,
            train_split=train_split,
            test_split=test_split,
            image_folder=image_folder,
            class_names=class_names,
            skip_unknown=skip_unknown,
            test_fraction=test_fraction,
            seed=seed,
        )
        if report_overlap:
            report_overlaps()
        if n_sheet_images and check_images:
            draw_contact_sheet()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"The lists are in {os.path.abspath(output_folder)}")


def check_voc_folders():
    """Say what can be done if a VOC folder is missing."""
    for path in filter(None, (voc07_path, voc12_path)):
        if not os.path.isdir(os.path.expanduser(path)):
            raise FileNotFoundError(
                f"{path}: no such folder.\n"
                "  --download=True fetches VOC2007 and VOC2012 (2.8 GB);\n"
                "  --voc07_path=FOLDER and --voc12_path=FOLDER name them if they are elsewhere;\n"
                "  --train_data=FOLDER takes data of your own in VOC's layout."
            )


# ----------------------------------------------------------------------------------------------
# A look at the data before they are trained on
# ----------------------------------------------------------------------------------------------


def read_lists(split):
    """The lists just written: label_map, list of image paths, list of {"boxes", "labels", "size", ...}."""
    names = ("label_map.json", f"{split}_images.json", f"{split}_objects.json")
    contents = []
    for name in names:
        with open(os.path.join(output_folder, name), encoding="utf-8") as file:
            contents.append(json.load(file))
    return contents


def report_overlaps():
    """Print what SSD300 can find of the objects in TRAIN, by class and size; data_report.txt gets it, too."""
    label_map, _, objects = read_lists("TRAIN")
    text = overlap_table(label_map, objects, SSD300.create_prior_boxes())
    print(text)
    with open(os.path.join(output_folder, "data_report.txt"), "a", encoding="utf-8") as file:
        file.write(f"\n{text}")


def overlap_table(label_map, objects, priors_cxcy):
    """A table of classes and sizes: the number of objects, and the share whose best prior overlaps enough.

    label_map: dict of class name to label. objects: list of {"boxes", "labels", "size"}, one for each image.
    priors_cxcy: (P, 4), center-size form, fractional. Returns a text.
    """
    labels = torch.tensor([label for image in objects for label in image["labels"]])  # (n,)
    boxes = torch.tensor([box for image in objects for box in image["boxes"]])  # (n, 4), pixels
    sizes = torch.tensor([image["size"] * 2 for image in objects for _ in image["labels"]])  # (n, 4)
    boxes_xy = boxes / sizes  # fractional: where the priors are, whatever the shape of the image
    sides = 300 * (boxes_xy[:, 2:] - boxes_xy[:, :2]).prod(dim=1).sqrt()  # (n,), pixels of the resized image
    is_found = find_best_overlaps(boxes_xy, cxcy_to_xy(priors_cxcy)) >= report_overlap
    column = torch.bucketize(sides, torch.tensor(SIZE_LIMITS, dtype=torch.float32), right=True)
    titles = [f"{low}-{high}" for low, high in zip((0, *SIZE_LIMITS), (*SIZE_LIMITS, 300), strict=True)] + ["all"]
    lines = [
        "Objects of TRAIN by size (root of the area, in pixels of the 300 x 300 image), and of each number the",
        f"share whose best prior overlaps {report_overlap:g} or more; to the others no prior fits well.",
        f"  {'':<20}" + "".join(title.rjust(15) for title in titles),
    ]
    for name, label in [*label_map.items(), ("all", None)]:
        if label != 0:
            of_class = torch.full_like(labels, True, dtype=torch.bool) if label is None else labels == label
            columns = [of_class & (column == i) for i in range(len(SIZE_LIMITS) + 1)] + [of_class]
            lines.append(f"  {name[:20]:<20}" + "".join(share_text(is_found[cell]).rjust(15) for cell in columns))
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode() + "\n"


def share_text(is_found):
    """Of a tensor of booleans, how many there are, and how many in a hundred are true."""
    return f"{len(is_found):,} {is_found.float().mean():.0%}" if len(is_found) else "-"


def find_best_overlaps(boxes_xy, priors_xy):
    """The overlap of each box with its best prior. Both in boundary form, (n, 4) and (P, 4); returns (n,)."""
    chunks = [find_jaccard_overlap(chunk, priors_xy).amax(dim=1) for chunk in boxes_xy.split(200)]
    return torch.cat(chunks)


def draw_contact_sheet():
    """Write contact_sheet.jpg: what the lists say, drawn on the images. Swapped coordinates and classes show."""
    label_map, paths, objects = read_lists("TRAIN")
    chosen = sorted(random.Random(seed).sample(range(len(paths)), min(n_sheet_images, len(paths))))
    colors, class_names = class_colors(label_map), rev_label_map(label_map)
    width, height = SHEET_CELL
    n_columns = min(SHEET_COLUMNS, len(chosen))
    sheet = Image.new("RGB", (n_columns * width, -(-len(chosen) // n_columns) * height), "white")
    for place, i in enumerate(chosen):
        image = to_pil_image(read_image(paths[i]))
        names = [class_names[label] for label in objects[i]["labels"]]
        scale = min((width - 8) / image.width, (height - 8) / image.height)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        boxes = [[value * scale for value in box] for box in objects[i]["boxes"]]
        corner = place % n_columns * width + 4, place // n_columns * height + 4
        sheet.paste(draw_boxes(image, boxes, names, None, colors), corner)
    path = os.path.abspath(os.path.join(output_folder, "contact_sheet.jpg"))
    sheet.save(path, quality=90, subsampling=0)  # thin coloured lines
    print(f"Look at {path}: {len(chosen)} images of TRAIN with their boxes")


# ----------------------------------------------------------------------------------------------
# Pascal VOC
# ----------------------------------------------------------------------------------------------


def download_voc():
    """Fetch the parts of VOC2007 and VOC2012 that are not there in full, through torchvision."""
    parts = [(voc07_path, "2007", "trainval"), (voc07_path, "2007", "test"), (voc12_path, "2012", "trainval")]
    for path, year, split in parts:
        path = os.path.abspath(os.path.expanduser(path)) if path else ""
        if not path or is_complete(path, split):
            continue
        root = path.removesuffix(os.path.join("VOCdevkit", f"VOC{year}"))
        if root == path:
            raise SystemExit(f"error: {path}: to download, the folder's name must end in VOCdevkit/VOC{year}")
        print(f"Downloading VOC{year} {split} to {path}")
        try:
            os.makedirs(root, exist_ok=True)
            VOCDetection(root, year=year, image_set=split, download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(
                f"error: could not download VOC{year} {split}: {error}\n"
                f"  Fetch it by hand from http://host.robots.ox.ac.uk/pascal/VOC/ and unpack it in {root}"
            ) from error


def is_complete(path, split):
    """Whether a VOC folder holds a split with all its images and annotations."""
    split_file = os.path.join(path, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(split_file):
        return False
    with open(split_file, encoding="utf-8") as file:
        names = file.read().split()
    return all(
        os.path.isfile(os.path.join(path, folder, name + extension))
        for name in names
        for folder, extension in (("JPEGImages", ".jpg"), ("Annotations", ".xml"))
    )


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with errors_in_words():
        main()
