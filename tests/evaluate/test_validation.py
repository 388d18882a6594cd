"""The validation loss: noise levels of each process, a closed-form denoiser as an oracle, and what a run records."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
import tiny
import tiny_text
from verbs import run_verbs

from dit_jax import build, recipes
from dit_jax.config_file import plain
from dit_jax.convert import formats
from dit_jax.data.captions import filled
from dit_jax.data.latent_loader import LatentLoader
from dit_jax.data.latents import LatentCache
from dit_jax.data.sources.digits import WORDS
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.encode.writer import encode
from dit_jax.errors import NotFinite, UserError
from dit_jax.evaluate import validation
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir, differences
from dit_jax.storage.upgrade import upgrade
from dit_jax.training.samples import Samples


def config(process="flow", **overrides):
    c = recipes.digits(process)
    c.model.update({"depth": 1, "width": 16, "heads": 2})
    c.mesh.data = -1
    c.evaluation.update({"num_images": 0, "batch_size": 64})
    fields = {"data__split": "train", "validation__split": "test", "preview__every_steps": 0}
    return tiny.override(c, fields | overrides).lock()


def held_out_images():
    from sklearn.datasets import load_digits

    return np.round(load_digits().images[1500:, :, :, None] * 255 / 16).astype(np.uint8)


def held_out_labels():
    from sklearn.datasets import load_digits

    return load_digits().target[1500:].astype(np.int32)


@pytest.mark.parametrize("process", [Flow(), Flow(interpolant="gvp", shift=3.0), Gaussian(), Gaussian(schedule="cosine")])
def test_levels_are_those_of_the_process(process):
    """Catches a level that is a time, a signal-to-noise ratio upside down, or a variance in place of a deviation."""
    for level in validation.times_of(process):
        assert math.isclose(level.used, level.asked, rel_tol=1e-9 if process.continuous else 0.02)
        one = jnp.ones((1, 1))
        alpha = float(process.perturb(one, 0 * one, jnp.full((1,), level.time))[0, 0])
        sigma = float(process.perturb(0 * one, one, jnp.full((1,), level.time))[0, 0])
        assert math.isclose(sigma / alpha, level.asked, rel_tol=1e-4 if process.continuous else 0.02)


def test_linear_flow_in_closed_form():
    """Catches a bisection that stops early: sigma / alpha = t / (1 - t), so t = r / (1 + r)."""
    levels = validation.times_of(Flow())
    np.testing.assert_allclose([level.time for level in levels], [r / (1 + r) for r in validation.LEVELS], rtol=1e-12)
    assert len(levels) == 10 and validation.LEVELS[0] == 0.1 and math.isclose(validation.LEVELS[-1], 10)


def test_levels_outside_of_the_process_are_refused():
    """Catches a level that is silently moved to the end of the schedule."""
    with pytest.raises(UserError, match=r"from 0.1 to 1e.09, and the process has 0.0633724 to 2031"):
        validation.times_of(Gaussian(schedule="linear", num_timesteps=25, variance="fixed_small"), (0.1, 10, 1e9))


class Shrinks:
    """Stands in for a task: its network is the best linear denoiser of N(0, 1) data, x0 = alpha x_t / (alpha^2 + sigma^2)."""

    def __init__(self, task):
        self.process, self.codec, self.moments, self.condition = task.process, task.codec, task.moments, task.condition

    def apply(self, params, x, time, cond, control=None):
        c = self.process.expanded(1 - time, x)
        x0 = c.alpha * x / (c.alpha**2 + c.sigma**2)
        noise = (x - c.alpha * x0) / c.sigma
        return -(c.alpha_rate * x0 + c.sigma_rate * noise)


def test_a_closed_form_denoiser(monkeypatch):
    """Catches a wrong target (the noise, the velocity), an error that is weighted or guided, rows that fill the last batch and
    are counted, and examples that are trained on.

    The best linear denoiser of N(0, 1) has the error x0 (a^2 / v - 1) + a s noise / v with v = a^2 + s^2. Its expected square
    over the noise is in closed form: mean(x0^2) (s^2 / v)^2 + (a s / v)^2.
    """
    run, number = build.Run(config(evaluation__batch_size=100)), 297 * 64
    monkeypatch.setattr(validation, "in_float32", lambda run: type("R", (), {"task": Shrinks(run.task)}))
    result = validation.measured(run, {}, run.constants)
    power = np.square((held_out_images() / 127.5 - 1 + 0.39) / 0.75).mean()
    for row in result["levels"]:
        r = row["sigma_over_alpha"]
        exact = power * (r**2 / (1 + r**2)) ** 2 + (r / (1 + r**2)) ** 2
        assert math.isclose(row["loss"], exact, rel_tol=6 / math.sqrt(number)), row
    assert math.isclose(result["loss"], np.mean([row["loss"] for row in result["levels"]]))
    by_noise = np.mean([row["loss"] / row["used"] ** 2 for row in result["levels"]])
    assert math.isclose(result["noise_loss"], by_noise) and result["num_images"] == 297
    json.dumps(result)


@pytest.mark.slow
def test_the_noise_is_that_of_the_example():
    """Catches noise that depends on the batch size or on the run's seed: two runs would not be compared on equal terms."""
    losses = []
    for size, seed in ((64, 0), (100, 5)):
        run = build.Run(config(evaluation__batch_size=size, seed=seed), devices=jax.devices()[:1])
        params = tiny.random_params(run.task.init_params(jax.random.key(0)))
        losses.append([row["loss"] for row in validation.measured(run, params, run.constants, (0.3, 2.0))["levels"]])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_bfloat16_network_is_measured_in_float32():
    """Catches a loss that is rounded as the training is."""
    assert build.Run(config(model__dtype="bfloat16")).task.network.dtype == jnp.bfloat16
    assert validation.in_float32(build.Run(config(model__dtype="bfloat16"))).task.network.dtype == jnp.float32


