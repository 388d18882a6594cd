"""Weights to convert: where they are, the file or folder opened, and the config that describes their network."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dit_jax import recipes
from dit_jax.build import Run
from dit_jax.errors import UserError
from dit_jax.interop import pt_reader
from dit_jax.interop.tensors import Tensor, Tensors, finite, open_safetensors, open_sharded, without_wrappers
from dit_jax.parallel.rules import path_name
from dit_jax.runtime import console
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import sha256_of

FOREIGN = ("lpips", "inception", "dinov2", "i3d")  # networks of losses and metrics, which no config describes
SOURCES = ("official", "sit", "diffusers", "workdir", "dit_jax", *FOREIGN, "inception_tf")
# Keys of a training checkpoint, in order of preference; the moving average first, as in the paper's sampling code.
NESTED = ("ema", "model_ema", "ema_state_dict", "model", "model_state_dict", "state_dict", "module")
DEEPEST = 3  # of such keys, one inside of another


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


def shapes_of(sections: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(network_params(config_of(sections)))[0]
    return {path_name(keys): leaf.shape for keys, leaf in leaves}


def open_weights(path: Path, key: str | None) -> tuple[Tensors, list[Path], str | None]:
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


def origin_of(source: Source, files: list[Path], key: str | None = None) -> dict:
    """key: place of the weights in a checkpoint."""
    place = {} if key is None else {"key": key}
    return {"from": source.layout, "sha256": {file.name: sha256_of(file) for file in files}, **place}
