"""Find objects in a video, frame by frame, and draw them.

    python tools/video.py --video=clip.mp4                      an annotated detections/clip.mp4
    python tools/video.py --video=clip.mp4 --write_boxes_to=found.csv
    python tools/video.py --video=clip.gif                      an animated GIF gives an animated GIF
    python tools/video.py --video=0 --show=True                 the first camera, in a window
    python tools/video.py --video=rtsp://192.168.1.20/stream    a stream

Reads the checkpoint that train.py writes. Writes a video of the same name, size and frame rate, without the sound,
into `output_folder`, and a list of the objects where `write_boxes_to` says. (Encoders take even sizes only: where the
width or height is odd, the last column or row is left out.) The written video plays at one frame rate, the one that
OpenCV states, or 30 where it states none. If the real rate varies, or a camera gives fewer frames than it states, it
plays too fast or too slowly; the list has each frame's own time. A camera and a stream go on until you press Ctrl-C, or
q in the window. Videos are read and written by OpenCV: pip install opencv-python. (With opencv-python-headless there is
no window.) GIFs need only Pillow.
Any parameter below can be overridden on the command line with --name=value.
"""

import importlib.util
import itertools
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detect import (
    check_arguments,
    check_boxes_file,
    draw_boxes,
    find_in_batch,
    list_objects,
    make_upright_rgb,
    open_file,
    save_image,
    write_boxes,
)
from model import load_model
from utils import choose_device, class_colors, exit_on_sigterm, exit_with_message, override_parameters, printable

# Model
checkpoint = "checkpoint_ssd300.pth.tar"
device = ""  # "cpu", "cuda", "cuda:1", "mps", ...; "": an accelerator where there is one

# Data
video = ""  # a file, the address of a stream, or the number of a camera: 0 is the first
output_folder = "detections"  # made where it is missing; a file of an earlier run is written over
write_boxes_to = ""  # a .csv or .json file: frame, time in seconds, class, score and box of each object; "": none
show = False  # True: a window that shows the annotated frames, where there is a screen
batch_size = 4  # frames that the network sees at once; 1 shows a camera's with the least delay

# Detection
min_score = 0.2  # lowest score of an object that is shown, in [0, 1]
max_overlap = 0.45  # of two boxes of a class that overlap more than this, only the better one is kept
top_k = 200  # most objects in a frame
suppress = ""  # classes that are not shown, separated by commas; "": none

# How OpenCV is to encode files of these names; a video of another kind gets the suffix .mp4 in addition.
CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
FRAME_RATE = 30.0  # of what does not say its own, such as most cameras


def main():
    if not video:
        raise ValueError("name the video, with --video=FILE, an address, or the number of a camera")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if write_boxes_to:
        check_boxes_file(write_boxes_to)
    target = plan_output(video, Path(output_folder))
    is_gif = target.suffix.lower() == ".gif"
    if importlib.util.find_spec("cv2") is None and not is_gif:
        raise ValueError("videos are read by OpenCV, which is missing: pip install opencv-python")
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or not sys.platform.startswith("linux")
    if show and not has_screen:  # OpenCV would end this program
        raise ValueError("show=True needs a screen, and there is none here; the annotated video is a file, too")
    model = load_model(checkpoint, choose_device(device))
    arguments = {"min_score": min_score, "max_overlap": max_overlap, "top_k": top_k, "suppress": suppress}
    check_arguments(arguments, model.label_map)

    rows = []  # the objects, as write_boxes() takes them
    n_frames = 0
    start = time.perf_counter()
    try:
        annotate = annotate_gif if is_gif else annotate_video
        n_frames = annotate(video, target, model, rows)
    finally:  # what was found before an error is written, too
        if write_boxes_to and (rows or n_frames):  # else it failed, and an earlier list stays as it is
            write_boxes(write_boxes_to, rows, ("video", "frame", "time"))
    rate = n_frames / (time.perf_counter() - start)
    print(f"{n_frames} frames, {rate:.1f} a second, annotated in {target}; {len(rows)} objects")


def is_camera(video):
    return video.isdecimal() and not Path(video).exists()


def plan_output(video, folder):
    """The file that the annotated video is written to.

    Raises FileNotFoundError if the video is missing; ValueError if it would, or could, be written over.
    """
    if is_camera(video):
        return folder / f"camera{video}.mp4"
    if "://" in video:
        scheme, _, address = video.partition("://")
        if scheme.lower() == "file":  # it could be written over
            raise ValueError(f"{printable(video)}: name a file by its path")
        host, _, path = address.partition("/")
        host = re.sub(r"[^\w.-]", "_", host.split("@")[-1])  # without user:password
        stem = Path(re.split("[?#]", path)[0]).stem
        return folder / f"{stem or host or 'stream'}.mp4"
    if not Path(video).is_file():
        raise FileNotFoundError(f"{printable(video)}: there is no such file")
    name = Path(video).name
    if Path(video).suffix.lower() not in (*CODECS, ".gif"):
        name += ".mp4"
    target = folder / name
    if target.exists() and target.samefile(video):
        raise ValueError(f"{target}: the original would be written over; choose another output_folder")
    return target


def annotate_frames(frames, first_number, model, rows):
    """Find the objects in some frames, and draw them.

    frames: list of (RGB PIL image, its time in seconds). first_number: of the first one, from 1 on.
    Adds the objects to `rows`. Returns annotated copies of the images.
    """
    colors = class_colors(model.label_map)
    found = find_in_batch([image for image, _ in frames], model, min_score, max_overlap, top_k, suppress)
    annotated = []
    for i, objects in enumerate(found):  # of each frame: boxes, names, scores
        image, seconds = frames[i]
        place = {"video": video, "frame": first_number + i, "time": round(seconds, 3)}
        rows += list_objects(place, *objects)
        annotated.append(draw_boxes(image, *objects, colors))
    return annotated