def test_what_is_refused_before_training():
    """Catches a validation set that is the training set, splits of a data set that has none, and other classes."""
    with pytest.raises(UserError, match="are those that are trained on"):
        Samples.check(build.Run(config(validation__split="train")))
    with pytest.raises(UserError, match="no split 'rest'"):
        Samples.check(build.Run(config(validation__split="rest")))
    Samples.check(build.Run(config(validation__split="")))


def text_run(rate=0.9, **overrides):
    """A run of a network with text, read as bytes."""
    fields = {"conditioner__encoders": ("bytes",), "conditioner__lengths": (40,), "conditioner__weights": ()}
    return build.Run(tiny_text.config("", **fields, conditioner__dropout=(0.5,), captions__long_caption_rate=rate, **overrides))


@pytest.mark.slow
def test_held_out_examples_have_their_own_captions(tmp_path):
    """Catches another example's caption, a long one, or an encoder that is dropped, of held-out images and of a latent cache; and
    training from a cache with the captions of other records."""
    run = text_run(data__split="train", validation__split="test")
    validation.check(run)
    source, number = validation.source_of(run), 0
    tokens = run.conditioner.tokenizer_of("bytes")
    for first, batch in validation._batches(run, source, 100):
        texts = [filled("{a} {name}", WORDS[label]) for label in source.labels[first : first + 100]]
        np.testing.assert_array_equal(batch["tokens_bytes"], tokens(texts).ids)
        assert batch["present"].all() and first == number
        number += len(texts)
    assert number == 297

    encode(latents.job(latents.params()), tmp_path / "cache", max_bad_share=0.1)
    cache, run = (
        LatentCache(tmp_path / "cache"),
        text_run(0.0, captions__templates=("a {name}",), captions__long_templates=(), captions__names=()),
    )
    texts = [
        caption or f"a {cache.class_names[cache.labels[i]]}" for i, caption in enumerate(cache.captions(np.arange(len(cache))))
    ]
    assert len(set(texts)) > 20
    found = [batch["tokens_bytes"] for _, batch in validation._batches(run, cache, 25)]
    np.testing.assert_array_equal(np.concatenate(found), tokens(texts).ids)
    loader = LatentLoader(cache, 24, 3, flip=False, entries=run.caption_entries(cache))
    records, batch = loader.rows(2)[0], loader.batch(2)
    np.testing.assert_array_equal(batch["tokens_bytes"], tokens([texts[i] for i in records]).ids)
    np.testing.assert_array_equal(batch["moments"], cache.gather(loader.rows(2)[1]))
    assert not batch["present"].all()


@pytest.mark.slow
def test_the_loss_of_a_network_with_text_depends_on_the_captions():
    """Catches a validation loss without its text, or with the null condition."""
    losses = []
    for templates in (("{a} {name}",), ("nothing",)):
        run = text_run(data__split="train", validation__split="test", captions__templates=templates, mesh__data=1)
        run = build.Run(run.config, devices=jax.devices()[:1])
        params = tiny.random_params(run.task.init_params(jax.random.key(0)))
        losses.append(validation.measured(run, params, run.constants, (1.0,))["loss"])
    assert abs(losses[0] / losses[1] - 1) > 1e-3, losses


