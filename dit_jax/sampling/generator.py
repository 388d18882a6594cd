"""Many images from one network: image k depends on (params, seed, k, its label) alone."""

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.console import Progress
from dit_jax.errors import UserError
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import batch_sharding, rows_per_step, split_rows
from dit_jax.training.diffusion_task import DiffusionTask
from dit_jax.training.state import on_device


class Generator:
    """Draws images in batches of one size, so that the arithmetic of an image does not depend on how many are asked for.

    program: jitted (params, constants, int32[B] indices, int32[B] labels, weak_params) -> uint8[B, H, W, C], rows over the mesh.
    """

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
            return task.sample(on_device(params), constants, keys, labels, sampler, guidance, weak if weak_task else None)

        rows = batch_sharding(mesh)
        self.program = jax.jit(draw, out_shardings=rows)

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
                batch = self.program(params, constants, split_rows(self.mesh, indices), split_rows(self.mesh, labels[indices]),
                                     weak_params)
                images.append(hosts.to_host(batch))
                if say_progress:
                    progress.update(min(start + size, count))
        return np.concatenate(images)[:count]
