"""training/records.py and grid.py: curves without duplicates, pictures one can see, and no way to stop a run."""

import errno
import json
import math
import sys
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.sample.grid import write_image_grid
from dit_jax.training import records as records_module
from dit_jax.training.records import Records
from dit_jax.training.tensorboard import TensorBoard
from dit_jax.training.wandb_writer import WandbWriter


def lines_of(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events_of(workdir):
    """[(step, tag, value or None), ...] and the steps of START markers, read from the event files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    values, starts = [], []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.name.rsplit(".", 1)[-1]):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                starts.append(event.step)
            for value in event.summary.value:
                image = value.HasField("image")
                values.append((event.step, value.tag, (value.image.height, value.image.width) if image else value.simple_value))
    return values, starts


def test_scalars_and_images_reach_both_files(tmp_path):
    """Catches metrics that are lost, rounded or filed under another step."""
    image = np.full((4, 6, 3), 7, np.uint8)
    with Records(tmp_path) as records:
        records.scalars(3, {"loss": jnp.float32(0.25), "images": np.int64(12), "ok": True})
        records.images(3, {"samples": image})
    (line,) = lines_of(tmp_path)
    assert line.pop("time") > 1.7e9
    assert line == {"step": 3, "loss": 0.25, "images": 12, "ok": 1}
    values, _ = events_of(tmp_path)
    assert (3, "loss", 0.25) in values
    assert (3, "samples", (4, 6)) in values


def test_not_a_number_is_strict_json(tmp_path):
    """json.dumps writes a bare NaN that no strict parser takes, and null would hide which of the three it was."""
    with Records(tmp_path) as records:
        records.scalars(1, {"a": math.nan, "b": math.inf, "c": -np.inf})
    (line,) = lines_of(tmp_path)
    assert math.isnan(float(line["a"])) and float(line["b"]) == math.inf and float(line["c"]) == -math.inf


def test_bad_metrics_are_refused(tmp_path):
    """An array instead of a number, a float image or a field name taken are mistakes in code, not failing disks."""
    records = Records(tmp_path)
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
        records.scalars(1, {"loss": np.ones(2)})
    with pytest.raises(ValueError, match="step"):
        records.scalars(1, {"step": 1})
    with pytest.raises(ValueError, match="float32"):
        records.images(1, {"x": np.ones((4, 4, 3), np.float32)})


def test_rewind_leaves_no_duplicates(tmp_path):
    """A resumed run must continue the curve of the step it restored, in both files, after a line cut by kill -9."""
    with Records(tmp_path) as records:
        for step in (1, 2, 3, 4):
            records.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with Records(tmp_path) as records:
        records.rewind(2)
        records.scalars(3, {"loss": 30})
        records.rewind(2)  # a roll-back within the run
        records.scalars(3, {"loss": 31})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(1, 1), (2, 2), (3, 31)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]
    values, starts = events_of(tmp_path)
    assert starts == [3, 3]  # TensorBoard hides the events from this step on that were written before
    assert [value for step, _, value in values if step == 3] == [3, 30, 31]


def test_a_half_line_is_cut_before_appending(tmp_path):
    """Without the cut the first line of the new process is glued to the half line, and both are lost."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0}\n{"step": 2, "ti')
    with Records(tmp_path) as records:
        records.scalars(2, {})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_failing_sink_is_counted_and_never_raises(tmp_path, caplog):
    """A full disk or a broken folder must cost metrics, not the run, and one warning, not one per step."""
    (tmp_path / "file").write_text("")
    records = Records(tmp_path / "file")  # not a folder
    for step in range(3):
        records.scalars(step, {"loss": 1.0})
        records.images(step, {"x": np.zeros((2, 2, 3), np.uint8)})
    records.rewind(1)
    records.flush()
    records.close()
    assert records.dropped["metrics.jsonl"] == 3
    assert records.dropped["tensorboard"] == 6


def test_a_full_disk_costs_the_records_of_that_moment(tmp_path, monkeypatch):
    """TensorBoard's thread dies of the first error, its queue fills, and the run hangs at the sixth record."""
    real, broken = TensorBoard.scalar, [True]

    def scalar(self, *args):
        if broken:
            raise OSError(errno.ENOSPC, "no space left on device")
        real(self, *args)

    monkeypatch.setattr(TensorBoard, "scalar", scalar)
    with Records(tmp_path) as records:
        for step in range(20):
            records.scalars(step, {"loss": 1.0})
            records.flush()
            if step == 1:
                broken.clear()
    assert records.dropped == {"previews": 0, "metrics.jsonl": 0, "tensorboard": 2, "wandb": 0}
    assert len(lines_of(tmp_path)) == 20 and [step for step, _, _ in events_of(tmp_path)[0]] == list(range(2, 20))


def test_a_sink_that_hangs_stops_nothing(tmp_path, monkeypatch):
    """A file system that does not respond holds up every step, or the end of the run."""
    for_ever = threading.Event()
    monkeypatch.setattr(TensorBoard, "scalar", lambda *_: for_ever.wait())
    monkeypatch.setitem(records_module.MOST_SECONDS, "tensorboard", 0.1)
    monkeypatch.setattr(records_module, "MOST_WAITING", 30)
    with Records(tmp_path) as records:
        for step in range(20):
            records.scalars(step, {"loss": 1.0})
    assert len(lines_of(tmp_path)) == 20 and records.dropped["tensorboard"] >= 19
    for_ever.set()


def test_disabled_records_write_nothing(tmp_path):
    """Every process but the first would write the same lines again."""
    with Records(tmp_path / "run", enabled=False) as records:
        records.rewind(3)
        records.scalars(1, {"loss": 1.0})
        records.images(1, {"x": np.zeros((2, 2, 3), np.uint8)})
        records.flush()
    assert not (tmp_path / "run").exists()


class StandIn:
    """What the writer uses of the package wandb, with the server's memory of runs."""

    def __init__(self):
        self.runs, self.starts, self.fails = {}, [], False
        self.Settings, self.Image = SimpleNamespace, lambda image: image.shape

    def init(self, *, project, id, resume, dir, config, settings):
        self.starts.append((project, id, resume, config))
        if self.fails:
            raise RuntimeError("no network")
        rows = self.runs.setdefault(id, [])

        def log(values, step):
            if self.fails:
                raise RuntimeError("quota")
            rows.append((step, values))
            run.step = step

        run = SimpleNamespace(log=log, finish=lambda: None, step=rows[-1][0] + 1 if rows else 0)
        return run


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    return sys.modules["wandb"]


def with_wandb(folder):
    return Records(folder, wandb=WandbWriter(folder, "digits", {"seed": 3}))


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb):
    """A resumed run that appears as another one, or sends again what W&B has."""
    with with_wandb(tmp_path / "run") as records:
        records.rewind(0)
        for step in (1, 2, 3):
            records.scalars(step, {"loss": step})
        records.images(3, {"samples": np.zeros((4, 6, 1), np.uint8)})
    with with_wandb(tmp_path / "run") as records:
        records.rewind(2)
        for step in (3, 4):
            records.scalars(step, {"loss": step})
    (name,) = wandb.runs
    assert wandb.starts == [("digits", name, "allow", {"seed": 3})] * 2
    loss = [(step, {"loss": step}) for step in (1, 2, 3, 4)]
    assert wandb.runs[name] == [*loss[:3], (3, {"samples": (4, 6)}), loss[3]]
    assert records.dropped["wandb"] == 0 and [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", ["absent", "start", "later"])
def test_wandb_never_stops_a_run(tmp_path, wandb, monkeypatch, broken):
    """A run that ends, loses its files or waits at every step because W&B is away."""
    if broken == "absent":
        monkeypatch.setitem(sys.modules, "wandb", None)
    wandb.fails = broken == "start"
    with with_wandb(tmp_path) as records:
        for step in (1, 2, 3):
            records.scalars(step, {"loss": step})
            records.flush()
            wandb.fails = broken != "absent"
    assert len(lines_of(tmp_path)) == 3 and len(wandb.starts) == (broken != "absent")
    assert records.dropped == {"previews": 0, "metrics.jsonl": 0, "tensorboard": 0, "wandb": 2 if broken == "later" else 3}


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_has_every_image_in_its_place(tmp_path, channels):
    """Catches rows and columns exchanged, images cut, and the smoothing of tiny images."""
    images = np.random.default_rng(0).integers(1, 255, (5, 8, 6, channels), np.uint8)
    grid = write_image_grid(tmp_path / "new" / "samples.png", images, columns=3)
    assert grid.shape == (2 * (8 * 8 + 4) + 4, 3 * (6 * 8 + 4) + 4, channels)  # 8 -> 64 pixels
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cell = grid[4 + row * 68 :, 4 + column * 52 :][:64, :48]
        assert np.array_equal(cell, image.repeat(8, 0).repeat(8, 1))
    assert (grid[72:, 2 * 52 :] == 40).all() and (grid[:4] == 40).all()
    read = np.asarray(Image.open(tmp_path / "new" / "samples.png"))
    assert np.array_equal(read.reshape(grid.shape), grid)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.png"]
    assert write_image_grid(tmp_path / "large.png", np.zeros((4, 100, 100, 3), np.uint8)).shape == (212, 212, 3)


def test_grid_refuses_floats_and_leaves_no_partial_file(tmp_path):
    """Floats in [-1, 1] would be written as black; a failed write must not leave half a picture."""
    with pytest.raises(ValueError, match="float32"):
        write_image_grid(tmp_path / "x.png", np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="columns=0"):
        write_image_grid(tmp_path / "x.png", np.zeros((1, 4, 4, 3), np.uint8), columns=0)
    with pytest.raises(ValueError):
        write_image_grid(tmp_path / "x.unknown", np.zeros((1, 4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