def test_broken_weights_are_named(monkeypatch):
    """Catches a NaN that is stored as a loss."""
    run = build.Run(config())
    monkeypatch.setattr(validation, "squared_errors", lambda task, params, constants, batch, indices, *_: indices * jnp.nan)
    with pytest.raises(NotFinite, match="validation loss is not finite"):
        validation.measured(run, {}, run.constants)


def test_an_older_run_goes_on():
    """Catches a folder of a run without the section that cannot be resumed, or a finished one whose results count as others."""
    new = plain(config(validation__split=""))
    old = {name: section for name, section in new.items() if name != "validation"}
    assert upgrade(old)["validation"] == new["validation"]
    assert not differences(new, plain(config()))


@pytest.mark.slow
def test_a_run_records_its_validation_loss(tmp_path):
    """Catches a loss of the trained weights in place of their average, of a part of the examples, or without their labels."""
    run = build.Run(config(evaluation__batch_size=300), devices=jax.devices()[:1])
    state = run.task.init(jax.random.key(0))
    state = dataclasses.replace(state, ema_params=tiny.random_params(state.params))
    found = Samples(run).finish(state, run.constants, tmp_path)
    assert found["validation_loss"] == found["validation"]["loss"] and found["samples"] is None
    assert found["validation"]["weights"] == "0.99" and found["validation"]["split"] == "test"
    row, digits = found["validation"]["levels"][3], {"image": held_out_images(), "label": held_out_labels()}
    errors = jax.jit(lambda *args: validation.squared_errors(run.task, *args).mean())
    arguments = (jnp.arange(297), row["time"], 3)
    assert math.isclose(row["loss"], errors(state.ema_params, run.constants, digits, *arguments), rel_tol=1e-4)
    others = digits | {"label": (held_out_labels() + 1) % 10}
    assert not math.isclose(row["loss"], errors(state.ema_params, run.constants, others, *arguments), rel_tol=1e-4)
    assert not math.isclose(row["loss"], errors(state.params, run.constants, digits, *arguments), rel_tol=1e-4)


def test_which_weights_and_examples_of_a_run(tmp_path, monkeypatch):
    """Catches other weights than were asked for, a split that is ignored, and a run without held-out examples that is measured
    on those that it was trained on."""
    c = config(validation__split="")
    shapes = formats.network_params(c)

    def filled(value):
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)

    with Workdir(tmp_path, plain(c)), Checkpointer(tmp_path / "checkpoints", every_steps=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"params": filled(2 * step), "ema_params": filled(2 * step + 1)}, {})
    seen = []

    def measured(run, params, constants):
        seen.append((run.config.validation.split, run.config.validation.path, float(jax.tree.leaves(params)[0].min())))
        return {"loss": 0.5}

    monkeypatch.setattr(validation, "measured", measured)
    for options, weights, value in (({}, "0.99", 5), ({"step": "1", "average": "none"}, "none", 2)):
        found = validation.of_run(tmp_path, split="test", **options)
        assert seen.pop() == ("test", "", value)
        assert found["validation_loss"] == 0.5 and found["validation"]["weights"] == weights and found["step"] == value // 2
    for options, words in (
        ({}, "was trained without held-out examples .* --split=test"),
        ({"split": "train"}, "are those that are trained on"),
        ({"split": "test", "step": "best"}, "has no scores"),
    ):
        with pytest.raises(UserError, match=words):
            validation.of_run(tmp_path, **options)
    assert not seen


@pytest.mark.slow
def test_a_finished_run_is_measured_again(tmp_path):
    """Catches a number of the verb that is not the training's own; a file that is written elsewhere, or without the numbers."""
    fields = "num_steps=2 model.depth=1 model.width=16 preview.every_steps=0 evaluation.num_images=0 data.split=train"
    train = ["main", "--config=digits", "--workdir=run", *(f"--config.{field}" for field in fields.split())]
    evaluate = ["evaluate", "--validation=run"]
    trained, again, other = run_verbs(
        tmp_path, [[*train, "--config.validation.split=test"], evaluate, [*evaluate, "--average=none", "--out=other.json"]]
    )
    assert trained[0] == again[0] == other[0] == 0, trained[2] + again[2] + other[2]
    own = json.loads((tmp_path / "run" / "result.json").read_text())
    found = json.loads((tmp_path / "run.validation.json").read_text())
    assert math.isclose(found["validation_loss"], own["validation_loss"], rel_tol=1e-6)
    assert found["validation"].keys() == own["validation"].keys() and found["step"] == 2
    assert json.loads((tmp_path / "other.json").read_text())["validation_loss"] != found["validation_loss"]
