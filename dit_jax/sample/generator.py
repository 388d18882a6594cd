"""Generates images in batches: image k depends only on (params, seed, k, its request).

A device samples chunks of C rows and decodes smaller chunks. XLA rounds a row differently in a batch of another size, so the
last bits of an image depend on C and on the row's place in its chunk. They do not depend on the batch size, the number of
devices or the number of processes.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from dit_jax.diffusion.forecast import Forecast
from dit_jax.diffusion.guidance import Guidance
from dit_jax.errors import NotFinite, UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, reader_place, replicated, rows_per_step, split_rows
from dit_jax.runtime.console import Progress
from dit_jax.sample.jobs.job import Job
from dit_jax.tasks.diffusion import CONDITIONER, DiffusionTask

SMALLEST_CHUNK, LARGEST_CHUNK = 8, 64
NAMED = 5  # images in a message
PADDING = -1  # index of the rows that fill the last call
OWN_KEYS = ("seed", "number")  # entries of `given` where images have keys of other seeds: uint32 and int32 [B]
DECODER_CHUNK = 8  # a few images fill a device; one of 256 px takes 160 MB in float32
CHUNK_TOKENS = 16384  # fills an accelerator's matrix units; hides kernel launches and reads of the weights
# With more, activations leave the caches: the digits at patch 2 have 15, 21, 27 and 21 images/s with 8, 16, 32 and 64 rows.
CPU_CHUNK_TOKENS = 512


def default_chunk_size(num_tokens: int, platform: str) -> int:
    """The default of C: a power of two from 8 to 64, for at most CHUNK_TOKENS tokens per chunk, or CPU_CHUNK_TOKENS on a CPU."""
    size, most = SMALLEST_CHUNK, CPU_CHUNK_TOKENS if platform == "cpu" else CHUNK_TOKENS
    while size < LARGEST_CHUNK and 2 * size * num_tokens <= most:
        size *= 2
    return size


def has_replicated_params(mesh: Mesh) -> bool:
    """Whether every device holds all parameters, so that it samples without communication."""
    return mesh.size == mesh.shape["data"]


def drawing_mesh(mesh: Mesh) -> Mesh:
    """The devices of this process if they hold all parameters; else the mesh, whose processes call in lockstep."""
    if jax.process_count() == 1 or not has_replicated_params(mesh):
        return mesh
    return make_mesh(devices=jax.local_devices())


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Converts replicated arrays to arrays of the `drawing_mesh`, without a copy."""

    def one(x):
        if x.sharding.device_set == set(mesh.devices.flat):
            return x
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), [shard.data for shard in x.addressable_shards])

    return jax.tree.map(one, tree)


