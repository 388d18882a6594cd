"""Opens trained networks for sampling: a run's folder, a weights file, or weights of other code."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.build import Run
from dit_jax.convert import formats
from dit_jax.errors import UserError
from dit_jax.interop import base_file, network_folder, peft, pt_reader, text_encoders
from dit_jax.interop import weights as weights_file
from dit_jax.interop.tensors import Tensor, open_safetensors
from dit_jax.parallel.mesh import place
from dit_jax.parallel.rules import path_name
from dit_jax.runtime.console import say
from dit_jax.sample.weights import check_finite, whole_network
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import read_best, read_config
from dit_jax.tasks import stored_averages
from dit_jax.tasks.adaptation import BASE, with_adapters


@dataclass(frozen=True)
class Trained:
    """A trained network on disk; its parameters are read by `params`.

    Fields:
        path: what was opened, absolute.
        config: a copy may be changed before `Run` builds the network from it.
        weights: opened parameters; None for a run, which has checkpoints.
        codec: the autoencoder that lies beside the weights; None if there is none.
        adapted: the run's own config, where a part of the network was trained; `config` is that of the whole network.
    """

    path: Path
    config: ml_collections.ConfigDict
    weights: weights_file.Weights | None = None
    codec: Path | None = None
    adapted: ml_collections.ConfigDict | None = None

    def check(self, step: int | str | None, average: str) -> int | None:
        """The step of the checkpoint that `step` selects; None for the newest, and for weights that are no run's.

        Raises:
            UserError: `average` is no name of one; weights with one set of parameters; `best` without scores; not a step.
        """
        stored_averages.check_name(average)
        if self.weights is not None:
            for name, given in (("step", step is not None), ("average", average != "default")):
                if given:
                    raise UserError(
                        f"{name} selects weights of a run, and {self.path} has only one set of weights; leave {name} out"
                    )
        if step is None:
            return None
        if step == "best":
            best = read_best(self.path)
            if best is None:
                raise UserError(
                    f"step=best: {self.path} has no scores; train with --config.scoring.every_steps=N, or give a step"
                )
            return best["step"]
        if not str(step).isdigit():
            raise UserError(f"step={step} must be the step of a checkpoint, or best")
        return int(step)

    def params(self, run: Run, step: int | None = None, average: str = "default") -> tuple[Any, int | None]:
        """(parameters on the mesh, their step or None), for the run of this config.

        step, average: as `check` has them.

        Raises:
            UserError: the run has no such checkpoint; the tensors do not fit the network, or hold NaN or infinity.
            NotFinite: the parameters of a run hold NaN or infinity.
        """
        if self.weights is not None:
            abstract = run.abstract_state.ema_params
            tensors = weights_file.load_tensors(self.weights.tensors, abstract, str(self.path))
            return place(tensors, jax.tree.map(lambda x: x.sharding, abstract)), None
        if self.adapted is None:
            return self._trained_params(run, step, average)
        own = with_base(Run(_on_mesh_of(run, self.adapted), devices=run.devices, platform=run.platform), self.path)
        trained, step = self._trained_params(own, step, average)
        return whole_network(own.task, trained, {BASE: own.placed_base()}), step

    def stored_null(self) -> Mapping[str, Tensor]:
        """What frozen text encoders make of "", as it is stored with a run or a file of weights; {} if it is not."""
        return text_encoders.stored_null(self.path) if self.weights is None else self.weights.null

    def _trained_params(self, run: Run, step: int | None, average: str) -> tuple[Any, int]:
        """As `params`, of the parameters that the run trains."""
        state = run.abstract_state
        try:
            stored = (run.task.average, *run.task.averages)
            params, step = stored_averages.read(self.path / "checkpoints", state, stored, average, step)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        check_finite(params, f"step {step} of {self.path}")
        return params, step


def read(path: str | os.PathLike, template: Mapping[str, Any] | None = None) -> Trained:
    """Opens a trained network; parameters are not read yet.

    Args:
        template: sections of a config, from which weights of other code take what their tensors do not determine: heads, codec,
            process. None: the paper's.
        path: a run's folder; a .safetensors file of `convert`; a .pt or .safetensors file of the paper's code (or of SiT's, if
            its name has the word "sit"); a folder that diffusers wrote, of the transformer or of the pipeline.

    Raises:
        UserError: none of these; damaged; or the run of an autoencoder.
    """
    path = local_path(path).absolute()
    part = next((part for part in network_folder.PARTS if (path / part).is_dir()), None)
    if part and not (path / "config.json").exists():
        codec = next((path / name for name in ("vae", "vqvae") if (path / name).is_dir()), None)
        return _with_text_folders(_read_foreign(path / part, "diffusers", template, codec), path)
    if path.name in network_folder.WEIGHTS_NAMES or any((path / name).exists() for name in network_folder.WEIGHTS_NAMES):
        return _read_foreign(path, "diffusers", template)
    if path.is_file() and (pt_reader.is_pt(path) or not _is_ours(path)):
        return _read_foreign(path, "sit" if re.search(r"(?<![a-z])sit(?![a-z])", path.stem.lower()) else "official", template)
    if path.is_file() or path.suffix == ".safetensors":
        opened = weights_file.read(path)
        return Trained(path, formats.config_of(opened.sections), opened)
    if path.suffix == ".pt":
        raise UserError(f"{path} does not exist; give a .pt file of DiT or SiT")
    config = ml_collections.ConfigDict(read_config(path))
    if not Run(config).task.draws_samples:
        raise UserError(
            f"{path} is the run of an autoencoder, which cannot be sampled; give {path} as codec.path of a diffusion run"
        )
    adaptation = Run(config).adaptation
    return Trained(path, Run(config).whole().config, adapted=config) if adaptation.active else Trained(path, config)


class Adapted(NamedTuple):
    """A network with an adapter that lies beside its weights.

    Fields:
        base: the run of the weights.
        run: the run of the network with the adapter, which may have other classes.
        adapter: the adapter.
    """

    base: Run
    run: Run
    adapter: peft.Adapter

    def merge(self, params: Any) -> Any:
        """The parameters of the network with the adapter, on the mesh, of those of the base."""
        own = jax.tree.map(lambda x: x.sharding, self.run.abstract_state.params)
        flat, shardings = flatten_dict(params, sep="/"), flatten_dict(own, sep="/")
        for name, x in self.adapter.whole.items():
            flat[name] = place(x.astype(flat[name].dtype), shardings[name])
        merge = jax.jit(functools.partial(with_adapters, scale=self.adapter.scale), out_shardings=own)
        return merge(unflatten_dict(flat, sep="/"), self.adapter.tree())


def with_adapter(run: Run, folder: str | os.PathLike) -> Adapted:
    """Reads an adapter in PEFT's layout for the network of a run.

    Raises:
        UserError: it is damaged, or of another network.
    """
    shapes = {path_name(keys): x.shape for keys, x in jax.tree_util.tree_leaves_with_path(run.abstract_state.params)}
    adapter = peft.read(folder, shapes, run.network)
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.model = formats.with_classes({"model": config.model}, adapter, run.network)["model"]
    return Adapted(run, run.with_config(config), adapter)


def with_base(run: Run, workdir: Path) -> Run:
    """The run with its frozen parameters, which its folder holds."""
    shapes = jax.eval_shape(run.task.init_params, jax.random.key(0))
    return run.with_base(base_file.read(workdir, run.adaptation.base(shapes)))


def _on_mesh_of(run: Run, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with the mesh and the codec of a run: scale and shift of the latents are read with the codec's weights."""
    config = ml_collections.ConfigDict(config.to_dict())
    config.mesh, config.codec = run.config.mesh, run.config.codec
    return config


