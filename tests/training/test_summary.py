"""What a run says at its end."""

import shlex
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

from dit_jax import build, recipes
from dit_jax.tasks.averages import progress
from dit_jax.training import summary

RESULT = {"step": 6, "loss": 0.25, "samples": "/runs/x/samples/00000006_final.npz"}
SCORE = {"fid": 0.3214, "fid_interval": [0.3, 0.35], "fid_interval_level": 0.95, "features": "pixels", "num_samples": 1000}


def commands(text):
    return [shlex.split(line[10:]) for line in text.splitlines() if "python -m" in line]


def test_the_end_of_a_run(tmp_path):
    """A score without its interval, a command that needs more than the folder, more than six lines."""
    run = build.Run(tiny.config(evaluation__num_images=1000))
    text = summary.ending(run, Path.cwd() / "runs/my digits", RESULT | SCORE, tmp_path / "report.html")
    assert len(text.splitlines()) == 5
    assert "Frechet distance 0.321 in pixels (95% interval 0.300 to 0.350), 1,000 samples" in text and "_final.png" in text
    held_out = {"validation_loss": 0.17123, "validation": {"num_images": 297}}
    assert "; validation loss 0.1712 of 297 held-out examples; Frechet distance" in summary.score(RESULT | held_out | SCORE)
    sample, evaluate = commands(text)
    assert sample[2] == "dit_jax.sample" and "--workdir=runs/my digits" in sample and "--guidance_scale=1.5" in sample
    assert "--reference=digits" in evaluate and f"--samples={sample[-1].removeprefix('--out=')}" in evaluate


def test_the_summary_shows_the_labels(tmp_path):
    """Labels whose numbering nobody knows until the samples are wrong; a scale that ignores them without a word."""
    text = summary.text(build.Run(tiny.config(guidance__scale=0.0)), tmp_path)
    assert "labels     0 to 9" in text and "guidance.scale is 0: the labels count for nothing" in text
    for number in range(12):
        (tmp_path / "data" / f"kind {number:02d}").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / f"kind {number:02d}" / "x.png")
    data = {"name": "folder", "path": str(tmp_path / "data"), "split": ""}
    text = summary.text(build.Run(tiny.config(data=data, model__num_classes=12)), tmp_path)
    assert "labels     0 'kind 00', 1 'kind 01', " in text and "8 'kind 08', ..., 11 'kind 11'" in text
    assert "count for nothing" not in text


def test_a_short_run_says_what_its_average_is(tmp_path):
    """Noise from an average that is 97 % initial weights, without a word; a warning where the average has converged."""
    short = summary.text(build.Run(tiny.config(num_steps=300, ema_decay=0.9999)), tmp_path)
    assert "(ema_decay 0.9999) holds 97% initial weights at step 300; set ema_warmup, lower ema_decay or train longer" in short
    assert "initial weights" not in summary.text(build.Run(tiny.config(num_steps=1000, ema_decay=0.99)), tmp_path)
    assert "97% of the moving average are initial weights" in summary.score(RESULT | {"initial_weights_in_average": 0.9704})


def test_how_far_every_average_has_come():
    """An average that is mostly initial weights, or one of the wrong age, that the end of a run does not name."""
    run, steps = build.Run(tiny.config(ema_decay=0.9999, averages=("0.99+warmup", "power:0.1"))), 300
    result = {"step": steps, "averages": [progress(one, steps) for one in (run.task.average, *run.task.averages)]}
    lines = [line for line in summary.ending(run, Path("/runs/a"), result, None).splitlines() if line.startswith("average")]
    assert lines == [
        "average    0.9999: 97.0% initial weights, the others 149 steps old on average",
        "average    0.99+warmup: 0.0% initial weights, the others 30 steps old on average",
        "average    power:0.1: 0.0% initial weights, the others 33 steps old on average",
    ]


def test_commands_that_would_be_refused():
    """Guidance of a network that was never trained without labels; a score without a reference."""
    run = build.Run(tiny.config(task__cond_dropout=0.0, evaluation__reference=""))
    ((*sample,),) = commands(summary.ending(run, Path("/runs/a"), {"step": 6, "loss": None}, None))
    assert not [word for word in sample if "guidance" in word] and "loss" not in summary.score({"step": 6, "loss": None})


def test_the_end_of_an_autoencoder():
    """A sample command for a run that draws no samples."""
    text = summary.ending(build.Run(tiny.autoencoder()), Path("/runs/vae"), RESULT | {"psnr": 29.6, "ssim": 0.97}, None)
    ((_, _, verb, *words),) = commands(text)
    assert verb == "dit_jax.encode" and "--data=digits" in words and "--resolution=8x8" in words and "PSNR 29.60 dB" in text


def test_the_next_command_of_a_network_with_text_has_a_prompt():
    """Catches a printed command that `sample` refuses, since such a network draws from a prompt."""
    run = build.Run(recipes.digits_text())
    (command,) = summary.next_commands(run, "runs/text")
    assert "--prompt='a zero'" in command or "'--prompt=a zero'" in command
    assert "--prompt" not in summary.next_commands(build.Run(tiny.config()), "runs/digits")[0]