def for_samples(constants: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of a step that drawing samples reads: the codec and frozen text encoders."""
    return {name: x for name, x in constants.items() if name in ("codec", CONDITIONER)}


def in_chunks(function: Callable[..., Any], chunk_size: int, ways: int, *trees: Any) -> Any:
    """function(*trees) over chunks of the batch in sequence; chunk i is the i-th `chunk_size` rows of every device.

    Args:
        function: of pytrees of chunks to a pytree of arrays with as many rows.
        ways: number of devices over which the rows are split.
        trees: pytrees of arrays [B, ...].
    """

    def split(x):
        x = x.reshape(ways, -1, chunk_size, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, ways * chunk_size, *x.shape[3:])

    def joined(x):
        x = x.reshape(len(x), ways, chunk_size, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])

    return jax.tree.map(joined, jax.lax.map(lambda chunk: function(*chunk), jax.tree.map(split, trees)))


def image_keys(seed: jax.Array | int, indices: jax.Array) -> jax.Array:
    """Keys [B] of the images with these indices, of one seed or of a seed for each (uint32[B])."""
    if jnp.ndim(seed):
        return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed, indices)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def check_seed(seed: int) -> None:
    """Raises a UserError if the seed is out of range."""
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of sampling is {seed}; it must lie in 0 to 2**32 - 1")


def check_images(finite: np.ndarray, indices: np.ndarray, requests: Mapping[str, np.ndarray]) -> None:
    """Raises unless images are finite: rounded to uint8, NaN would be black.

    Args:
        finite: bool [n], of the first n images with these indices.
        requests: arrays [N, ...] of all images.

    Raises:
        NotFinite: with the number of images, and the first with their labels.
    """
    bad = sorted({int(k) for k, good in zip(indices, finite, strict=False) if not good and k != PADDING})
    bad = [k for k in bad if "label" not in requests or k < len(requests["label"])]  # others fill the last chunk
    if not bad:
        return
    labels = requests.get("label")
    names = [f"{k}" if labels is None else f"{k} (label {int(labels[k])})" for k in bad[:NAMED]]
    raise NotFinite(
        f"{len(bad)} of {len(finite)} images of a batch hold NaN or infinity: {', '.join(names)}{', ...' * (len(bad) > NAMED)}. "
        "They are not written. The weights are broken, or the sampler or guidance_scale lets the numbers grow without bound"
    )


def rows_of(given: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of a job's arrays for the images with these indices; an array of one row serves all images."""
    return {name: x[rows % len(x)] for name, x in given.items()}


class Share(NamedTuple):
    """This process's share of each batch. A part is a process, or all processes that hold the same rows of a batch.

    Fields:
        part, parts: index of this process's part, and number of parts.
        rows: number of images of a call that belong to the part.
        is_writer: whether this process is the first of its part.
    """

    part: int
    parts: int
    rows: int
    is_writer: bool


class Generator:
    """Samples images on a mesh, in calls of a fixed size.

    Fields:
        image_shape: (H, W, C) or (F, H, W, C) of one sample; a clip of one frame is an image.
        batch_size: images of a call over all devices: the argument, rounded up to full chunks on every device.
        program: jitted (params, constants, int32[batch_size] indices, requests, weak_params, uint32 seed, given) -> (uint8
            [batch_size, H, W, C], whether each was finite before it was rounded, bool [batch_size]), rows split over the mesh.
            Pass parameters from `weights.cast_for_inference`; others are cast at every step.

    Args:
        chunk_size: C. Two generators with the same C give the same bits on devices of one kind if every device holds all
            parameters (`has_replicated_params`), and otherwise agree up to rounding.
        watch: called on the host at every evaluation of the network, for one chunk at a time, as watch(indices [C], number of the
            evaluation, t [C], predicted x0 [C, h, w, c]), with NumPy arrays; rows with index PADDING are no images. It costs a
            copy of x0 to the host.
        job: what sampling starts from; `given` is its arrays, a row for each image. The sampler is that of `job.sampler`.

    Raises:
        UserError: a number is out of range; guidance without a null condition; `watch` where devices share an image.
    """

    def __init__(
        self,
        task: DiffusionTask,
        mesh: Mesh,
        sampler: Callable[..., jax.Array],
        guidance: Guidance,
        batch_size: int,
        seed: int,
        weak_task: DiffusionTask | None = None,
        chunk_size: int | None = None,
        forecast: Forecast | None = None,
        watch: Callable[..., None] | None = None,
        job: Job | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"the batch size of sampling is {batch_size}; it must be at least 1")
        check_seed(seed)
        if watch is not None and not has_replicated_params(mesh):
            raise UserError(
                f"sampling can be watched only where every device holds all parameters; the mesh is {dict(mesh.shape)}"
            )
        if chunk_size is not None and chunk_size < 1:
            raise UserError(f"the chunk size of sampling is {chunk_size}; it must be at least 1")
        if guidance.active and weak_task is None and not task.has_null_condition:
            raise UserError(
                f"guidance.scale is {guidance.scale} and the network was never trained without its condition "
                f"(task.cond_dropout is {task.cond_dropout}); set the scale to 1, or guide by a second network (autoguidance)"
            )
        task.skips(guidance, sampler)  # raises errors of skip-layer guidance
        self.mesh, self.seed, self.task, self.image_shape = mesh, seed, task, task.image_shape
        job = Job() if job is None else job
        if watch is not None and job.windows > 1:
            raise UserError(f"job {job.name} draws {job.windows} clips one after the other, which cannot be watched")
        shape = job.output_shape(task.image_shape)
        self.image_shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
        self.mesh, self.seed, self.task = mesh, seed, task
        self.chunk_size = chunk_size or default_chunk_size(
            task.network.num_tokens(task.latent_shape), mesh.devices.flat[0].platform
        )
        ways = rows_per_step(mesh)
        self.batch_size = -(-batch_size // (ways * self.chunk_size)) * ways * self.chunk_size

        tells_known = bool(getattr(task.network, "known_frames", False))

        def images(ways, params, constants, indices, requests, weak_params, seed, given):
            def latents(indices, requests, given):
                def weak(x, t, cond):
                    assert weak_task is not None  # called only where there is one
                    return weak_task.apply(weak_params, x, t, cond)

                def report(number, t, x0):
                    assert watch is not None
                    io_callback(watch, None, indices, number, jnp.broadcast_to(t, indices.shape), x0)

                second, own = weak if weak_task else None, {name: given[name] for name in OWN_KEYS if given and name in given}
                keys = image_keys(*own.values()) if own else image_keys(seed, job.key_indices(indices))

                def window(given, keys):
                    noise = task.initial_noise(keys)
                    drawn = task.draw_latents(
                        params,
                        constants,
                        keys,
                        {**requests, **job.conditions(given)},
                        sampler,
                        guidance,
                        second,
                        forecast,
                        job.begin(sampler, task.process, noise, given),
                        report if watch else None,
                        lambda denoise: job.around(denoise, task.process, noise, given),
                        job.known(given) if tells_known else None,
                    )
                    return job.finish_latents(drawn, given)

                if job.windows == 1:
                    return job.joined(window(given, keys)[None])

                def following(given, number):  # window 0 has the keys of a result with one window
                    own = jax.vmap(lambda key: jnp.where(number > 0, jax.random.fold_in(key, number), key))(keys)
                    drawn = window(given, own)
                    return {**given, **job.next_given(drawn, given)}, drawn

                return job.joined(jax.lax.scan(following, dict(given), jnp.arange(job.windows))[1])

            drawn = in_chunks(latents, self.chunk_size, ways, indices, requests, given)
            decoded, finite = self.decode(constants, drawn, ways)
            finished = job.finish(decoded, given)
            return finished.reshape(len(finished), *self.image_shape), finite

        def draw(*args):
            if not has_replicated_params(mesh):
                return images(ways, *args)
            replicated, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
            in_specs = (replicated, replicated, split, split, replicated, replicated, split)
            return jax.shard_map(lambda *args: images(1, *args), mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)(
                *args
            )

        self.program = jax.jit(draw, out_shardings=batch_sharding(mesh))
        self.images_of_one_device = functools.partial(images, 1)

    def with_seed(self, seed: int) -> "Generator":
        """The same generator with another seed, which is not compiled again.

        Raises:
            UserError: the seed is out of range.
        """
        check_seed(seed)
        other = copy.copy(self)
        other.seed = seed
        return other

    def noise(self, indices: np.ndarray) -> np.ndarray:
        """f32[B, h, w, c]: the noise that sampling of the images with these indices starts from."""
        return np.asarray(self.task.initial_noise(image_keys(self.seed, jnp.asarray(indices))))

    def decode(self, constants: Mapping[str, Any], latents: jax.Array, ways: int = 1) -> tuple[jax.Array, jax.Array]:
        """`task.decode_and_check` of latents [B, h, w, c], rows split over `ways` devices; B is a multiple of ways x C."""
        size = math.gcd(self.chunk_size, DECODER_CHUNK)
        return in_chunks(lambda x: self.task.decode_and_check(constants, x), size, ways, latents)

    @property
    def calls_in_flight(self) -> int:
        """Number of calls that may run at once. On CPU devices, two XLA programs that communicate deadlock."""
        return 1 if not has_replicated_params(self.mesh) and self.mesh.devices.flat[0].platform == "cpu" else 2

    @functools.cached_property
    def share(self) -> Share:
        """This process's share of each batch."""
        processes = [device.process_index for device in self.mesh.devices.flat]
        if set(processes) == {jax.process_index()}:
            return Share(jax.process_index(), jax.process_count(), self.batch_size, True)
        rows_of: dict[int, set] = {}
        places: Mapping[Any, Any] = batch_sharding(self.mesh).devices_indices_map((self.batch_size,))
        for device, index in places.items():
            rows_of.setdefault(device.process_index, set()).add(index[0].indices(self.batch_size))
        first = min(process for process, rows in rows_of.items() if rows == rows_of[jax.process_index()])
        part, parts = reader_place(self.mesh)
        return Share(part, parts, self.batch_size // parts, first == jax.process_index())

    def start(
        self,
        params: Any,
        constants: Mapping[str, Any],
        indices: jax.Array,
        requests: Mapping[str, jax.Array],
        weak_params: Any = None,
        given: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatches a call and returns what `program` does, which may not be computed yet; see `check_images`.

        Args:
            constants: {"codec": ...}, and {"conditioner": ...} of a frozen encoder; other entries are ignored.
            indices: int32[batch_size], global.
            requests: arrays [batch_size, ...], global, as `Conditioner.from_requests` returns them.
            given: arrays [batch_size, ...], global, of the job.
        """
        constants = for_samples(constants)
        with jax.set_mesh(self.mesh):
            return self.program(params, constants, indices, requests, weak_params, np.uint32(self.seed), dict(given or {}))

    def __call__(
        self,
        params: Any,
        constants: Mapping[str, Any],
        requests: Mapping[str, np.ndarray],
        num_images: int,
        weak_params: Any = None,
        say_progress: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Images 0 .. num_images - 1, as many as fit in memory; use `drawing.draw` for more.

        Args:
            requests: host arrays [num_images, ...].
            weak_params: parameters of autoguidance's second network, if there is one.
            given: host arrays [num_images, ...], or [1, ...] for all images, of the job.

        Returns:
            uint8 [num_images, H, W, C], the same on every process.

        Raises:
            UserError: a request is out of range.
            NotFinite: an image is not finite.
        """
        requests, size = self.task.requests(requests), self.batch_size
        progress = Progress("sampling", num_images)
        images = []
        for start in range(0, num_images, size):
            rows = np.arange(start, start + size, dtype=np.int32)
            keyed = np.where(rows < num_images, rows, np.int32(PADDING))
            rows = np.minimum(rows, num_images - 1)
            of_call, of_requests, of_given = jax.tree.map(
                lambda x: split_rows(self.mesh, x),
                (keyed, {name: x[rows] for name, x in requests.items()}, rows_of(given or {}, rows)),
            )
            drawn, finite = map(hosts.to_host, self.start(params, constants, of_call, of_requests, weak_params, of_given))
            check_images(finite[: num_images - start], rows, requests)
            images.append(drawn)
            if say_progress:
                progress.update(min(start + size, num_images))
        return np.concatenate(images)[:num_images]
