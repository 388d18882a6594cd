"""The library: `dit_jax.load` draws what `sample` draws, and refuses what it cannot draw."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dit_files import tiny_weights
from runs import save_run
from verbs import run as run_verb

import dit_jax
from dit_jax import pipeline, recipes
from dit_jax.build import Run
from dit_jax.config_file import plain
from dit_jax.convert import formats
from dit_jax.errors import NotFinite, UserError
from dit_jax.evaluate.images import NpzImages
from dit_jax.interop import pt_reader, weights
from dit_jax.sample import drawing, samples_file, shards, trained
from dit_jax.sample.jobs.interpolate import spherical
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir, read_best, write_class_names
from dit_jax.tasks import averages
from dit_jax.training.results import results_of

# With velocities as output, a random network draws images that are not black and white.
CONFIG = tiny.config(model__depth=1, process=recipes.flow(), sampler=recipes.default_sampler("euler"))
FAST = {"num_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a random network."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    save_run(folder, CONFIG, 0)
    return folder


@pytest.fixture(scope="module")
def pipe(run):
    return dit_jax.load(str(run))


@pytest.fixture(scope="module")
def pair(pipe):
    """Two images, of classes 3 and 5."""
    return pipe([3, 5], **FAST)


def levels(a, b):
    """The largest difference of images in levels of 8 bits."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_a_short_average_is_said_when_it_is_sampled(run, capsys):
    """Noise that is taken for the network's fault."""
    dit_jax.load(run)
    assert 'holds 99% initial weights at step 1; average="none" (--average=none) samples' in capsys.readouterr().err


