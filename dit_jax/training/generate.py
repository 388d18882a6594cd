"""Many images from one network: image k depends on (params, seed, k, its label) alone."""

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.console import Progress
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import batch_sharding, rows_per_step, split_rows
from dit_jax.training.diffusion_task import DiffusionTask


def spread_labels(num_images: int, num_classes: int, labels: tuple[int, ...] = ()) -> np.ndarray:
    """int32[num_images]: the given labels in turn, or all classes in turn, so that counts differ by at most one.

    Raises:
        UserError: a label out of range, or labels for a network without classes.
    """
    if num_images < 1:
        raise UserError(f"{num_images} samples asked for; at least 1 is needed")
    if labels and not num_classes:
        raise UserError("the network is unconditional (0 classes); ask for no labels")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"label {label} is out of range: 0 to {num_classes - 1}")
    cycle = np.asarray(labels or range(max(num_classes, 1)), np.int32)
    return np.resize(cycle, num_images)


def null_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int32[num_images] of the null label: images without condition."""
    return np.full_like(spread_labels(num_images, num_classes), num_classes)


def random_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """int32[num_images], each drawn evenly from all classes; label k depends on the seed alone, not on num_images."""
    spread_labels(num_images, num_classes)  # for its checks
    return np.random.default_rng(seed).integers(0, max(num_classes, 1), num_images, np.int32)


class Generator:
    """Draws images in batches of one size, so that the arithmetic of an image does not depend on how many are asked for."""

    def __init__(self, task: DiffusionTask, mesh: Mesh, sampler, guidance, batch_size: int, seed: int,
                 weak_task: DiffusionTask | None = None):
        ways = rows_per_step(mesh)
        if batch_size < 1 or batch_size % ways:
            raise UserError(f"sampling batch_size {batch_size} is not a positive multiple of mesh.data x mesh.fsdp = {ways}")
        self.mesh, self.batch_size = mesh, batch_size

        def draw(params, constants, indices, labels, weak_params):
            def weak(x, t, cond):
                return weak_task.network.apply({"params": weak_params}, x, t, cond)

            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
            return task.sample(params, constants, keys, labels, sampler, guidance, weak if weak_task else None)

        rows = batch_sharding(mesh)
        self._draw = jax.jit(draw, out_shardings=rows)

    def __call__(self, params, constants, labels: np.ndarray, weak_params=None, say_progress: bool = False) -> np.ndarray:
        """Image k for labels[k], k = 0, 1, ...

        Args:
            labels: int32[N].
            weak_params: of the second network of autoguidance, if there is one.

        Returns:
            uint8[N, H, W, C], whole on every process.
        """
        count, size = len(labels), self.batch_size
        progress = Progress("sampling", count)
        images = []
        with jax.set_mesh(self.mesh):
            for start in range(0, count, size):
                indices = np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)
                batch = self._draw(params, constants, split_rows(self.mesh, indices), split_rows(self.mesh, labels[indices]),
                                   weak_params)
                images.append(hosts.to_host(batch))
                if say_progress:
                    progress.update(min(start + size, count))
        return np.concatenate(images)[:count]
