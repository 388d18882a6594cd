"""The page of a run: what it shows, that it stands alone, and that it never fails a finished run."""

import json
import re

import jax
import numpy as np
import pytest
import tiny
from finished_run import write_run
from html_structure import Structure

from dit_jax import build, recipes
from dit_jax.errors import UserError
from dit_jax.report import collect, ending, page, pictures
from dit_jax.sample.generator import Generator
from dit_jax.sample.labels import spread_requests
from dit_jax.sample.weights import cast_for_inference
from dit_jax.tasks.state import create_sharded


def test_the_page_of_a_finished_run(tmp_path):
    """A page that is broken, is unreadable on a phone, fetches something, runs what a config says, or leaves out a part."""
    text = page.write(write_run(tmp_path / "my r\udce9n", True)).read_text()
    structure = Structure()
    structure.feed(text)
    assert not structure.open and not structure.fetched and not re.search(r"https?://", text)
    assert len(structure.ids) == len(set(structure.ids)) and set(structure.uses) <= set(structure.ids)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text and "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 3  # loss, images per second, score
    assert text.count("<img") == 3 + page.MOST_PREVIEWS and text.count("image/jpeg") == 3  # the large ones
    assert "Step 10." in text and "Step 80." in text and "95% interval 0.300 to 0.340" in text
    assert "4 x TPU v5 (tpu)" in text and "Abacus, 3 cores" in text and "1m15s" in text
    assert "<dt>optimizer.learning_rate</dt><dd>0.002</dd>" in text
    assert len(text) < 2_000_000


def test_the_page_shows_the_starts(tmp_path):
    """Starts that only a file has; text of a log that runs in the browser, or values that end in a trace."""
    folder = write_run(tmp_path / "run", True)
    log = [
        {"start": "a", "time": 1.7e9, "host": "<b>", "devices": "4 x TPU v5", "first_step": 0},
        {"start": "b", "time": "x", "first_step": 40},
        {"start": "b", "last_step": 90, "ended": "finished", "status": 0},
    ]
    (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    text = page.text(collect.read(folder))
    assert (
        "Starts: 2" in text
        and "<td>2023-11-14 22:13 UTC</td><td>&lt;b&gt;</td><td>4 x TPU v5</td><td>0 to ?</td><td>killed</td>" in text
    )
    assert "<td>40 to 90</td><td>finished (status 0)</td>" in text


def test_the_page_of_a_run_that_still_trains(tmp_path):
    """A page that waits for the end, or a number that is not finite in a curve."""
    run = collect.read(write_run(tmp_path / "run", False))
    assert run.curves["loss"][3:5] == [(40, 9 / 40), (60, 9 / 60)] and run.last_step == 90
    assert "Not finished: 90 of 90 steps" in page.text(run)
    with pytest.raises(UserError, match=r"not the --workdir of a dit_jax.main run"):
        page.write(tmp_path)


@pytest.fixture(scope="module")
def run():
    """A tiny run on one device, and its state with random parameters."""
    run = build.Run(tiny.config(mesh__data=1, evaluation__num_images=20), devices=jax.devices()[:1])
    state = create_sharded(run.task, jax.random.key(0), run.mesh)
    return run, state.replace(ema_params=tiny.random_params(state.ema_params))


def test_denoising_ends_with_the_run_s_sample(run, tmp_path):
    """Frames in another order than the sampler's, of another seed or label than the run's samples."""
    run, state = run
    images, times = pictures.denoise(run, state.ema_params, run.constants)
    assert images.shape == (pictures.ROWS, 5, 8, 8, 1) and times == sorted(times, reverse=True) and times[0] == 1.0
    generator = Generator(run.task, run.mesh, run.sampler, run.guidance, 4, run.config.seed, chunk_size=4)
    params = cast_for_inference(run.task, state.ema_params)
    drawn = generator(params, run.constants, spread_requests(run.conditioner, pictures.ROWS), pictures.ROWS)
    assert np.abs(images[:, -1].astype(int) - drawn).max() <= 1
    assert (images[:, 0] != images[:, -1]).any()


def test_real_images_have_the_wanted_labels(run):
    """Real images of other classes than the samples beside them, or the same one twice."""
    run, _ = run
    images, labels = pictures.real_images(run, np.arange(50) % 10)
    assert labels.tolist() == [*range(10)] * 5 and len({image.tobytes() for image in images}) == 50
    images, labels = pictures.real_images(run, np.full(300, 3))  # more than there are among those looked at
    assert len(images) == 300 and (labels == 3).sum() > 80


def test_an_error_in_the_report_does_not_fail_the_run(run, tmp_path, monkeypatch, capsys):
    """A run of days that ends with status 1 because of a picture."""
    run, state = run

    def fail(*args):
        raise RuntimeError("no space\nfor pictures")

    monkeypatch.setattr(pictures, "denoise", fail)
    write_run(tmp_path / "run", False)
    assert ending.write(run, state.ema_params, run.constants, tmp_path / "run", 6) == tmp_path / "run" / "report.html"
    assert "the picture of the denoising is left out: no space for pictures (test_report.py:" in capsys.readouterr().err
    monkeypatch.setattr(page, "write", fail)
    assert ending.write(run, state.ema_params, run.constants, tmp_path / "run", 6) is None


def test_samples_of_text_say_where_their_prompts_are(tmp_path):
    """Catches labels in the report of a run that has prompts."""
    text = page.write(write_run(tmp_path / "run", True, recipes.digits_text().lock())).read_text()
    assert "Each has its prompt below it." in text and "The noise and the prompts are the same" in text
    assert "the labels are" not in text and "preview.prompts" in text and "a handwritten three" in text
