"""Everything beside training works for a network that shares no field with DiT, registered from outside (support/toy_network),
and for U-Net, HDiT and DiffiT."""

import io
import json

import jax
import numpy as np
import pytest
import tiny
from demo_client import serving
from finished_run import write_run
from flax.traverse_util import flatten_dict
from PIL import Image
from runs import save_run
from toy_network import Pixelwise

import dit_jax
from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.demo.schema import Schema
from dit_jax.errors import UserError
from dit_jax.interop import peft
from dit_jax.plan import search
from dit_jax.report import page, style
from dit_jax.storage.atomic import write_json
from dit_jax.sweep import collect, cost, figures, grid
from dit_jax.sweep.folder import Folder
from dit_jax.training import loop
from dit_jax.training.initial import Initial, settled

TABLE = "labels/embedding"
DIFFIT = {"model.name": "diffit", "model.grid": (4, 4), "model.patch_size": 2, "model.num_classes": 10}
DIFFIT |= {"model.depth": 1, "model.width": 32, "model.heads": 4}


def config(weights="", **overrides):
    c = recipes.digits()
    c.model = {"name": "pixelwise", "features": 8, "num_classes": 10}
    c.init = recipes.init() | {"weights": str(weights)}
    c.sampler.num_steps = 2
    return tiny.shorten(c, **overrides)


def flat(tree):
    return {name: np.asarray(x) for name, x in flatten_dict(jax.device_get(tree), sep="/").items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(a weights file of a network with 10 classes, its parameters by path)."""
    c, out = config(), tmp_path_factory.mktemp("weights") / "toy.safetensors"
    params = flat(tiny.random_params(formats.network_params(c)))
    held = formats._held(params)
    sections = formats.weights.sections_of(c.to_dict())
    origin = {"from": "a test", "class_names": list("0123456789")}
    formats.write(formats.Weights(held, sections, origin), "dit_jax", out)
    return out, params


def test_weights_to_start_from(weights, tmp_path):
    """Catches a start that asks the config for patches, or that takes images of another size for a network of one size."""
    params = flat(Initial(settled(Run(config(weights[0])), tmp_path), tmp_path).params)
    for name, x in weights[1].items():
        np.testing.assert_array_equal(params[name], x)
    for fields, words in (
        (
            {"transform__resolution": 12},
            "the input is 12 x 12, the weights have 8 x 8, and 'pixelwise' takes only its trained size",
        ),
        ({"model__features": 16}, "model.features is 16, and the weights have 8"),
    ):
        run = Run(config(weights[0], **fields))
        with pytest.raises(UserError, match=words):
            Initial(settled(run, tmp_path), tmp_path)
    sized = Run(config(weights[0], transform__resolution=12, model__name="any_size"))
    np.testing.assert_array_equal(flat(Initial(settled(sized, tmp_path), tmp_path).params)[TABLE], weights[1][TABLE])


def test_from_another_kind_of_network(weights, tmp_path):
    """Catches a crash, where the weights of another kind of network need an error."""
    c = tiny.config(init__weights=str(weights[0]))
    with pytest.raises(UserError, match="does not fit the network"):
        Initial(settled(Run(c), tmp_path), tmp_path)


@pytest.mark.slow
def test_diffit_of_another_size(tmp_path):
    """Catches a DiffiT that starts from tables of another grid, or refuses its own, which a file has as a list."""
    c = tiny.diffit()
    held = formats._held(flat(tiny.random_params(formats.network_params(c))))
    sections = formats.weights.sections_of(c.to_dict())
    formats.write(formats.Weights(held, sections, {"from": "a test"}), "dit_jax", tmp_path / "small.safetensors")
    start = {"init__weights": str(tmp_path / "small.safetensors")}
    same = flat(Initial(settled(Run(tiny.diffit(**start)), tmp_path), tmp_path).params)
    assert (same["blocks/attention/position_bias"] == held["blocks/attention/position_bias"].load()).all()
    larger = Run(tiny.diffit(transform__resolution=12, model__grid=(6, 6), **start))
    with pytest.raises(UserError, match=r"model.grid is \(6, 6\), and the weights have \[4, 4\]"):
        Initial(settled(larger, tmp_path), tmp_path)


@pytest.mark.slow
def test_another_size(weights, tmp_path):
    """Catches a network that cannot say it takes other sizes without DiT's fields, or one that draws them unasked."""
    with pytest.raises(UserError, match="'pixelwise' draws only the size that it was trained on"):
        dit_jax.load(weights[0], resolution=12)
    c = config(model__name="any_size")
    sized = formats.Weights(formats._held(weights[1]), formats.weights.sections_of(c.to_dict()), {"from": "a test"})
    formats.write(sized, "dit_jax", tmp_path / "sized.safetensors")
    pipe = dit_jax.load(tmp_path / "sized.safetensors", resolution="8x12")
    assert np.asarray(pipe(labels=[3], num_steps=2)).shape == (1, 8, 12, 1)
    with pytest.raises(UserError, match=r"multiples of 2 \(codec 1 x network 2\), as in 10x8"):
        dit_jax.load(tmp_path / "sized.safetensors", resolution="9x8")


def test_the_demo_page(weights):
    """Catches a page that asks for DiT's fields."""
    described = Schema(dit_jax.load(weights[0]), "toy").describe()
    assert described["model"]["network"] == "Pixelwise, 8 features" and described["fields"]["labels"]["classes"] == list(
        "0123456789"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, described", [("unet", "UNet (ADM)"), ("hourglass", "HDiT patch 2"), ("diffit", "DiffiT depth")]
)
def test_load_the_demo_and_the_report(network, described, tmp_path):
    """Catches a run of another network that `dit_jax.load` cannot draw, a demo page or a report.html that needs DiT's fields,
    and a page that draws other images than the library."""
    c = tiny.other(network)
    save_run(tmp_path / "run", c, 0)
    pipe = dit_jax.load(tmp_path / "run")
    wanted = np.asarray(pipe(labels=[3, 5], num_steps=2, seed=1))
    assert wanted.shape == (2, 8, 8, 1) and wanted.std() > 5 and (wanted[0] != wanted[1]).any()
    with serving(pipe) as client:
        about = json.loads(client.get("/api/model")[2])
        assert about["model"]["network"].startswith(described)
        assert about["fields"]["labels"]["classes"] == list("0123456789")
        pngs = client.draw(labels=[3, 5], num_images=2, num_steps=2, seed=1)
    assert (np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])[..., None] == wanted).all()
    text = page.write(write_run(tmp_path / "finished", True, c)).read_text()
    assert f"<dt>model.name</dt><dd>{network}</dd>" in text and text.count("<svg") == 3


