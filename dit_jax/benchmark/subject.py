"""The subject of a benchmark: a task on a mesh, from a config or, with only jax, flax and optax, from a model's name.

`recipes` and `build` also need ml_collections, grain and orbax, so `of_model` constructs the same objects without them; a test
checks that both are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import registry
from dit_jax.benchmark.embeddings import Embeddings
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.codecs.pixels import Pixels
from dit_jax.codecs.vq_vae import VQVAE
from dit_jax.data.size import size_json
from dit_jax.diffusion import samplers
from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.encoders.labels import Labels
from dit_jax.errors import UserError
from dit_jax.models import sizes
from dit_jax.models.dit import DiT
from dit_jax.models.network import for_platform, has_null_label
from dit_jax.models.published import Published
from dit_jax.models.registered import networks
from dit_jax.parallel.mesh import batch_sharding, make_mesh, rows_per_step
from dit_jax.sample.labels import spread_requests
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.optimizer import adamw
from dit_jax.tasks.task import Task

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A task with a batch size on a mesh, and the sampler and guidance for its samples.

    constants: what a step reads and does not change.
    entry: entry of the data set's batches: "moments" of a latent cache, or "image".

    Raises:
        UserError: a batch size that does not divide over the mesh and the microbatches.
    """

    task: Task
    mesh: Mesh
    batch_size: int
    sampler: Any = None
    guidance: Guidance = field(default_factory=Guidance)
    constants: Mapping[str, Any] = field(default_factory=dict)
    entry: str = "image"
    seed: int = 0

    def __post_init__(self):
        ways = rows_per_step(self.mesh) * self.task.microbatches
        if self.batch_size < 1 or self.batch_size % ways:
            raise UserError(
                f"batch size {self.batch_size} is not a positive multiple of mesh.data x mesh.fsdp x microbatches = "
                f"{rows_per_step(self.mesh)} x {self.task.microbatches} = {ways}"
            )

    def batch(self) -> dict[str, jax.Array]:
        """A training batch of noise, created on the devices."""
        spec, size = self.task.batch_spec(self.entry), self.batch_size

        def noise(key, x):
            shape = (size, *x.shape)
            if x.dtype == jnp.uint8:
                return jax.random.bits(key, shape, jnp.uint8)
            if jnp.issubdtype(x.dtype, jnp.integer):
                return jax.random.randint(key, shape, 0, max(self.num_classes, 1), x.dtype)
            return jax.random.normal(key, shape, x.dtype)

        def make(key):
            return {name: noise(key, x) for name, x in spec.items()}

        return jax.jit(make, out_shardings=batch_sharding(self.mesh))(jax.random.key(self.seed))

    def requests(self) -> dict[str, Any]:
        """Requests of a batch of samples: all classes in turn, or the random embeddings of a batch."""
        if self.num_classes:
            return spread_requests(self.diffusion_task.conditioner, self.batch_size)
        wanted = self.diffusion_task.conditioner.batch_spec()
        return {name: np.asarray(x) for name, x in self.batch().items() if name in wanted}

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one forward pass of one image; None if the task's step uses further networks."""
        return None if self.task.has_auxiliary_networks else self.task.macs()

    @property
    def diffusion_task(self) -> DiffusionTask:
        """The task, where it draws samples."""
        return cast(DiffusionTask, self.task)

    @property
    def num_tokens(self) -> int:
        return self.diffusion_task.network.num_tokens(self.diffusion_task.latent_shape)

    @property
    def num_classes(self) -> int:
        return self.diffusion_task.conditioner.num_classes if self.task.draws_samples else 0

    def describe(self) -> dict:
        """The settings that determine the speed, for the result."""
        task: Any = self.task  # a diffusion task has a network and a codec, an autoencoder's has a codec
        trained: Any = for_platform(task.network, jax.default_backend()) if task.draws_samples else task.codec
        names = ("depth", "width", "heads", "patch_size", "conditioning", "attention", "unroll", "remat")
        fields = {name: getattr(trained, name) for name in names if hasattr(trained, name)}
        embeddings = dict(task.conditioner.shapes) if isinstance(getattr(task, "conditioner", None), Embeddings) else {}
        return {
            "model": {"name": type(trained).__name__, **fields},
            **({"condition": {"random_embeddings": embeddings}} if embeddings else {}),
            "dtype": jnp.dtype(trained.dtype).name,
            "param_dtype": jnp.dtype(trained.param_dtype).name,
            "resolution": size_json(task.image_shape[-3:-1]),
            "batch_size": self.batch_size,
            "microbatches": task.microbatches,
            "mesh": dict(self.mesh.shape),
            "gmacs": None if self.macs is None else self.macs / 1e9,
        }


