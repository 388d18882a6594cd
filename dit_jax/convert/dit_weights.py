"""Reads DiT's and SiT's weights in the layouts of the paper's code and of diffusers."""

from pathlib import Path
from typing import Any

import numpy as np

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.convert.source import Source, config_of, origin_of, shapes_of
from dit_jax.errors import UserError
from dit_jax.interop import diffusers_dit, network_folder, official, weights
from dit_jax.interop.tensors import Tensor, Tensors, check
from dit_jax.interop.weights import Weights
from dit_jax.runtime import console
from dit_jax.storage.run_folder import read_config

# Usual numbers of classes. A label table of so many rows has no row for the null label, or is of one class less.
USUAL_CLASSES = (10, 100, 200, 365, 1_000, 21_841, 21_843)
LATENT_CHANNELS = 4  # of the autoencoder that DiT and SiT were trained with


def read(source: Source, tensors: Tensors, files: list[Path], key: str | None) -> Weights:
    """Converts opened tensors of DiT or SiT.

    Raises:
        UserError: they do not fit the layout, or its config.json does not describe them; the number of heads is unknown.
    """
    return (_read_diffusers if source.layout == "diffusers" else _read_official)(source, tensors, files, key)


def _read_official(source: Source, tensors: Tensors, files: list[Path], key: str | None) -> Weights:
    what = str(source.path)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        raise UserError(f"{what} has the layout of diffusers: use --from=diffusers")
    architecture = official.infer(tensors, what)
    tensors, architecture, has_null = _with_null_row(source, tensors, architecture)
    side = official.grid_side(tensors, what)
    sections = _sections(source, architecture, side * architecture.patch_size)
    if not has_null:
        sections["task"] = {**sections["task"], "cond_dropout": 0.0}
    shapes = shapes_of(sections)
    check(tensors, official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections)), what)
    official.check_position(tensors[official.POSITION], what)
    return Weights(official.to_ours(tensors, shapes), sections, origin_of(source, files, key))


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


def _read_diffusers(source: Source, tensors: Tensors, files: list[Path], key: str | None) -> Weights:
    path = network_folder.find_weights(source.path)
    what = str(path)
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
    shapes = shapes_of(sections)
    theirs = official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections))
    check(tensors, diffusers_dit.expected(theirs, architecture.depth), what)
    console.say(
        "note: weights trained with diffusers' own module have slightly different time frequencies than ours (spaced by "
        "1/127, not 1/128); the published weights were renamed from the paper's and are not affected"
    )
    return Weights(
        official.to_ours(diffusers_dit.to_official(tensors, architecture.depth), shapes), sections, origin_of(source, files, key)
    )


def write(to_write: Weights, layout: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors in the layout, config.json of a folder of diffusers or None).

    Raises:
        UserError: the layout cannot represent the network.
    """
    config = config_of(to_write.sections)
    patch_size, grid = config.model.patch_size, config.model.get("position_grid")
    side = _side(config)
    tensors = official.to_theirs(to_write.tensors, patch_size, side // patch_size, grid)
    if layout == "official":
        return tensors, None
    if grid is not None:
        raise UserError(
            f"diffusers' module cannot scale positions, and model.position_grid is {tuple(grid)}; write --to=official, which "
            "stores the table"
        )
    architecture = official.infer(tensors, "the network")
    described = diffusers_dit.describe(architecture, config.model.heads, side)
    return diffusers_dit.from_official(tensors, architecture.depth), described


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
