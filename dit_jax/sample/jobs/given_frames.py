"""Jobs on clips: some frames are given, and the network draws the others.

N clips, F frames of the network's clips, G frames of a given clip, f x h x w x c latents.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.known import KnownRegion
from dit_jax.diffusion.process import Denoise, Process
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.sample.jobs.edit import sha256
from dit_jax.sample.jobs.given import Given, for_each, read_clips
from dit_jax.sample.jobs.job import Arrays, Inputs, Job, Labels, Scene

MOST_FRAMES = 4_096  # of a clip that is drawn


class Layout(NamedTuple):
    """Where the frames of a given clip stand in the network's, and what is put around the drawn frames.

    Fields:
        places: frames of the network's clip that are given.
        used: the frames of the given clip that stand there.
        before, after: frames of the given clip that are put before and after.
        kept: the part of the network's clip that is in the result.
    """

    places: tuple[int, ...]
    used: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    kept: slice = slice(None)


@dataclass(frozen=True, eq=False)
class Animate(Job):
    """Draws a clip that begins with a given image.

    The given frames are held at every step of the sampler (`diffusion.known.KnownRegion`), and a network with `known_frames` is
    told them. They come back to the bit; a codec would change them by its reconstruction error.

    Fields:
        given: an image, a clip (animated WebP or GIF, mp4), or an .npy, .npz or array of them: one for all, or one for each.
        given_frames: frames of the drawn clip where the given ones stand, ascending; None for what the job does by itself.
        resize: scales a given image or clip of another size and crops its centre; False refuses it.

    Source: Brooks et al. 2024 (Sora), which shows the jobs; the mechanism is Open-Sora's (arXiv 2412.20404).
    """

    given: Given = None
    given_frames: Sequence[int] | None = None
    resize: bool = False

    name: ClassVar[str] = "animate"

    def requests(self, labels: Labels, num_samples: int | None, num_classes: int, seed: int) -> tuple[Requests, str]:
        if num_samples is None and (isinstance(labels, str) or labels is None):
            num_samples = len(self._clips())
        return super().requests(labels, num_samples, num_classes, seed)

    def layout(self, frames: int, given: int) -> Layout:
        """The layout for the network's number of frames and that of the given clip.

        Raises:
            UserError: they do not fit.
        """
        if given != 1 and self.given_frames is None:
            raise UserError(
                f"given has {given} frames, and job animate begins with one; give an image, say where they stand "
                "(--given_frames=0,1), or choose --job=extend"
            )
        places = self._places(frames, default=(0,))
        if len(places) != given:
            raise UserError(f"given has {given} frames and given_frames {len(places)}; both must be equal")
        return Layout(places, tuple(range(given)))

    def settled(self, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> "Animate":
        if len(image_shape) != 4:
            raise UserError(
                f"the network draws images of {' x '.join(map(str, image_shape))}, and job {self.name} draws clips; train one on "
                "clips, or choose --job=edit or inpaint"
            )
        clips = (
            None if self.given is None else read_clips(self.given, image_shape[1:], self.resize, one_clip=self.name != "animate")
        )
        return _settled(self, clips, image_shape, latent_shape)

    def _places(self, frames: int, default: Sequence[int]) -> tuple[int, ...]:
        """`given_frames`, or the default.

        Raises:
            UserError: they are not frames of the clip in ascending order, or all of them.
        """
        places = tuple(int(place) for place in (default if self.given_frames is None else self.given_frames))
        ascending = places == tuple(sorted(set(places)))
        if not places or not ascending or not 0 <= places[0] <= places[-1] < frames or len(places) >= frames:
            raise UserError(
                f"given_frames is {','.join(map(str, places))}; the clip has {frames} frames: give some of 0 to {frames - 1}, "
                "ascending"
            )
        return places

    def _clips(self) -> np.ndarray:
        raise UserError(f"job {self.name} is asked for requests before it is settled")  # see `Pipeline`


@dataclass(frozen=True, eq=False)
class Extend(Animate):
    """Continues a given clip, forward or backward, as far as is asked.

    A window of F frames begins with the last frames of what there is, F / 2 of them, and the next window continues it. With
    given_frames at the end of the window (as 2,3 of 4) the clip is extended backward.

    Fields:
        given: an image, a clip (animated WebP or GIF, mp4), or an .npy, .npz or array of them: one for all, or one for each.
        given_frames: frames of the drawn clip where the given ones stand, ascending; None for what the job does by itself.
        resize: scales a given image or clip of another size and crops its centre; False refuses it.
        num_frames: of the result, the given clip included; None for one window.
    """

    num_frames: int | None = None

    name: ClassVar[str] = "extend"

    def layout(self, frames: int, given: int) -> Layout:
        count = min(given, max(frames // 2, 1))
        places = self._places(frames, default=range(count))
        count = len(places)
        if count > given:
            raise UserError(f"given has {given} frames and given_frames {count}; a window begins with frames of the given clip")
        if places == tuple(range(count)):
            return Layout(places, tuple(range(given - count, given)), before=tuple(range(given - count)))
        if places == tuple(range(frames - count, frames)):
            return Layout(places, tuple(range(count)), after=tuple(range(count, given)))
        raise UserError(
            f"given_frames is {','.join(map(str, places))}; to extend, give the first frames of a window (0,1) to go forward, or "
            f"the last ({frames - 2},{frames - 1}) to go backward"
        )


@dataclass(frozen=True, eq=False)
class Connect(Animate):
    """Draws what lies between two clips.

    The first half of the given frames is one clip, the second half the other. Between the last frame of one and the first of the
    other, F - 2 frames are drawn; given_frames may hold more, as 0,1,6,7 of 8.

    Fields:
        given: an image, a clip (animated WebP or GIF, mp4), or an .npy, .npz or array of them: one for all, or one for each.
        given_frames: frames of the drawn clip where the given ones stand, ascending; None for what the job does by itself.
        resize: scales a given image or clip of another size and crops its centre; False refuses it.
    """

    name: ClassVar[str] = "connect"

    def layout(self, frames: int, given: int) -> Layout:
        if given < 2 or given % 2:
            raise UserError(f"given has {given} frames; job connect needs two clips of equal length, one after the other")
        places = self._places(frames, default=(0, frames - 1))
        first = next((i for i, place in enumerate(places) if place != i), len(places))
        last = len(places) - first
        if not first or not last or places[first:] != tuple(range(frames - last, frames)) or max(first, last) > given // 2:
            raise UserError(
                f"given_frames is {','.join(map(str, places))}; to connect, give frames at the begin and at the end of the "
                f"{frames}, at most {given // 2} each"
            )
        half = given // 2
        used = (*range(half - first, half), *range(half, half + last))
        return Layout(places, used, tuple(range(half - first)), tuple(range(half + last, given)))


@dataclass(frozen=True, eq=False)
class Loop(Animate):
    """Draws a clip whose last frame leads back to its first.

    Between the last frame of the given clip and its first, F - 2 frames are drawn. Without a given clip, one is drawn, of which
    the first F / 2 frames are kept.

    Fields:
        given: an image, a clip (animated WebP or GIF, mp4), or an .npy, .npz or array of them: one for all, or one for each.
        given_frames: frames of the drawn clip where the given ones stand; it must be None, since a loop gives its ends.
        resize: scales a given image or clip of another size and crops its centre; False refuses it.
    """

    name: ClassVar[str] = "loop"

    def layout(self, frames: int, given: int) -> Layout:
        if self.given_frames is not None:
            raise UserError("given_frames has no effect on job loop, whose ends are given; leave it out")
        if frames < 3:
            raise UserError(f"the network's clips have {frames} frames, and a loop needs at least 3")
        return Layout((0, frames - 1), (given - 1, 0), tuple(range(given - 1)), kept=slice(0, -1))


@dataclass(frozen=True, eq=False)
class _Settled(Animate):
    """A job on clips whose given frames are read, with what a compiled program depends on as numbers."""

    job: Animate = dataclasses.field(default_factory=Animate)
    clips: Any = None  # uint8 [M, G, H, W, C]; None for a loop that is drawn from noise
    plan: Layout = dataclasses.field(default_factory=lambda: Layout((), ()))
    shape: tuple[int, ...] = ()  # (F, H, W, C)
    latent: tuple[int, ...] = ()
    num_windows: int = 1
    total: int = 0  # frames of the result
    backward: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.job.name

    @property
    def numbers(self) -> dict[str, Any]:
        facts = {"plan": repr(self.plan), "shape": self.shape, "total": self.total, "windows": self.num_windows}
        return {**facts, "given": 0 if self.clips is None else self.clips.shape[1]}

    @property
    def windows(self) -> int:
        return self.num_windows

    def settled(self, image_shape, latent_shape):
        return self

    def _clips(self) -> np.ndarray:
        return np.zeros(1) if self.clips is None else self.clips

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.total, *image_shape[1:])

    def inputs(self, scene: Scene, requests: Requests, num_images: int) -> Inputs:
        settings = {"name": self.name, "num_frames": self.total}
        frames, places = self.shape[0], list(self.plan.places)
        if self.clips is None:  # a loop of its own: the first window has nothing given
            zeros = np.zeros((1, *self.latent), np.float32)
            return Inputs({"x0": zeros, "known_mask": zeros[..., :1]}, settings)
        clips = for_each(self.clips, num_images, "given clips")
        # Frames that are not given are filled by the nearest given one: a codec that compresses time needs them.
        nearest = [int(np.abs(np.array(places) - frame).argmin()) for frame in range(frames)]
        placed = clips[:, [self.plan.used[i] for i in nearest]]
        mask = np.zeros((1, frames, 1, 1, 1), bool)
        mask[:, places] = True
        known = np.broadcast_to(latent_frames(mask, self.latent[0]), (1, *self.latent[:-1], 1)).astype(np.float32)
        if not known.any():
            raise UserError(
                f"job {self.name}: the codec makes one latent of several frames, and no latent is given whole; give more frames"
            )
        settings |= {"given_sha256": sha256(clips), "given_frames": places}
        arrays = {"x0": scene.encode(placed) * known, "known_mask": known, "clips": clips, "placed": placed, "given": mask}
        return Inputs(arrays, settings)

    def known(self, given: Arrays) -> Mapping[str, jax.Array]:
        mask = jnp.broadcast_to(given["known_mask"], (*given["x0"].shape[:-1], 1))
        return {"known": given["x0"] * mask, "known_mask": mask}

    def around(self, denoise: Denoise, process: Process, noise: jax.Array, given: Arrays) -> Denoise:
        return KnownRegion(denoise, process, given["x0"], noise, given["known_mask"] == 0)

    def next_given(self, latents: jax.Array, given: Arrays) -> dict[str, jax.Array]:
        frames, count = self.shape[0], len(self.plan.places)
        if self.name == "loop":
            ends = [frames // 2 - 1, 0]
        else:
            ends = [*range(count)] if self.backward else [*range(frames - count, frames)]
        x0 = jnp.zeros_like(given["x0"]).at[:, np.array(self.plan.places)].set(latents[:, np.array(ends)])
        mask = jnp.zeros_like(given["known_mask"]).at[:, np.array(self.plan.places)].set(1)
        return {"x0": x0, "known_mask": mask}

    def joined(self, windows: jax.Array) -> jax.Array:
        if len(windows) == 1:
            return windows[0]
        frames, count = self.shape[0], len(self.plan.places)
        if self.name == "loop":
            return jnp.concatenate([windows[0][:, : frames // 2], windows[1][:, 1:-1]], axis=1)
        new = self.total - self.clips.shape[1]
        parts = [x[:, : frames - count] for x in windows[::-1]] if self.backward else [x[:, count:] for x in windows]
        joined = jnp.concatenate(parts, axis=1)
        return joined[:, joined.shape[1] - new :] if self.backward else joined[:, :new]

    def finish(self, images: jax.Array, given: Arrays) -> jax.Array:
        if self.clips is None:
            return images
        clips = given["clips"]
        if self.num_windows > 1:
            return jnp.concatenate([images, clips] if self.backward else [clips, images], axis=1)
        images = jnp.where(given["given"], given["placed"], images)[:, self.plan.kept]
        before, after = (clips[:, np.array(part, np.int64)] for part in (self.plan.before, self.plan.after))
        joined = jnp.concatenate([before, images, after], axis=1)
        return joined[:, joined.shape[1] - self.total :] if self.backward else joined[:, : self.total]


def _settled(job: Animate, clips: np.ndarray | None, image_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> _Settled:
    frames = image_shape[0]
    if clips is None and job.name != "loop":
        raise UserError(f"job {job.name} needs what is given: --given=<image, clip, .npy or .npz>")
    given = 0 if clips is None else clips.shape[1]
    plan = job.layout(frames, given or frames // 2)
    every: dict[str, Any] = {"job": job, "clips": clips, "plan": plan, "shape": image_shape, "latent": latent_shape}
    one_each = latent_shape[0] == frames
    if clips is None:
        if not one_each:
            raise UserError("job loop without a given clip needs a codec that encodes frame by frame; give a clip")
        return _Settled(**every, num_windows=2, total=frames // 2 + frames - 2)
    total = len(plan.before) + len(range(frames)[plan.kept]) + len(plan.after)
    backward = job.name == "extend" and plan.places[0] > 0
    wanted = getattr(job, "num_frames", None)
    if wanted is None or wanted == total:
        return _Settled(**every, total=total, backward=backward)
    if not given < wanted <= MOST_FRAMES:
        raise UserError(f"num_frames is {wanted}, and the given clip has {given}; it must lie in {given + 1} to {MOST_FRAMES}")
    windows = -(-(wanted - given) // (frames - len(plan.places)))
    if windows > 1 and not one_each:
        raise UserError(
            f"num_frames is {wanted}: the codec makes one latent of several frames, and a clip is extended by at most one window "
            f"of {frames}; extend the result again"
        )
    return _Settled(**every, total=wanted, num_windows=windows, backward=backward)


def latent_frames(mask: np.ndarray, latents: int) -> np.ndarray:
    """bool [1, f, ...]: the latents all of whose frames are given, of a mask [1, F, ...] of frames.

    A codec that compresses time makes its first latent of the first frame, and each other one of (F - 1) / (f - 1) frames.
    """
    frames = mask.shape[1]
    if latents == frames:
        return mask
    rate = (frames - 1) // max(latents - 1, 1)
    rest = mask[:, 1:].reshape(len(mask), latents - 1, rate, *mask.shape[2:]).all(2)
    return np.concatenate([mask[:, :1], rest], axis=1)
