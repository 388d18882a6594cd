"""What an autoencoder's run shows for itself: images beside their reconstructions, their scores, and the finished codec.

N images, H x W x C images, h x w x c latents.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import build
from dit_jax.codecs.kl_vae import normalised, split_moments
from dit_jax.data.loader import read_in_order
from dit_jax.errors import UserError
from dit_jax.evaluate import extractors, scores
from dit_jax.interop import codec_folder
from dit_jax.metrics.reconstruction import psnr, ssim
from dit_jax.parallel import hosts
from dit_jax.parallel.mesh import batch_sharding, rows_per_step, split_rows
from dit_jax.pixels import to_float, to_uint8
from dit_jax.runtime.console import say
from dit_jax.sample import samples_file
from dit_jax.sample.grid import write_image_grid
from dit_jax.tasks.state import on_device
from dit_jax.training.latent_plane import PALETTE, plane_picture

STATISTICS_IMAGES = 10_000  # enough to know the scale of the latents to about a percent


class Reconstructor:
    """Images through a codec and back, by the mean of the posterior, in batches of one size."""

    def __init__(self, codec, mesh, batch_size: int):
        self.mesh = mesh
        ways = rows_per_step(mesh)
        self.batch_size = -(-batch_size // ways) * ways

        def run(params, images):
            params = on_device(params)
            mean, log_variance = split_moments(codec.encode(params, to_float(images)))
            decoded = codec.decode(params, (mean - jnp.asarray(codec.shift)) * jnp.asarray(codec.scale))
            return to_uint8(decoded), mean, jnp.exp(log_variance)

        self._run = jax.jit(run, out_shardings=batch_sharding(mesh))

    def __call__(self, params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(reconstructions uint8 [N, H, W, C], posterior mean and variance [N, h, w, c]) of uint8 images, whole on every host."""
        parts, count = [], len(images)
        with jax.set_mesh(self.mesh):
            for start in range(0, count, self.batch_size):
                rows = np.minimum(np.arange(start, start + self.batch_size), count - 1)
                parts.append([hosts.to_host(x) for x in self._run(params, split_rows(self.mesh, images[rows]))])
        return tuple(np.concatenate(part)[:count] for part in zip(*parts, strict=True))


def evaluation_source(config):
    """The images that are kept for judging: `data` with `evaluation.split`, where the data set has splits."""
    fields = config.data.to_dict()
    if config.evaluation.get("split") is not None:
        fields["split"] = config.evaluation.split
    return build.construct("data", fields)


def check(config):
    """Raises a UserError for what would only be found after the training."""
    wanted, split = config.evaluation.num_images, config.evaluation.get("split")
    available = len(evaluation_source(config))
    if wanted > available:
        raise UserError(
            f"evaluation.num_images is {wanted} and evaluation.split {split!r} has {available} images; ask for at most as many"
        )
    if wanted == 1:
        raise UserError("evaluation.num_images is 1; the distance between two sets of images needs at least 2 (0 turns it off)")
    if wanted and config.evaluation.features:
        extractors.check_name(config.evaluation.features, config.evaluation.weights or None)
        extractors.check_shape(config.evaluation.features, build.transform(config).shape)
    if config.evaluation.normalize not in ("scale", "channel"):
        raise UserError(f"evaluation.normalize is {config.evaluation.normalize!r}; it must be scale (one number) or channel")
    classes = len(build.construct("data", config.data).class_names)
    if is_plane(build.codec(config), build.transform(config).shape) and classes > len(PALETTE):
        raise UserError(
            f"the latent of an image is 2 numbers, whose picture has {len(PALETTE)} colours for {classes} classes; "
            "choose the images of some classes, or merge classes"
        )


def read(config, source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, C], labels int32 [N]) of the first readable `count` images, never mirrored."""
    images, labels, bad = [], [], []
    for batch in read_in_order(source, build.transform(config), 256, bad_records=bad):
        images.append(batch["image"])
        labels.append(batch["label"])
        if sum(map(len, labels)) >= count:
            break
    if bad:
        say(f"{len(bad)} unreadable images left out, the first: {bad[0][1]}")
    if not images:
        raise UserError(f"none of the {len(source)} images can be read")
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def side_by_side(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Originals and their reconstructions in turn, [2N, H, W, C]: with an even number of columns each pair lies together."""
    return np.stack([images, reconstructions], 1).reshape(-1, *images.shape[1:])


def is_plane(codec, shape: tuple[int, ...]) -> bool:
    """Whether the whole latent of an image is 2 numbers."""
    return int(np.prod(codec.latent_shape(shape))) == 2


