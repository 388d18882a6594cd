"""Training that starts from weights: full, with frozen parts, with adapters; other classes and other sizes."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from dit_files import held
from flax.traverse_util import flatten_dict
from kill_points import check_every_kill
from PIL import Image

import dit_jax
from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.errors import UserError
from dit_jax.interop import weights as weights_file
from dit_jax.interop.weights import Weights
from dit_jax.parallel.mesh import place, shard_batch
from dit_jax.sample import trained
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.training import loop
from dit_jax.training.initial import Initial, kept_rows, settled

CLASSES = ("cat", "dog", "owl")
NAMES = ("ant", "dog", "bee", "owl", "elk")  # of the weights' classes
TABLE = "label_embedding/embedding"


def config(photos, weights="", **overrides):
    """Fine-tuning of a tiny DiT on photographs of 16 x 16 pixels."""
    c = recipes.folder("S/8", 16, len(CLASSES))
    c.model.update({"depth": 2, "width": 32, "heads": 4, "patch_size": 4})
    c.data.path, c.init.weights = str(photos), str(weights)
    c.num_steps, c.batch_size, c.log.every_steps = 3, 8, 1
    c.checkpoint.every_steps, c.preview.every_steps, c.sampler.num_steps = 1, 0, 3
    c.mesh.data = -1
    return tiny.override(c, overrides).lock()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (18, 20, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def official(photos, tmp_path_factory):
    """(file in the layout of the paper's code with 5 classes, its parameters by our paths)."""
    c = config(photos, model__num_classes=len(NAMES))
    rng = np.random.default_rng(1)
    shapes = flatten_dict(formats.network_params(c), sep="/")
    arrays = {name: (0.1 * rng.normal(size=x.shape)).astype(np.float32) for name, x in shapes.items()}
    sections = weights_file.sections_of(c.to_dict())
    out = tmp_path_factory.mktemp("weights") / "dit.pt"
    formats.write(Weights({name: held(x) for name, x in arrays.items()}, sections, {"from": "a test"}), "official", out)
    return out, arrays


def flat(tree):
    return {name: np.asarray(x) for name, x in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("named", [True, False])
def test_rows_of_the_label_table(photos, official, tmp_path, named):
    """Catches rows that are kept by number where the names say otherwise, and a null row that is lost or made a class."""
    path, source = official
    if named:
        (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    c = config(photos, path, init__class_names=str(tmp_path / "names.txt") if named else "")
    initial = Initial(Run(c), tmp_path / "run")
    params = flat(initial.params)
    rows, theirs = params[TABLE], source[TABLE]
    assert rows.shape == (4, 32) and (rows[3] == theirs[5]).all()
    kept = {
        label: int(np.flatnonzero((theirs == row).all(1))[0])
        for label, row in enumerate(rows[:3])
        if (theirs == row).all(1).any()
    }
    assert kept == ({1: 1, 2: 3} if named else {})
    assert 0.005 < rows[0].std() < 0.05  # as a new network draws it
    for name in params.keys() - {TABLE}:
        np.testing.assert_array_equal(params[name], source[name])
    assert initial.record["classes_kept"] == (2 if named else 0) and len(initial.record["sha256"]) == 64


@pytest.mark.parametrize("layout", ["diffusers", "dit_jax"])
def test_other_kinds_of_weights(photos, official, tmp_path, layout):
    """Catches a kind of weights that `init.weights` promises and that another config, or another place of the heads, breaks."""
    c = config(photos, model__num_classes=len(NAMES))
    out = tmp_path / {"diffusers": "folder", "dit_jax": "dit.safetensors"}[layout]
    opened = trained.read(official[0], weights_file.sections_of(c.to_dict())).weights
    formats.write(opened._replace(origin={"from": "a test", "class_names": list(NAMES)}), layout, out)
    initial = Initial(Run(config(photos, out)), tmp_path / "run")
    for name, x in flat(initial.params).items():
        if name != TABLE:
            np.testing.assert_array_equal(x, official[1][name])
    assert initial.record["classes_kept"] == {"diffusers": 0, "dit_jax": 2}[layout]  # our files have the names


def test_kept_rows():
    """Catches an equal number of classes without names that loses its rows."""
    assert kept_rows(("a", "b"), ("b", "c"), 2, 2) == {0: 1}
    assert kept_rows((), ("b", "c"), 2, 2) == {0: 0, 1: 1} == kept_rows(("x", "y"), (), 2, 2)
    assert kept_rows((), ("b", "c"), 5, 2) == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__depth": 3, "model__width": 64}, r"model.depth is 3, and the weights have 2\n  model.width is 64, and"),
        ({"model__patch_size": 8}, "model.patch_size is 8, and the weights have 4"),
        ({"process__variance": "fixed_large"}, "with a learned variance, and this run has 3 channels .* no learned variance"),
        ({"model__conditioning": "in_context"}, "model.conditioning is in_context, and the weights have adaln_zero"),
        ({"init__average": "none"}, "has only one set of weights"),
        ({"init__weights": ""}, "init.weights is empty"),
        ({"init__weights": "", "init__freeze": (), "init__step": 3}, "init.step is 3 and init.weights is empty"),
        ({"init__class_names": "names-of-nothing.txt"}, "init.class_names=names-of-nothing.txt cannot be read"),
    ],
)
def test_weights_that_do_not_fit(photos, official, tmp_path, fields, words):
    """Catches weights that are read into another network, or an error that does not say what differs."""
    overrides = {"init__freeze": ("blocks/.*",), **fields}
    with pytest.raises(UserError, match=f"(?s){words}"):
        run = Run(tiny.override(config(photos, official[0]).copy_and_resolve_references(), overrides).lock())
        run.task  # as the loop does
        Initial(run, tmp_path)


def test_another_size_keeps_the_grid_of_positions(photos, official, tmp_path):
    """Catches positions that the network has never seen, and a resumed run that asks the weights for their grid again."""
    c = config(photos, official[0], transform__resolution=32)
    run = settled(Run(c), tmp_path)
    assert run.config.model.position_grid == (4, 4) and run.network.position_grid == (4, 4)
    initial = Initial(run, tmp_path)
    initial.keep()
    moved = Run(tiny.override(c.copy_and_resolve_references(), {"init__weights": "gone.pt"}).lock())
    assert settled(moved, tmp_path).config.model.position_grid == (4, 4)
    assert settled(Run(config(photos, official[0])), tmp_path / "new").config.model.get("position_grid") is None


def test_other_weights_before_the_first_checkpoint(photos, official, tmp_path):
    """Catches a run that was killed before its first checkpoint and goes on with other weights under the same name."""
    Initial(Run(config(photos, official[0])), tmp_path).keep()
    record = json.loads((tmp_path / "initial_weights.json").read_text())
    (tmp_path / "initial_weights.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="has changed since this run began"):
        Initial(Run(config(photos, official[0])), tmp_path).keep()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["freeze", "lora"])
def test_a_run_from_weights(photos, official, tmp_path, kind):
    """Catches frozen tensors that move, a resumed run that reads its weights again, adapters that are lost on the way out."""
    path, source = official
    shutil.copy(path, tmp_path / "dit.pt")
    fields = {
        "freeze": {"init__freeze": ("blocks/.*", "time_embedding/.*")},
        "lora": {"init__lora__rank": 2, "init__lora__alpha": 3.0, "init__lora__train": (TABLE,)},
    }[kind]
    c = config(photos, tmp_path / "dit.pt", **fields)
    loop.train(Run(tiny.override(c.copy_and_resolve_references(), {"num_steps": 2}).lock()), tmp_path / "run")
    (tmp_path / "dit.pt").unlink()
    result = loop.train(Run(c), tmp_path / "run")
    pipe = dit_jax.load(tmp_path / "run", average="none")
    params, own = flat(pipe._parameters[0]), flat(result.state.params)
    moves = {
        "freeze": lambda name: not name.startswith(("blocks/", "time_embedding/")),
        "lora": lambda name: (
            name == TABLE or ((name.endswith("kernel") and "attention" in name) or ("mlp" in name and "kernel" in name))
        ),
    }[kind]
    for name, x in params.items():
        same = x.shape == source[name].shape and (x == source[name]).all()
        assert same == (not moves(name)), name
    assert {name for name in own if not name.startswith("lora/")} == (
        {TABLE} if kind == "lora" else {name for name in params if moves(name)}
    )
    again = np.asarray(pipe(labels=[0, 2, 1], seed=3))
    formats.write(formats.read(formats.Source("workdir", tmp_path / "run")), "dit_jax", tmp_path / "out.safetensors")
    np.testing.assert_array_equal(flat(trained_params(tmp_path / "out.safetensors"))[TABLE].shape, (4, 32))
    if kind == "freeze":  # a branch takes its frozen parameters from the other run
        dit_jax.train(c, tmp_path / "branch", from_=tmp_path / "run", step=2)
        for name, x in flat(dit_jax.load(tmp_path / "branch", average="none")._parameters[0]).items():
            np.testing.assert_array_equal(x, params[name])
    if kind == "lora":
        written = formats.write_adapter(formats.Source("workdir", tmp_path / "run"), tmp_path / "adapter", "diffusers")
        assert written["parameters"] < 0.3 * sum(x.size for x in params.values())
        shutil.copy(path, tmp_path / "dit.pt")
        merged = dit_jax.load(tmp_path / "run")
        c5 = config(photos, model__num_classes=len(NAMES))
        beside = dit_jax.load(as_ours(path, c5, tmp_path / "base.safetensors"), lora=tmp_path / "adapter")
        for name, x in flat(beside._parameters[0]).items():
            np.testing.assert_allclose(x, flat(merged._parameters[0])[name], atol=1e-6)
        assert np.abs(np.asarray(beside(labels=[0, 2, 1], seed=3), int) - np.asarray(merged(labels=[0, 2, 1], seed=3))).max() <= 1
    assert again.shape == (3, 16, 16, 3)


def trained_params(path):
    opened = trained.read(path)
    return opened.params(Run(opened.config))[0]


def as_ours(path, config, out):
    """The official file in our format, with the config of a run."""
    opened = trained.read(path, weights_file.sections_of(config.to_dict()))
    formats.write(opened.weights, "dit_jax", out)
    return out


@pytest.mark.slow
def test_a_step_with_adapters_is_the_same_on_every_mesh(photos, official, tmp_path):
    """Catches adapters or frozen parameters whose product or gradient depends on how they are split."""
    rng, results = np.random.default_rng(5), []
    images, labels = rng.integers(0, 255, (8, 16, 16, 3), np.uint8), rng.integers(0, 3, 8).astype(np.int32)
    for mesh in ({}, {"mesh__fsdp": 2, "mesh__tensor": 2}):
        c = config(photos, official[0], init__lora__rank=2, model__depth=2, **mesh)
        initial = Initial(Run(c, devices=jax.devices()[:8] if mesh else jax.devices()[:1]), tmp_path)
        run, state = initial.run, initial.state()
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        state = state.replace(params=place(jax.device_get(tiny.random_params(state.params)), shardings))
        batch = shard_batch(run.mesh, {"image": images, "label": labels})
        step, zeros, _ = compile_step(run.task, run.mesh, 0, run.abstract_state, run.constants, batch)
        results.append(jax.device_get(step(state, zeros(), run.constants, batch)))
    (one, sums), (many, sums_of_many) = results
    assert tiny.distance(many.opt_state, one.opt_state) < 1e-4 and tiny.distance(sums_of_many, sums) < 1e-4
    assert tiny.distance(many.params, one.params) < 1e-3 and all(np.abs(x).max() > 0 for x in jax.tree.leaves(one.params))


def test_killed_while_the_weights_are_kept(photos, official, tmp_path):
    """Catches a record or frozen parameters that a kill leaves half written, so that the run can never begin."""
    initial = Initial(Run(config(photos, official[0], init__freeze=("blocks/.*",))), tmp_path)

    def keep(folder):
        initial._workdir = folder
        initial.keep()

    names = check_every_kill(
        tmp_path, keep, 1, lambda folder: {x.name: x.read_bytes() for x in folder.iterdir() if x.name[0] != "."}
    )
    assert len(names) > 3
