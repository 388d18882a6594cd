"""Conversion from end to end: what is inferred, what is refused, and the command line."""

import argparse
import json
from pathlib import Path

import jax
import lpips_weights
import metric_networks
import numpy as np
import pytest
import tiny
from dit_files import held, same_bits, tiny_weights
from kill_points import check_every_kill
from verbs import run_verbs

from dit_jax import build, recipes
from dit_jax.config_file import plain
from dit_jax.convert import formats
from dit_jax.convert.formats import Source
from dit_jax.errors import UserError
from dit_jax.interop import dinov2, lpips, pt_reader, pt_writer, weights
from dit_jax.models.dit import DiT
from dit_jax.parallel import rules
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.rules import path_name
from dit_jax.storage.checkpoints import Checkpointer
from dit_jax.storage.run_folder import Workdir


@pytest.fixture
def pt(tmp_path):
    """A tiny DiT as a .pt of the paper's code."""
    formats.write(tiny_weights(), "official", tmp_path / "x.pt")
    return tmp_path / "x.pt"


def rewrite(path, change):
    """Changes the dict of a .pt."""
    tensors = pt_reader.read(path)
    pt_writer.write(path.with_name("y.pt"), change(dict(tensors)))
    return path.with_name("y.pt")


def read(path, layout="official", **more):
    return formats.read(Source(layout, path, **{"heads": 4, **more}))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_official_and_back_keeps_every_bit(suffix, dtype, tmp_path):
    """A tensor transposed one way only, cast, or lost."""
    ours = tiny_weights(dtype=dtype)
    formats.write(ours, "official", tmp_path / f"x{suffix}")
    found = read(tmp_path / f"x{suffix}")
    assert same_bits(found, ours)
    assert found.sections == ours.sections
    written = formats.write(found, "dit_jax", tmp_path / "y.safetensors")
    assert same_bits(formats.read(Source("dit_jax", tmp_path / "y.safetensors")), ours)
    assert (written["tensors"], written["parameters"]) == (21, tiny_parameters())


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder", "ours.safetensors"])
def test_killed_before_any_file_operation(name, tmp_path):
    """A partial file that stays, a lock that keeps the next start out, weights without their config."""
    made, layout = tiny_weights(depth=1), {"folder": "diffusers", "ours.safetensors": "dit_jax"}.get(name, "official")
    check_every_kill(tmp_path, lambda folder: formats.write(made, layout, folder / name), 1, times=2)


def test_a_folder_with_other_files_is_no_output(tmp_path):
    """Weights between the files of somebody else."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt; give an empty folder"):
        formats.write(tiny_weights(depth=1), "diffusers", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def tiny_parameters():
    width, depth = 32, 3
    block = width * (6 + 3 + 1 + 4 + 4) * width + (6 + 3 + 1 + 4 + 1) * width
    return (
        depth * block
        + 16 * width
        + width
        + 256 * width
        + width * width
        + 2 * width
        + 11 * width
        + 2 * width * width
        + 2 * width
        + 32 * width
        + 32
    )


def test_sits_weights_become_a_flow(tmp_path):
    """SiT's weights sampled as if they predicted noise."""
    sit = tiny_weights(recipes.sit)
    formats.write(sit, "official", tmp_path / "x.pt")
    found = read(tmp_path / "x.pt", "sit")
    assert same_bits(found, sit)
    assert found.sections["process"] == sit.sections["process"]
    assert found.sections["process"]["name"] == "flow"
    network = build.Run(formats.config_of(found.sections)).network
    assert network.out_channels == 8
    build.Run(formats.config_of(found.sections)).sampler