def _is_ours(path: Path) -> bool:
    """Whether a file that exists is a weights file of `convert`, or has another format than safetensors."""
    return path.suffix != ".safetensors" or "dit_jax" in open_safetensors(path)[1]


def _read_foreign(path: Path, layout: str, template: Mapping[str, Any] | None, codec: Path | None = None) -> Trained:
    say(f"reading {path} with the layout {layout}")
    opened = formats.read(formats.Source(layout, path, template=template))
    return Trained(path, formats.config_of(opened.sections), opened, codec)


def _with_text_folders(opened: Trained, path: Path) -> Trained:
    """Weights of a pipeline's folder, with the text encoders and tokenizers that lie in it; one that is not there is missing."""
    section = opened.config.get("conditioner", {})
    if section.get("name") != "text" or section.get("weights"):
        return opened
    weights, tokenizers, missing = [], [], []
    for name, number in zip(section.encoders, ("", "_2", "_3"), strict=False):
        if (path / f"text_encoder{number}").is_dir():
            weights.append(f"{name}={path / f'text_encoder{number}'}")
        else:
            missing.append(name)
        if (path / f"tokenizer{number}").is_dir():
            tokenizers.append(f"{name}={path / f'tokenizer{number}'}")
    if not weights:
        return opened
    if missing:
        say(f"{path} has no text encoder {', '.join(missing)}; it contributes zeros")
    opened.config.conditioner.update({"weights": (*weights,), "tokenizers": (*tokenizers,), "missing": (*missing,)})
    return opened


def check_guides(run: Run, other: Run, path: Path) -> None:
    """Raises a UserError if the network of `other`, read from `path`, does not predict the same quantity as that of `run`."""
    own, others = run.predicts(), other.predicts()
    for name, value in own.items():
        if others[name] != value:
            raise UserError(
                f"{path} was trained with another {name} ({others[name]}) than the network that it guides ({value}); "
                "both must have the same"
            )
