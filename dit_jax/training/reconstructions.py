"""The results of an autoencoder's run: images with their reconstructions, scores, and the finished codec.

N images, H x W x C images, h x w x c latents; or clips, F x H x W x C and f x h x w x c.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.build import Run
from dit_jax.codecs.kl_vae import KLVAE, KLAutoencoder, normalised, split_moments
from dit_jax.data.loader import read_in_order
from dit_jax.errors import NotFinite, UserError
from dit_jax.evaluate import extractors, scores
from dit_jax.interop import codec_folder
from dit_jax.metrics.image_quality import psnr, ssim
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import batch_sharding, rows_per_step, split_rows
from dit_jax.pixels import to_float, to_uint8
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file
from dit_jax.sample.grid import write_image_grid
from dit_jax.tasks.state import TrainState, on_device
from dit_jax.training.latent_plane import PALETTE, plane_picture
from dit_jax.training.records import Records

STATISTICS_IMAGES = 10_000  # gives the scale of the latents to about a percent
STATISTICS_BYTES = 2**31  # of fewer clips


class Reconstructor:
    """Encodes images or clips and decodes the posterior mean, in batches of one size."""

    def __init__(self, codec: KLAutoencoder, mesh: Mesh, batch_size: int):
        self.mesh = mesh
        ways = rows_per_step(mesh)
        self.batch_size = -(-batch_size // ways) * ways

        def run(params, images):
            params = on_device(params)
            mean, log_variance = split_moments(codec.encode(params, to_float(images)))
            decoded = codec.decode(params, (mean - jnp.asarray(codec.shift)) * jnp.asarray(codec.scale))
            finite = [jnp.isfinite(x).all(range(1, x.ndim)) for x in (decoded, mean, log_variance)]
            return to_uint8(decoded), mean, jnp.exp(log_variance), finite[0] & finite[1] & finite[2]

        self._run = jax.jit(run, out_shardings=batch_sharding(mesh))

    def __call__(self, params: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(reconstructions uint8 [N, H, W, C], posterior mean and variance [N, h, w, c]) of uint8 images, on every host.

        Raises:
            NotFinite: an image is not finite.
        """
        parts, count = [], len(images)
        with jax.set_mesh(self.mesh):
            for start in range(0, count, self.batch_size):
                rows = np.minimum(np.arange(start, start + self.batch_size), count - 1)
                parts.append([hosts.to_host(x) for x in self._run(params, split_rows(self.mesh, images[rows]))])
        decoded, mean, variance, finite = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
        if len(bad := np.flatnonzero(~finite)):
            raise NotFinite(
                f"{len(bad)} of {count} reconstructions hold NaN or infinity, the first is image {bad[0]}: the weights are broken"
            )
        return decoded, mean, variance


def read(run: Run, source: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, C], labels int32 [N]) of the first `count` readable images of a data set, not mirrored."""
    images, labels, bad = [], [], []
    for batch in read_in_order(source, run.transform, 256, bad_records=bad):
        images.append(batch["image"])
        labels.append(batch["label"])
        if sum(map(len, labels)) >= count:
            break
    if bad:
        say(f"{len(bad)} unreadable images skipped, the first: {bad[0][1]}")
    if not images:
        raise UserError(f"none of the {len(source)} images can be read")
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def side_by_side(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Originals and reconstructions alternate, [2N, ...]; an even number of columns keeps each pair of images in one row."""
    return np.stack([images, reconstructions], 1).reshape(-1, *images.shape[1:])


def _pairs(step: int, images: np.ndarray) -> str:
    return f"step {step}, each original {'left of' if images.ndim == 4 else 'above'} its reconstruction"