@pytest.mark.slow
def test_adapters(weights, tmp_path):
    """Catches adapters that only DiT can train, store, merge or load; a stacked kernel whose layers are exchanged."""
    lora = {"init__lora__rank": 2, "init__lora__targets": ("stack/kernel", "enter/kernel"), "init__lora__train": (TABLE,)}
    loop.train(Run(config(weights[0], num_steps=1, **lora)), tmp_path / "run")
    written = formats.write_adapter(formats.Source("workdir", tmp_path / "run"), tmp_path / "adapter")
    assert written["tensors"] == 2 * 3 + 1
    names = set(peft.open_safetensors(tmp_path / "adapter" / peft.FILE)[0])
    assert f"{peft.PREFIX}layers.1.stack.lora_A.weight" in names and f"{peft.PREFIX}labels.embedding" in names
    merged = flat(dit_jax.load(tmp_path / "run")._parameters[0])
    beside = flat(dit_jax.load(weights[0], lora=tmp_path / "adapter")._parameters[0])
    converted = formats.with_adapter(formats.read(formats.Source("dit_jax", weights[0])), tmp_path / "adapter")
    changed = {name for name, x in merged.items() if np.abs(x - weights[1][name]).max() > 0}
    assert changed == {"layers/stack/kernel", "enter/kernel", TABLE}
    for name, x in merged.items():
        np.testing.assert_allclose(beside[name], x, atol=1e-6)
        np.testing.assert_allclose(converted.tensors[name].load(), x, atol=1e-6)


def test_adapters_keep_the_order_of_a_stack(tmp_path):
    """Catches layers of a stack that are exchanged, a transposed matrix, and the label table of other classes."""
    rng, network = np.random.default_rng(0), Pixelwise(8, 10, 2)
    shapes = {name: x.shape for name, x in flatten_dict(formats.network_params(config()), sep="/").items()}
    pairs = {"layers/stack/kernel": ((2, 8, 3), (2, 3, 8)), "leave/kernel": ((8, 3), (3, 2))}
    arrays = {name: tuple(rng.normal(size=shape).astype(np.float32) for shape in pair) for name, pair in pairs.items()}
    adapter = peft.Adapter(arrays, {TABLE: rng.normal(size=(4, 8)).astype(np.float32)}, 2.0)
    peft.write(tmp_path / "adapter", adapter, None, shapes, network)
    again = peft.read(tmp_path / "adapter", shapes, network)
    for name, pair in adapter.pairs.items():
        for x, y in zip(pair, again.pairs[name], strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(again.whole[TABLE], adapter.whole[TABLE])
    assert again.scale == 2.0 and again.pairs.keys() == adapter.pairs.keys()
    wrong = {**shapes, TABLE: (11, 9)}
    with pytest.raises(UserError, match=r"labels/embedding is \(4, 8\), and the network's is \(11, 9\)"):
        peft.read(tmp_path / "adapter", wrong, network)
    with pytest.raises(UserError, match="can only hold class-conditional networks"):
        peft.write(tmp_path / "other", adapter, "official", shapes, network)


def test_forecasts_are_refused():
    """Catches a network without DiT's three parts that fails only when it is traced."""
    run = Run(config(forecast__interval=2))
    with pytest.raises(UserError, match="Pixelwise has no method embed: a forecast needs a network in three parts"):
        run.forecast


def test_a_search():
    """Catches a search that sets model.remat, or asks for heads, of a network that has neither."""
    wanted, _ = search.choices(config(), 4, ["none"], [16], [1])
    assert (1, 1, 4, False) in {choice[:4] for choice in wanted}
    assert "remat" not in wanted[0].apply(config()).model


def test_a_sweep(tmp_path):
    """Catches a sweep of several kinds of networks that needs patches and DiT's sizes, or gives them one colour."""
    toy = {"model.name": "pixelwise", "model.features": 8, "model.num_classes": 10}
    runs = grid.expand(
        grid.Sweep(title="t", base="configs/digits.py", variants={"dit": {"model.width": 32}, "toy": toy, "diffit": DIFFIT})
    )
    folder, rows = Folder(tmp_path, "t"), []
    for run in runs:
        folder.of(run).mkdir(parents=True)
        write_json(folder.of(run) / "result.json", {"step": 4, "loss": 0.1, "fid": 1.0, "stopped": False, "features": "pixels"})
        rows.append(collect.read(run, cost.count(run), (), folder))
    assert [(row.family, row.patch) for row in rows] == [("4 x 32", 4), ("pixelwise", None), ("diffit", 2)]
    collect.write(rows, tmp_path)
    assert len(figures.fid_against("gmacs", rows, rows[0].protocol, False).axes) == 1
    style.pyplot().close("all")
