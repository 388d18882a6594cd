"""From a config to objects: the only module that knows both.

Adding a model, a process, a sampler, a codec, a data source or an optimizer is its own file and one line in a table here.
"""

import inspect
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dit_jax.codecs.discriminator import PatchDiscriminator
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.codecs.pixels import Pixels
from dit_jax.data.latent_loader import LatentLoader, resident_moments
from dit_jax.data.latents import LatentCache
from dit_jax.data.loader import Loader
from dit_jax.data.size import size_text
from dit_jax.data.sources import TFDS, Digits, ImageFolder, TarShards
from dit_jax.data.transforms import ImageTransform
from dit_jax.diffusion import samplers
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.forecast import Forecast
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Prediction
from dit_jax.errors import UserError
from dit_jax.interop import lpips
from dit_jax.models.dit import DiT
from dit_jax.parallel.mesh import batch_sharding, make_mesh, place, reader_place, replicated, rows_per_step
from dit_jax.parallel.rules import shardings
from dit_jax.tasks.autoencoder import AutoencoderTask
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.optimizer import adamw

TABLES = {
    "task": {"diffusion": DiffusionTask, "autoencoder": AutoencoderTask},
    "model": {"dit": DiT},
    "process": {"gaussian": Gaussian, "flow": Flow},
    "codec": {"pixels": Pixels, "kl_vae": KLVAE},
    "data": {"digits": Digits, "folder": ImageFolder, "tfds": TFDS, "tars": TarShards, "latents": LatentCache},
    "transform": {"image": ImageTransform},
    "optimizer": {"adamw": adamw},
    "sampler": samplers.CLASSES,
    "guidance": {"classifier_free": Guidance},
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def construct(section: str, fields: Mapping, **more):
    """TABLES[section][fields["name"]](**the other fields, **more).

    Raises:
        UserError: an unknown name, an unknown field, a missing field, or whatever the constructor refuses.
    """
    fields = dict(fields)
    name, table = fields.pop("name"), TABLES[section]
    if name not in table:
        raise UserError(f"{section}.name is {name!r}; it must be one of {', '.join(sorted(table))}")
    for key in ("dtype", "param_dtype"):
        if key in fields:
            if fields[key] not in DTYPES:
                raise UserError(f"{section}.{key} is {fields[key]!r}; it must be one of {', '.join(DTYPES)}")
            fields[key] = DTYPES[fields[key]]
    fields |= more
    parameters = inspect.signature(table[name]).parameters
    unknown = [key for key in fields if key not in parameters]
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in fields]
    if unknown or missing:
        raise UserError(
            f"{section} {name!r} has no field {', '.join(unknown)}"
            if unknown
            else f"{section} {name!r} needs the field {', '.join(missing)}"
        )
    return table[name](**fields)


def mesh(config, devices=None):
    """The mesh that the config asks for, over these devices or all that there are."""
    return make_mesh(**{axis: size for axis, size in config.mesh.items() if axis not in ("zero1", "offload")}, devices=devices)


def codec(config):
    """The codec; fields that are None take the constructor's default (`codec_weights.settle` fills them from the weights)."""
    places = ("path", "sha256")
    return construct("codec", {k: v for k, v in config.codec.items() if v is not None and k not in places})


def latent_shape(config) -> tuple[int, int, int]:
    """(h, w, c) of what the network sees.

    Raises:
        UserError: the resolution does not fit the codec and the patch.
    """
    c, shape, patch = codec(config), transform(config).shape, config.model.patch_size
    if patch < 1 or any(side % (c.downsample * patch) for side in shape[:2]):
        raise UserError(
            f"resolution {size_text(shape[:2])} is not a multiple of codec {c.downsample} x patch {patch} = "
            f"{c.downsample * patch}; change transform.resolution (transform.size, where it is set) or model.patch_size"
        )
    return c.latent_shape(shape)


def network(config):
    shape = latent_shape(config)
    channels = construct("process", config.process).output_channels(shape[-1])
    net = construct("model", config.model, out_channels=channels)
    net.check(*shape[:2])
    return net


def check_numbers(config):
    """Raises a UserError for a number of the training loop that is out of its range."""
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay is {config.ema_decay}; it must lie in [0, 1)")
    for field in ("num_steps", "batch_size", "microbatches"):
        if config[field] < 1:
            raise UserError(f"{field} is {config[field]}; it must be at least 1")
    if "log" in config and config.log.every_steps < 1:
        raise UserError(f"log.every_steps is {config.log.every_steps}; it must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}; it must lie in 0 to 2**32 - 1")


def task(config):
    """The training task; checks all that can be checked without data or devices."""
    check_numbers(config)
    shared = {
        "codec": codec(config),
        "optimizer": construct("optimizer", config.optimizer),
        "ema_decay": config.ema_decay,
        "microbatches": config.microbatches,
        "zero1": config.mesh.get("zero1", False),
        "offload": config.mesh.get("offload", "none"),
    }
    if config.task.name == "autoencoder":
        fields = {k: v for k, v in config.task.items() if k != "perceptual_path"} | {"discriminator": discriminator(config)}
        return construct("task", fields, **shared, image_shape=transform(config).shape)
    return construct(
        "task",
        config.task,
        **shared,
        network=network(config),
        process=construct("process", config.process),
        latent_shape=latent_shape(config),
        num_classes=config.model.num_classes,
    )


def discriminator(config) -> PatchDiscriminator | None:
    """The discriminator that an autoencoder's loss asks for; None where its weight is 0.

    Raises:
        UserError: the codec has nothing to train, or does not fit the images.
    """
    if config.codec.name == "pixels":
        raise UserError("codec.name is 'pixels', which has nothing to train; name an autoencoder, such as kl_vae")
    if config.codec.image_channels != config.transform.channels:
        raise UserError(
            f"transform.channels = {config.transform.channels} and codec.image_channels = "
            f"{config.codec.image_channels} must be equal"
        )
    return PatchDiscriminator(**config.task.discriminator) if config.task.discriminator_weight else None


