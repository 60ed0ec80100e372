"""tools/video.py: clips and GIFs in, annotated ones of the same size and rate out; damage; the list of objects."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import video as module
from helpers import LABEL_MAP, FakeModel, finish, read_files, script, start
from PIL import Image, ImageColor, ImageSequence

import detect
from utils import class_colors

CAT = ImageColor.getrgb(class_colors(LABEL_MAP)["cat"])
SIZE = (80, 60)  # the cat of FakeModel is at [8, 12, 40, 36]


@pytest.fixture
def run(tmp_path, monkeypatch, run_main):
    """Runs main() in a temporary folder with a fake model; parameters are keywords."""
    monkeypatch.chdir(tmp_path)
    model = FakeModel()

    def run(**parameters):
        run_main(module, **{"output_folder": "out", "load_model": lambda *_: model, **parameters})
        return model

    return run


def make_trimmed_clip(path):
    """An MP4 of 10 frames, 10 a second, whose edit list shows the first 6."""
    make_clip(path, frame_rate=10)
    content = bytearray(path.read_bytes())
    for name, offset in ((b"elst", 12), (b"mvhd", 20), (b"tkhd", 24)):  # where the duration is, in milliseconds
        start = content.find(name) + offset
        content[start : start + 4] = (600).to_bytes(4, "big")
    path.write_bytes(content)


def make_clip(path, n_frames=10, frame_rate=12.5, size=SIZE, noise=0):
    """A video in which frame i has the brightness 20 i, and perhaps noise, which makes the file larger."""
    cv2 = pytest.importorskip("cv2")
    codec = cv2.VideoWriter_fourcc(*module.CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), codec, frame_rate, size)
    rng = np.random.default_rng(0)
    for i in range(n_frames):
        writer.write((rng.integers(0, noise + 1, (size[1], size[0], 3)) + 20 * i % 250).astype(np.uint8))
    writer.release()


def read_clip(path):
    """Frame rate and frames, (n, H, W, 3) in RGB, of a video."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame[:, :, ::-1])
    return capture.get(cv2.CAP_PROP_FPS), np.array(frames)


def is_near(pixel, color, tolerance):
    return np.abs(np.array(pixel, float) - color).max() < tolerance


# --- Videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a clip.mp4", "clip.MP4", "clip.avi", "clip.mkv", "clip.mov", "clip.webm"])
def test_a_video_of_the_same_name_size_and_rate(run, tmp_path, capsys, name):
    plain = tmp_path / f"plain{Path(name).suffix.lower()}"
    make_clip(plain)
    plain.rename(name)
    model = run(video=name, batch_size=4)
    assert [len(batch) for batch in model.batches] == [4, 4, 2]
    assert sorted(path.name for path in Path("out").iterdir()) == [name]
    frame_rate, frames = read_clip(Path("out", name))
    assert frame_rate == 12.5 and frames.shape == (10, 60, 80, 3)
    for i, frame in enumerate(frames):  # in the same order, and not with red for blue
        assert is_near(frame[50, 60], 20 * i, 12), i
    lines = frames[:, 15:34, 8].mean(axis=(0, 1))  # the left side of the box
    assert lines[0] + 30 < lines[1] < lines[2] - 60  # the encoder blurs the colours, (0, 74, 255)
    assert "10 frames, " in capsys.readouterr().out