@pytest.mark.parametrize("recipe", [recipes.dit, recipes.sit])
def test_networks_without_spare_channels_are_understood(recipe, tmp_path):
    """Four output channels read as eight."""
    config = recipe("XL/2", 64)
    ours = tiny_weights()
    change = {"variance": "fixed_large"} if recipe is recipes.dit else {"spare_channels": False}
    process = config.process.to_dict() | change
    tensors = dict(ours.tensors)
    for name in ("final/linear/kernel", "final/linear/bias"):
        array = tensors[name].load()
        tensors[name] = held(array[..., : array.shape[-1] // 2])
    ours = ours._replace(tensors=tensors, sections=ours.sections | {"process": process})
    formats.write(ours, "official", tmp_path / "x.pt")
    found = read(tmp_path / "x.pt", "official" if recipe is recipes.dit else "sit")
    assert same_bits(found, ours)
    assert found.sections["process"] == process


def test_the_moving_average_of_a_training_checkpoint_is_taken(pt, tmp_path):
    """Raw weights taken for the average, or a checkpoint with options and optimizer refused."""
    torch = pytest.importorskip("torch")
    ema = torch.load(pt, weights_only=True)
    model = {name: tensor + (name != "pos_embed") for name, tensor in ema.items()}
    args = argparse.Namespace(model="DiT-XL/2", results_dir="results")
    torch.save({"model": model, "ema": ema, "opt": {"state": {0: {"step": 1}}}, "args": args}, tmp_path / "train.pt")
    torch.save({"model": model}, tmp_path / "model.pt")
    assert same_bits(read(tmp_path / "train.pt"), read(pt))
    assert not same_bits(read(tmp_path / "model.pt"), read(pt))


def saved(path, **entries):
    """Saves {key: {name: array}} as PyTorch does."""
    torch = pytest.importorskip("torch")
    torch.save({key: {name: torch.from_numpy(array) for name, array in value.items()} for key, value in entries.items()}, path)
    return path


def theirs(pt, plus=0.0):
    return {name: tensor.load() + np.float32(plus * (name != "pos_embed")) for name, tensor in pt_reader.read(pt).items()}


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        (("model", "ema"), "ema"),
        (("model", "model_ema"), "model_ema"),
        (("model",), "model"),
        (("state_dict",), "state_dict"),
        (("other", "state_dict"), "state_dict"),
    ],
)
def test_which_weights_of_a_checkpoint_are_taken_is_said_and_recorded(keys, taken, pt, tmp_path, capsys):
    """Raw weights taken for the average without a word, or a usual checkpoint refused."""
    path = saved(tmp_path / "y.pt", **{key: theirs(pt, key != taken) for key in keys})
    found = read(path)
    assert same_bits(found, read(pt))
    assert found.origin["key"] == taken
    assert f"using '{taken}'" in capsys.readouterr().err
    other = read(path, key=keys[0])
    assert other.origin["key"] == keys[0]
    assert same_bits(other, read(pt)) == (keys[0] == taken)
    assert "key" not in read(pt).origin
    with pytest.raises(UserError, match=f"has no 'neither' that holds tensors; it has .*'{taken}'"):
        read(path, key="neither")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module."])
def test_names_lose_what_wrappers_of_pytorch_add(prefix, pt, capsys):
    """Every tensor missing and every tensor extra, for a prefix."""
    found = read(rewrite(pt, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}))
    assert same_bits(found, read(pt))
    assert "names are read without" in capsys.readouterr().err


