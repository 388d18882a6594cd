"""From a config to objects: the only module that knows both.

Adding a model, a process, a codec, a data source or an optimizer is its own file and one line here; user code needs no line
here and calls `dit_jax.register`. Samplers are registered in `diffusion.samplers`.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

import dit_jax.diffusion.samplers  # noqa: F401 - registers the samplers
from dit_jax import registry
from dit_jax.codecs.discriminator import PatchDiscriminator
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.codecs.pixels import Pixels
from dit_jax.data.latent_loader import LatentLoader, resident_moments
from dit_jax.data.latents import LatentCache
from dit_jax.data.loader import Loader
from dit_jax.data.sources import TFDS, Digits, ImageFolder, TarShards
from dit_jax.data.transforms import ImageTransform
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.forecast import Forecast
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Memoryless, Prediction, Process
from dit_jax.encoders.conditioner import Conditioner
from dit_jax.encoders.labels import Labels
from dit_jax.encoders.unconditional import Unconditional
from dit_jax.errors import UserError
from dit_jax.interop import codec_folder, lpips, vae
from dit_jax.models.dit import DiT
from dit_jax.models.network import Network, for_platform
from dit_jax.parallel.mesh import batch_sharding, make_mesh, place, reader_place, replicated, rows_per_step
from dit_jax.parallel.rules import shardings
from dit_jax.registry import register
from dit_jax.runtime.console import say
from dit_jax.tasks.autoencoder import AutoencoderTask
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.optimizer import adamw
from dit_jax.tasks.state import TrainState, abstract_state

register("task", "diffusion", DiffusionTask)
register("task", "autoencoder", AutoencoderTask)
register("model", "dit", DiT)
register("process", "gaussian", Gaussian)
register("process", "flow", Flow)
register("codec", "pixels", Pixels)
register("codec", "kl_vae", KLVAE)
register("data", "digits", Digits)
register("data", "folder", ImageFolder)
register("data", "tfds", TFDS)
register("data", "tars", TarShards)
register("data", "latents", LatentCache)
register("transform", "image", ImageTransform)
register("optimizer", "adamw", adamw)
register("conditioner", "labels", Labels)
register("conditioner", "none", Unconditional)
register("guidance", "classifier_free", Guidance)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def construct(section: str, fields: Mapping, **more: Any) -> Any:
    """The object of a section: its registered constructor, called with the section's fields and `more`.

    Raises:
        UserError: an unknown name, an unknown field, a missing field, or whatever the constructor refuses.
    """
    fields = dict(fields)
    name = fields.pop("name")
    constructor = registry.get(section, name)
    for key in ("dtype", "param_dtype"):
        if key in fields:
            if fields[key] not in DTYPES:
                raise UserError(f"{section}.{key} is {fields[key]!r}; it must be one of {', '.join(DTYPES)}")
            fields[key] = DTYPES[fields[key]]
    fields |= more
    parameters = inspect.signature(constructor).parameters
    unknown = [key for key in fields if key not in parameters]
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in fields]
    if unknown or missing:
        raise UserError(
            f"{section} {name!r} has no field {', '.join(unknown)}"
            if unknown
            else f"{section} {name!r} needs the field {', '.join(missing)}"
        )
    return constructor(**fields)


CODEC_FILES = ("path", "sha256")  # fields of the section `codec` that are no fields of a codec
MESH_FLAGS = ("zero1", "offload")  # fields of the section `mesh` that are no axes
TASK_FILES = ("perceptual_path",)
TRAINING_ONLY = (
    "min_snr_gamma",
    "time_distribution",
    "logit_mean",
    "logit_std",
)  # fields of processes that samples do not depend on


class Run:
    """The objects of one config, each built once, when it is first asked for.

    A `Run` reads no weights and no data until `source`, `loader` or `constants` are asked for, so that a plan or a check costs
    nothing. `with_codec_weights` gives the run that trains or samples.

    Args:
        config: a resolved config, as `recipes` makes it.
        devices: of the mesh; all devices if None.
        codec_params: weights of the frozen codec as NumPy arrays.
        platform: "cpu", "gpu" or "tpu": what the network leaves to the platform is chosen for it now, and not where it runs.

    Raises:
        UserError: whatever is wrong with the part of the config that is asked for.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        devices: Sequence[Any] | None = None,
        codec_params: Any = None,
        platform: str | None = None,
    ):
        self.config, self.devices, self._codec_params, self.platform = config, devices, codec_params, platform

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh that the config asks for."""
        axes = {axis: size for axis, size in self.config.mesh.items() if axis not in MESH_FLAGS}
        return make_mesh(**axes, devices=self.devices)

    @cached_property
    def transform(self) -> ImageTransform:
        return construct("transform", self.config.transform)

    @cached_property
    def codec(self) -> Any:
        """The codec; fields that are None have the constructor's default until `with_codec_weights` reads them."""
        return construct("codec", {k: v for k, v in self.config.codec.items() if v is not None and k not in CODEC_FILES})

    @cached_property
    def process(self) -> Process:
        return construct("process", self.config.process)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) or (F, H, W, C) of one example.

        Raises:
            UserError: the images have other channels than the codec.
        """
        shape, channels = self.transform.shape, getattr(self.codec, "image_channels", self.transform.shape[-1])
        if shape[-1] != channels:
            raise UserError(f"transform.channels = {shape[-1]} and the codec's image_channels = {channels} must be equal")
        return shape

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, c) or (f, h, w, c) of what the network sees.

        Raises:
            UserError: the image size does not fit the codec.
        """
        return self.codec.latent_shape(self.image_shape)

    @cached_property
    def network(self) -> Network:
        channels = self.process.output_channels(self.latent_shape[-1])
        network = construct("model", self.config.model, out_channels=channels)
        network.check(self.latent_shape)
        return network if self.platform is None else for_platform(network, self.platform)

    @cached_property
    def conditioner(self) -> Conditioner:
        return construct("conditioner", self.config.conditioner, num_classes=self.config.model.get("num_classes", 0))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return construct("optimizer", self.config.optimizer)

    @cached_property
    def task(self) -> Any:
        """The training task. Building it checks all that can be checked without data or devices."""
        config = self.config
        check_numbers(config)
        fields = {k: v for k, v in config.task.items() if k not in TASK_FILES} | {
            "codec": self.codec,
            "optimizer": self.optimizer,
            "image_shape": self.image_shape,
            "ema_decay": config.ema_decay,
            "microbatches": config.microbatches,
            "zero1": config.mesh.get("zero1", False),
            "offload": config.mesh.get("offload", "none"),
        }
        return construct("task", fields, **TASK_PARTS[config.task.name](self))

    @cached_property
    def entry(self) -> str:
        """What of the data set a batch holds: "image", "moments" of a latent cache, or "row" of one on the devices."""
        if registry.get("data", self.config.data.name) is not LatentCache:
            return "image"
        return "row" if self.config.loader.get("resident") else "moments"

    @cached_property
    def source(self) -> Any:
        """The training data set, opened."""
        return construct("data", self.config.data)

    @cached_property
    def evaluation_source(self) -> Any:
        """The images that are kept for evaluation: `data` with `evaluation.split`, where the data set has splits."""
        split = self.config.evaluation.get("split")
        return construct("data", self.config.data, **({} if split is None else {"split": split}))

    @cached_property
    def loader(self) -> Loader | LatentLoader:
        """This host's training batches; checks the data set against the model and the batch against the mesh."""
        config = self.config
        self.check_batch()
        self.task.batch_spec(self.entry)
        classes = self.conditioner.num_classes if "conditioner" in config else 0
        if classes and self.source.num_classes != classes:
            raise UserError(
                f"the data set has {self.source.num_classes} classes and model.num_classes is {classes}; pass "
                f"--config.model.num_classes={self.source.num_classes}, or 0 to train without labels"
            )
        part: dict[str, Any] = dict(zip(("process_index", "process_count"), reader_place(self.mesh), strict=True))
        if self.entry == "image":
            return Loader(self.source, self.transform, config.batch_size, config.seed, **config.loader, **part)
        self.source.check(self.codec, config.codec.sha256, self.transform)
        return LatentLoader(self.source, config.batch_size, config.seed, self.transform.flip, **config.loader, **part)

    def check_batch(self) -> None:
        """Raises a UserError if the batch cannot be split over the mesh."""
        ways, microbatches = rows_per_step(self.mesh), self.config.microbatches
        if self.config.batch_size % (ways * microbatches):
            raise UserError(
                f"batch_size {self.config.batch_size} is not a multiple of mesh.data x mesh.fsdp x microbatches = "
                f"{ways} x {microbatches} = {ways * microbatches}"
            )

    @cached_property
    def abstract_state(self) -> TrainState:
        """The training state as ShapeDtypeStructs with shardings."""
        return abstract_state(self.task, self.mesh)

    @cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch as ShapeDtypeStructs with shardings; nothing is read."""
        rows, sharding = self.config.batch_size, batch_sharding(self.mesh)
        spec = self.task.batch_spec(self.entry)
        return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=sharding) for name, x in spec.items()}

    @cached_property
    def frozen(self) -> dict[str, Any]:
        """The frozen weights that the task reads, on the mesh.

        Raises:
            UserError: task.perceptual_weight is not 0 and task.perceptual_path is empty or not LPIPS's weights.
        """
        arrays = {name: CONSTANTS[name](self) for name in self.task.constants()}
        return {name: place(tree, self._sharding_of_constant(name, tree)) for name, tree in arrays.items()}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What a training step reads and does not change, on the mesh: frozen weights, and a data set that lives there."""
        return self.frozen | ({"moments": resident_moments(self.source, self.mesh)} if self.entry == "row" else {})

    def abstract_constants(self, resident_rows: int = 0) -> dict[str, Any]:
        """`constants` as ShapeDtypeStructs with shardings; nothing is read.

        resident_rows: of the latent cache that lives on the devices, where the config asks for one.

        Raises:
            UserError: the config asks for such a cache and resident_rows is 0.
        """
        found = {}
        for name, tree in self.task.constants().items():
            sharding = self._sharding_of_constant(name, tree)
            sharding = jax.tree.map(lambda _, s=sharding: s, tree) if isinstance(sharding, NamedSharding) else sharding
            found[name] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)
        if self.entry == "row":
            if resident_rows < 1:
                raise UserError(
                    "loader.resident keeps the latent cache on the devices, and only the data tells its size: give "
                    "--resident_rows=<images, twice as many where it holds mirror images>"
                )
            ways, moments = rows_per_step(self.mesh), self.task.batch_spec("moments")["moments"]
            shape = (-(-resident_rows // ways) * ways, *moments.shape)
            found["moments"] = jax.ShapeDtypeStruct(shape, moments.dtype, sharding=batch_sharding(self.mesh))
        return found

    def _sharding_of_constant(self, name: str, tree):
        rules = self.task.constant_rules().get(name)
        return replicated(self.mesh) if rules is None else shardings(tree, self.mesh, rules)

    @cached_property
    def codec_params(self) -> Any:
        """The codec's parameters as NumPy arrays.

        Raises:
            UserError: the codec has weights and they were not read (`with_codec_weights`).
        """
        if self._codec_params is not None:
            return self._codec_params
        if self.has_codec_weights:
            raise UserError(NO_CODEC_PATH)
        return jax.tree.map(np.asarray, self.codec.init(jax.random.key(0)))

    @property
    def has_codec_weights(self) -> bool:
        """Whether a frozen codec's weights must be read; the codec of an autoencoder's run is trained."""
        return "path" in self.config.codec

    def with_codec_weights(self, workdir: Path | None = None) -> "Run":
        """This run with the frozen codec's weights, and with the fields of `codec` that only the weights can tell.

        The folder of a run that has its own copy of the codec is read first: the path in the config need not exist any more.
        `codec.scale` and `codec.shift` that are None become those of the weights' folder. `codec.sha256` becomes the hash of
        the weights.

        Raises:
            UserError: the codec needs weights and there are none; they do not fit the config; the hash is not the one asked for.
        """
        if not self.has_codec_weights:
            return self
        section, own = dict(self.config.codec), workdir / codec_folder.FOLDER if workdir else None
        path = self._codec_path(own)
        if path.is_dir():
            stored = vae.read_codec(path)
            for field in ("scale", "shift"):
                if section.get(field) is None:
                    section[field] = getattr(stored, field)
                elif getattr(self.codec, field) != getattr(stored, field) and path != own:
                    say(f"codec.{field} {section[field]} of the config is used, not {getattr(stored, field)} of {path}")
        elif section.get("scale") is None:
            raise UserError(
                f"codec.path {path} is a single file, which does not hold the scale of the latents; give codec.scale, or the "
                "folder with config.json"
            )
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.codec = section
        settled = Run(config, devices=self.devices, platform=self.platform)
        params = vae.load_diffusers(path, settled.codec)
        sha256, wanted = vae.weights_sha256(params), section.get("sha256")
        if wanted and sha256 != wanted:
            raise UserError(
                f"the weights in {path} have the SHA-256 {sha256} and codec.sha256 asks for {wanted}; give those weights, or "
                "leave codec.sha256 empty"
            )
        config.codec.sha256 = sha256
        return Run(config.lock(), devices=self.devices, codec_params=params, platform=self.platform)

    def _codec_path(self, own: Path | None) -> Path:
        given = self.config.codec.path
        if own and own.exists():
            if given and not Path(given).expanduser().exists():
                say(f"codec.path {given} does not exist; the copy in {own} is used")
            return own
        if not given:
            raise UserError(NO_CODEC_PATH)
        return vae.find(given)

    @cached_property
    def sampler(self) -> Any:
        return self.checked_sampler(self.config.sampler)

    @cached_property
    def scoring_sampler(self) -> Any:
        """The cheap sampler of scores while training."""
        return self.checked_sampler(self.config.scoring.sampler)

    def checked_sampler(self, fields: Mapping) -> Any:
        """A sampler, traced on the process, so that a pair that does not fit fails before any training.

        Raises:
            UserError: the sampler does not suit the process, or its steps exceed the process's timesteps.
        """
        sampler = construct("sampler", fields)
        x, keys = jax.eval_shape(lambda: (jnp.zeros((1, 1, 1, 1)), jax.random.split(jax.random.key(0), 1)))
        denoise = Memoryless(lambda x, t: Prediction(x, x, 0.0))
        jax.eval_shape(lambda x, keys: sampler(self.process, denoise, x, keys), x, keys)
        return sampler

    @cached_property
    def guidance(self) -> Guidance:
        """The guidance of samples, checked against the network.

        Raises:
            UserError: more channels than the data has; a scale other than 1 where the null condition was never trained.
        """
        guidance = self.guidance_by_second_network
        if guidance.active and not self.task.has_null_condition:
            raise UserError(
                f"guidance.scale is {guidance.scale} and the network knows no null condition (model.num_classes = "
                f"{self.conditioner.num_classes}, task.cond_dropout = {self.task.cond_dropout}); set the scale to 1"
            )
        return guidance

    @cached_property
    def guidance_by_second_network(self) -> Guidance:
        """The guidance where a second network is what it leads away from (autoguidance): no null condition is needed."""
        guidance, channels = construct("guidance", self.config.guidance), self.latent_shape[-1]
        if guidance.channels is not None and guidance.channels > channels:
            raise UserError(
                f"guidance.channels is {guidance.channels} and the data has {channels}; ask for at most {channels}, or None "
                "for all"
            )
        return guidance

    @cached_property
    def forecast(self) -> Forecast:
        """At which calls of the network its blocks run."""
        return self.checked_forecast(self.sampler)

    def checked_forecast(self, sampler: Any) -> Forecast:
        """`forecast` with this sampler; at all calls where the config has no such section.

        Raises:
            UserError: the sampler, the guidance or the network do not allow forecasts.
        """
        forecast = Forecast(**self.config.get("forecast", {}))
        if not forecast.active:
            return forecast
        if sampler.evaluations(self.process) != getattr(sampler, "num_steps", 0):
            raise UserError(
                f"forecast.interval is {forecast.interval} and the sampler {type(sampler).__name__} evaluates the network "
                "several times a step or goes back in time; choose ddpm, ddim, euler, ab of order 2, sde, dpmpp or unipc, or set "
                "the interval to 1"
            )
        if self.guidance_by_second_network.active and self.guidance_by_second_network.is_partial:
            raise UserError(
                f"forecast.interval is {forecast.interval} and guidance acts on an interval of t, outside of which half of what "
                "would be forecast from is not computed; set guidance.low = 0 and high = 1, or interval 1"
            )
        if not hasattr(self.network, "run_blocks"):
            raise UserError(
                f"forecast.interval is {forecast.interval}, and {type(self.network).__name__} has no blocks to forecast; set it "
                "to 1"
            )
        return forecast

    def predicts(self) -> dict[str, Any]:
        """What two networks must share for one to guide the other: {what: value}."""
        config = self.config
        return {
            "process": {k: v for k, v in config.process.items() if k not in TRAINING_ONLY},
            "codec": {k: v for k, v in config.codec.items() if k not in (*CODEC_FILES, "dtype")},
            "image size": list(self.image_shape),
            "number of classes": self.conditioner.num_classes,
        }


NO_CODEC_PATH = (
    "codec.path is empty; give the folder or .safetensors file of the VAE's weights, or the --workdir of a run that trained one "
    "(--config.codec.path=... or, to sample, --codec_path=...)"
)


def _diffusion_parts(run: Run) -> dict[str, Any]:
    return {
        "network": run.network,
        "process": run.process,
        "conditioner": run.conditioner,
        "latent_shape": run.latent_shape,
    }


def _autoencoder_parts(run: Run) -> dict[str, Any]:
    """The discriminator that an autoencoder's loss asks for; None where its weight is 0.

    Raises:
        UserError: the codec has nothing to train, or does not fit the images.
    """
    task = run.config.task
    if not isinstance(run.codec, KLVAE):
        raise UserError(
            f"codec.name is {run.config.codec.name!r}, which has nothing to train; name an autoencoder, such as kl_vae"
        )
    return {"discriminator": PatchDiscriminator(**task.discriminator) if task.discriminator_weight else None}


def _perceptual(run: Run):
    path = run.config.task.perceptual_path
    if not path:
        raise UserError(
            "task.perceptual_weight is not 0 and task.perceptual_path is empty: give LPIPS's weights as "
            "dit_jax.convert --from=lpips writes them, or set --config.task.perceptual_weight=0"
        )
    return lpips.load(path)


TASK_PARTS = {"diffusion": _diffusion_parts, "autoencoder": _autoencoder_parts}  # what a task is made of, beside its section
CONSTANTS = {"codec": lambda run: run.codec_params, "perceptual": _perceptual}  # by the names of `Task.constants`


def check_numbers(config: ml_collections.ConfigDict) -> None:
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
