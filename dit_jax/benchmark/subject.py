"""The subject of a benchmark: a task on a mesh, from a config or, with only jax, flax and optax, from a model's name.

`recipes` and `build` also need ml_collections, grain and orbax, so `of_model` constructs the same objects without them; a test
checks that both are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dit_jax.codecs import macs
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.diffusion import samplers
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.errors import UserError
from dit_jax.models import sizes
from dit_jax.models.dit import DiT, form_of_loop
from dit_jax.models.macs import dit_macs
from dit_jax.parallel.mesh import batch_sharding, make_mesh, replicated, rows_per_step
from dit_jax.tasks.autoencoder import AutoencoderTask
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.optimizer import adamw

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A task with a batch size on a mesh, and the sampler and guidance for its samples.

    constants: inputs of a step that it does not change.

    Raises:
        UserError: the batch size is not divisible by the mesh and the microbatches.
    """

    task: DiffusionTask | AutoencoderTask
    mesh: Mesh
    batch_size: int
    sampler: Any = None
    guidance: Guidance = field(default_factory=Guidance)
    constants: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        ways = rows_per_step(self.mesh) * self.task.microbatches
        if self.batch_size < 1 or self.batch_size % ways:
            raise UserError(
                f"batch size {self.batch_size} is not a positive multiple of mesh.data x mesh.fsdp x microbatches = "
                f"{rows_per_step(self.mesh)} x {self.task.microbatches} = {ways}"
            )

    @property
    def resolution(self) -> int:
        if isinstance(self.task, AutoencoderTask):
            return self.task.resolution
        return self.task.latent_shape[0] * self.task.codec.downsample

    def macs(self) -> float | None:
        """Multiply-adds of one forward pass of one image; None for an autoencoder that is trained with a second network."""
        if isinstance(self.task, DiffusionTask):
            return dit_macs(self.task.network, self.task.latent_shape)
        if self.task.discriminator is not None or self.task.perceptual_weight:
            return None
        return sum(macs.gmacs(self.task.codec, self.task.resolution)) * 1e9

    def batch(self) -> dict[str, jax.Array]:
        """A training batch of noise, created on the devices: moments as in a latent cache, or images without a KL codec."""
        task, size = self.task, self.batch_size
        cached = isinstance(task, DiffusionTask) and isinstance(task.codec, KLVAE)

        def make(key):
            if cached:
                h, w, c = task.latent_shape
                return {"moments": jax.random.normal(key, (size, h, w, 2 * c), jnp.float16)} | labels(key)
            shape = (size, self.resolution, self.resolution, task.codec.image_channels)
            return {"image": jax.random.bits(key, shape, jnp.uint8)} | labels(key)

        def labels(key):
            classes = getattr(task, "num_classes", 0)
            return {"label": jax.random.randint(key, (size,), 0, max(classes, 1))}

        return jax.jit(make, out_shardings=batch_sharding(self.mesh))(jax.random.key(self.seed))

    def describe(self) -> dict:
        """The settings that determine the speed, for the result."""
        task = self.task
        macs = self.macs()
        net = task.network if isinstance(task, DiffusionTask) else task.codec
        fields = {
            name: getattr(net, name)
            for name in ("depth", "width", "heads", "patch_size", "conditioning", "attention")
            if hasattr(net, name)
        }
        if isinstance(net, DiT):
            fields["unroll"], fields["remat"] = form_of_loop(net.unroll, net.remat, jax.default_backend())
        return {
            "model": {"name": type(net).__name__, **fields},
            "dtype": jnp.dtype(net.dtype).name,
            "param_dtype": jnp.dtype(net.param_dtype).name,
            "resolution": self.resolution,
            "batch_size": self.batch_size,
            "microbatches": task.microbatches,
            "mesh": dict(self.mesh.shape),
            "gmacs": None if macs is None else macs / 1e9,
        }


def of_model(
    name: str,
    resolution: int,
    batch_size: int,
    dtype: str,
    remat: str = "auto",
    attention: str = "auto",
    unroll: bool | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    sampler: str = "ddpm",
    num_steps: int = 250,
    guidance_scale: float = 1.0,
    devices=None,
) -> Subject:
    """The paper's model and training (Peebles & Xie 2023) on cached latents, equal to `recipes.dit` with a latent cache.

    devices: of the mesh, whose data axis uses those that fsdp and tensor leave; None for all devices.

    Raises:
        UserError: model or sampler are unknown; resolution, batch size or mesh do not fit.
    """
    size, draw = sizes.fields(name), samplers.default_sampler(sampler)
    draw |= {"num_steps": num_steps} if "num_steps" in draw else {}
    codec, process = KLVAE(), Gaussian()
    latent_shape = codec.latent_shape(resolution)
    network = DiT(
        **size,
        num_classes=1000,
        out_channels=process.output_channels(latent_shape[-1]),
        attention=attention,
        remat=remat,
        unroll=unroll,
        dtype=DTYPES[dtype],
    )
    network.check(*latent_shape[:2])
    task = DiffusionTask(network, process, codec, adamw(), latent_shape, num_classes=1000)
    return Subject(
        task,
        make_mesh(-1, fsdp, tensor, devices),
        batch_size,
        samplers.CLASSES[draw.pop("name")](**draw),
        Guidance(guidance_scale),
    )


def of_config(config, devices=None) -> Subject:
    """The training of a config, without reading its data set and its codec's weights.

    devices: of the mesh; None for all devices.

    Raises:
        UserError: the config is invalid; an autoencoder's perceptual distance has no weights.
    """
    from dit_jax import build

    task, mesh = build.task(config), build.mesh(config, devices)
    if isinstance(task, AutoencoderTask):
        return Subject(task, mesh, config.batch_size, constants=build.constants(config, mesh, None, {}), seed=config.seed)
    constants = (
        {} if isinstance(task.codec, KLVAE) else {"codec": jax.device_put(task.codec.init(jax.random.key(0)), replicated(mesh))}
    )
    return Subject(task, mesh, config.batch_size, build.sampler(config), build.guidance(config), constants, config.seed)