def test_wrappers_inside_of_names(pt):
    """Blocks that were compiled one by one; the counter of AveragedModel; two copies of a tensor of which one is taken."""
    inside = rewrite(pt, lambda t: {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in t.items()})
    assert same_bits(read(inside), read(pt))
    counted = {"n_averaged": held(np.zeros((1,), np.int64))}
    assert same_bits(read(rewrite(pt, lambda t: counted | {f"module.{k}": v for k, v in t.items()})), read(pt))
    with pytest.raises(UserError, match="remove one copy"):
        read(rewrite(pt, lambda t: t | {"_orig_mod.pos_embed": t["pos_embed"]}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused_by_name(value, pt, tmp_path):
    """Black images of a weights file with NaN in it."""

    def change(tensors):
        array = tensors["final_layer.linear.bias"].load().copy()
        array[1] = value
        return tensors | {"final_layer.linear.bias": held(array)}

    bad = rewrite(pt, change)
    for layout, out in (("dit_jax", "o.safetensors"), ("official", "o.pt"), ("diffusers", "o")):
        with pytest.raises(UserError, match=r"final_layer\.linear\.bias holds NaN or infinity \(1 of 32 values\)"):
            formats.write(read(bad), layout, tmp_path / out)
        assert not list(tmp_path.glob("o*.safetensors")) + list(tmp_path.glob("o/*.safetensors"))
    tensors = read(pt).tensors
    bias = tensors["final/linear/bias"].load().copy()
    bias[:] = value
    weights.write(tmp_path / "w.safetensors", read(pt)._replace(tensors={**tensors, "final/linear/bias": held(bias)}))
    tree = formats.network_params(formats.config_of(read(pt).sections))
    with pytest.raises(UserError, match="final/linear/bias holds NaN"):
        weights.load(tmp_path / "w.safetensors", tree)


def test_a_label_table_without_a_null_row_is_asked_about(tmp_path):
    """The last class of 1,000 taken for the null label, in silence."""
    formats.write(tiny_weights(num_classes=99), "official", tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"has 100 rows\. Give --num_classes=100 if .* or --num_classes=99 if"):
        read(tmp_path / "x.pt")
    with pytest.raises(UserError, match="100 rows in its label table, not 50 or 51"):
        read(tmp_path / "x.pt", num_classes=50)
    with_null, without = read(tmp_path / "x.pt", num_classes=99), read(tmp_path / "x.pt", num_classes=100)
    assert (with_null.sections["model"]["num_classes"], without.sections["model"]["num_classes"]) == (99, 100)
    assert (with_null.sections["task"]["cond_dropout"] > 0, without.sections["task"]["cond_dropout"]) == (True, 0)
    tables = [found.tensors["label_embedding/embedding"].load() for found in (with_null, without)]
    np.testing.assert_array_equal(tables[0], tables[1][:-1])
    assert not tables[1][-1].any()
    formats.write(without, "dit_jax", tmp_path / "y.safetensors")
    assert same_bits(formats.read(Source("dit_jax", tmp_path / "y.safetensors")), without)


def test_every_tensor_is_accounted_for(pt):
    """A missing, extra or misshapen tensor passed over."""

    def change(tensors):
        tensors["blocks.1.mlp.fc2.weigth"] = tensors.pop("blocks.1.mlp.fc2.weight")
        tensors["t_embedder.mlp.0.bias"] = held(np.zeros(31, np.float32))
        return tensors

    with pytest.raises(UserError) as error:
        read(rewrite(pt, change))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "extra blocks.1.mlp.fc2.weigth [32, 128]",
        "misshapen t_embedder.mlp.0.bias: [31] instead of [32]",
        "missing blocks.1.mlp.fc2.weight [32, 128]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"pos_embed": held(np.zeros((1, 16, 32), np.float32))}, "differs by 1 from the sine-cosine table"),
        (lambda t: t | {"pos_embed": held(np.zeros((1, 15, 32), np.float32))}, "square N"),
        (lambda t: t | {"pos_embed": held(np.zeros((1, 25, 32), np.float32))}, "differs by"),
        (lambda t: {k: v for k, v in t.items() if k != "pos_embed"}, "pos_embed is missing"),
        (lambda t: t | {"x_embedder.proj.bias": held(np.zeros(32, np.float16))}, "same dtype"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("x_embedder")},
            "not a DiT in this layout: x_embedder.proj.weight",
        ),
        (lambda t: {}, "not a dict of tensors"),
    ],
)
def test_weights_of_another_network_are_refused(change, message, pt):
    """Other positions, dtypes or layouts converted as if they were DiT's."""
    with pytest.raises(UserError, match=message):
        read(rewrite(pt, change))


def test_the_wrong_layout_is_named(pt, tmp_path):
    """Hundreds of missing tensors where one flag is wrong."""
    formats.write(read(pt), "diffusers", tmp_path / "d")
    with pytest.raises(UserError, match="use --from=diffusers"):
        read(tmp_path / "d" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="use --from=official"):
        read(pt, "diffusers")
    with pytest.raises(UserError, match=r"no header of dit_jax"):
        read(tmp_path / "d" / "diffusion_pytorch_model.safetensors", "dit_jax", heads=None)
    (tmp_path / "text.pt").write_text("<html>")
    with pytest.raises(UserError, match="is not a PyTorch file"):
        read(tmp_path / "text.pt")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "absent.pt")


def test_heads_are_never_guessed(pt, tmp_path):
    """A width outside the paper's table with heads made up: the same shapes compute something else."""
    with pytest.raises(UserError, match="give --heads"):
        read(pt, heads=None)
    with pytest.raises(UserError, match="heads = 5 does not divide"):
        read(pt, heads=5)
    assert read(pt, heads=8).sections["model"]["heads"] == 8
    small = tiny_weights(depth=1, width=384, heads=6)
    formats.write(small, "official", tmp_path / "s.pt")
    assert read(tmp_path / "s.pt", heads=None).sections["model"]["heads"] == 6


