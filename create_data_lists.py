"""Make the lists of images and objects that training and evaluation read.

    python create_data_lists.py --download=True               fetch VOC2007 and VOC2012 (2.8 GB) first
    python create_data_lists.py                               VOC2007 + VOC2012 that are already there
    python create_data_lists.py --train_data=/path/to/mine    data of your own, with classes of their own

Reads folders in Pascal VOC's layout (or COCO-style JSON files). Writes into `output_folder`:
{TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json, label_map.json and data_report.txt, which names all that
was dropped or mended. Any parameter below can be overridden on the command line with --name=value.
"""

import os
import sys

from torchvision.datasets import VOCDetection

from utils import create_data_lists, override_parameters

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
    main()
