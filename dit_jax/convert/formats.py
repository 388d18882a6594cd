"""From weights in one layout to weights in another, by way of ours: what `python -m dit_jax.convert` does.

Above `build`, because a network's shapes come from its config; the layouts themselves are in `interop`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.interop import diffusers_dit, dinov2, inception, lpips, official, pt_reader, pt_writer, weights
from dit_jax.interop.tensors import (
    Tensor,
    Tensors,
    check,
    common_dtype,
    count,
    open_safetensors,
    open_sharded,
    write_foreign,
    write_safetensors,
)
from dit_jax.interop.weights import Weights
from dit_jax.parallel.rules import path_name
from dit_jax.runtime import console
from dit_jax.storage.checkpoints import restore_subtree
from dit_jax.storage.run_folder import read_config
from dit_jax.storage.sealed import sha256_of

# Networks that no config describes, for losses and metrics: one file each, for the module of that name in interop.
FOREIGN = {"lpips": lpips.from_package, "inception": inception.from_port, "dinov2": dinov2.from_published}
SOURCES = ("official", "sit", "diffusers", "workdir", "dit_jax", *FOREIGN, "inception_tf")
TARGETS = ("dit_jax", "official", "diffusers")
NESTED = ("ema", "model")  # of a training checkpoint, the moving average first, as the paper's sampling code has it
LATENT_CHANNELS = 4  # of the autoencoder that DiT and SiT were trained with


@dataclass(frozen=True)
class Source:
    """What to convert, as the command line says it.

    Fields:
        layout: one of SOURCES.
        path: a file, or a folder for "workdir" and "diffusers".
        heads: attention heads, where the layout does not tell and the width is none of the paper's; None otherwise.
        like: a run's folder or a file of ours: the weights have its config, process and codec too. None: the paper's.
        step: checkpoint of a workdir; None for the newest good one.
    """

    layout: str
    path: Path
    heads: int | None = None
    like: Path | None = None
    step: int | None = None

    def __post_init__(self):
        if self.layout not in SOURCES:
            raise UserError(f"--from={self.layout}: one of {', '.join(SOURCES)} is needed")
        foreign = self.layout in ("official", "sit", "diffusers")
        for name, value, wanted in (
            ("heads", self.heads, foreign),
            ("like", self.like, foreign),
            ("step", self.step, self.layout == "workdir"),
        ):
            if value is not None and not wanted:
                raise UserError(f"--{name} means nothing with --from={self.layout}; leave it out")
        if self.like and self.heads is not None:
            raise UserError("--like tells the number of heads; leave out --heads")


def config_of(sections) -> ml_collections.ConfigDict:
    """A whole config around the sections of a weights file, for `build`; training fields have the recipes' values."""
    return ml_collections.ConfigDict({**recipes.diffusion().to_dict(), **sections})


def network_params(config):
    """The parameters of the config's network as ShapeDtypeStructs; nothing is computed."""
    task = Run(config).task
    return jax.eval_shape(lambda key: task.init(key).params, jax.random.key(0))


def read(source: Source) -> Weights:
    """Opens weights of any layout as ours.

    Raises:
        UserError: there is no such file; it is damaged; it does not fit the layout or its own config.
    """
    if not source.path.exists():
        raise UserError(f"--weights={source.path} does not exist")
    if source.layout == "workdir":
        return _read_workdir(source)
    if source.layout == "dit_jax":
        found = weights.read(source.path)
        check(found.tensors, _shapes(found.sections), str(source.path))
        common_dtype(found.tensors, str(source.path))
        return found
    if source.layout == "inception_tf" and not source.path.is_dir():
        return Weights(inception.from_graph(source.path), {}, _origin(source, [source.path]))
    if source.layout in (*FOREIGN, "inception_tf"):
        tensors, files = _open(source.path)
        return Weights(FOREIGN[source.layout](tensors, str(source.path)), {}, _origin(source, files))
    return (_read_diffusers if source.layout == "diffusers" else _read_official)(source)