def test_a_run_with_nan_is_refused(tmp_path):
    """Black images of a checkpoint that holds NaN, which an older version may have saved."""
    average = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), formats.network_params(CONFIG))
    average["final"]["linear"]["bias"][0] = np.nan
    with Workdir(tmp_path, plain(CONFIG)), Checkpointer(tmp_path / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(1, {"ema_params": jax.tree.map(jax.numpy.asarray, average)}, {})
    with pytest.raises(NotFinite, match=r"step 1 of .* has NaN or infinity in final/linear/bias \(1 of "):
        dit_jax.load(tmp_path)


def test_samples_are_an_array(pair):
    """Images that NumPy does not take, or that somebody changes the fields of."""
    assert np.asarray(pair).shape == (2, 8, 8, 1) and np.asarray(pair).dtype == np.uint8 and np.asarray(pair).std() > 10
    assert pair.labels.tolist() == [3, 5] and len(pair) == 2 and pair.made_by["sampler"]["num_steps"] == 2
    with pytest.raises(AttributeError):
        pair.images = None


def test_an_image_depends_on_seed_index_and_label(pipe, pair):
    """An image that changes with the images beside it, or does not change with its seed or label."""
    more = pipe([3, 4, 5] * 30, **FAST).images
    assert levels(more[0], pair.images[0]) == 0
    assert levels(more[1], pair.images[1]) > 5
    assert levels(pipe([3, 5], seed=1, **FAST), pair) > 5


def test_save_writes_what_sample_writes(pipe, pair, tmp_path):
    """A saved file with other bytes than the verb's: another layout, or settings that are missing."""
    written = pipe.write(str(tmp_path / "written.npz"), [3, 5], num_samples=2, **FAST)
    pair.save(str(tmp_path / "saved.npz"))
    assert (tmp_path / "saved.npz").read_bytes() == Path(written["out"]).read_bytes() == samples_file.npz_bytes(pair)
    assert pair.save_grid(str(tmp_path / "grid.png")).stat().st_size > 50
    for call in (lambda: pair.save(tmp_path / "x.png"), lambda: pair.save_grid(tmp_path / "x.npz")):
        with pytest.raises(UserError, match="png"):
            call()


@pytest.mark.slow
def test_verb_draws_what_the_library_draws(run, tmp_path):
    """A verb with settings of its own."""
    run_verb(
        "sample", f"--workdir={run}", "--labels=3,5", "--num_samples=70", "--guidance_scale=1.5", f"--out={tmp_path / 'x.npz'}"
    )
    code = (
        f"import dit_jax; pipe = dit_jax.load({str(run)!r}); "
        f"pipe([3, 5], num_samples=70, guidance_scale=1.5).save({str(tmp_path / 'y.npz')!r})"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


WRONG = {
    "label of another set": ({"labels": [3, 12]}, "label 12 is out of range: 0 to 9"),
    "negative label": ({"labels": [-1]}, "label -1 is out of range"),
    "fraction as label": ({"labels": [1.5]}, "not a whole number"),
    "truth as label": ({"labels": [True]}, "not a whole number"),
    "no labels": ({"labels": []}, "labels is empty"),
    "unknown word": ({"labels": "all"}, "balanced, random, none"),
    "no images": ({"num_samples": 0}, "at least 1"),
    "negative scale": ({"guidance_scale": -3}, "guidance.scale is -3.0; it must be at least 0"),
    "no number": ({"guidance_scale": float("nan")}, "it must be at least 0"),
    "half a step": ({"num_steps": 2.5}, "num_steps=2.5 must be a whole number"),
    "negative seed": ({"seed": -1}, "the seed of sampling is -1"),
    "misspelt option": ({"guidance_scal": 2}, "did you mean guidance_scale"),
    "field of another sampler": ({"sampler_fields": {"eta": 1}}, "'euler' has the fields num_steps"),
    "interval without guidance": ({"guidance_interval": (0.1, 0.2)}, "no effect where guidance is off"),
    "channels without guidance": ({"guidance_channels": 1, "guidance_scale": 1}, "no effect where guidance is off"),
    "order without forecast": ({"forecast_order": 1}, "no effect where forecast_interval is 1"),
    "three times": ({"guidance_interval": (0.1, 0.2, 0.3)}, "give two times"),
    "scale without skipped layers": ({"skip_scale": 2.0}, "no effect without skip_layers"),
    "layer of another network": ({"skip_layers": [4]}, "has block 4, and the network has the blocks 0 to 0"),
    "chunk that splits a shard": ({"chunk_size": 5}, "must divide 64"),
    "weights of the same size": ({"autoguidance": "x"}, "needs guidance_scale above 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused(pipe, name):
    """Flat images, NaN, or images of other settings than were asked for."""
    options, text = WRONG[name]
    with pytest.raises(UserError) as error:
        pipe(**options)
    assert text in str(error.value)


def test_generator_refuses_labels_out_of_range(pipe):
    """The generator itself, called from Python, drew flat images for label 12 of 10."""
    generator = pipe._prepare([3], None, 0, FAST, in_memory=True).generator
    with pytest.raises(UserError, match="label 12 is out of range"):
        generator(pipe._parameters[0], {"codec": {}}, {"label": np.array([12])}, 1)
    with pytest.raises(UserError, match="labels are float32"):
        generator(pipe._parameters[0], {"codec": {}}, {"label": np.array([1.0], np.float32)}, 1)


def test_scale_0_is_said(pipe, capfd):
    """Labels that are asked for and ignored without a word."""
    pipe._prepare([3], None, 0, {"guidance_scale": 0})
    assert "the labels count for nothing" in capfd.readouterr().err


def test_no_guidance_and_no_null_label_without_dropout(tmp_path):
    """Images of a row of the label table that was never trained: by the verb's way, in Python, and by the generator itself."""
    config = tiny.config(model__depth=1, task__cond_dropout=0.0)
    save_run(tmp_path / "run", config, 0)
    pipe = dit_jax.load(tmp_path / "run")
    for call in (
        lambda: pipe("none"),
        lambda: pipe.interpolate((0, 1)),
        lambda: pipe.write(tmp_path / "x.npz", "none"),
        lambda: pipe._prepare([3], None, 0, {}).generator({}, {}, {"label": np.array([3, 10])}, 2),
    ):
        with pytest.raises(UserError, match=r"never trained without its label .* ask for labels from 0 to 9"):
            call()
    for call in (lambda: pipe([3], guidance_scale=4), lambda: pipe.export(tmp_path / "out", guidance_scale=0)):
        with pytest.raises(UserError, match="not trained on the null condition"):
            call()
    with pytest.raises(UserError, match="not trained on the null condition"):
        results_of(Run(tiny.config(task__cond_dropout=0.0, guidance__scale=1.5)))
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_samples_hold_the_names_of_their_labels(run, tmp_path):
    """Labels whose meaning is lost with the run; samples begun by an older version that are refused for want of the names."""
    shutil.copytree(run, tmp_path / "run")
    settings = dit_jax.load(tmp_path / "run")._prepare([3], None, 0, {}).settings()
    assert "class_names" not in settings
    write_class_names(tmp_path / "run", [f"digit {k}" for k in range(10)])
    drawing = dit_jax.load(tmp_path / "run")._prepare([3], None, 0, {})
    assert drawing.settings()["class_names"][3] == drawing.made_by()["class_names"][3] == "digit 3"
    assert not shards.changes({"made_by": settings}, {"made_by": drawing.settings()})


def test_callback_sees_every_evaluation(pipe, pair):
    """Evaluations that are lost, repeated for the rows that fill a chunk, or told of with another image's index; a last
    prediction that is not what becomes the image."""
    seen = []
    samples = pipe([3, 5], callback=seen.append, **FAST)
    assert levels(samples, pair) <= 1
    assert [(e.number, e.images.tolist(), e.x0.shape) for e in seen] == [(k, [0, 1], (2, 8, 8, 1)) for k in range(2)]
    assert seen[0].t.tolist() == [1, 1] and 0 < seen[1].t[0] < 1
    assert levels(pipe.decode(seen[-1].x0), pair) <= 1  # Euler's last step goes to the prediction
    assert levels(pipe.decode(seen[0].x0), pair) > 5


def test_error_of_a_callback_is_raised(pipe):
    """An error in the user's function that is lost, or that ends the process."""

    def fails(evaluation):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        pipe([3, 5], callback=fails, **FAST)
    assert len(pipe([3, 5], callback=lambda e: None, **FAST)) == 2


def test_check_raises_what_a_call_raises(pipe, pair):
    """Catches a server that queues what it cannot draw, or counts other evaluations than its callback is told of."""
    labels, evaluations = pipe.check([3, 5], **FAST)
    assert labels.tolist() == pair.labels.tolist() and evaluations == 2
    assert pipe.check("none", num_samples=3, sampler="heun", num_steps=4)[1] == 8
    for options, text in WRONG.values():
        if text != WRONG["weights of the same size"][1]:
            with pytest.raises(UserError, match=re.escape(text)):
                pipe.check(**options)


def test_programs_have_a_bound(run, monkeypatch):
    """Catches a server whose memory grows with every other guidance scale, and a program that is dropped while it is used."""
    monkeypatch.setattr(pipeline, "MOST_PROGRAMS", 2)
    pipe = dit_jax.load(run)
    for scale in (1.0, 1.5, 2.0, 2.5):
        pipe.check([3], guidance_scale=scale, **FAST)
        assert f'"scale": {scale}' in list(pipe._generators)[-1] and len(pipe._generators) <= 2
    generator = pipe._prepare([3], None, 0, {"guidance_scale": 2.5} | FAST, in_memory=True, watched=True).generator
    assert generator.program is list(pipe._generators.values())[-1].program


def test_interpolation_ends_at_both_seeds(pipe):
    """Noise of less than unit variance between the seeds, or ends that are not the seeds' images."""
    images = pipe.interpolate((0, 1), 5, label=3, **FAST).images
    for seed, end in ((0, images[0]), (1, images[-1])):
        assert levels(pipe([3], seed=seed, **FAST).images[0], end) <= 1
    assert min(levels(a, b) for a, b in itertools.pairwise(images)) > 5
    a, b = np.random.default_rng(0).standard_normal((2, 1, 8, 8, 1)).astype(np.float32)
    points = spherical(a, b, np.linspace(0, 1, 5))
    lengths = np.sqrt((points**2).sum((1, 2, 3)))
    assert lengths.min() > 0.99 * min(lengths[0], lengths[-1])
    with pytest.raises(UserError, match="at least 2 images"):
        pipe.interpolate((0, 1), 1)


def test_raw_weights(run, tmp_path):
    """The moving average in place of the weights that training left, or the other way around."""
    folder = tmp_path / "raw"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    params = jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.1, x.dtype), formats.network_params(CONFIG))
    average = jax.tree.map(lambda x: 2 * x, params)
    with Checkpointer(folder / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(7, {"params": params, "ema_params": average}, {})
    values = {name: jax.tree.leaves(dit_jax.load(folder, average=name)._parameters[0])[0] for name in ("default", "none")}
    assert {name: float(np.asarray(x).flat[0]) for name, x in values.items()} == pytest.approx({"default": 0.2, "none": 0.1})
    pipe = dit_jax.load(folder, average="none")
    assert pipe.step == 7 and pipe._prepare([3], None, 0, {}).settings()["average"] == "none"
    for wrong, text in (
        ({"average": "half"}, "default, none: 'half' is no average; write 0.9999"),
        ({"step": "seven"}, "or best"),
        ({"step": 8}, "8"),
    ):
        with pytest.raises(UserError, match=text):
            dit_jax.load(folder, **wrong)


def test_an_average_that_is_made_afterwards(run, tmp_path, capsys):
    """Checkpoints combined with each other's factors, one average in place of another, or one of steps that come later."""
    folder = tmp_path / "averaged"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    names, steps = ("power:0.05", "power:0.1"), range(100, 900, 100)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"averages": list(names)}))
    shapes, rng = formats.network_params(CONFIG), np.random.default_rng(0)
    values = {(name, at): rng.normal() for at in steps for name in names}
    with Checkpointer(folder / "checkpoints", every_steps=100, keep_last=9) as checkpointer:
        for at in steps:
            stored = {
                averages.key(averages.parse(name)): jax.tree.map(lambda x, v=values[name, at]: jnp.full(x.shape, v), shapes)
                for name in names
            }
            checkpointer.save(at, {"averages": stored, "ema_params": jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)}, {})

    def drawn(average, step=None):
        return float(np.asarray(jax.tree.leaves(dit_jax.load(folder, average=average, step=step)._parameters[0])[0]).flat[0])

    assert drawn("power:0.1") == pytest.approx(values["power:0.1", 800]) and drawn("0.99") == drawn("default") == 0
    assert drawn("power:0.05", 300) == pytest.approx(values["power:0.05", 300])
    known = [(averages.parse(name), at) for (name, at) in values]
    factors, error = averages.combine(known, averages.Power(0.075), 600)
    assert drawn("power:0.075", 600) == pytest.approx(factors @ list(values.values()), rel=1e-4)
    assert f"power:0.075 of step 600 from 6 checkpoints, weights of the steps off by {error:.1%}" in capsys.readouterr().err
    for average, text in (("power:0.25", "would be off by"), ("0.5", r"has 0\.99, power:0\.05, power:0\.1; 'none' takes")):
        with pytest.raises(UserError, match=text):
            drawn(average)