def of_model(
    name: str,
    image_size: tuple[int, int],
    batch_size: int,
    dtype: str,
    remat: str = "auto",
    attention: str = "auto",
    unroll: bool | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance_scale: float = 1.0,
    devices=None,
) -> Subject:
    """The paper's model and training (Peebles & Xie 2023) on cached latents, as `recipes.dit` with a latent cache has it.

    image_size: (height, width) in pixels.
    devices: of the mesh, whose data axis takes what fsdp and tensor leave; all that there are if None.

    Raises:
        UserError: no such model or sampler; a size, batch or mesh that does not fit.
    """
    size = sizes.fields(name)
    codec, process = KLVAE(), Gaussian()
    image_shape = (*image_size, codec.image_channels)
    latent_shape = codec.latent_shape(image_shape)
    network = DiT(
        **size,
        num_classes=1000,
        out_channels=process.output_channels(latent_shape[-1]),
        attention=attention,
        remat=remat,
        unroll=unroll,
        dtype=DTYPES[dtype],
    )
    network.check(latent_shape)
    task = DiffusionTask(network, process, codec, Labels(num_classes=1000), adamw(), image_shape, latent_shape)
    draw = _sampler("gaussian", sampler, num_steps)
    return _drawing(task, make_mesh(-1, fsdp, tensor, devices), batch_size, draw, guidance_scale, True)


def of_published(
    name: str,
    batch_size: int,
    dtype: str,
    fields: Mapping[str, Any],
    fsdp: int = 1,
    tensor: int = 1,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance_scale: float = 1.0,
    devices=None,
) -> Subject:
    """A published network of any kind, "ADM@256", on what it takes: images, or cached latents of an autoencoder.

    The process is that of its training. The condition of a text network is random embeddings (`Embeddings`).

    Args:
        fields: of the network, in place of the published ones, as remat.
        sampler, num_steps: None for those of DRAWN_BY.

    Raises:
        UserError: no such network; it has no such field, or refuses a value, or upsamples; a batch or mesh that does not fit.
    """
    known = {key: (constructor, published) for key, constructor, published in networks()}
    if name not in known:
        raise UserError(f"--model={name} does not exist; choose one of {', '.join([*sizes.MODELS, *known])}")
    constructor, published = known[name]
    if published.after:
        raise UserError(f"--model={name} upsamples images of another network, which a benchmark does not have; choose another")
    if unknown := [key for key in fields if key not in constructor.__dataclass_fields__]:
        raise UserError(f"--{unknown[0]} has no effect on --model={name}, whose network has no such field; omit it")
    *grid, channels = published.input_shape
    network = constructor(**{**published.fields, **fields, "dtype": DTYPES[dtype]})
    network.check(published.input_shape)
    factor = int(name.split("@")[1].split()[0]) // grid[0]
    codec: Any = {1: Pixels(channels), 4: VQVAE(), 8: KLVAE(latent_channels=channels, use_quant_conv=channels == 4)}[factor]
    text = tuple((entry, shape) for entry, shape in published.cond_shapes.items() if entry != "label")
    classes = published.fields.get("num_classes", 0)
    guided = text or (classes and has_null_label(network))
    task = DiffusionTask(
        network,
        _process(published),
        codec,
        Embeddings(text) if text else Labels(num_classes=classes),
        adamw(),
        (*(factor * side for side in grid), codec.image_channels),
        published.input_shape,
        cond_dropout=0.1 if guided else 0.0,
    )
    if guidance_scale != 1 and not guided:
        raise UserError(f"--guidance_scale={guidance_scale}: --model={name} has no null label to be guided with; omit it")
    draw = _sampler(published.process, sampler, num_steps)
    return _drawing(task, make_mesh(-1, fsdp, tensor, devices), batch_size, draw, guidance_scale, factor > 1)


DRAWN_BY = {"gaussian": ("ddpm", 250), "edm": ("heun", 50), "flow": ("euler", 28)}  # sampler and steps, by process


def _sampler(process: str, name: str | None, num_steps: int | None) -> dict[str, Any]:
    """The section of a sampler: that of the process, unless another one or other steps are named."""
    own, steps = DRAWN_BY[process]
    draw = samplers.default_sampler(name or own)
    return draw | ({"num_steps": steps if num_steps is None else num_steps} if "num_steps" in draw else {})


def _process(published: Published) -> Any:
    """The process that a network was trained with; a flow is that of Stable Diffusion 3."""
    if published.process == "gaussian":
        learned = published.fields["out_channels"] == 2 * published.input_shape[-1]
        return Gaussian(variance="learned_range" if learned else "fixed_small")
    if published.process == "edm":
        return EDM()
    return Flow(time_distribution="logit_normal", shift=3.0, convention="sd3", sampling_grid="sd3")


def _drawing(
    task: DiffusionTask, mesh: Mesh, batch_size: int, draw: dict[str, Any], guidance_scale: float, cached: bool
) -> Subject:
    """The subject with the section of a sampler; `cached` latents come from a cache, images from a data set."""
    make = registry.get("sampler", draw.pop("name"))
    entry = "moments" if cached else "image"
    return Subject(task, mesh, batch_size, make(**draw), Guidance(guidance_scale), {} if cached else {"codec": {}}, entry)


def of_config(config, devices=None) -> Subject:
    """The training of a config, without reading its data set and its codec's weights.

    devices: of the mesh; all that there are if None.

    Raises:
        UserError: whatever the config is refused for; an autoencoder whose perceptual distance has no weights.
    """
    from dit_jax.build import Run

    run = Run(config, devices=devices)
    draw = {"sampler": run.sampler, "guidance": run.guidance} if run.task.draws_samples else {}
    if run.has_codec_weights:  # the step begins at a latent cache and does not read them
        return Subject(run.task, run.mesh, config.batch_size, entry="moments", seed=config.seed, **draw)
    return Subject(run.task, run.mesh, config.batch_size, constants=run.frozen, seed=config.seed, **draw)
