"""Many images from one network: image k depends on (params, seed, k, its label) alone.

R rows of a device and call, worked on in chunks of C, and decoded in smaller ones. XLA rounds a row otherwise in a batch of
another size, so C and a row's place in its chunk are what its last bits depend on; R, the number of devices and that of
processes are not.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dit_jax.diffusion.forecast import Forecast
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, reader_place, replicated, rows_per_step, split_rows
from dit_jax.runtime.console import Progress
from dit_jax.tasks.diffusion import DiffusionTask

FEWEST_ROWS, MOST_ROWS = 8, 64
DECODED_AT_ONCE = 8  # a decoder fills a device with a few images, and takes 160 MB for each of 256 px in float32
TOKENS_AT_ONCE = 16384  # enough to fill an accelerator's matrix units, and to hide launches and the reading of the weights


def default_rows_at_once(task: DiffusionTask, platform: str) -> int:
    """C if none is asked for: a power of two, 8 on a CPU, elsewhere 8 to 64, so that a chunk has TOKENS_AT_ONCE tokens."""
    height, width, _ = task.latent_shape
    tokens = height * width // task.network.patch_size**2
    rows = FEWEST_ROWS
    while platform != "cpu" and rows < MOST_ROWS and 2 * rows * tokens <= TOKENS_AT_ONCE:
        rows *= 2
    return rows


def has_whole_params(mesh: Mesh) -> bool:
    """Whether every device holds all parameters, so that it draws its images without the others."""
    return mesh.size == mesh.shape["data"]


def drawing_mesh(mesh: Mesh) -> Mesh:
    """The devices of this process alone where that is enough to draw images; else the mesh, whose processes go in step."""
    if jax.process_count() == 1 or not has_whole_params(mesh):
        return mesh
    return make_mesh(devices=jax.local_devices())


def on_mesh(tree, mesh: Mesh):
    """Arrays that every device holds whole, as arrays of the `drawing_mesh`; nothing is copied."""

    def one(x):
        if x.sharding.device_set == set(mesh.devices.flat):
            return x
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), [shard.data for shard in x.addressable_shards])

    return jax.tree.map(one, tree)


def in_chunks(function, rows: int, ways: int, *arrays):
    """function(*arrays) over chunks of the batch, one after another; chunk i is the i-th `rows` rows of every device.

    ways: over how many devices the rows of the arrays are split.
    """

    def split(x):
        return x.reshape(ways, -1, rows, *x.shape[1:]).swapaxes(0, 1).reshape(-1, ways * rows, *x.shape[1:])

    done = jax.lax.map(lambda chunk: function(*chunk), tuple(map(split, arrays)))
    done = done.reshape(len(done), ways, rows, *done.shape[2:]).swapaxes(0, 1)
    return done.reshape(-1, *done.shape[3:])


class Place(NamedTuple):
    """One of the parts that draw images, each its own: a process, or the processes that hold the same rows of a batch.

    Fields:
        rows: of a call.
        is_writer: whether this process is the first of its part.
    """

    part: int
    parts: int
    rows: int
    is_writer: bool


class Generator:
    """Draws images in calls of one size on a mesh.

    batch_size: images of a call over all devices: the one asked for, rounded up to whole chunks on every device.
    program: jitted (params, {"codec": ...}, int32[batch_size] indices, int32[batch_size] labels, weak_params)
        -> uint8[batch_size, H, W, C], rows over the mesh. Parameters are those of `held_weights.hold`: it casts none before its
        loop, so others would be cast at every step.

    Args:
        rows_at_once: C; images of two generators with the same C are equal to the bit on devices of one kind where the
            parameters are whole on each (`has_whole_params`), and else to rounding.
    """

    def __init__(
        self,
        task: DiffusionTask,
        mesh: Mesh,
        sampler,
        guidance,
        batch_size: int,
        seed: int,
        weak_task: DiffusionTask | None = None,
        rows_at_once: int | None = None,
        forecast: Forecast | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"sampling batch_size {batch_size}: it must be at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"sampling seed {seed}: it must lie in 0 to 2**32 - 1")
        self.mesh, self.seed = mesh, seed
        self.rows_at_once = rows_at_once or default_rows_at_once(task, mesh.devices.flat[0].platform)
        ways = rows_per_step(mesh)
        self.batch_size = -(-batch_size // (ways * self.rows_at_once)) * ways * self.rows_at_once

        def rows(params, constants, indices, labels, weak_params, ways):
            def latents(indices, labels):
                def weak(x, t, cond):
                    return weak_task.network.apply({"params": weak_params}, x, t, cond)

                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
                return task.draw_latents(params, keys, labels, sampler, guidance, weak if weak_task else None, forecast)

            drawn = in_chunks(latents, self.rows_at_once, ways, indices, labels)
            return in_chunks(lambda x: task.decode(constants, x), math.gcd(self.rows_at_once, DECODED_AT_ONCE), ways, drawn)

        def draw(params, constants, indices, labels, weak_params):
            args = params, constants, indices, labels, weak_params
            if not has_whole_params(mesh):
                return rows(*args, ways)
            whole, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
            return jax.shard_map(
                lambda *args: rows(*args, 1),
                mesh=mesh,
                in_specs=(whole, whole, split, split, whole),
                out_specs=split,
                check_vma=False,
            )(*args)

        self.program = jax.jit(draw, out_shardings=batch_sharding(mesh))

    @property
    def calls_in_flight(self) -> int:
        """How many calls may wait for their images at once: XLA on CPU devices deadlocks with two programs that communicate."""
        return 1 if not has_whole_params(self.mesh) and self.mesh.devices.flat[0].platform == "cpu" else 2

    @functools.cached_property
    def place(self) -> Place:
        """What of every call falls to this process."""
        processes = [device.process_index for device in self.mesh.devices.flat]
        if set(processes) == {jax.process_index()}:
            return Place(jax.process_index(), jax.process_count(), self.batch_size, True)
        held: dict[int, set] = {}
        for device, index in batch_sharding(self.mesh).devices_indices_map((self.batch_size,)).items():
            held.setdefault(device.process_index, set()).add(index[0].indices(self.batch_size))
        first = min(process for process, rows in held.items() if rows == held[jax.process_index()])
        part, parts = reader_place(self.mesh)
        return Place(part, parts, self.batch_size // parts, first == jax.process_index())

    def start(self, params, constants, indices, labels, weak_params=None) -> jax.Array:
        """The images of a call, which are being drawn.

        Args:
            constants: {"codec": ...}; anything else in it is left out.
            indices, labels: int32[batch_size], global.
        """
        with jax.set_mesh(self.mesh):
            images = self.program(params, {"codec": constants["codec"]}, indices, labels, weak_params)
        return images

    def __call__(self, params, constants, labels: np.ndarray, weak_params=None, say_progress: bool = False) -> np.ndarray:
        """Image k for labels[k], k = 0, 1, ...: for as many as fit in memory; `drawing.draw` is for more.

        Args:
            labels: int32[N].
            weak_params: of the second network of autoguidance, if there is one.

        Returns:
            uint8[N, H, W, C], whole on every process.
        """
        count, size = len(labels), self.batch_size
        progress = Progress("sampling", count)
        images = []
        for start in range(0, count, size):
            indices = np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)
            rows = split_rows(self.mesh, indices), split_rows(self.mesh, labels[indices])
            images.append(hosts.to_host(self.start(params, constants, *rows, weak_params)))
            if say_progress:
                progress.update(min(start + size, count))
        return np.concatenate(images)[:count]