def draw_plane(codec, params, mesh, images, labels, class_names) -> np.ndarray:
    """The latent plane as uint8 RGB: images decoded over it, and where the given ones lie."""
    reconstructor = Reconstructor(codec, mesh, 256)
    means = reconstructor(params, images)[1].reshape(-1, 2)

    def decode(points):
        latents = points.reshape(-1, *codec.latent_shape(images.shape[1:]))
        return np.asarray(codec.decode(params, (latents - codec.shift) * codec.scale))

    names = class_names or ("images",)
    return plane_picture(decode, means, labels, len(names), names=names)


def make_preview(config, task, mesh, source):
    """(folder, records, step, state, constants) -> seconds: writes images beside their reconstructions."""
    count = config.preview.num_images
    if config.preview.every_steps and count < 1:
        raise UserError(f"preview.num_images is {count}; it must be at least 1 (preview.every_steps = 0 turns previews off)")
    images = read(config, evaluation_source(config), count)[0] if config.preview.every_steps else None
    reconstructor = Reconstructor(task.codec, mesh, count)

    def preview(folder, records, step, state, constants):
        start = time.monotonic()
        decoded, _, _ = reconstructor(state.ema_params["codec"], images)
        if hosts.is_first():
            path = folder / f"{step:08d}.png"
            quality = float(np.mean(psnr(images, decoded)))
            records.images(step, {"reconstructions": write_image_grid(path, side_by_side(images, decoded), columns=10)})
            records.scalars(step, {"psnr": quality})
            say(f"images and their reconstructions in {path}, PSNR {quality:.2f} dB")
        return time.monotonic() - start

    return preview


def finish(run, workdir: Path) -> dict:
    """Writes the finished codec to <workdir>/codec, with the scale of its latents, and scores its reconstructions.

    The scale makes one posterior sample of a training image have unit variance over all channels (Rombach et al. 2022,
    appendix G), or, with evaluation.normalize = "channel", zero mean and unit variance in each channel.
    """
    config, params = run.config, jax.tree.map(hosts.to_host, run.state.ema_params["codec"])
    codec = run.task.codec
    reconstructor = Reconstructor(codec, run.mesh, config.evaluation.batch_size)
    placed = run.state.ema_params["codec"]

    images, labels = read(config, run.source, STATISTICS_IMAGES)
    _, means, variances = reconstructor(placed, images)
    axes = (0, 1, 2) if config.evaluation.normalize == "channel" else None
    std = np.sqrt(means.var(axes) + variances.mean(axes))
    codec = normalised(codec, means.mean(axes) if config.evaluation.normalize == "channel" else 0.0, std)
    folder = workdir / codec_folder.FOLDER
    result = {"codec": str(folder), "scale": codec.scale, "shift": codec.shift}
    if hosts.is_first():
        codec_folder.replace(folder, codec, params)
        say(f"the codec is in {folder}: give that folder, or {workdir}, as codec.path")
    if is_plane(codec, images.shape[1:]) and hosts.is_first():
        picture = draw_plane(run.task.codec, params, run.mesh, images[:2_000], labels[:2_000], run.source.class_names)
        result["plane"] = str(samples_file.write_picture(workdir / "samples" / "plane.png", picture))
        say(f"the latent plane is in {result['plane']}")
    if config.evaluation.num_images:
        result |= judge(config, reconstructor, placed, workdir, int(run.state.step))
    return result


def judge(config, reconstructor: Reconstructor, params, workdir: Path, step: int) -> dict:
    """PSNR, SSIM and, with evaluation.features, Frechet distance of the evaluation images' reconstructions; writes both sets."""
    start = time.monotonic()
    images, labels = read(config, evaluation_source(config), config.evaluation.num_images)
    decoded, _, _ = reconstructor(params, images)
    original, path = (workdir / "samples" / f"{step:08d}_{name}.npz" for name in ("originals", "reconstructions"))
    result = {"samples": str(path)}
    if hosts.is_first():
        made_by = {"step": step, "codec": config.codec.to_dict(), "data": config.data.to_dict()}
        samples_file.write(original, images, labels, {"data": config.data.to_dict()})
        samples_file.write(path, decoded, labels, made_by)
        write_image_grid(path.with_suffix(".png"), side_by_side(images, decoded)[:100], columns=10)
        if config.evaluation.features:
            result |= scores.evaluate(
                str(path),
                str(original),
                config.evaluation.features,
                config.evaluation.weights or None,
                scores.Options(("fid",)),
                processes=(0, 1),
            )
        side = min(images.shape[1:3])
        window = min(11, side - 1 + side % 2)
        result |= {
            "psnr": float(psnr(images, decoded).mean()),
            "ssim": float(ssim(images, decoded, window).mean()),
            "ssim_window": window,
        }
        say(
            f"{len(images)} reconstructions in {time.monotonic() - start:.1f} s: PSNR {result['psnr']:.2f} dB, SSIM "
            f"{result['ssim']:.3f}, {path.with_suffix('.png')}"
        )
    return result
