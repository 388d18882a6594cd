"""Converts weights between layouts, via ours; implements `python -m dit_jax.convert`.

The layouts themselves are in `interop`. This module needs `build`, because a network's shapes come from its config.
"""

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.interop import base_file, diffusers_dit, dinov2, inception, lpips, official, peft, pt_reader, pt_writer, weights
from dit_jax.interop.download import how_to_get
from dit_jax.interop.tensors import (
    Tensor,
    Tensors,
    check,
    common_dtype,
    count,
    finite,
    open_safetensors,
    open_sharded,
    without_wrappers,
    write_foreign,
    write_safetensors,
)
from dit_jax.interop.weights import Weights
from dit_jax.parallel.rules import path_name
from dit_jax.runtime import console
from dit_jax.storage.claim import claim_file
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import read_class_names, read_config
from dit_jax.storage.sealed import sha256_of
from dit_jax.tasks import stored_averages
from dit_jax.tasks.adaptation import LORA

# Networks of losses and metrics, which no config describes: one file each, read by the module of that name in interop.
FOREIGN = {"lpips": lpips.from_package, "inception": inception.from_port, "dinov2": dinov2.from_published}
SOURCES = ("official", "sit", "diffusers", "workdir", "dit_jax", *FOREIGN, "inception_tf")
TARGETS = ("dit_jax", "official", "diffusers", "peft")
# Keys of a training checkpoint, in order of preference; the moving average first, as in the paper's sampling code.
NESTED = ("ema", "model_ema", "ema_state_dict", "model", "model_state_dict", "state_dict", "module")
DEEPEST = 3  # of such keys, one inside of another
# Usual numbers of classes. A label table of so many rows has no row for the null label, or is of one class less.
USUAL_CLASSES = (10, 100, 200, 365, 1_000, 21_841, 21_843)
LATENT_CHANNELS = 4  # of the autoencoder that DiT and SiT were trained with


@dataclass(frozen=True)
class Source:
    """The weights to convert, with the options of the command line.

    Fields:
        layout: one of SOURCES.
        path: a file, or a folder for "workdir" and "diffusers".
        heads: attention heads, if the layout does not record them and the width is not one of the paper's; None otherwise.
        like: a run's folder or a file in our format whose config, process and codec these weights have. None: the paper's.
        step: checkpoint of a workdir; None for the newest valid one.
        key: place of the weights in a .pt, as in "ema" or "state.model"; None for the first of NESTED.
        template: sections of the run that will start from these weights; what the tensors do not determine is taken from it.
        num_classes: of the label table of "official" and "sit", which has that many rows or one more; None if that is clear.
        average: of a workdir, see `tasks.stored_averages`; None for its moving average.
    """

    layout: str
    path: Path
    heads: int | None = None
    like: Path | None = None
    step: int | None = None
    key: str | None = None
    num_classes: int | None = None
    average: str | None = None
    template: Mapping[str, Any] | None = None

    def __post_init__(self):
        for name in ("path", "like"):  # str is accepted too
            if getattr(self, name) is not None:
                object.__setattr__(self, name, local_path(getattr(self, name)))
        if self.layout not in SOURCES:
            raise UserError(f"--from={self.layout}: one of {', '.join(SOURCES)} is needed")
        foreign = self.layout in ("official", "sit", "diffusers")
        for name, value, wanted in (
            ("heads", self.heads, foreign),
            ("like", self.like, foreign),
            ("step", self.step, self.layout == "workdir"),
            ("key", self.key, self.layout not in ("workdir", "dit_jax", "inception_tf")),
            ("num_classes", self.num_classes, self.layout in ("official", "sit")),
            ("average", self.average, self.layout == "workdir"),
        ):
            if value is not None and not wanted:
                raise UserError(f"--{name} has no effect with --from={self.layout}; omit it")
        if self.like and self.heads is not None:
            raise UserError("--like determines the number of heads; omit --heads")
        if self.like and self.num_classes is not None:
            raise UserError("--like determines the number of classes; omit --num_classes")
        if self.num_classes is not None and self.num_classes < 1:
            raise UserError(f"--num_classes={self.num_classes} must be at least 1")


