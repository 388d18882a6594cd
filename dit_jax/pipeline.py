"""Draws images with a trained network, in a script, a notebook, or the verb `sample`.

    import dit_jax
    pipe = dit_jax.load("runs/digits")
    samples = pipe(labels=[3, 5], num_steps=50, guidance_scale=1.5, seed=0)
    samples.save_grid("digits.png")

An image depends on the weights, the settings, the seed, its index and its label. It does not depend on the other images, the
batch size or the number of devices.
"""

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import ml_collections
import numpy as np

from dit_jax import recipes, registry
from dit_jax.build import Run
from dit_jax.data.size import parse_size, size_text
from dit_jax.encoders.conditioner import Requests
from dit_jax.errors import UserError
from dit_jax.interop import text_encoders as text_weights
from dit_jax.models.network import position_grid, scales_positions, size_unit
from dit_jax.parallel import hosts
from dit_jax.pixels import to_float
from dit_jax.runtime.console import say
from dit_jax.runtime.field_values import FieldType
from dit_jax.sample import drawing, export, samples_file, shards, trained
from dit_jax.sample.generator import DECODER_CHUNK, Generator, check_images, drawing_mesh, image_keys, on_mesh
from dit_jax.sample.grid import image_grid, label_names, sampling_caption, write_animation
from dit_jax.sample.jobs import Interpolate, Job, made
from dit_jax.sample.jobs.edit import sha256
from dit_jax.sample.jobs.job import Inputs, Labels, Scene
from dit_jax.sample.prompts import Prompts, prompts_of
from dit_jax.sample.samples_file import Samples
from dit_jax.sample.watch import Evaluation, Watcher
from dit_jax.sample.weights import cast_for_inference, weights_fingerprint
from dit_jax.storage.paths import local_path
from dit_jax.storage.run_folder import read_class_names
from dit_jax.tasks import averages
from dit_jax.tasks.diffusion import CONDITIONER
from dit_jax.tasks.task import warning_of_average

ENCODER_SEED = 0  # of the posterior samples of given images
MOST_PROGRAMS = 32  # compiled for other samplers, steps or guidance, that a pipeline keeps: a server is asked for many
ANIMATIONS = (".webp", ".gif", ".png")
ANIMATED_IMAGES, ANIMATED_FRAMES = 25, 50  # at most; every frame is decoded by the codec
MOST_FRAMES = 4_096  # of a clip
MOST_GRID_IMAGES = 1_000  # of a picture with a row for each class


class Options(TypedDict, total=False):
    """How images are drawn; what is left out is as the config of the run or the weights has it.

    Fields:
        prompt: of a network with text: one for all images, several in turn, or `Prompts`.
        negative_prompt: a text that guidance leads away from, for all images or one for each prompt.
        sampler: a registered sampler, such as "ddpm", "ddim" or "heun".
        num_steps: sampling steps.
        sampler_fields: other fields of the sampler, as in {"eta": 0.5}.
        guidance_scale: 1 turns guidance off, 0 ignores the labels.
        guidance_channels: number of channels to guide, from the first.
        guidance_interval: guide only for t between two times, as in (0.2, 0.7); 1 is noise.
        guidance_schedule: "constant", or "power_cosine": from 1 at noise to the scale at data (`Guidance.scale_at`).
        guidance_power: of "power_cosine"; a greater one guides less at noisy times.
        skip_layers: blocks, from 0, without which the network is called once more (`Guidance`), as in (7, 8, 9).
        skip_scale: of skip-layer guidance; 2.8 by default.
        skip_interval: shares of the steps between which blocks are skipped, as in (0.01, 0.2); 0 is noise.
        guidance_image_scale: of the given part of a clip (`Guidance.image_scale`); 1 turns it off.
        autoguidance: a weaker run or weights file, which guides instead of the network without labels.
        forecast_interval: run the network's blocks at every N-th step and forecast them at the others; 1 is off.
        forecast_order: order of the forecast's Taylor series.
        batch_size: images per call of all devices, rounded up to full chunks on each device. It changes no bit.
        chunk_size: images that a device computes at a time, a divisor of 64. It changes the last bits of an image. None chooses
            it by the network's tokens and the kind of device.
        given, given_frames, num_frames, mask, strength, resize: fields of a job that is asked for by its name, see
            `dit_jax.sample.jobs`.
    """

    prompt: str | Sequence[str] | Prompts | None
    negative_prompt: str | Sequence[str] | None
    sampler: str | None
    num_steps: int | None
    sampler_fields: Mapping[str, Any] | None
    guidance_scale: float | None
    guidance_channels: int | None
    guidance_interval: Sequence[float] | None
    guidance_schedule: str | None
    guidance_power: float | None
    skip_layers: Sequence[int] | None
    skip_scale: float | None
    skip_interval: Sequence[float] | None
    guidance_image_scale: float | None
    autoguidance: str | os.PathLike | None
    forecast_interval: int | None
    forecast_order: int | None
    batch_size: int | None
    chunk_size: int | None
    given: Any
    given_frames: Sequence[int] | None
    num_frames: int | None
    mask: Any
    strength: float | None
    resize: bool | None


JOB_FIELDS = ("given", "given_frames", "num_frames", "mask", "strength", "resize")