def constants(config, mesh, loader, codec_params) -> dict:
    """What a training step reads and does not change, on the mesh.

    codec_params: of `codec_weights.settle`.

    Raises:
        UserError: task.perceptual_weight is not 0 and task.perceptual_path is empty or not LPIPS's weights.
    """
    if config.task.name == "autoencoder":
        if not config.task.perceptual_weight:
            return {}
        if not config.task.perceptual_path:
            raise UserError(
                "task.perceptual_weight is not 0 and task.perceptual_path is empty: give LPIPS's weights as "
                "dit_jax.convert --from=lpips writes them, or set --config.task.perceptual_weight=0"
            )
        return {"perceptual": place(lpips.load(config.task.perceptual_path), replicated(mesh))}
    found = {"codec": place(codec_params, shardings(codec_params, mesh, codec(config).rules))}
    if isinstance(loader, LatentLoader) and loader.resident:
        found["moments"] = resident_moments(loader.source, mesh)
    return found


def loader(config, mesh):
    """This host's training batches; checks the data set against the model and the batch against the mesh."""
    ways = rows_per_step(mesh) * config.microbatches
    if config.batch_size % ways:
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of mesh.data x mesh.fsdp x microbatches = "
            f"{rows_per_step(mesh)} x {config.microbatches} = {ways}"
        )
    source = construct("data", config.data)
    if config.task.name == "diffusion" and config.model.num_classes and source.num_classes != config.model.num_classes:
        raise UserError(
            f"the data set has {source.num_classes} classes and model.num_classes is "
            f"{config.model.num_classes}; pass --config.model.num_classes={source.num_classes}, or 0 to train "
            "without labels"
        )
    part = dict(zip(("process_index", "process_count"), reader_place(mesh), strict=True))
    if config.data.name != "latents":
        return Loader(source, transform(config), config.batch_size, config.seed, **config.loader, **part)
    if config.task.name == "autoencoder":
        raise UserError("data.name is 'latents', and an autoencoder is trained on images; give the data set that was encoded")
    source.check(codec(config), config.codec.sha256, transform(config))
    return LatentLoader(source, config.batch_size, config.seed, config.transform.flip, **config.loader, **part)


def abstract_batch(config, task, mesh) -> dict:
    """A global batch as `shard_batch` makes it of the loader's, as ShapeDtypeStructs; nothing is read.

    Raises:
        UserError: an autoencoder that is to be trained on latents.
    """
    rows = config.batch_size
    fields = {"label": ((rows,), jnp.int32)}
    if config.data.name != "latents":
        fields["image"] = (rows, *transform(config).shape), jnp.uint8
    elif config.task.name != "diffusion":
        raise UserError("data.name is 'latents', and an autoencoder is trained on images; give a data set of images")
    elif config.loader.get("resident"):
        fields["row"] = (rows,), jnp.int32
    else:
        *grid, c = task.latent_shape
        fields["moments"] = (rows, *grid, 2 * c), jnp.float16
    return {name: jax.ShapeDtypeStruct(*field, sharding=batch_sharding(mesh)) for name, field in fields.items()}


def transform(config) -> ImageTransform:
    return construct("transform", config.transform)


def sampler(config):
    """The sampler, tried without arithmetic on the process, so that a pair that does not fit fails before any training.

    Raises:
        UserError: the sampler does not suit the process, or its steps exceed the process's timesteps.
    """
    sampler, process = construct("sampler", config.sampler), construct("process", config.process)
    x, keys = jax.eval_shape(lambda: (jnp.zeros((1, 1, 1, 1)), jax.random.split(jax.random.key(0), 1)))
    jax.eval_shape(lambda x, keys: sampler(process, lambda x, t: Prediction(x, x, 0.0), x, keys), x, keys)
    return sampler


def forecast(config) -> Forecast:
    """At which sampling steps the blocks run; at all of them where the config has no such section.

    Raises:
        UserError: the sampler or the guidance evaluates the network in a way that forecasts do not follow.
    """
    found = Forecast(**config.get("forecast", {}))
    if not found.active:
        return found
    name = config.sampler.name
    if name in ("heun", "dopri5") or (name == "ab" and config.sampler.order > 2):
        raise UserError(
            f"forecast.interval is {found.interval} and the sampler {name!r} evaluates the network several times a "
            "step or goes back in time; choose ddpm, ddim, euler, ab of order 2, sde, dpmpp or unipc, or interval 1"
        )
    if config.guidance.scale != 1.0 and (config.guidance.low, config.guidance.high) != (0.0, 1.0):
        raise UserError(
            f"forecast.interval is {found.interval} and guidance acts on an interval of t, outside of which half of "
            "what would be forecast from is not computed; set guidance.low = 0 and high = 1, or interval 1"
        )
    return found


def guidance(config, weak: bool = False):
    """The guidance, checked against the data's channels; weak says that a second network is there to lead away from.

    Raises:
        UserError: more channels than the data has; a scale without labels or a second network, which would change nothing.
    """
    found = construct("guidance", config.guidance)
    channels = latent_shape(config)[-1]
    if found.channels is not None and found.channels > channels:
        raise UserError(
            f"guidance.channels is {found.channels} and the data has {channels}; ask for at most {channels}, or None for all"
        )
    if found.active and not config.model.num_classes and not weak:
        raise UserError(f"guidance.scale is {found.scale} and the network has no classes to be guided by; set it to 1")
    return found