def config_of(sections: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A complete config with the sections of a weights file, for `build`; training fields have the recipes' values."""
    return ml_collections.ConfigDict({**recipes.diffusion().to_dict(), **sections})


def network_params(config: ml_collections.ConfigDict) -> Any:
    """The parameters of the config's network as ShapeDtypeStructs, without computing them."""
    task = Run(config).task
    return jax.eval_shape(task.init_params, jax.random.key(0))


def read(source: Source) -> Weights:
    """Opens weights of any layout and converts them to ours.

    Raises:
        UserError: the file does not exist, is damaged, or does not fit the layout or its own config.
    """
    if not source.path.exists():
        raise UserError(f"--weights={source.path} does not exist{how_to_get(source.path)}")
    if source.layout == "workdir":
        return _read_workdir(source)
    if source.layout == "dit_jax":
        opened = weights.read(source.path)
        check(opened.tensors, _shapes(opened.sections), str(source.path))
        common_dtype(opened.tensors, str(source.path))
        return opened._replace(tensors=finite(opened.tensors, str(source.path)))
    if source.layout == "inception_tf" and not source.path.is_dir():
        return Weights(inception.from_graph(source.path), {}, _origin(source, [source.path]))
    if source.layout in (*FOREIGN, "inception_tf"):
        tensors, files, key = _open(source.path, source.key)
        return Weights(FOREIGN[source.layout](tensors, str(source.path)), {}, _origin(source, files, key))
    return (_read_diffusers if source.layout == "diffusers" else _read_official)(source)


def write(to_write: Weights, layout: str, out: str | os.PathLike) -> dict:
    """Writes weights in a layout of TARGETS; returns {"out", "tensors", "parameters", "sha256"}.

    A network that no config describes keeps the names of its publication.

    Raises:
        UserError: the name of `out` does not fit the layout, or the layout cannot represent the network; another command is
            writing `out`, or the folder of diffusers holds other files.
    """
    out = local_path(out)
    if layout == "peft":
        raise UserError("--to=peft writes the adapter of a run; give --from=workdir and a run that trained one (init.lora.rank)")
    if not to_write.sections and layout != "dit_jax":
        raise UserError(
            f"--to={layout}: weights read with --from={to_write.origin['from']} cannot be written in that layout; omit --to"
        )
    if layout == "dit_jax":
        with claim_file(out, "writing weights"):
            if to_write.sections:
                weights.write(out, to_write)
            else:
                write_foreign(out, to_write.tensors, to_write.origin)
        return {
            "out": str(out),
            "tensors": len(to_write.tensors),
            "parameters": count(to_write.tensors),
            "sha256": sha256_of(out),
        }
    config = config_of(to_write.sections)
    patch_size, heads = config.model.patch_size, config.model.heads
    input_size = _side(config)
    grid = config.model.get("position_grid")
    tensors = official.to_theirs(to_write.tensors, patch_size, input_size // patch_size, grid)
    file = out
    if layout == "diffusers":
        if grid is not None:
            raise UserError(
                f"diffusers' module cannot scale positions, and model.position_grid is {tuple(grid)}; write --to=official, which "
                "stores the table"
            )
        if out.suffix in (".safetensors", ".pt", ".json") or out.is_file():
            raise UserError(f"--out={out}: diffusers reads a folder; give the name of a folder")
        architecture = official.infer(tensors, "the network")
        diffusers_dit.write(out, tensors, architecture, heads, input_size)
        tensors, file = diffusers_dit.from_official(tensors, architecture.depth), out / diffusers_dit.WEIGHTS_NAME
    elif out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--out={out} must end in .pt or .safetensors for --to=official")
    else:
        with claim_file(out, "writing weights"):
            if out.suffix == ".pt":
                pt_writer.write(out, tensors)
            else:
                write_safetensors(out, tensors, {"format": "pt"})
    return {"out": str(out), "tensors": len(tensors), "parameters": count(to_write.tensors), "sha256": sha256_of(file)}


def _shapes(sections) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(network_params(config_of(sections)))[0]
    return {path_name(keys): leaf.shape for keys, leaf in leaves}


def _read_workdir(source: Source) -> Weights:
    config = ml_collections.ConfigDict(read_config(source.path))
    if not Run(config).task.draws_samples:
        raise UserError(
            f"{source.path} is the run of an autoencoder: when it has finished, its weights are in "
            f"{source.path}/codec, in the format of diffusers"
        )
    tensors, step = _trained(source, config)
    adaptation = Run(config).adaptation
    if adaptation.active:
        abstract = jax.eval_shape(Run(config).task.init_params, jax.random.key(0))
        base = flatten_dict(base_file.read(source.path, adaptation.base(abstract)), sep="/")
        adapters = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{LORA}/")}
        tensors = {**_held(base), **{name: tensor for name, tensor in tensors.items() if name not in adapters}}
        if adapters:
            tensors = peft.of_run(adapters, adaptation.lora.scale).merged(tensors)
    sections = weights.sections_of(config.to_dict())
    sections["model"]["param_dtype"] = common_dtype(tensors, str(source.path)).name
    origin: dict[str, Any] = {"from": "workdir", "name": source.path.name, "step": step}
    average = Run(config).task.average
    if source.average or average.warmup:  # files without it hold the average of their ema_decay
        origin["average"] = source.average or average.name
    if names := read_class_names(source.path):
        origin["class_names"] = list(names)
    return Weights(finite(tensors, str(source.path)), sections, origin)


def _held(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(x.shape, x.dtype, partial(np.asarray, x)) for name, x in arrays.items()}


def _trained(source: Source, config: ml_collections.ConfigDict) -> tuple[dict[str, Tensor], int]:
    """(an average of the parameters that a run trains, its step).

    Raises:
        UserError: there is no such checkpoint.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    task, average = Run(config).task, source.average or "default"
    stored_averages.check_name(average)
    state = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    root, stored = source.path.absolute() / "checkpoints", (task.average, *task.averages)
    try:
        params, step = stored_averages.read(root, state, stored, average, source.step)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return _held({path_name(keys): leaf for keys, leaf in leaves}), step


def adapter_of(source: Source) -> tuple[peft.Adapter, ml_collections.ConfigDict]:
    """(adapter, config) of a run that trained one.

    Raises:
        UserError: the run trained none, or has no such checkpoint.
    """
    config = ml_collections.ConfigDict(read_config(source.path))
    if not (lora := Run(config).adaptation.lora).rank:
        raise UserError(f"{source.path} was trained without adapters (init.lora.rank); write --to=dit_jax, official or diffusers")
    return peft.of_run(_trained(source, config)[0], lora.scale), config


def write_adapter(source: Source, out: str | os.PathLike, names: str | None = None) -> dict:
    """Writes the adapter of a run in PEFT's layout; returns {"out", "tensors", "parameters", "sha256"}.

    names: whose names of modules, one of `peft.LAYOUTS`; None for the first that the network has.

    Raises:
        UserError: as `adapter_of`; the layout cannot represent the network; the folder holds other files.
    """
    adapter, config = adapter_of(source)
    shapes = {name: tensor.shape for name, tensor in _held(flatten_dict(network_params(config), sep="/")).items()}
    written = peft.write(out, adapter, names, shapes, Run(config).network)
    return {"out": str(out), **written, "sha256": sha256_of(local_path(out) / peft.FILE)}


def with_adapter(to_adapt: Weights, folder: str | os.PathLike) -> Weights:
    """The weights with an adapter in PEFT's layout merged into them.

    Raises:
        UserError: the adapter is damaged, or of another network.
    """
    network = Run(config_of(to_adapt.sections)).network
    shapes = {name: tensor.shape for name, tensor in to_adapt.tensors.items()}
    adapter = peft.read(folder, shapes, network)
    sections = with_classes(to_adapt.sections, adapter, network)
    origin = to_adapt.origin | {"lora": {"name": local_path(folder).name, "sha256": sha256_of(local_path(folder) / peft.FILE)}}
    return Weights(adapter.merged(to_adapt.tensors), sections, origin)


def with_classes(sections: Mapping[str, Any], adapter: peft.Adapter, network: Any) -> dict[str, Any]:
    """The sections of a network with the classes of an adapter, which may have a label table of its own."""
    table = adapter.whole.get(getattr(network, "label_table", ""))
    if table is None:
        return dict(sections)
    return {**sections, "model": {**sections["model"], "num_classes": len(table) - 1}}


def _open(path: Path, key: str | None) -> tuple[Tensors, list[Path], str | None]:
    """Opens a .pt or .safetensors file, distinguished by content, or an index of parts.

    Names lose what wrappers of PyTorch added; tensors of numbers refuse NaN when they are read.

    Returns:
        (tensors, files, key): the place of the tensors in a .pt, None if they are at the top level.
    """
    if path.is_dir():
        raise UserError(f"--weights={path} is a folder; give the file in it")
    tensors, files, key = _opened(path, key)
    tensors, removed = without_wrappers(tensors, str(path))
    if removed:
        console.say(f"{path}: names are read without {removed}")
    return finite(tensors, str(path)), files, key


def _opened(path: Path, key: str | None) -> tuple[Tensors, list[Path], str | None]:
    is_pt = not path.name.endswith(".index.json") and pt_reader.is_pt(path)
    if key is not None and not is_pt:
        raise UserError(f"--key={key} is for PyTorch's files, and {path} is none; omit it")
    if path.name.endswith(".index.json"):
        return *open_sharded(path), None
    if not is_pt:
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a PyTorch file (a zip archive, or the stream written before 1.6), and its name does not "
                "end in .safetensors; check that it is the right file and complete"
            )
        return open_safetensors(path)[0], [path], None
    content: Any = pt_reader.read(path)
    taken: list[str] = []
    for part in key.split(".") if key is not None else ():
        inside = [name for name, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
        if part not in inside:
            raise UserError(f"--key={key}: {path} has no {part!r} that holds tensors; it has {reprlib.repr(inside)}")
        content, taken = content[part], [*taken, part]
    while key is None and len(taken) < DEEPEST and (nested := _nested(content)):
        names = [str(name)[:40] for name in list(content)[:10]]
        console.say(f"{path} is a checkpoint with {', '.join(names)}: using {nested!r}; --key takes another")
        content, taken = content[nested], [*taken, nested]
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path} holds {type(content).__name__}, not a dict of tensors at the top level or under "
            f"{' or '.join(map(repr, NESTED))}"
        )
    strange = [
        reprlib.repr(name) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if strange:
        raise UserError(
            f"{path} has entries that are not tensors: {', '.join(strange[:10])}; give a state_dict, at the top level or "
            f"under {' or '.join(map(repr, NESTED))}"
        )
    return content, [path], ".".join(taken) or None


def _nested(content: Any) -> str | None:
    """The first key of NESTED under which a checkpoint has a dict."""
    return next((key for key in NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), None)


def _read_official(source: Source) -> Weights:
    what = str(source.path)
    tensors, files, key = _open(source.path, source.key)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        raise UserError(f"{what} has the layout of diffusers: use --from=diffusers")
    architecture = official.infer(tensors, what)
    tensors, architecture, has_null = _with_null_row(source, tensors, architecture)
    side = official.grid_side(tensors, what)
    sections = _sections(source, architecture, side * architecture.patch_size)
    if not has_null:
        sections["task"] = {**sections["task"], "cond_dropout": 0.0}
    shapes = _shapes(sections)
    check(tensors, official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections)), what)
    official.check_position(tensors[official.POSITION], what)
    return Weights(official.to_ours(tensors, shapes), sections, _origin(source, files, key))


def _with_null_row(
    source: Source, tensors: Tensors, architecture: official.Architecture
) -> tuple[Tensors, official.Architecture, bool]:
    """Tells from --num_classes whether the last row of the label table is that of the null label; adds zeros if it is not.

    Raises:
        UserError: --num_classes is needed, or does not fit the table.
    """
    rows, classes = architecture.num_classes + 1, source.num_classes
    if source.like is not None or (classes is None and rows not in USUAL_CLASSES):
        return tensors, architecture, True
    if classes is None:
        raise UserError(
            f"{source.path}: the label table has {rows:,} rows. Give --num_classes={rows} if each is a class, as in a network "
            f"trained without label dropout, or --num_classes={rows - 1} if the last one is the null label"
        )
    if rows not in (classes, classes + 1):
        raise UserError(
            f"--num_classes={classes}: {source.path} has {rows:,} rows in its label table, not {classes} or {classes + 1}"
        )
    if rows == classes + 1:
        return tensors, architecture, True
    table = tensors[official.TABLE]
    padded = Tensor(
        (rows + 1, *table.shape[1:]), table.dtype, lambda: np.pad(table.load(), [(0, 1)] + [(0, 0)] * (len(table.shape) - 1))
    )
    console.say(f"{source.path}: no row for the null label, so the network cannot be guided; a row of zeros stands in")
    return {**tensors, official.TABLE: padded}, architecture._replace(num_classes=classes), False


def _read_diffusers(source: Source) -> Weights:
    path = diffusers_dit.find_weights(source.path)
    what = str(path)
    tensors, files, key = _open(path, source.key)
    if official.PATCH in tensors:
        raise UserError(f"{what} has the layout of the paper's code: use --from=official, or --from=sit")
    architecture = official.infer(tensors, what, lambda name: diffusers_dit.names(name, 1)[0], "transformer_blocks")
    config = diffusers_dit.read_config(path)
    diffusers_dit.check_config(config, architecture, str(path.parent / "config.json"))
    if source.heads not in (None, config["num_attention_heads"]):
        raise UserError(
            f"--heads={source.heads} differs from num_attention_heads = {config['num_attention_heads']} in config.json; "
            "omit --heads"
        )
    sections = _sections(source, architecture, config["sample_size"], config["num_attention_heads"])
    shapes = _shapes(sections)
    theirs = official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections))
    check(tensors, diffusers_dit.expected(theirs, architecture.depth), what)
    console.say(
        "note: weights trained with diffusers' own module have slightly different time frequencies than ours (spaced by "
        "1/127, not 1/128); the published weights were renamed from the paper's and are not affected"
    )
    return Weights(
        official.to_ours(diffusers_dit.to_official(tensors, architecture.depth), shapes), sections, _origin(source, files, key)
    )


def _tokens_per_side(sections) -> int:
    config = config_of(sections)
    return _side(config) // config.model.patch_size


def _side(config) -> int:
    """Side of the network's input.

    Raises:
        UserError: it is not a square, which is what the layouts of other code describe.
    """
    height, width, _ = Run(config).latent_shape
    if height != width:
        raise UserError(f"the network's input is {height} x {width}; the layouts official and diffusers are of squares only")
    return height


def _origin(source: Source, files: list[Path], key: str | None = None) -> dict:
    """key: place of the weights in a checkpoint."""
    place = {} if key is None else {"key": key}
    return {"from": source.layout, "sha256": {file.name: sha256_of(file) for file in files}, **place}


def _sections(source: Source, architecture: official.Architecture, input_size: int, heads: int | None = None) -> dict:
    """The config sections of foreign weights: those of `like`, or the paper's with the sizes inferred from the tensors.

    Raises:
        UserError: the number of heads, or what the network was trained on, is unknown.
    """
    if source.like is not None:
        like = read_config(source.like) if source.like.is_dir() else weights.read(source.like).sections
        sections = weights.sections_of(like)
        sections["model"] = {**sections["model"], "param_dtype": architecture.dtype.name}
        return sections
    if source.template is not None:
        return _of_template(source, architecture, input_size, heads)
    heads = (
        heads or source.heads or next((size.heads for size in recipes.SIZES.values() if size.width == architecture.width), None)
    )
    if heads is None:
        raise UserError(
            f"{source.path}: width {architecture.width} is not one of the paper's ({_widths()}), and the tensors do not "
            "determine the number of attention heads: give --heads"
        )
    if architecture.in_channels != LATENT_CHANNELS:
        raise UserError(
            f"{source.path}: the network takes {architecture.in_channels} channels, but the paper's take {LATENT_CHANNELS}, "
            "the latents of a VAE: give the config with --like=<a run's folder, or a file in our format>"
        )
    learned = architecture.out_channels == 2 * architecture.in_channels
    config = (recipes.sit if source.layout == "sit" else recipes.dit)("XL/2", input_size * 8)
    config.model.update(
        {
            "patch_size": architecture.patch_size,
            "depth": architecture.depth,
            "width": architecture.width,
            "heads": heads,
            "mlp_ratio": architecture.mlp_width / architecture.width,
            "num_classes": architecture.num_classes,
            "dtype": "float32",
            "param_dtype": architecture.dtype.name,
        }
    )
    if source.layout == "sit":
        config.process.spare_channels = learned
    elif not learned:
        config.process.variance = "fixed_large"  # as the paper's code has it
    return weights.sections_of(config.to_dict())


def _of_template(source: Source, architecture: official.Architecture, input_size: int, heads: int | None) -> dict:
    """The sections of a run that starts from foreign weights, with the sizes of the weights.

    Raises:
        UserError: the run's data has other channels, or its process another variance.
    """
    assert source.template is not None
    config = config_of(source.template)
    run = Run(config)
    channels = run.latent_shape[-1]
    outputs = run.process.output_channels(channels)
    if (architecture.in_channels, architecture.out_channels) != (channels, outputs):
        names = {1: "no learned variance", 2: "a learned variance"}
        raise UserError(
            f"{source.path} is of a network for {architecture.in_channels} channels with "
            f"{names[architecture.out_channels // architecture.in_channels]}, and this run has {channels} channels "
            f"(codec.name={config.codec.name}) with {names[outputs // channels]} (process.name={config.process.name}); set the "
            "codec and the process as the weights have them"
        )
    factor = run.image_shape[0] // run.latent_shape[0]
    config.transform.update({"resolution": input_size * factor, "size": None})
    config.model.update(
        {
            "patch_size": architecture.patch_size,
            "depth": architecture.depth,
            "width": architecture.width,
            "heads": heads or config.model.heads,
            "mlp_ratio": architecture.mlp_width / architecture.width,
            "num_classes": architecture.num_classes,
            "conditioning": "adaln_zero",
            "param_dtype": architecture.dtype.name,
        }
    )
    return weights.sections_of(config.to_dict())


def _widths() -> str:
    return ", ".join(str(size.width) for size in recipes.SIZES.values())