# --- Videos, by OpenCV ----------------------------------------------------------------------------


def annotate_video(video, target, model, rows):
    """Write an annotated copy of a video, and add its objects to `rows`; returns the number of frames.

    Raises ValueError or OSError if the video cannot be decoded, or the copy not be written. Whatever ends the work, the
    frames that were written before can be played.
    """
    # What is wrong with a video is said by this program, once.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    import cv2

    capture = cv2.VideoCapture(int(video) if is_camera(video) else video)
    frame_rate = capture.get(cv2.CAP_PROP_FPS)
    n_promised = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # of a camera or a stream: 0
    if not 0 < frame_rate < 1000:  # unknown, and so is the number of frames
        frame_rate = FRAME_RATE
        n_promised = 0
    n_frames = 0
    writer = None
    progress = tqdm(total=n_promised or None, unit="frame")
    try:
        frames = read_frames(capture, frame_rate)
        while batch := list(itertools.islice(frames, batch_size)):
            for image in annotate_frames(batch, n_frames + 1, model, rows):
                writer = writer or open_writer(target, frame_rate, image.size)
                pixels_bgr = np.asarray(image)[:, :, ::-1].copy()
                writer.write(pixels_bgr)
                n_frames += 1
                if show:
                    show_frame(pixels_bgr)
            progress.update(len(batch))
        if n_frames == 0:
            raise ValueError(f"{printable(video)}: OpenCV can decode no frame of it")
        if n_frames < n_promised:
            words = "frames that it expected: the file was trimmed, or is cut off, or its sound is longer"
            progress.write(f"OpenCV decodes {n_frames} of the {n_promised} {words}")
    except KeyboardInterrupt:  # how a camera is stopped
        pass
    finally:
        progress.close()
        capture.release()
        if writer is not None:
            writer.release()
    if n_frames > 0:
        check_written(target, n_frames)
    return n_frames


def read_frames(capture, frame_rate):
    """Yield the frames of a video, up to its end or to where it is damaged: RGB PIL images, and their times in seconds.

    The first frame's time is 0. Where OpenCV does not know how much later a frame is, that is 1 / frame_rate.
    """
    import cv2

    first_position = None  # of a camera it may be any number
    while True:
        is_frame, pixels_bgr = capture.read()  # (H, W, 3) uint8
        if not is_frame:
            return
        position = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if first_position is None:
            first_position = position
            seconds = 0.0
        elif position - first_position > seconds:
            seconds = position - first_position
        else:
            seconds += 1 / frame_rate
        yield Image.fromarray(pixels_bgr[:, :, ::-1].copy()), seconds


def open_writer(target, frame_rate, size):
    """OpenCV's writer of a video file. Raises OSError, naming the file."""
    import cv2

    target.parent.mkdir(parents=True, exist_ok=True)
    if frame_rate > 65:  # OpenCV counts thousandths of a frame, of which MPEG-4 takes 65,535 a second
        frame_rate = round(frame_rate, 1)
    codec = cv2.VideoWriter_fourcc(*CODECS[target.suffix.lower()])
    writer = cv2.VideoWriter(str(target), codec, frame_rate, size)
    if not writer.isOpened():
        raise OSError(f"{target}: could not be written; OpenCV has no encoder for it, or the folder cannot be written")
    return writer


def show_frame(pixels_bgr):
    """Show a frame in a window. Raises KeyboardInterrupt if the user has pressed q or Esc; ValueError: no windows."""
    import cv2

    try:
        cv2.imshow("press q to stop", pixels_bgr)
        key = cv2.waitKey(1) & 0xFF
    except cv2.error as error:
        raise ValueError("show=True needs a screen, and opencv-python, not opencv-python-headless") from error
    if key in (ord("q"), 27):
        raise KeyboardInterrupt


def check_written(target, n_frames):
    """OSError if a video file does not hold so many frames: OpenCV does not say that a disk is full."""
    import cv2

    written = cv2.VideoCapture(str(target))
    n_written = round(written.get(cv2.CAP_PROP_FRAME_COUNT))
    written.release()
    if n_written < n_frames:
        raise OSError(f"{target}: only {max(0, n_written)} of {n_frames} frames could be written; is the disk full?")


# --- Animated GIFs, by Pillow ---------------------------------------------------------------------


def annotate_gif(video, target, model, rows):
    """Write an annotated copy of an animated GIF, and add its objects to `rows`; returns the number of frames.

    Raises ValueError, naming the file, if a frame is damaged; nothing is written then.
    """
    frames = []
    durations = []  # in milliseconds
    options = {}
    with open_file(video) as animation:
        if "loop" in animation.info:  # how often it is repeated
            options["loop"] = animation.info["loop"]
        try:
            for frame in ImageSequence.Iterator(animation):
                frames.append((make_upright_rgb(frame, video), sum(durations) / 1000))
                durations.append(frame.info.get("duration", 0))
        except (ValueError, MemoryError):  # the former is make_upright_rgb()'s
            raise
        except Exception as error:  # a damaged header: Pillow's readers raise errors of many kinds
            raise ValueError(f"{printable(video)}: damaged, it cannot be decoded ({printable(error)})") from error
    annotated = []
    for start in tqdm(range(0, len(frames), batch_size), unit="batch"):
        annotated += annotate_frames(frames[start : start + batch_size], start + 1, model, rows)
    save_image(annotated[0], target, save_all=True, append_images=annotated[1:], duration=durations, **options)
    return len(annotated)


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    exit_on_sigterm()  # what was found so far is kept
    with exit_with_message():
        main()