class Pipeline:
    """A trained network with its codec, which draws images. `load` makes one.

    Fields:
        run: the objects of the config, with the codec's weights.
        path: what the weights were read from.

    Args: see `load`; fsdp is the number of devices over which the parameters of network and codec are split.

    Raises:
        UserError: as `load`, except for errors of the parameters, which are read when they are first used.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        codec: str | os.PathLike | None = None,
        step: int | str | None = None,
        average: str = "default",
        dtype: str | None = None,
        lora: str | os.PathLike | None = None,
        fsdp: int = 1,
        resolution: int | str | Sequence[int] | None = None,
        text_encoders: Sequence[str] = (),
        tokenizers: Sequence[str] = (),
        num_frames: int | None = None,
    ):
        opened = trained.read(path)
        self.path, self.average, self._opened, self._dtype = opened.path, average, opened, dtype
        self._chosen_step = opened.check(step, average)
        config = ml_collections.ConfigDict(opened.config.to_dict())
        if dtype is not None:
            if dtype not in ("float32", "bfloat16"):
                raise UserError(f"dtype={dtype!r}: one of float32, bfloat16 is needed")
            config.model.dtype = dtype
        codec = opened.codec if codec is None else codec
        if codec is not None:
            if "path" not in config.codec:
                raise UserError(f"codec={codec}: codec {config.codec.name!r} has no weights; leave it out")
            config.codec.path, config.codec.sha256 = str(codec), ""
        _give_text_encoders(config, text_encoders, tokenizers)
        config.mesh = {"data": -1, "fsdp": fsdp}  # the devices of this machine, not those of training
        self._trained_shape = Run(config).image_shape
        self._size = None if resolution is None else _size(resolution)
        if self._size is not None and self._size != self._trained_shape[-3:-1]:
            config = resized(config, self._size)
            say(
                f"warning: the network was trained at {size_text(self._trained_shape[-3:-1])} and draws {size_text(self._size)}; "
                "its positions are interpolated, and it may repeat or break objects"
            )
        if num_frames is not None:
            config = with_frames(config, _whole_number("num_frames", num_frames))
        is_run = opened.weights is None
        run = Run(config).with_codec_weights(opened.path if is_run and codec is None else None)
        run = run.for_samples_of_text(opened.stored_null(), str(opened.path))
        run.task  # raises errors of the config
        self._adapted = None if lora is None else trained.with_adapter(run, lora)
        self.run = run if self._adapted is None else self._adapted.run
        self._generators: dict[str, Generator] = {}
        self._weak: dict[Path, tuple[Any, Any, str]] = {}
        self._watcher = Watcher()

    def __repr__(self) -> str:
        at = "" if self._chosen_step is None else f" at step {self._chosen_step}"
        condition = "text" if self.takes_text else f"{self.num_classes} classes"
        return f"<Pipeline of {self.path}{at}: {self.run.network.describe()}, {condition}>"

    @property
    def takes_text(self) -> bool:
        """Whether the network draws from prompts."""
        return getattr(self.run.conditioner, "takes_text", False)

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for a network without labels."""
        return self.run.conditioner.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) or (F, H, W, C) of one image."""
        return self.run.image_shape

    @property
    def step(self) -> int | None:
        """The training step of the weights; None if their file does not say it."""
        return self._parameters[1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels; () if they are not known."""
        return self._class_names

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        """The names of the labels; () if they are not known."""
        names = read_class_names(self.path)
        return names if len(names) == self.num_classes else ()

    @cached_property
    def _mesh(self):
        return drawing_mesh(self.run.mesh)

    @cached_property
    def _constants(self):
        return on_mesh(self.run.frozen, self._mesh)

    @cached_property
    def _parameters(self) -> tuple[Any, int | None, str]:
        """(parameters for inference on the mesh, their step, the fingerprint of the stored ones)."""
        base = self.run if self._adapted is None else self._adapted.base
        params, step = self._opened.params(base, self._chosen_step, self.average)
        self._warn_of_average(step)
        if self._adapted is not None:
            params = self._adapted.merge(params)
        params = on_mesh(params, self._mesh)
        fingerprint = weights_fingerprint(params)
        return cast_for_inference(self.run.task, params), step, fingerprint

    def _warn_of_average(self, step: int | None) -> None:
        """Says that the weights are the moving average of a short run, also if `convert` wrote them to a file."""
        name, remedy = (
            self.average,
            'average="none" (--average=none) samples the weights themselves; lower ema_decay for short runs',
        )
        if self._opened.weights is not None:
            origin, remedy = self._opened.weights.origin, "train longer, or with a lower ema_decay"
            step = origin.get("step") if origin.get("from") == "workdir" else None
            name = str(origin.get("average", name))
        if name == "none":
            return
        average = self.run.task.average if name == "default" else averages.parse(name)
        text = warning_of_average(average, step, remedy) if isinstance(step, int) else None
        if text:
            say(f"warning: {text}")

    def __call__(
        self,
        labels: Labels = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        job: Job | str | None = None,
        callback: Callable[[Evaluation], None] | None = None,
        **options: Unpack[Options],
    ) -> Samples:
        """Draws images and returns them; `write` draws more than fit in memory, and goes on after an interruption.

        Args:
            labels: classes in turn, as in [3, 5]; None or "balanced" for all in turn; "random"; "none" for no label.
            num_samples: None draws one image for each label, or for each class.
            seed: image k depends on (seed, k) and its label.
            job: the name of a job, whose fields are then options, as in job="animate", given="photo.png"; or a job of
                `dit_jax.sample.jobs`, or one of your own; None draws from noise. It is an argument, and not a method for each
                job, so that a call, `write` and the demo page take every job.
            callback: called with an `Evaluation` of some of the images at every evaluation of the network, in order for each
                image. It must not call JAX, which waits for it: keep x0, and decode it after the call. An error that it raises is
                raised here, after the call. Images may differ in their last bits from those without a callback.
            options: see `Options`.

        Raises:
            UserError: an option does not exist, has a value out of range, or does not fit the network.
            NotFinite: an image is not finite.
        """
        drawn = self._prepare(labels, num_samples, seed, options, in_memory=True, watched=callback is not None, job=job)
        arrays = self._parameters[0], self._constants, drawn.requests, len(drawn.labels), drawn.weak_params
        with self._watcher.calling(callback):
            images = drawn.generator(*arrays, given=drawn.inputs.arrays)
        return Samples(images, drawn.labels, drawn.made_by(), drawn.texts)

    def check(
        self, labels: Labels = None, *, num_samples: int | None = None, seed: int = 0, **options: Unpack[Options]
    ) -> tuple[np.ndarray, int | None]:
        """(int32[N] labels of the images of a call, evaluations that its callback is told of for each image).

        It raises what the call would raise before it draws. The evaluations are None for a sampler that chooses its own steps.

        Raises:
            UserError: as for a call.
        """
        drawn = self._prepare(labels, num_samples, seed, options, in_memory=True, watched=True)
        return drawn.labels, drawn.run.sampler.evaluations(drawn.run.process)

    def write(
        self,
        out: str | os.PathLike,
        labels: Labels = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        job: Job | str | None = None,
        class_grid: int | None = None,
        animation: str | os.PathLike | None = None,
        **options: Unpack[Options],
    ) -> dict[str, Any]:
        """Draws images into x.npz, or into a folder of shards, and a grid of the first 100; the same call continues one.

        The images are those of a call with the same arguments. All processes make the same call.

        Args:
            class_grid: images of each class, in place of num_samples: all classes (or `labels`) in order, and a picture with one
                row for each, its name at the side.
            animation: also writes `write_animation` of the first ANIMATED_IMAGES images.

        Returns:
            {"out", "grid", "num_samples", "seconds", "evaluations" of the network per image (None if they vary), "step",
            "stopped": whether a signal ended the work early}, and the settings of the "job" if there is one.

        Raises:
            UserError: as for a call; `out` holds other samples or cannot be written.
        """
        out = local_path(out).absolute()
        drawing.check_out(out)
        if class_grid is not None:
            labels, num_samples = self._labels_of_grid(labels, num_samples, _whole_number("class_grid", class_grid)), None
        _check_given(self._job(job, options), out)
        watched = None if animation is None else self._watched(animation, labels, num_samples, seed, options, job)
        drawn = self._prepare(labels, num_samples, seed, options, job=job)
        run, guidance, count = drawn.run, drawn.guidance, len(drawn.labels)
        at = "" if self.step is None else f" at step {self.step}"
        say(f"sampling from {self.path}{at}: {dict(run.config.sampler)}, guidance {guidance.scale}")
        names = drawn.prompts.texts if drawn.prompts else self._names(drawn.requests)
        done = drawing.draw(
            out,
            drawn.generator,
            self._parameters[0],
            self._constants,
            drawn.requests,
            count,
            drawn.settings(),
            drawn.weak_params,
            names=names,
            caption=drawn.caption(),
            given=drawn.inputs.arrays,
            rows=names[::class_grid] if class_grid else (),
            texts=drawn.texts,
        )
        if watched is not None and animation is not None and not done.stopped and hosts.is_first():
            self._animate(animation, watched)
        # Per image. None for an adaptive sampler, and with guidance at some of the steps, whose steps take more evaluations.
        per_image = None if guidance.is_partial or guidance.skip_layers else drawn.sampler.evaluations(run.process)
        return {
            "out": str(out),
            "grid": str(done.grid),
            **({} if len(drawn.generator.image_shape) == 3 else {"clips": str(done.grid.with_suffix(".webp"))}),
            "num_samples": count,
            "seconds": done.seconds,
            "evaluations": per_image and per_image * (2 if guidance.active else 1),
            "step": self.step,
            "stopped": done.stopped,
            **({"steps_with_blocks": run.forecast.full_steps(drawn.sampler.num_steps)} if run.forecast.active else {}),
            **({"job": dict(drawn.inputs.settings)} if drawn.inputs.settings else {}),
            **({} if animation is None else {"animation": str(local_path(animation).absolute())}),
        }

    def _labels_of_grid(self, labels: Labels, num_samples: int | None, count: int) -> list[int]:
        """`count` labels of each class, for a picture with a row for each."""
        if num_samples is not None:
            raise UserError(f"num_samples={num_samples} has no effect with class_grid={count}; omit it")
        if not self.num_classes or isinstance(labels, str):
            raise UserError(f"class_grid={count} needs classes: a network with labels, and no --labels or numbers, as in 3,5")
        classes = [*range(self.num_classes)] if labels is None else list(labels)
        if not 1 <= count * len(classes) <= MOST_GRID_IMAGES:
            raise UserError(
                f"class_grid={count}: {len(classes)} classes with {count} images each; a picture has 1 to {MOST_GRID_IMAGES}: "
                "give fewer images, or some of the classes with --labels"
            )
        return [label for label in classes for _ in range(count)]

    def write_animation(
        self,
        path: str | os.PathLike,
        labels: Labels = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        job: Job | str | None = None,
        **options: Unpack[Options],
    ) -> Path:
        """Writes how images come out of noise: the network's predicted images at its evaluations, as a grid that moves.

        It has the first ANIMATED_IMAGES images of a call with the same arguments, and at most ANIMATED_FRAMES evaluations, evenly
        chosen; the last frame is the images themselves.

        Args:
            path: .webp (lossless), .gif or .png (animated).

        Raises:
            UserError: as for a call; another suffix; the file cannot be written.
        """
        return self._animate(path, self._watched(path, labels, num_samples, seed, options, job))

    def _watched(self, path, labels, num_samples, seed, options, job) -> "_Drawing":
        """The drawing for an animation, checked before anything is drawn."""
        if local_path(path).suffix.lower() not in ANIMATIONS:
            raise UserError(f"animation={path}: the name must end in one of {', '.join(ANIMATIONS)}")
        drawn = self._prepare(labels, num_samples, seed, options, in_memory=True, watched=True, job=job)
        if np.prod(drawn.generator.image_shape) != np.prod(self.image_shape):
            raise UserError(
                f"animation={path}: job {drawn.inputs.settings['name']} makes longer clips than the network; leave it out"
            )
        return drawn

    def _animate(self, path: str | os.PathLike, drawn: "_Drawing") -> Path:
        path, count, seen = local_path(path), min(len(drawn.labels), ANIMATED_IMAGES), {}

        def watch(evaluation: Evaluation) -> None:
            latents = seen.setdefault(evaluation.number, np.zeros((count, *self.run.latent_shape), np.float32))
            latents[evaluation.images] = evaluation.x0

        requests = {name: x[:count] for name, x in drawn.requests.items()}
        arrays = self._parameters[0], self._constants, requests, count, drawn.weak_params
        with self._watcher.calling(watch):
            images = drawn.generator(*arrays, given=drawn.inputs.arrays)
        numbers = sorted(seen)
        chosen = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), ANIMATED_FRAMES)).round().astype(int))
        frames = [image_grid(self.decode(seen[numbers[i]]).reshape(images.shape)) for i in chosen]
        try:
            write_animation(path, [*frames, image_grid(images)])
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
        return path

    def _names(self, requests: Requests) -> list[str]:
        """The name of each image's class, for pictures; of both classes where two are mixed."""
        if not self.num_classes:
            return []
        names = label_names(requests["label"], self.num_classes, self._class_names)
        if "second_label" not in requests:
            return names
        others = label_names(requests["second_label"], self.num_classes, self._class_names)
        shares = requests["second_share"]
        return [f"{share:.0%} {other}, {name}" for name, other, share in zip(names, others, shares, strict=True)]

    def interpolate(
        self,
        seeds: tuple[int, int],
        num_samples: int = 8,
        label: int | Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Samples:
        """Draws images between the first image of one seed and the first image of another: a call with the job `Interpolate`.

        Args:
            label: a class; two classes, between which the embedding moves; None for no label.

        Raises:
            UserError: as for a call; fewer than two images; a network that cannot mix labels.
        """
        labels = "none" if label is None else [label] if isinstance(label, (int, np.integer)) else list(label)
        return self(labels, num_samples=num_samples, job=Interpolate(seeds), **options)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """f32[N, h, w, c]: latents of uint8 images [N, H, W, C], of which the codec's posterior is sampled with a fixed seed."""
        count = len(images)
        rows = np.arange(-(-count // DECODER_CHUNK) * DECODER_CHUNK).reshape(-1, DECODER_CHUNK)
        encoded = [hosts.to_host(self._encode(self._constants, images[np.minimum(chunk, count - 1)], chunk)) for chunk in rows]
        return np.concatenate(encoded)[:count]

    @cached_property
    def _encode(self):
        task = self.run.task

        def encode(constants, images, indices):
            moments = task.codec.encode(constants["codec"], to_float(images))
            one = jax.vmap(lambda key, moments: task.codec.sample_latent(key, moments[None])[0])
            return one(image_keys(ENCODER_SEED, indices), moments)

        return jax.jit(encode)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """uint8 images [N, H, W, C] of latents f32[N, h, w, c], such as the x0 of an `Evaluation`.

        Raises:
            NotFinite: an image is not finite.
        """
        count = len(latents)
        rows = np.minimum(np.arange(-(-count // DECODER_CHUNK) * DECODER_CHUNK), count - 1).reshape(-1, DECODER_CHUNK)
        drawn = [self._decode(self._constants, np.asarray(latents[chunk])) for chunk in rows]
        images, finite = (np.concatenate([np.asarray(x) for x in part])[:count] for part in zip(*drawn, strict=True))
        check_images(finite, np.arange(count), {})
        return images

    @cached_property
    def _decode(self):
        return jax.jit(self.run.task.decode_and_check)

    def export(self, path: str | os.PathLike, **options: Unpack[Options]) -> Path:
        """Writes the sampler as StableHLO, with its weights, to a folder that a process with only jax and numpy can run.

        The folder holds sampler.stablehlo (a serialized `jax.export.Exported`), weights.npz and made_by.json. It runs on the kind
        of device that it was exported on. This draws image k of a seed for k = 0 to rows - 1, all of class 3:

            import json, jax, numpy as np
            from jax import export

            with open("exported/made_by.json") as file:
                rows = json.load(file)["rows"]  # images of a call
            with open("exported/sampler.stablehlo", "rb") as file:
                draw = jax.jit(export.deserialize(bytearray(file.read())).call)
            weights = dict(np.load("exported/weights.npz"))
            seed, indices, labels = np.uint32(0), np.arange(rows, dtype=np.int32), np.full(rows, 3, np.int32)
            images = np.asarray(draw(weights, seed, indices, {"label": labels}))  # uint8 [rows, H, W, C]

        Other indices give other images; a network without labels takes {}. On the same kind of machine, with the same jax, the
        images have the same bits as those of this pipeline.

        Args:
            path: a folder; one that exists is replaced if it holds nothing but an export.
            options: see `Options`.

        Raises:
            UserError: as for a call; the weights are split over devices; the folder holds something else; cannot be written.
        """
        asked: Options = {"prompt": "", **options} if self.takes_text else options
        drawn = self._prepare(None, None, 0, asked, in_memory=True)
        constants = {name: self._constants[name] for name in ("codec", CONDITIONER) if name in self._constants}
        trees = {"params": self._parameters[0], "weak_params": drawn.weak_params, **constants}
        made_by = {k: v for k, v in drawn.settings().items() if k not in ("seed", "labels")}
        facts = {"num_classes": self.num_classes, "made_by": made_by}
        return export.write(path, drawn.generator, trees, drawn.requests, facts)

    def _prepare(
        self,
        labels: Labels,
        num_samples: int | None,
        seed: int,
        options: Options,
        in_memory: bool = False,
        watched: bool = False,
        job: Job | str | None = None,
    ) -> "_Drawing":
        """Checks everything that a drawing depends on; reads no parameters of the network itself."""
        job = self._job(job, options).settled(self.image_shape, self.run.latent_shape)
        seed = job.seed(_whole_number("seed", seed))
        num_samples = None if num_samples is None else _whole_number("num_samples", num_samples)
        config = self._configured(options)
        run = self.run.with_config(config)
        prompts = self._prompts(labels, num_samples, options)
        if prompts is not None and num_samples is None and len(prompts.texts) > 1:
            num_samples = len(prompts.texts)
        asked, mode = job.requests("none" if prompts else labels, num_samples, self.num_classes, seed)
        chosen = asked["label"]
        if prompts is not None:
            prompts = prompts.repeated(len(chosen))
        requests = run.task.requests(prompts.requests() if prompts else asked if self.num_classes else {})
        sampler = job.sampler(run.sampler, run.process)
        forecast = run.checked_forecast(sampler)
        guides = options.get("autoguidance")
        guidance = run.guidance if guides is None else run.guidance_by_second_network
        if prompts is not None and any(prompts.negatives) and (guidance.scale == 1 or guides is not None):
            why = "guidance is off (guidance_scale is 1)" if guides is None else "another network guides (autoguidance)"
            raise UserError(f"negative_prompt={prompts.negatives[0]!r} has no effect where {why}; omit it")
        if guidance.scale == 0:
            say(f"guidance_scale is 0: {'the labels count for nothing' if guides is None else 'only the weaker network counts'}")
        batch_size = options.get("batch_size")
        if batch_size is None:
            batch_size = 1 if in_memory else min(config.evaluation.batch_size, len(chosen))  # 1 is rounded up to full chunks
        sections = [dict(config.get(name, {})) for name in ("sampler", "guidance", "forecast")]
        chunk_size = options.get("chunk_size")
        if chunk_size is not None and (_whole_number("chunk_size", chunk_size) < 1 or shards.SHARD_IMAGES % chunk_size):
            raise UserError(f"chunk_size={chunk_size} must divide {shards.SHARD_IMAGES}, the images of a shard")
        batch_size = _whole_number("batch_size", batch_size)
        key = json.dumps([sections, batch_size, chunk_size, str(guides), watched, job.name, job.numbers], default=str)
        generator = self._generators.get(key)
        if generator is None:
            weak_task = None if guides is None else self._weaker(guides, config)[0]
            generator = Generator(
                self.run.task,
                self._mesh,
                sampler,
                guidance,
                batch_size,
                seed,
                weak_task,
                chunk_size,
                forecast=forecast,
                watch=self._watcher if watched else None,
                job=job,
            )
            for oldest in list(self._generators)[: 1 - MOST_PROGRAMS]:
                self._generators.pop(oldest, None)
            self._generators[key] = generator
        generator = generator.with_seed(seed)
        scene = Scene(
            self.image_shape,
            self.run.latent_shape,
            self.run.network,
            self.encode,
            lambda seed: generator.with_seed(seed).noise(np.zeros(1, np.int32)),
            self.run.task.low_resolution,
        )
        inputs = job.inputs(scene, requests, len(chosen))
        if prompts and (keys := prompts.keys(seed)):
            if hasattr(job, "seeds"):
                raise UserError("the prompts have seeds of their own, and the job has seeds too; leave those of the prompts out")
            inputs = Inputs({**inputs.arrays, **keys}, {**inputs.settings, "seeds_sha256": sha256(keys["seed"])})
        return _Drawing(self, run, sampler, generator, guidance, chosen, mode, requests, inputs, guides, prompts)

    def _job(self, job: Job | str | None, options: Options) -> Job:
        """The job of a call; the options that are its fields are those of a job that is asked for by its name."""
        fields = {name: value for name, value in options.items() if name in JOB_FIELDS and value is not None}
        if isinstance(job, str) or (job is None and fields):
            job = made(job or Job.name, fields)
        elif fields:
            raise UserError(f"{next(iter(fields))} is a field of a job, and job={job!r} is one already; give it there")
        job = Job() if job is None else job
        if not isinstance(job, Job):
            raise UserError(f"job={job!r}: give a name, such as 'edit', or Edit(given=..., strength=0.6) of dit_jax.sample.jobs")
        return job

    def _prompts(self, labels: Labels, num_samples: int | None, options: Options) -> Prompts | None:
        """The prompts of a call; None of a network without text.

        Raises:
            UserError: there is none; labels for a network with text; prompts for another.
        """
        prompt, negative = options.get("prompt"), options.get("negative_prompt")
        if not self.takes_text:
            for name, value in (("prompt", prompt), ("negative_prompt", negative)):
                if value is not None:
                    asks = "labels" if self.num_classes else "no condition"
                    raise UserError(f"{name}={value!r}: the network takes {asks} and no text; leave {name} out")
            return None
        if labels is not None:
            raise UserError(f"labels={labels!r}: the network takes text; give prompt=, as in prompt='a three', and no labels")
        if prompt is None:
            raise UserError("the network draws from text; give prompt=, as in prompt='a three'; prompt='' draws without one")
        return prompts_of(prompt, negative)

    def _configured(self, options: Options) -> ml_collections.ConfigDict:
        """The config with the options in place of its sections `sampler`, `guidance` and `forecast`."""
        for name in options:
            if name not in Options.__annotations__:
                near = difflib.get_close_matches(name, Options.__annotations__, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"there is no option {name!r}; {hint}The options are {', '.join(Options.__annotations__)}")
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        config = ml_collections.ConfigDict(self.run.config.to_dict())
        if given.get("sampler", config.sampler.name) != config.sampler.name:
            config.sampler = ml_collections.ConfigDict(recipes.default_sampler(given["sampler"]))
        if "num_steps" in given:
            if "num_steps" not in config.sampler:
                raise UserError(
                    f"num_steps={given['num_steps']}: sampler {config.sampler.name!r} chooses its own steps; leave num_steps out"
                )
            config.sampler.num_steps = _whole_number("num_steps", given["num_steps"])
        for key, value in dict(given.get("sampler_fields", {})).items():
            fields = registry.parameters("sampler", config.sampler.name)
            if key not in fields:
                raise UserError(f"sampler_fields {key}: sampler {config.sampler.name!r} has the fields {', '.join(fields)}")
            wanted = FieldType.of_annotation(fields[key].annotation)
            try:
                config.sampler[key] = wanted.parse(str(value))
            except ValueError:
                raise UserError(f"sampler_fields {key}={value}: {key} must be {wanted.describe()}") from None
        for key in ("interval", "order"):
            if f"forecast_{key}" in given:
                number = _whole_number(f"forecast_{key}", given[f"forecast_{key}"])
                config.forecast = {**config.get("forecast", {}), key: number}
        if "guidance_scale" in given:
            config.guidance.scale = _number("guidance_scale", given["guidance_scale"])
        if "guidance_channels" in given:
            config.guidance.channels = _whole_number("guidance_channels", given["guidance_channels"])
        if "guidance_interval" in given:
            times = _two_numbers("guidance_interval", given["guidance_interval"], "two times, as in 0.2,0.7")
            config.guidance.low, config.guidance.high = times
        if "guidance_schedule" in given:
            config.guidance.schedule = given["guidance_schedule"]
        if "guidance_power" in given:
            config.guidance.power = _number("guidance_power", given["guidance_power"])
            if config.guidance.schedule != "power_cosine":
                raise UserError(
                    f"guidance_power={given['guidance_power']} has no effect where guidance_schedule is not power_cosine"
                )
        if "skip_layers" in given:
            config.guidance.skip_layers = tuple(_whole_number("skip_layers", layer) for layer in given["skip_layers"])
        if "skip_scale" in given:
            config.guidance.skip_scale = _number("skip_scale", given["skip_scale"])
        if "skip_interval" in given:
            shares = _two_numbers("skip_interval", given["skip_interval"], "two shares of the steps, as in 0.01,0.2")
            config.guidance.skip_low, config.guidance.skip_high = shares
        for name in ("skip_scale", "skip_interval"):
            if name in given and not config.guidance.get("skip_layers"):
                raise UserError(f"{name}={given[name]} has no effect without skip_layers; omit it")
        if "guidance_image_scale" in given:
            config.guidance.image_scale = _number("guidance_image_scale", given["guidance_image_scale"])
        off = {f"guidance_{name}": config.guidance.scale == 1 for name in ("channels", "interval", "schedule", "power")}
        off["forecast_order"] = config.get("forecast", {}).get("interval", 1) == 1
        for name, is_off in off.items():
            if is_off and name in given:
                switch = "guidance is off (guidance_scale is 1)" if name.startswith("guidance") else "forecast_interval is 1"
                raise UserError(f"{name}={given[name]} has no effect where {switch}; omit it")
        return config.lock()

    def _weaker(self, path: str | os.PathLike, config: ml_collections.ConfigDict) -> tuple[Any, Any, str]:
        """(task, parameters for inference, fingerprint) of the network that guides in place of the one without labels.

        Raises:
            UserError: guidance is off, or the network's process, codec, image size or classes differ from this one's.
        """
        if config.guidance.scale == 1.0:
            raise UserError("autoguidance needs guidance_scale above 1; at 1 guidance is off")
        path = local_path(path).absolute()
        if path not in self._weak:
            opened = trained.read(path)
            weaker = ml_collections.ConfigDict(opened.config.to_dict())
            if self._dtype is not None:
                weaker.model.dtype = self._dtype
            if self.image_shape != self._trained_shape == Run(weaker).image_shape:
                weaker = resized(weaker, self.image_shape[-3:-1])
            trained.check_guides(self.run, Run(weaker), path)
            weaker.codec, weaker.mesh = self.run.config.codec, self.run.config.mesh
            run = Run(weaker)
            params = on_mesh(opened.params(run)[0], self._mesh)
            self._weak[path] = run.task, cast_for_inference(run.task, params), weights_fingerprint(params)
        return self._weak[path]


class _Drawing(NamedTuple):
    """A checked request for images."""

    pipe: Pipeline
    run: Run
    sampler: Any
    generator: Generator
    guidance: Any
    labels: np.ndarray
    labels_mode: str
    requests: Requests
    inputs: Inputs
    guides: str | os.PathLike | None
    prompts: Prompts | None

    @property
    def texts(self) -> Mapping[str, Sequence[str]]:
        """The texts that are stored with the images."""
        return {} if self.prompts is None else self.prompts.stored()

    @property
    def weak_params(self) -> Any:
        return None if self.guides is None else self.pipe._weaker(self.guides, self.run.config)[1]

    def caption(self) -> str:
        """The line above a picture of the images."""
        job = self.inputs.settings
        facts = [job["name"] + (f" with strength {job['strength']:g}" if "strength" in job else "")] if job else []
        sampling = sampling_caption(self.pipe.step, self.guidance.scale, self.run.config.sampler, self.generator.seed)
        return ", ".join([sampling, *facts])

    def settings(self) -> dict[str, Any]:
        """What the images depend on, besides the labels and the machine."""
        pipe, (_, step, fingerprint) = self.pipe, self.pipe._parameters
        settings = samples_file.describe(self.run.config, fingerprint, step, self.generator.seed, pipe._class_names)
        if self.prompts is None:
            settings["labels"] = self.labels_mode
        if self.run.fps is not None:
            settings["fps"] = self.run.fps
        if self.inputs.settings:
            settings["job"] = dict(self.inputs.settings)
        if pipe.average != "default":
            settings["average"] = pipe.average
        if pipe._opened.weights is not None:
            settings["origin"] = pipe._opened.weights.origin
        if self.guides is not None:
            weights = pipe._weaker(self.guides, self.run.config)[2]
            settings |= {"autoguidance": str(self.guides), "autoguidance_weights": weights}
        return settings

    def made_by(self) -> dict[str, Any]:
        """`settings` and all others, as they stand in the npz of samples."""
        shape, made_with = self.generator.image_shape, drawing.made_with(self.generator)
        settings = shards.settings_of(self.labels, shape, self.settings(), made_with, self.requests, self.texts)
        return json.loads(json.dumps(shards.Shards(Path(), settings, self.labels).made_by))


def resized(config: ml_collections.ConfigDict, size: tuple[int, ...]) -> ml_collections.ConfigDict:
    """The config of the same network for images of another size (height, width), with interpolated positions if it has some.

    Raises:
        UserError: the network takes only the size of its training, or the size does not fit codec and network.
    """
    run = Run(config)
    own, factor = size_unit(run.network), run.codec.downsample
    if own is None:
        raise UserError(f"network {config.model.name!r} draws only the size that it was trained on; leave resolution out")
    unit = own * factor
    if size[0] % unit or size[1] % unit:
        near = size_text((-(-size[0] // unit) * unit, -(-size[1] // unit) * unit))
        raise UserError(
            f"resolution {size_text(size)}: both sides must be multiples of {unit} (codec {factor} x network {own}), as in {near}"
        )
    new = ml_collections.ConfigDict(config.to_dict())
    if scales_positions(run.network):
        new.model.position_grid = position_grid(run.network, run.latent_shape)
    _keep_frequencies(new, run)
    new.transform.size = size
    return new


def _give_text_encoders(config: ml_collections.ConfigDict, weights: Sequence[str], tokenizers: Sequence[str]) -> None:
    """Sets the paths of text encoders and of tokenizers in place of those of the config, for the encoders that are named.

    Frozen encoders that then have no weights are missing, which is said.

    Raises:
        UserError: the network takes no text; the form is not <encoder>=<path>; weights do not exist.
    """
    for option, field, given in (("text_encoders", "weights", weights), ("tokenizers", "tokenizers", tokenizers)):
        if not given:
            continue
        if config.get("conditioner", {}).get("name") != "text":
            raise UserError(f"{option}={','.join(given)}: the network takes no text; leave {option} out")
        section = config.conditioner
        names = {entry.partition("=")[0] for entry in given}
        section[field] = (*(entry for entry in section.get(field, ()) if entry.partition("=")[0] not in names), *given)
        if option == "text_encoders":
            text = Run(config).text  # raises for another form
            for path in text.by_encoder(field).values() if text else ():
                text_weights.find(path)
    if weights and (text := Run(config).text) is not None:
        section, found = config.conditioner, text.by_encoder("weights")
        if lacking := [name for name in text.frozen if name not in found]:
            say(f"text_encoders names no weights of {', '.join(lacking)}, which contributes zeros")
            section.missing = (*section.get("missing", ()), *lacking)


def with_frames(config: ml_collections.ConfigDict, frames: int) -> ml_collections.ConfigDict:
    """The config of the same network for clips of another length.

    Raises:
        UserError: the network draws images, or the length does not fit codec and network.
    """
    run = Run(config)
    if len(run.image_shape) != 4:
        raise UserError(f"num_frames={frames}: the network draws images; leave num_frames out")
    if not 1 <= frames <= MOST_FRAMES:
        raise UserError(f"num_frames is {frames}; it must lie in 1 to {MOST_FRAMES}")
    trained = run.image_shape[0]
    new = ml_collections.ConfigDict(config.to_dict())
    _keep_frequencies(new, run)
    new.transform.frames = frames
    if frames > trained:
        say(
            f"warning: the network was trained on clips of {trained} frames and draws {frames} at once; --job=extend draws "
            "longer ones in windows"
        )
    return new


def _check_given(job: Job, out: Path) -> None:
    """Raises a UserError if what is given would be overwritten by a picture of the results, which has the name of `out`."""
    for name in ("given", "mask"):
        path = getattr(job, name, None)
        if isinstance(path, (str, os.PathLike)) and out.suffix == ".npz":
            path = local_path(path).absolute()
            if path.parent == out.parent and path.stem == out.stem:
                raise UserError(f"{name}={path} would be overwritten by the pictures of {out.name}; give another name for out")


def _keep_frequencies(config: ml_collections.ConfigDict, run: Run) -> None:
    """Fixes the frequencies of rotary positions to those of training, which may be chosen by the size of its inputs."""
    if (grid := getattr(run.network, "rope_grid", None)) is not None:
        config.model.rope_grid = grid


def _size(resolution: int | str | Sequence[int]) -> tuple[int, int]:
    """(height, width) of 256, "256x384" or (256, 384)."""
    if isinstance(resolution, (int, str)):
        return parse_size(str(resolution), "resolution")
    height, width = (_whole_number("resolution", side) for side in resolution)
    return height, width


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UserError(f"{name}={value!r} must be a whole number")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise UserError(f"{name}={value!r} must be a number")
    return float(value)


def _two_numbers(name: str, values: Any, form: str) -> list[float]:
    numbers = [_number(name, value) for value in values]
    if len(numbers) != 2:
        raise UserError(f"{name}={values}: give {form}")
    return numbers


def load(
    path: str | os.PathLike,
    *,
    codec: str | os.PathLike | None = None,
    step: int | str | None = None,
    average: str = "default",
    dtype: str | None = None,
    lora: str | os.PathLike | None = None,
    fsdp: int = 1,
    resolution: int | str | Sequence[int] | None = None,
    text_encoders: Sequence[str] = (),
    tokenizers: Sequence[str] = (),
    num_frames: int | None = None,
) -> Pipeline:
    """Loads a trained network, for `pipe(labels=[3, 5])`.

    Args:
        path: the folder of a run; a .safetensors file of `convert`; a .pt file of DiT or SiT; a folder that diffusers wrote.
        codec: weights of the VAE, in place of the run's own: a diffusers folder, a safetensors file, or an autoencoder's run.
        step: of a run's checkpoint; "best" for the best score during training; None for the newest that is intact.
        average: "default" for the moving average of the weights, "none" for the weights themselves.
        dtype: of the network's computation, "float32" or "bfloat16"; None as in training. With bfloat16 the weights take half the
            memory; norms, the network's output and the sampler stay float32, and the codec keeps its own dtype.
        lora: the folder of an adapter in PEFT's layout, which is added to the weights.
        fsdp: number of devices over which the parameters are split.
        resolution: another size of the images than that of training, 384, "256x384" (height first) or (256, 384): the network's
            positions are interpolated, and a warning says that it was not trained so. None, or the trained size, changes nothing.
        text_encoders: weights of pretrained text encoders in place of those of the config, as ("clip_l=/path", "t5_xxl=/path").
            Without them, weights of a network with frozen encoders draw the empty prompt alone.
        tokenizers: folders of their tokenizers, in the same form; without, those beside the weights.
        num_frames: another length of the clips than that of training.

    Raises:
        UserError: there is no such network or checkpoint, it is damaged, or the codec is missing or does not fit.
    """
    pipe = Pipeline(
        path,
        codec=codec,
        step=step,
        average=average,
        dtype=dtype,
        lora=lora,
        fsdp=fsdp,
        resolution=resolution,
        num_frames=num_frames,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
    )
    pipe._parameters  # read now, not at the first call
    return pipe