def test_like_gives_the_config(tmp_path):
    """A pixel model's process and codec replaced by the paper's."""
    found = tiny_weights()
    config = tiny.config(model__dtype="float32")
    params = formats.network_params(config)
    rng = np.random.default_rng(0)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    found = formats.Weights(
        {path_name(keys): held(rng.normal(size=x.shape).astype(np.float32)) for keys, x in leaves},
        formats.weights.sections_of(config.to_dict()),
        {},
    )
    formats.write(found, "dit_jax", tmp_path / "ours.safetensors")
    formats.write(found, "official", tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"takes 1 channels.*--like"):
        read(tmp_path / "x.pt")
    back = read(tmp_path / "x.pt", heads=None, like=tmp_path / "ours.safetensors")
    assert same_bits(back, found)
    assert back.sections == found.sections
    with pytest.raises(UserError, match="omit --heads"):
        read(tmp_path / "x.pt", like=tmp_path / "ours.safetensors")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with a checkpoint whose average is split over eight devices, and that average."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config()
    params = formats.network_params(config)
    rng = np.random.default_rng(0)
    average = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), params)
    split = jax.device_put(average, rules.shardings(params, make_mesh(data=2, fsdp=2, tensor=2), DiT.rules))
    assert not split["blocks"]["mlp"]["in"]["kernel"].is_fully_replicated
    with Workdir(folder, plain(config)), Checkpointer(folder / "checkpoints", every_steps=1) as checkpointer:
        checkpointer.save(3, {"ema_params": split, "params": {"unused": jax.numpy.zeros(1)}}, {})
    return folder, average


def test_a_runs_moving_average_is_gathered_whole(workdir):
    """Raw parameters taken for the average, or one device's part of a sharded stack taken for all of it."""
    folder, average = workdir
    found = formats.read(Source("workdir", folder))
    expected = {path_name(keys): held(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(average)[0]}
    assert same_bits(found, found._replace(tensors=expected))
    assert found.origin["step"] == 3
    assert found.sections["process"] == tiny.config().process.to_dict()
    with pytest.raises(UserError, match="4"):
        formats.read(Source("workdir", folder, step=4))


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("dit_jax", "x.pt", "must end in .safetensors"),
        ("official", "x", "must end in .pt or .safetensors"),
        ("diffusers", "x.safetensors", "give the name of a folder"),
    ],
)
def test_a_name_that_does_not_suit_is_refused(layout, name, message, tmp_path):
    """A .pt that holds safetensors."""
    with pytest.raises(UserError, match=message):
        formats.write(tiny_weights(), layout, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "torch"},
        {"layout": "workdir", "heads": 4},
        {"layout": "official", "step": 3},
        {"layout": "dit_jax", "like": Path("x")},
        {"layout": "lpips", "heads": 4},
        {"layout": "workdir", "key": "ema"},
        {"layout": "diffusers", "num_classes": 4},
        {"layout": "official", "num_classes": 0},
        {"layout": "official", "num_classes": 4, "like": Path("x")},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    """A flag silently ignored."""
    with pytest.raises(UserError, match="--"):
        Source(path=Path("x"), **options)


SAMPLE = "--num_samples=3 --labels=1,2,9 --seed=5"
TRIP = (
    f"sample --workdir=RUN {SAMPLE} --out=a.npz",
    "convert --from=workdir --weights=RUN --out=a.safetensors",
    "convert --from=dit_jax --to=official --weights=a.safetensors --out=b.pt",
    "convert --from=official --to=diffusers --weights=b.pt --like=a.safetensors --out=c",
    "convert --from=diffusers --weights=c --like=RUN --out=d.safetensors",
    f"sample --weights=d.safetensors {SAMPLE} --out=b.npz",
)
LPIPS = "convert --from=lpips --weights=lpips.pt --out=lpips.safetensors"
DINOV2 = "convert --from=dinov2 --weights=dinov2.pt --out=dinov2.safetensors"
MISTAKES = {
    "convert --weights=x.pt --out=y.safetensors": "--from",
    "convert --from=official --weights=x.pt --out=y.safetensors": "does not exist",
    "convert --from=official --to=official --weights=x.pt --out=y.pt": "nothing would change",
    "convert --from=official --to=onnx --weights=x.pt --out=y": "one of dit_jax, official, diffusers",
    "convert --from=lpips --to=official --weights=lpips.pt --out=y.pt": "omit --to",
    "convert --from=lpips --weights=lpips.pt --out=y.npz": "must end in .safetensors",
    "convert --from=dinov2 --weights=lpips.pt --out=y.safetensors": "is not DINOv2",
    "convert --from=inception_tf --weights=lpips.pt --out=y.safetensors": "unpacked classify_image_graph_def.pb",
    "convert --download=dit-s --out=y.safetensors": "dit-xl2-256",
    "convert --download=sit-xl2-256 --from=official --out=y.safetensors": "leave out --from",
    "convert --download=sd-vae-ft-mse --out=y": "--out has no effect",
    "convert --from=official --weights=DiT-XL-2-256x256.pt --out=y.safetensors": "--download=dit-xl2-256",
    "sample --weights=x.safetensors --workdir=RUN": "give one of",
    "sample --weights=vae.safetensors": "--codec_path",
    "sample --weights=vae.safetensors --codec_path=nowhere": "nowhere",
    "sample --workdir=RUN --codec_path=nowhere": "has no weights",
    "sample --weights=vae.safetensors --step=3": "--step has no effect with --weights",
}


