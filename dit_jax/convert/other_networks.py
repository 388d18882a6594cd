"""Reads and writes weights of the networks that are not DiT, in the layouts of other code.

A module of `interop` for a network has
    NETWORK     its name in the registry
    LAYOUTS     the layouts that it reads and writes: "official" (of the paper's code), "diffusers"
    recognises  whether tensors with these names are of the network
    read        their tensors -> ours, and the config sections that they determine; beside them "input_side", if the config has it
    HINTS       optional: fields that tensors may not say, {"heads": its name in the config that `read` takes}; the flags of these
                names and --like give them
    write       ours -> their tensors, and the config: config.json of diffusers' folder, or the metadata of a .safetensors file
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_collections

from dit_jax import recipes, registry
from dit_jax.convert.source import Source, config_of, origin_of, shapes_of
from dit_jax.diffusion.samplers import default_sampler
from dit_jax.errors import UserError
from dit_jax.interop import diffit, hourglass, mmdit, pixart, unet, weights
from dit_jax.interop.tensors import Tensor, Tensors, check, common_dtype
from dit_jax.interop.weights import Weights
from dit_jax.storage.run_folder import read_config
from dit_jax.tasks.diffusion import CONDITIONER


class Layouts(Protocol):
    """See the module's docstring."""

    @property
    def NETWORK(self) -> str: ...

    @property
    def LAYOUTS(self) -> tuple[str, ...]: ...

    def recognises(self, names: Collection[str], layout: str) -> bool: ...

    def read(
        self, tensors: Tensors, layout: str, what: str, config: Mapping[str, Any] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def write(
        self, tensors: Tensors, layout: str, model: Mapping[str, Any], latent_shape: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]: ...


NETWORKS: tuple[Layouts, ...] = (diffit, hourglass, mmdit, pixart, unet)


def reader_of(names: Collection[str], layout: str) -> Layouts | None:
    """The module that reads tensors with these names; None for DiT's, and for names of no network that is known."""
    return next((module for module in NETWORKS if layout in module.LAYOUTS and module.recognises(names, layout)), None)


def writer_of(network: str, layout: str) -> Layouts:
    """The module that writes a network.

    Raises:
        UserError: the layout has no such network.
    """
    module = next((module for module in NETWORKS if network == module.NETWORK and layout in module.LAYOUTS), None)
    if module is None:
        known = {name for known in NETWORKS if network == known.NETWORK for name in known.LAYOUTS}
        raise UserError(f"--to={layout} has no network {network!r}; write --to={' or '.join(['dit_jax', *sorted(known)])}")
    return module


def read(
    module: Layouts,
    source: Source,
    tensors: Tensors,
    files: list[Path],
    key: str | None,
    config: Mapping[str, Any] | None,
) -> Weights:
    """Converts opened tensors of a network; config is config.json beside them, or the metadata of the file.

    Raises:
        UserError: they do not fit the network; its input is unknown; a flag has no effect on the network.
    """
    what = str(source.path)
    hints = getattr(module, "HINTS", {})
    for name, value in (("heads", source.heads), ("num_classes", source.num_classes)):
        if value is not None and name not in hints:
            raise UserError(f"--{name} has no effect on {module.NETWORK!r}, whose weights determine it; omit it")
        if value is not None:
            config = {**(config or {}), hints[name]: value}
    if source.like is not None:
        model = _like(module, source)["model"]
        config = {theirs: model[ours] for ours, theirs in hints.items() if model.get(ours)} | dict(config or {})
    ours, determined = module.read(tensors, source.layout, what, config)
    sections = _complete(module, source, determined)
    sections["model"] = {**sections["model"], "param_dtype": common_dtype(ours, what).name}
    check(ours, shapes_of(sections), what)
    return Weights(ours, sections, origin_of(source, files, key))


def _complete(module: Layouts, source: Source, determined: Mapping[str, Any]) -> dict[str, Any]:
    """The config sections of foreign weights: those of `like`, of the template with the weights' model, or what they determine.

    Raises:
        UserError: `like` is another network; the weights do not determine the network's input.
    """
    if source.like is not None:
        return _like(module, source)
    if source.template is not None:
        template = dict(source.template)
        fields = template["model"] if template["model"]["name"] == module.NETWORK else {}
        return weights.sections_of({**template, "model": {**_section("model", fields), **determined["model"]}})
    recipe = _recipe(module, determined)
    if recipe is None and not determined.keys() >= {"process", "codec", "transform"}:
        raise UserError(
            f"{source.path}: its sizes are not published ones, so its process, autoencoder and resolution are unknown; give the "
            "config with --like=<a run's folder or a file in our format>"
        )
    if recipe is None:
        config = recipes.diffusion()
        for kind in ("model", "process", "codec", "transform"):
            config[kind] = _section(kind, determined[kind])
        config.sampler = default_sampler(determined.get("sampler", "ddpm"))
    else:
        config = recipe()
        for kind in ("model", "process"):
            known = config[kind].keys()
            config[kind].update({name: value for name, value in determined.get(kind, {}).items() if name in known})
    config.task.update(determined.get("task", {}))
    return weights.sections_of(config.to_dict())


def _like(module: Layouts, source: Source) -> dict[str, Any]:
    """The sections of `like`.

    Raises:
        UserError: it is another network.
    """
    assert source.like is not None
    sections = weights.sections_of(read_config(source.like) if source.like.is_dir() else weights.read(source.like).sections)
    if (name := sections["model"]["name"]) != module.NETWORK:
        raise UserError(f"--like={source.like} is a network {name!r}, and {source.path} is a {module.NETWORK!r}")
    return sections


def _recipe(module: Layouts, determined: Mapping[str, Any]) -> Callable[[], ml_collections.ConfigDict] | None:
    """The recipe of the published network with these fields, at the side of input that is determined, if one is.

    None if there is none.
    """
    model, side = determined["model"], determined.get("input_side")
    for name, published in getattr(registry.get("model", module.NETWORK), "published", {}).items():
        fields = {key: value for key, value in published.fields.items() if key != "out_channels"}
        same = all(_plain(model.get(key)) == _plain(value) for key, value in fields.items())
        if name in recipes.PUBLISHED and same and side in (None, published.input_shape[0]):
            return recipes.PUBLISHED[name]
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _section(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a section, of some of them."""
    if "name" not in fields:
        return dict(fields)
    name = fields["name"]
    return {**registry.defaults(kind, name), **recipes.section(kind, name), **fields}


def write(to_write: Weights, layout: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors in the layout, config.json or None).

    Raises:
        UserError: as `writer_of`; the layout cannot represent the network.
    """
    from dit_jax.build import Run

    config = config_of(to_write.sections)
    module = writer_of(config.model.name, layout)
    if any(name.startswith(f"{CONDITIONER}/") for name in to_write.tensors):
        raise UserError(
            f"--to={layout} has no place for the text encoder that was trained with the network "
            f"({', '.join(config.conditioner.encoders)}); write --to=dit_jax"
        )
    return module.write(to_write.tensors, layout, config.model.to_dict(), Run(config).latent_shape)