def write(found: Weights, layout: str, out: Path) -> dict:
    """Writes weights in a layout of TARGETS; returns what was written: out, tensors, parameters, sha256.

    A network that no config describes keeps the names it was published with.

    Raises:
        UserError: the name of `out` does not suit, or the layout has no place for such a network.
    """
    if not found.sections and layout != "dit_jax":
        raise UserError(f"--to={layout}: what comes --from={found.origin['from']} has no such layout; leave out --to")
    if layout == "dit_jax":
        if found.sections:
            weights.write(out, found)
        else:
            write_foreign(out, found.tensors, found.origin)
        return {"out": str(out), "tensors": len(found.tensors), "parameters": count(found.tensors), "sha256": sha256_of(out)}
    config = config_of(found.sections)
    patch_size, heads = config.model.patch_size, config.model.heads
    input_size = _side(config)
    tensors = official.to_theirs(found.tensors, patch_size, input_size // patch_size)
    file = out
    if layout == "diffusers":
        if out.suffix in (".safetensors", ".pt", ".json") or out.is_file():
            raise UserError(f"--out={out}: diffusers reads a folder; give the name of one")
        architecture = official.infer(tensors, "the network")
        diffusers_dit.write(out, tensors, architecture, heads, input_size)
        tensors, file = diffusers_dit.from_official(tensors, architecture.depth), out / diffusers_dit.WEIGHTS_NAME
    elif out.suffix == ".pt":
        pt_writer.write(out, tensors)
    elif out.suffix == ".safetensors":
        write_safetensors(out, tensors, {"format": "pt"})
    else:
        raise UserError(f"--out={out} must end in .pt or .safetensors for --to=official")
    return {"out": str(out), "tensors": len(tensors), "parameters": count(found.tensors), "sha256": sha256_of(file)}


def _shapes(sections) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(network_params(config_of(sections)))[0]
    return {path_name(keys): leaf.shape for keys, leaf in leaves}


def _read_workdir(source: Source) -> Weights:
    config = ml_collections.ConfigDict(read_config(source.path))
    if config.task.name != "diffusion":
        raise UserError(
            f"{source.path} is the run of an autoencoder: its weights are in {source.path}/codec, as diffusers reads "
            "them, when it has finished"
        )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    init = Run(config).task.init
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda key: init(key).ema_params, jax.random.key(0)),
    )
    try:
        restored, _, step = restore_subtree(source.path.absolute() / "checkpoints", {"ema_params": wanted}, source.step)
    except FileNotFoundError as error:
        raise UserError(str(error)) from None
    leaves = jax.tree_util.tree_flatten_with_path(restored["ema_params"])[0]
    tensors = {path_name(keys): Tensor(leaf.shape, leaf.dtype, partial(np.asarray, leaf)) for keys, leaf in leaves}
    sections = weights.sections_of(config.to_dict())
    sections["model"]["param_dtype"] = common_dtype(tensors, str(source.path)).name
    return Weights(tensors, sections, {"from": "workdir", "name": source.path.name, "step": step})


def _open(path: Path) -> tuple[Tensors, list[Path]]:
    """(tensors, files) of a .pt or .safetensors file, told apart by their content, or of an index of parts."""
    if path.is_dir():
        raise UserError(f"--weights={path} is a folder; give the file in it")
    if path.name.endswith(".index.json"):
        return open_sharded(path)
    if not pt_reader.is_pt(path):
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is no PyTorch file (a zip archive, or the stream written before 1.6), and its name does not "
                "end in .safetensors; is it whole, and is it the right file?"
            )
        return open_safetensors(path)[0], [path]
    content = pt_reader.read(path)
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            console.say(f"{path} is a training checkpoint with {', '.join(map(str, content))}: {key!r} is taken")
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path} holds {type(content).__name__}, not a dict of tensors, bare or under {' or '.join(map(repr, NESTED))}"
        )
    strange = [repr(name) for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise UserError(
            f"{path} holds what is no tensor: {', '.join(strange[:10])}; a state_dict is needed, bare or under "
            f"{' or '.join(map(repr, NESTED))}"
        )
    return content, [path]


def _read_official(source: Source) -> Weights:
    what = str(source.path)
    tensors, files = _open(source.path)
    if any(name.startswith("transformer_blocks.") for name in tensors):
        raise UserError(f"{what} has the layout of diffusers: pass --from=diffusers")
    found = official.infer(tensors, what)
    side = official.grid_side(tensors, what)
    sections = _sections(source, found, side * found.patch_size)
    shapes = _shapes(sections)
    check(tensors, official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections)), what)
    official.check_position(tensors[official.POSITION], what)
    return Weights(official.to_ours(tensors, shapes), sections, _origin(source, files))