def frames(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C], or the frames of clips [N, F, H, W, C] as images [N F, H, W, C]."""
    return images if images.ndim == 4 else images.reshape(-1, *images.shape[2:])


def is_plane(latent_shape: tuple[int, ...]) -> bool:
    """Whether the latent of an image is 2 numbers in all."""
    return math.prod(latent_shape) == 2


def draw_plane(
    codec: KLVAE, params: Any, mesh: Mesh, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """The latent plane as uint8 RGB: images decoded over it, and the posterior means of the given images."""
    reconstructor = Reconstructor(codec, mesh, 256)
    means = reconstructor(params, images)[1].reshape(-1, 2)

    def decode(points):
        latents = points.reshape(-1, *codec.latent_shape(images.shape[1:]))
        return np.asarray(codec.decode(params, (latents - codec.shift) * codec.scale))

    names = class_names or ("images",)
    return plane_picture(decode, means, labels, len(names), names=names)


class Reconstructions:
    """The `Results` of an autoencoder's run: images with their reconstructions, scores, and the finished codec."""

    def __init__(self, run: Run):
        self.run, preview = run, run.config.preview
        if preview.every_steps and preview.num_images < 1:
            raise UserError(
                f"preview.num_images is {preview.num_images}; it must be at least 1 (preview.every_steps = 0 turns previews off)"
            )
        self.images = read(run, run.evaluation_source, preview.num_images)[0] if preview.every_steps else None
        self.reconstructor = Reconstructor(run.task.codec, run.mesh, preview.num_images)

    @staticmethod
    def check(run: Run) -> None:
        """Raises the UserErrors that `finish` would raise, before training."""
        evaluation = run.config.evaluation
        wanted, split, available = evaluation.num_images, evaluation.get("split"), len(run.evaluation_source)
        if wanted > available:
            raise UserError(f"evaluation.num_images is {wanted} and evaluation.split {split!r} has {available} images; lower it")
        if wanted == 1:
            raise UserError("evaluation.num_images is 1; it must be at least 2, which the Frechet distance needs, or 0 (off)")
        if wanted and evaluation.features:
            extractors.check_name(evaluation.features, evaluation.weights or None)
            extractors.check_shape(evaluation.features, run.image_shape)
        if evaluation.normalize not in ("scale", "channel"):
            raise UserError(f"evaluation.normalize is {evaluation.normalize!r}; it must be scale (one number) or channel")
        classes = len(run.source.class_names)
        if is_plane(run.latent_shape) and classes > len(PALETTE):
            raise UserError(
                f"the data set has {classes} classes, and the picture of a latent of 2 numbers at most {len(PALETTE)} colours; "
                "choose images of fewer classes, or merge classes"
            )

    def preview(self, folder: Path, records: Records, step: int, state: TrainState, constants: Any) -> float:
        start = time.monotonic()
        assert self.images is not None  # read where preview.every_steps is set
        decoded, _, _ = self.reconstructor(state.ema_params["codec"], self.images)
        path, images = folder / f"{step:08d}.png", self.images
        quality = float(np.mean(psnr(frames(images), frames(decoded))))

        def write():
            pairs = side_by_side(images, decoded)
            records.images(step, {"reconstructions": write_image_grid(path, pairs, columns=10, caption=_pairs(step, images))})
            say(f"images and their reconstructions in {path}, PSNR {quality:.2f} dB")

        if hosts.is_first():
            records.scalars(step, {"psnr": quality})
            records.preview(write)
        return time.monotonic() - start

    def finish(self, state: TrainState, constants: Any, workdir: Path) -> dict[str, Any]:
        """Writes the finished codec to <workdir>/codec, with the scale of its latents, and scores its reconstructions.

        The scale makes one posterior sample of a training image have unit variance over all channels (Rombach et al. 2022,
        appendix G), or, with evaluation.normalize = "channel", zero mean and unit variance in each channel.
        """
        run, evaluation = self.run, self.run.config.evaluation
        on_devices, trained = state.ema_params["codec"], run.task.codec
        params = jax.tree.map(hosts.to_host, on_devices)
        reconstructor = Reconstructor(trained, run.mesh, evaluation.batch_size)

        images, labels = read(run, run.source, min(STATISTICS_IMAGES, max(1, STATISTICS_BYTES // math.prod(run.image_shape))))
        _, means, variances = reconstructor(on_devices, images)
        by_channel = evaluation.normalize == "channel"
        axes = tuple(range(means.ndim - 1)) if by_channel else None
        codec = normalised(trained, means.mean(axes) if by_channel else 0.0, np.sqrt(means.var(axes) + variances.mean(axes)))
        folder = workdir / codec_folder.FOLDER
        result: dict[str, Any] = {"codec": str(folder), "scale": codec.scale, "shift": codec.shift}
        if hosts.is_first():
            codec_folder.replace(folder, codec, params)
            say(f"the codec is in {folder}; give that folder, or {workdir}, as codec.path")
        if is_plane(run.latent_shape) and hosts.is_first():
            try:  # the codec and its scores are the result; the picture is not
                picture = draw_plane(trained, params, run.mesh, images[:2_000], labels[:2_000], run.source.class_names)
                result["plane"] = str(samples_file.write_picture(workdir / "samples" / "plane.png", picture))
                say(f"the latent plane is in {result['plane']}")
            except Exception as error:
                result["plane"] = None
                say(f"the latent plane is left out: {type(error).__name__}: {error}")
        if evaluation.num_images:
            result |= self.judge(reconstructor, on_devices, workdir, int(state.step))
        return result

    def judge(self, reconstructor: Reconstructor, params: Any, workdir: Path, step: int) -> dict[str, Any]:
        """PSNR, SSIM and, with evaluation.features, the Frechet distance of the evaluation images' reconstructions.

        Writes both sets.
        """
        start, run, evaluation = time.monotonic(), self.run, self.run.config.evaluation
        images, labels = read(run, run.evaluation_source, evaluation.num_images)
        decoded, _, _ = reconstructor(params, images)
        original, path = (workdir / "samples" / f"{step:08d}_{name}.npz" for name in ("originals", "reconstructions"))
        result: dict[str, Any] = {"samples": str(path)}
        if hosts.is_first():
            data = run.config.data.to_dict()
            samples_file.write(original, images, labels, {"data": data})
            samples_file.write(path, decoded, labels, {"step": step, "codec": run.config.codec.to_dict(), "data": data})
            pairs = side_by_side(images, decoded)[:100]
            write_image_grid(path.with_suffix(".png"), pairs, columns=10, caption=_pairs(step, images))
            if evaluation.features:
                result |= scores.evaluate(
                    str(path),
                    str(original),
                    evaluation.features,
                    evaluation.weights or None,
                    scores.Options(("fid",)),
                    processes=(0, 1),
                )
            side = min(images.shape[-3:-1])
            window = min(11, side - 1 + side % 2)
            result |= {
                "psnr": float(psnr(frames(images), frames(decoded)).mean()),
                "ssim": float(ssim(frames(images), frames(decoded), window).mean()),
                "ssim_window": window,
            }
            say(
                f"{len(images)} reconstructions in {time.monotonic() - start:.1f} s: PSNR {result['psnr']:.2f} dB, SSIM "
                f"{result['ssim']:.3f}, {path.with_suffix('.png')}"
            )
        return result