def test_weights_of_other_code(tmp_path):
    """The paper's .pt, SiT's, or a folder of diffusers, which cannot be loaded or get another process or other weights."""
    size = {"width": 384, "heads": 6, "depth": 1, "num_classes": 10}
    made = tiny_weights(**size)
    formats.write(made, "official", tmp_path / "DiT.pt")
    formats.write(tiny_weights(recipes.sit, **size), "official", tmp_path / "SiT-S.pt")
    formats.write(made, "diffusers", tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "vae").mkdir()
    weights.write(tmp_path / "ours.safetensors", made)
    opened = {name: trained.read(str(tmp_path / name)) for name in ("DiT.pt", "pipeline", "ours.safetensors")}
    assert opened["pipeline"].codec == tmp_path / "pipeline" / "vae"
    assert {each.config.process.name for each in opened.values()} == {"gaussian"}
    assert trained.read(tmp_path / "SiT-S.pt").config.process.name == "flow"
    params = {name: jax.tree.leaves(each.params(Run(each.config))[0]) for name, each in opened.items()}
    for each in params.values():
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(each, params["ours.safetensors"], strict=True))
    with pytest.raises(UserError, match="has only one set of weights"):
        dit_jax.load(tmp_path / "ours.safetensors", average="none")


LOADER = """
import json, sys, jax, numpy as np
from jax import export

before = set(sys.modules)
folder, out = sys.argv[1:]
with open(f"{folder}/made_by.json") as file:
    rows = json.load(file)["rows"]  # images of a call
with open(f"{folder}/sampler.stablehlo", "rb") as file:
    draw = jax.jit(export.deserialize(bytearray(file.read())).call)
weights = dict(np.load(f"{folder}/weights.npz"))
seed, indices, labels = np.uint32(4), np.arange(rows, dtype=np.int32), np.full(rows, 3, np.int32)
np.save(out, np.asarray(draw(weights, seed, indices, {"label": labels})))
assert not {"dit_jax", "flax", "ml_collections", "absl"} & (set(sys.modules) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_export_runs_with_jax_and_numpy_alone(run, tmp_path, dtype):
    """A sampler that needs the package to run, forgets its weights, or draws other images."""
    pipe = dit_jax.load(run, dtype=dtype)
    folder = pipe.export(tmp_path / "exported", guidance_scale=1.5, **FAST)
    wanted = pipe([3] * 32, seed=4, guidance_scale=1.5, **FAST)
    command = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "images.npy")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=600)
    images = np.load(tmp_path / "images.npy")
    assert levels(images, wanted) == 0 and images.std() > 10
    assert pipe.export(folder, **FAST) == folder
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        pipe.export(folder, **FAST)


def test_paths_may_be_str(run, tmp_path):
    """'str' object has no attribute 'suffix'."""
    assert trained.read(str(run)).path == run
    weights.write(str(tmp_path / "x.safetensors"), tiny_weights())
    assert weights.read(str(tmp_path / "x.safetensors")).origin == {"from": "a test"}
    source = formats.Source("dit_jax", str(tmp_path / "x.safetensors"))
    assert formats.write(formats.read(source), "official", str(tmp_path / "y.pt"))["tensors"]
    assert pt_reader.is_pt(str(tmp_path / "y.pt")) and pt_reader.read(str(tmp_path / "y.pt"))
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 1), np.uint8)
    samples_file.write(str(tmp_path / "x.npz"), images, np.zeros(2), {"seed": 1})
    assert samples_file.made_by_of(str(tmp_path / "x.npz"))["seed"] == 1 and len(NpzImages(str(tmp_path / "x.npz"))) == 2
    drawing.check_out(str(tmp_path / "z.npz"))
    assert read_best(str(run)) is None


def test_score_takes_samples_arrays_and_paths(tmp_path):
    """Scores that depend on how the images are given; an error about their type."""
    images = np.random.default_rng(0).integers(0, 255, (70, 8, 8, 1), np.uint8)
    samples = dit_jax.Samples(images, np.zeros(70, np.int32), {"seed": 0})
    options = {"metrics": ["fid"], "replicates": 0}
    found = [dit_jax.score(each, "digits", **options)["fid"] for each in (samples, images, samples.save(tmp_path / "x.npz"))]
    assert found[0] == found[1] == found[2] > 1
    assert dit_jax.score(samples, images, **options)["fid"] < 1e-4
    for wrong, text in (
        ((images[:1],), "N >= 2"),
        ((images, images[:, :4]), "must be equal"),
        (("nowhere.npz",), "does not exist"),
    ):
        with pytest.raises(UserError, match=text):
            dit_jax.score(*wrong, **options)
    with pytest.raises(UserError, match="no option metric"):
        dit_jax.score(images, metric="fid")


def test_train_takes_a_config_or_its_name(tmp_path):
    """Fields that are ignored because the config is built already; a missing file that is met after the folder was made."""
    with pytest.raises(UserError, match="set the fields in it"):
        dit_jax.train(CONFIG, tmp_path / "run", ["num_steps=3"])
    with pytest.raises(UserError, match=r"nothing\.py"):
        dit_jax.train(str(tmp_path / "nothing.py"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_conditions_are_checked():
    """An array of labels in place of {"label": y} (JAX: no string indexing), and NaN for a label that the table does not have."""
    network = tiny.dit()
    x, t, y = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.float32), np.array([3, 10])
    params = network.init(jax.random.key(0), x, t, {"label": y})
    for cond, text in (
        (y, r'int64\[2\]; DiT takes a dict of arrays by name, as in {"label": y}'),
        ([3, 10], "cond is list"),
        ({"label": np.array([3, 99])}, "label 99 is out of range: 0 to 9, or 10 for no label"),
        ({"label": np.array([0.5, 1])}, "is float64"),
        ({"label": y[:1]}, r"int32\[2\] is needed"),
        (None, "the condition has no label"),
    ):
        with pytest.raises(UserError, match=text):
            network.apply(params, x, t, cond)
    assert dit_jax.models.DiT.of("S/8", num_classes=10).out_channels == 8


def test_import_is_light():
    """`import dit_jax` that takes seconds."""
    code = "import sys, dit_jax; dit_jax.models; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