def test_objects_as_files_with_frame_and_time(run):
    make_clip(Path("clip.mp4"), n_frames=3)
    run(video="clip.mp4", batch_size=2, write_boxes_to="found.csv")
    with open("found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["video", "frame", "time", "class", "score", "x_min", "y_min", "x_max", "y_max"]
    assert [(row["frame"], row["time"]) for row in rows] == [("1", "0.0"), ("2", "0.08"), ("3", "0.16")]
    assert list(rows[1].values())[5:] == ["8.0", "12.0", "40.0", "36.0"] and rows[1]["class"] == "cat"
    run(video="clip.mp4", write_boxes_to="found.json")
    found = json.loads(Path("found.json").read_text())
    assert [(row["frame"], row["time"]) for row in found] == [(1, 0.0), (2, 0.08), (3, 0.16)]
    assert found[2]["video"] == "clip.mp4" and found[2]["box"] == [8.0, 12.0, 40.0, 36.0]


def test_limits_are_those_of_the_tool(run):
    make_clip(Path("clip.mp4"), n_frames=1)
    for name in ("max_overlap", "top_k", "min_score", "suppress"):
        assert getattr(module, name) == getattr(detect, name)
    model = run(video="clip.mp4", min_score=0.3, max_overlap=0.6, top_k=7)
    assert model.arguments == [(0.3, 0.6, 7)]
    run(video="clip.mp4", suppress="cat", write_boxes_to="found.json")
    assert json.loads(Path("found.json").read_text()) == []


@pytest.mark.parametrize("name", ["clip.avi", "clip.webm", "clip.mkv", "clip.mp4"])
def test_a_video_that_ends_early(run, capsys, name):
    """What is there is annotated, its objects are in the list, and a note says how much it is."""
    make_clip(Path(name), n_frames=30, noise=200)
    content = bytearray(Path(name).read_bytes())
    if name == "clip.mp4":  # whose index is at the end
        content[len(content) // 3 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - len(content) // 3)
    else:
        del content[len(content) // 2 :]
    Path(name).write_bytes(content)
    run(video=name, write_boxes_to="found.json")
    frames = read_clip(f"out/{name}")[1]
    assert 3 < len(frames) < 25 and len(json.loads(Path("found.json").read_text())) == len(frames)
    assert f"OpenCV decodes {len(frames)} of the 30 frames that it expected: the file was" in capsys.readouterr().out


def test_a_trimmed_video_is_whole(run, capsys):
    make_trimmed_clip(Path("clip.mp4"))
    run(video="clip.mp4")
    assert len(read_clip("out/clip.mp4")[1]) == 6
    assert "OpenCV decodes 6 of the 10 frames that it expected: the file was trimmed" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no video", "cut"])
def test_what_cannot_be_decoded(run, tmp_path, content):
    if content == "cut":
        make_clip(Path("clip.mp4"))
        content = Path("clip.mp4").read_bytes()[:-1000]  # without the index no frame is to be found
    Path("clip.mp4").write_bytes(content)
    Path("found.json").write_bytes(b"an earlier list")
    pytest.importorskip("cv2")
    before = read_files(tmp_path)
    with pytest.raises(ValueError, match=r"clip\.mp4: OpenCV can decode no frame of it"):
        run(video="clip.mp4", write_boxes_to="found.json")
    assert read_files(tmp_path) == before


def test_stopped_by_ctrl_c(run, monkeypatch, capsys):
    make_clip(Path("clip.mp4"))
    numbers = iter(range(100))

    def annotate(frames, *_):
        if next(numbers) == 2:
            raise KeyboardInterrupt
        return [image for image, _ in frames]

    monkeypatch.setattr(module, "annotate_frames", annotate)
    run(video="clip.mp4", batch_size=4)
    assert len(read_clip("out/clip.mp4")[1]) == 8
    assert "8 frames" in capsys.readouterr().out


def test_a_disk_that_is_full(run, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    make_clip(Path("clip.mp4"))

    class Writer:  # writes half of the frames, and says nothing
        def __init__(self, *arguments):
            self.writer, self.n_written = cv2_writer(*arguments), 0

        def write(self, pixels):
            self.n_written += 1
            if self.n_written <= 5:
                self.writer.write(pixels)

        def isOpened(self):
            return True

        def release(self):
            self.writer.release()

    cv2_writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    with pytest.raises(OSError, match=r"out/clip\.mp4: only 5 of 10 frames could be written; is the disk full"):
        run(video="clip.mp4")


def test_a_window(run, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    make_clip(Path("clip.mp4"))
    monkeypatch.setenv("DISPLAY", ":0")
    shown, keys = [], iter([-1, -1, ord("q")] + [-1] * 9)
    monkeypatch.setattr(cv2, "imshow", lambda _, pixels: shown.append(pixels), raising=False)
    monkeypatch.setattr(cv2, "waitKey", lambda _: next(keys), raising=False)
    run(video="clip.mp4", show=True, batch_size=1)
    assert len(shown) == 3 and shown[0].shape == (60, 80, 3) and is_near(shown[2][50, 60], 40, 12)
    assert len(read_clip("out/clip.mp4")[1]) == 3
    monkeypatch.setattr(cv2, "imshow", lambda *_: (_ for _ in ()).throw(cv2.error("not implemented")))
    with pytest.raises(ValueError, match="opencv-python-headless"):
        run(video="clip.mp4", show=True)


@pytest.fixture
def fake_capture(monkeypatch):
    """fake_capture(frame_rate, positions): what OpenCV opens has a frame for each position in milliseconds."""
    cv2 = pytest.importorskip("cv2")
    opencv, sources = cv2.VideoCapture, []

    def fake(frame_rate, positions):
        class Capture:
            def __init__(self):
                self.n_read = 0

            def get(self, key):
                known = {cv2.CAP_PROP_FPS: frame_rate, cv2.CAP_PROP_POS_MSEC: positions[self.n_read - 1]}
                return known.get(key, -1.0)  # what OpenCV says of what it does not know

            def read(self):
                if self.n_read == len(positions):
                    return False, None
                self.n_read += 1
                return True, np.full((48, 64, 3), 20 * self.n_read, np.uint8)

            def release(self):
                pass

        def capture(source):
            if "out" in str(source):
                return opencv(source)
            sources.append(source)
            return Capture()

        monkeypatch.setattr(cv2, "VideoCapture", capture)
        return sources

    return fake


@pytest.mark.parametrize(("video", "source", "target"), [
    ("0", 0, "camera0.mp4"), ("rtsp://host:554/front door?u=x", None, "front door.mp4"),
    ("rtsp://me:secret@host:554/", None, "host_554.mp4"), ("rtsp:///?a", None, "stream.mp4"),
    ("rtsp://192.168.1.20", None, "192.168.1.20.mp4"), ("http://host/video@2x.mp4", None, "video@2x.mp4"),
    ("http://host/live#x", None, "live.mp4"), ("rtsp://me:a?b@host/front", None, "front.mp4"),
])  # fmt: skip
def test_cameras_and_streams_go_on_until_they_end(run, fake_capture, video, source, target):
    sources = fake_capture(frame_rate=-1.0, positions=[-1.0] * 5)
    run(video=video)
    assert sources == [video if source is None else source]
    assert [path.name for path in Path("out").iterdir()] == [target]
    frame_rate, frames = read_clip(Path("out", target))
    assert frame_rate == module.FRAME_RATE and frames.shape == (5, 48, 64, 3)


@pytest.mark.parametrize(("frame_rate", "positions", "times"), [
    (10.0, [0, 100, 200, 600, 1000], [0, 0.1, 0.2, 0.6, 1.0]),  # it varies
    (30.0, [86_400_000, 86_400_200, 86_400_400], [0, 0.2, 0.4]),  # a camera, since the machine was started
    (10.0, [0, 0, 0], [0, 0.1, 0.2]), (1000.0, [-1, -1, -1], [0, 0.033, 0.067]),  # unknown
    (10.0, [0, 500, 0, 100], [0, 0.5, 0.6, 0.7]),  # a stream that begins again
])  # fmt: skip
def test_the_time_of_a_frame_is_its_own(run, fake_capture, frame_rate, positions, times):
    fake_capture(frame_rate, positions)
    run(video="0", batch_size=2, write_boxes_to="found.json")
    assert [row["time"] for row in json.loads(Path("found.json").read_text())] == times


@pytest.mark.parametrize("frame_rate", [59.94006, 70.123, 999.123])
def test_frame_rates_that_encoders_take(run, fake_capture, frame_rate):
    fake_capture(frame_rate, [0, 1, 2])
    run(video="0")
    assert read_clip("out/camera0.mp4")[0] == pytest.approx(frame_rate, rel=1e-3)


@pytest.mark.parametrize(("parameters", "error", "message"), [
    ({}, ValueError, "--video=FILE"), ({"video": "none.mp4"}, FileNotFoundError, r"none\.mp4: there is no such file"),
    ({"video": "a.mp4", "batch_size": 0}, ValueError, "batch_size is 0"),
    ({"video": "a.mp4", "output_folder": "."}, ValueError, r"a\.mp4: the original would be written over"),
    ({"video": "file:///videos/a.mp4"}, ValueError, "name a file by its path"),
    ({"video": "a.mp4", "write_boxes_to": "found.txt"}, ValueError, "write_boxes_to is 'found.txt'"),
    ({"video": "a.mp4", "show": True}, ValueError, "needs a screen"),
    ({"video": "a.mp4", "suppress": "horse", "write_boxes_to": "earlier.csv"}, ValueError, "'horse', which is not a"),
    ({"video": "a.mp4", "output_folder": "a.mp4"}, OSError, r"a\.mp4"),
])  # fmt: skip
def test_parameters_that_are_wrong(run, tmp_path, monkeypatch, parameters, error, message):
    pytest.importorskip("cv2")
    make_clip(Path("a.mp4"), n_frames=2)
    Path("earlier.csv").write_bytes(b"an earlier list")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    before = read_files(tmp_path)
    with pytest.raises(error, match=message):
        run(**parameters)
    assert read_files(tmp_path) == before


def test_without_opencv(run, monkeypatch):
    Path("clip.mp4").write_bytes(b"not looked at")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install opencv-python"):
        run(video="clip.mp4")


# --- GIFs -----------------------------------------------------------------------------------------


def make_animation(path, n_frames, **options):
    frames = [Image.new("RGB", SIZE, (40 * i, 0, 255 - 40 * i)) for i in range(n_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(("n_frames", "options"), [
    (5, {"duration": [40, 100, 250, 60, 90]}), (5, {"duration": 70, "loop": 0}), (3, {"loop": 3}), (1, {}),
])  # fmt: skip
def test_gif(run, n_frames, options):
    """Without OpenCV; every frame as long as before, and repeated as often."""
    make_animation("clip.GIF", n_frames, **options)
    model = run(video="clip.GIF", batch_size=2, write_boxes_to="found.json")
    assert [len(batch) for batch in model.batches] == [2] * (n_frames // 2) + [1]
    with Image.open("clip.GIF") as original, Image.open("out/clip.GIF") as result:
        assert result.n_frames == n_frames and result.size == SIZE
        assert result.info.get("loop") == options.get("loop")
        for i, (before, after) in enumerate(zip(*map(ImageSequence.Iterator, (original, result)), strict=True)):
            assert after.info.get("duration", 0) == before.info.get("duration", 0)
            inside, line = (after.convert("RGB").getpixel(place) for place in ((24, 30), (8, 24)))
            assert is_near(inside, (40 * i, 0, 255 - 40 * i), 6) and is_near(line, CAT, 12)
    found = json.loads(Path("found.json").read_text())
    assert [row["frame"] for row in found] == list(range(1, n_frames + 1))
    if isinstance(options.get("duration"), list):
        assert [row["time"] for row in found] == [0, 0.04, 0.14, 0.39, 0.45]


def test_damaged_gif(run):
    first, *others = map(Image.fromarray, np.random.default_rng(0).integers(0, 256, (4, 60, 80), dtype=np.uint8))
    first.save("clip.gif", save_all=True, append_images=others, duration=50)
    content = Path("clip.gif").read_bytes()
    header = content.rindex(b"!\xf9\x04")  # of the last frame
    for end in (len(content) - 2500, header + 3, header + 12):  # in the pixels of a frame, in its header
        Path("clip.gif").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"clip\.gif: damaged, it cannot be decoded"):
            run(video="clip.gif")
        assert not Path("out").exists()


@pytest.mark.parametrize("content", [b"", b"GIF89a"])
def test_what_is_no_gif(run, content):
    Path("clip.gif").write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.gif: not an image that can be read"):
        run(video="clip.gif")
    assert not Path("out").exists()


def test_script(tmp_path, tiny_checkpoint):
    make_clip(tmp_path / "clip.mp4", n_frames=3)
    command = script("tools/video.py", checkpoint=tiny_checkpoint, video="clip.mp4", min_score=0.2, top_k=5)
    code, output = finish(start(command, tmp_path))
    assert code == 0 and "3 frames, " in output and "15 objects" in output, output
    assert read_clip(tmp_path / "detections/clip.mp4")[1].shape == (3, 60, 80, 3)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    code, output = finish(start(command, tmp_path))
    assert code == 1 and output.splitlines()[-1].startswith("error: clip.mp4: OpenCV can decode no frame"), output
    assert "Traceback" not in output
