"""Converts weights between layouts, via ours; implements `python -m dit_jax.convert`.

The layouts themselves are in `interop`. This module needs `build`, because a network's shapes come from its config.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from dit_jax.build import Run
from dit_jax.convert import dit_weights, model_parts, other_networks
from dit_jax.convert.source import FOREIGN, Source, config_of, network_params, open_weights, origin_of, shapes_of
from dit_jax.errors import UserError
from dit_jax.interop import base_file, dinov2, i3d, inception, lpips, network_folder, peft, pt_writer, weights
from dit_jax.interop.download import how_to_get
from dit_jax.interop.tensors import Tensor, check, common_dtype, count, finite, open_safetensors, write_foreign, write_safetensors
from dit_jax.interop.weights import Weights
from dit_jax.parallel.rules import path_name
from dit_jax.runtime import console
from dit_jax.storage.bounded import json_object
from dit_jax.storage.claim import claim_file
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import read_class_names, read_config
from dit_jax.storage.sealed import sha256_of
from dit_jax.tasks import stored_averages
from dit_jax.tasks.adaptation import LORA

# Networks of losses and metrics, which no config describes: one file each, read by the module of that name in interop.
READERS = {
    "lpips": lpips.from_package,
    "inception": inception.from_port,
    "dinov2": dinov2.from_published,
    "i3d": i3d.from_published,
}
TARGETS = ("dit_jax", "official", "diffusers", "peft")


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
        check(opened.tensors, shapes_of(opened.sections), str(source.path))
        common_dtype(opened.tensors, str(source.path))
        return opened._replace(tensors=finite(opened.tensors, str(source.path)))
    if source.layout == "inception_tf" and not source.path.is_dir():
        return Weights(inception.from_graph(source.path), {}, origin_of(source, [source.path]))
    if source.layout in (*FOREIGN, "inception_tf"):
        tensors, files, key = open_weights(source.path, source.key)
        return Weights(READERS[source.layout](tensors, str(source.path)), {}, origin_of(source, files, key))
    return _read_foreign(source)


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
    described = dit_weights if to_write.sections["model"]["name"] == "dit" else other_networks
    tensors, config = described.write(to_write, layout)
    if layout == "diffusers":
        file = network_folder.write(out, tensors, config or {})
    elif out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--out={out} must end in .pt or .safetensors for --to={layout}")
    else:
        file = out
        with claim_file(out, "writing weights"):
            if out.suffix == ".pt":
                pt_writer.write(out, tensors)
            else:
                write_safetensors(out, tensors, {"format": "pt"} | ({"config": json.dumps(config)} if config else {}))
    return {"out": str(out), "tensors": len(tensors), "parameters": count(to_write.tensors), "sha256": sha256_of(file)}


def _read_foreign(source: Source) -> Weights:
    """Reads a network in a layout of other code, which the names of the tensors identify."""
    path = network_folder.find_weights(source.path) if source.layout == "diffusers" else source.path
    tensors, files, key = open_weights(path, source.key)
    if others := model_parts.found(tensors):
        console.say(f"{path} also has {', '.join(others)}, which are left out; --part={others[0]} writes one")
    module = other_networks.reader_of(tensors.keys(), source.layout)
    if module is None:
        return dit_weights.read(source, tensors, files, key)
    config = network_folder.read_config(path) if source.layout == "diffusers" else _header(path)
    return other_networks.read(module, source, tensors, files, key, config)


def _header(path: Path) -> dict[str, Any] | None:
    """The config in the metadata of a .safetensors file; None if there is none."""
    if path.suffix != ".safetensors":
        return None
    text = open_safetensors(path)[1].get("config")
    return None if text is None else json_object(text, f"the header of {path}", "convert the weights again")


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