def _read_diffusers(source: Source) -> Weights:
    path = diffusers_dit.find_weights(source.path)
    what = str(path)
    tensors, files = _open(path)
    if official.PATCH in tensors:
        raise UserError(f"{what} has the layout of the paper's code: pass --from=official, or --from=sit")
    found = official.infer(tensors, what, lambda name: diffusers_dit.names(name, 1)[0], "transformer_blocks")
    config = diffusers_dit.read_config(path)
    diffusers_dit.check_config(config, found, str(path.parent / "config.json"))
    if source.heads not in (None, config["num_attention_heads"]):
        raise UserError(
            f"--heads={source.heads}, and config.json has num_attention_heads = {config['num_attention_heads']}; "
            "leave out --heads"
        )
    sections = _sections(source, found, config["sample_size"], config["num_attention_heads"])
    shapes = _shapes(sections)
    theirs = official.expected(shapes, sections["model"]["patch_size"], _tokens_per_side(sections))
    check(tensors, diffusers_dit.expected(theirs, found.depth), what)
    console.say(
        "note: weights trained with diffusers' own module, rather than renamed from the paper's as the published ones "
        "are, had slightly other time frequencies than ours (spaced by 1/127, not 1/128)"
    )
    return Weights(official.to_ours(diffusers_dit.to_official(tensors, found.depth), shapes), sections, _origin(source, files))


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


def _origin(source: Source, files: list[Path]) -> dict:
    return {"from": source.layout, "sha256": {file.name: sha256_of(file) for file in files}}


def _sections(source: Source, found: official.Architecture, input_size: int, heads: int | None = None) -> dict:
    """The config sections of foreign weights: those of `like`, or the paper's around the sizes that the tensors show.

    Raises:
        UserError: the number of heads is unknown, or what the network was trained on.
    """
    if source.like is not None:
        like = read_config(source.like) if source.like.is_dir() else weights.read(source.like).sections
        sections = weights.sections_of(like)
        sections["model"] = {**sections["model"], "param_dtype": found.dtype.name}
        return sections
    heads = heads or source.heads or next((size.heads for size in recipes.SIZES.values() if size.width == found.width), None)
    if heads is None:
        raise UserError(
            f"{source.path}: width {found.width} is none of the paper's ({_widths()}), and the tensors do not tell "
            "the number of attention heads: pass --heads"
        )
    if found.in_channels != LATENT_CHANNELS:
        raise UserError(
            f"{source.path}: the network takes {found.in_channels} channels, and the paper's take {LATENT_CHANNELS}, "
            "latents of a VAE: say what they mean with --like=<a run's folder, or a file of ours>"
        )
    learned = found.out_channels == 2 * found.in_channels
    config = (recipes.sit if source.layout == "sit" else recipes.dit)("XL/2", input_size * 8)
    config.model.update(
        {
            "patch_size": found.patch_size,
            "depth": found.depth,
            "width": found.width,
            "heads": heads,
            "mlp_ratio": found.mlp_width / found.width,
            "num_classes": found.num_classes,
            "dtype": "float32",
            "param_dtype": found.dtype.name,
        }
    )
    if source.layout == "sit":
        config.process.spare_channels = learned
    elif not learned:
        config.process.variance = "fixed_large"  # as the paper's code has it
    return weights.sections_of(config.to_dict())


def _widths() -> str:
    return ", ".join(str(size.width) for size in recipes.SIZES.values())