@pytest.fixture(scope="module")
def results(workdir, tmp_path_factory):
    """(folder, {line: (status, stdout, stderr)}) of all command lines of this file."""
    folder = tmp_path_factory.mktemp("verbs")
    lone = tiny_weights()
    lone.sections["codec"]["path"] = ""  # as files written before the paper's codec had a name
    formats.write(lone, "dit_jax", folder / "vae.safetensors")
    pt_writer.write(folder / "lpips.pt", lpips_weights.tensors())
    pt_writer.write(folder / "dinov2.pt", metric_networks.tensors(metric_networks.dinov2("plain")))
    lines = [*TRIP, LPIPS, DINOV2, *MISTAKES]
    found = run_verbs(folder, [line.replace("RUN", str(workdir[0])).split() for line in lines])
    return folder, dict(zip(lines, found, strict=True))


def test_a_run_samples_alike_after_a_trip_through_every_layout(results):
    """A flag, a layout or the sampler losing something between a run and the images of its converted weights."""
    folder, found = results
    said = []
    for line in TRIP:
        status, stdout, stderr = found[line]
        assert status == 0, (line, stderr)
        said.append(json.loads(stdout.splitlines()[-1]))
    assert said[1]["tensors"] == 21
    assert said[1]["parameters"] == said[3]["parameters"] > 1000
    assert len(said[3]["sha256"]) == 64
    assert said[5]["step"] is None
    with np.load(folder / "a.npz") as a, np.load(folder / "b.npz") as b:
        assert a["arr_0"].std() > 1
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
        assert json.loads(str(b["made_by"]))["origin"]["from"] == "diffusers"


def test_lpips_becomes_one_file_without_copies(results):
    """The verb's way to LPIPS untrodden, or its file taken for a network of ours."""
    folder, found = results
    status, stdout, stderr = found[LPIPS]
    assert status == 0, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert said["parameters"] == 14_714_688 + 1_472 + 6  # vgg16().features, the linear layers, the scaling
    assert said["tensors"] == 2 * 13 + 5 + 2
    assert (said["origin"]["from"], *said["origin"]["sha256"]) == ("lpips", "lpips.pt")
    assert lpips.load(folder / "lpips.safetensors")["conv1_1"]["kernel"].shape == (3, 3, 3, 64)
    with pytest.raises(UserError, match="no header of dit_jax"):
        read(folder / "lpips.safetensors", "dit_jax", heads=None)


def test_dinov2_becomes_one_file(results):
    """The verb's way to the metrics' networks untrodden."""
    folder, found = results
    status, stdout, stderr = found[DINOV2]
    assert status == 0, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert (said["origin"]["from"], *said["origin"]["sha256"]) == ("dinov2", "dinov2.pt")
    assert dinov2.load(folder / "dinov2.safetensors")["pos_embed"].shape == (37, 37, 128)


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_on_the_command_line_are_one_or_two_lines(line, results):
    """A stack trace, a status of 0, or a default in place of what is missing."""
    status, stdout, stderr = results[1][line]
    assert status == 2, stderr
    assert MISTAKES[line] in stderr
    assert not stdout
    assert len([line for line in stderr.strip().splitlines() if not line.endswith(": starting")]) <= 2, stderr


def test_other_layouts_are_of_squares(tmp_path):
    """A table of positions of a square that is written for a network whose input is none."""
    c = recipes.digits().to_dict()
    sections = {name: c[name] for name in ("task", "model", "process", "codec", "transform", "conditioner") if name in c}
    sections["transform"]["size"] = (8, 12)
    for layout in ("official", "diffusers"):
        with pytest.raises(UserError, match=r"input is 8 x 12; .* squares only"):
            formats.write(formats.Weights({}, sections, {}), layout, tmp_path / "x")
