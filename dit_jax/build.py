"""Builds objects from a config.

A new process, codec, data source or optimizer of the package is a file and one `register` line here. User code calls
`dit_jax.register`. Samplers are registered in `diffusion.samplers`, networks in `models.registered`.
"""

import copy
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

import dit_jax.diffusion.samplers
import dit_jax.models.registered  # noqa: F401 - registers the networks
from dit_jax import registry
from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.discriminator import PatchDiscriminator
from dit_jax.codecs.kl_vae import KLVAE, KLAutoencoder
from dit_jax.codecs.pixels import Pixels
from dit_jax.codecs.vq_vae import VQVAE
from dit_jax.data.buckets import Bucket, Buckets
from dit_jax.data.captions import CaptionedImage, CaptionEntries, Captions
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.latent_loader import LatentBuckets, LatentLoader, resident_moments
from dit_jax.data.latents import LatentCache, LatentCaches
from dit_jax.data.loader import Loader, Part
from dit_jax.data.sources import TFDS, ClipFolder, DigitPairs, Digits, ImageFolder, RollingDigits, TarShards
from dit_jax.data.transforms import ImageTransform
from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.forecast import Forecast
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.guidance import Guidance
from dit_jax.diffusion.process import Memoryless, Prediction, Process
from dit_jax.encoders.conditioner import Conditioner
from dit_jax.encoders.labels import Labels
from dit_jax.encoders.text import Text
from dit_jax.encoders.unconditional import Unconditional
from dit_jax.errors import UserError, failures, raise_all, suggest
from dit_jax.interop import codec_folder, lpips, text_encoders, vae
from dit_jax.models.network import Network, for_input, for_platform
from dit_jax.parallel.mesh import batch_sharding, make_mesh, place, reader_place, replicated, rows_per_step
from dit_jax.parallel.rules import shardings
from dit_jax.registry import register
from dit_jax.runtime import user_code
from dit_jax.runtime.console import say
from dit_jax.storage.paths import local_path
from dit_jax.tasks.adaptation import Adaptation, Lora
from dit_jax.tasks.autoencoder import AutoencoderTask
from dit_jax.tasks.averages import parse_all
from dit_jax.tasks.diffusion import DiffusionTask
from dit_jax.tasks.low_resolution import LowResolution
from dit_jax.tasks.muon import muon
from dit_jax.tasks.optimizer import adafactor, adamw
from dit_jax.tasks.state import TrainState, abstract_state

register("task", "diffusion", DiffusionTask)
register("task", "autoencoder", AutoencoderTask)
register("process", "gaussian", Gaussian)
register("process", "flow", Flow)
register("process", "edm", EDM)
register("codec", "pixels", Pixels)
register("codec", "kl_vae", KLVAE)
register("codec", "vq_vae", VQVAE)
register("codec", "causal_vae", CausalVAE)
register("data", "digits", Digits)
register("data", "digit_pairs", DigitPairs)
register("data", "rolling_digits", RollingDigits)
register("data", "folder", ImageFolder)
register("data", "clips", ClipFolder)
register("data", "tfds", TFDS)
register("data", "tars", TarShards)
register("data", "latents", LatentCache)
register("transform", "image", ImageTransform)
register("transform", "clip", ClipTransform)
register("optimizer", "adamw", adamw)
register("optimizer", "adafactor", adafactor)
register("optimizer", "muon", muon)
register("conditioner", "labels", Labels)
register("conditioner", "none", Unconditional)
register("conditioner", "text", Text)
register("guidance", "classifier_free", Guidance)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def construct(section: str, fields: Mapping, **more: Any) -> Any:
    """Calls the registered constructor of a section with the section's fields and `more`.

    Raises:
        UserError: an unknown name, an unknown or missing field, or an error of the constructor.
    """
    fields = dict(fields)
    name = fields.pop("name")
    constructor = registry.get(section, name)
    for key in ("dtype", "param_dtype"):
        if key in fields:
            if fields[key] not in DTYPES:
                raise UserError(f"{section}.{key} is {fields[key]!r}; it must be one of {', '.join(DTYPES)}")
            fields[key] = DTYPES[fields[key]]
    fields |= more
    parameters = inspect.signature(constructor).parameters
    unknown = [key for key in fields if key not in parameters]
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in fields]
    if unknown or missing:
        raise UserError(
            f"{section} {name!r} has no field {', '.join(unknown)}{suggest(unknown[0], [*registry.parameters(section, name)])}"
            if unknown
            else f"{section} {name!r} needs the field {', '.join(missing)}"
        )
    file = registry.origin(section, name)
    return constructor(**fields) if file is None else user_code.run(lambda: constructor(**fields), file)


CODEC_FILES = ("path", "sha256")  # fields of the section `codec` that are not fields of a codec
RESTRUCTURED = ("adamw", "adafactor", "muon")  # optimizers whose state `tasks.state.with_structure` carries over
MESH_FLAGS = ("zero1", "offload")  # fields of the section `mesh` that are not axes
TASK_FILES = ("perceptual_path",)
TRAINING_ONLY = (
    "min_snr_gamma",
    "time_distribution",
    "logit_mean",
    "logit_std",
    "log_sigma_mean",
    "log_sigma_std",
    "image_side",
    "low_side",
    "high_side",
    "loss_weight",
)  # fields of a process that do not change samples
SAMPLING_ONLY = ("sampling_grid",)  # fields of a process that change neither training nor what the network predicts


class Run:
    """The objects of one config, each built on first use and then cached.

    A `Run` reads weights and data only when `source`, `loader` or `constants` are used, so plans and checks are cheap.
    `with_codec_weights` returns the run for training or sampling.

    Args:
        config: a resolved config, as `recipes` makes it.
        devices: devices of the mesh; None means all.
        codec_params: weights of the frozen codec as NumPy arrays.
        platform: "cpu", "gpu" or "tpu": resolves the network's platform-dependent choices for this platform instead of the
            default backend.

    Raises:
        UserError: the part of the config that is used is invalid.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        devices: Sequence[Any] | None = None,
        codec_params: Any = None,
        platform: str | None = None,
    ):
        self.config, self.devices, self._codec_params, self.platform = config, devices, codec_params, platform
        self._base: Any = None
        self._shape_of_choices: tuple[int, ...] | None = None  # see `network.for_input`

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of the config."""
        axes = {axis: size for axis, size in self.config.mesh.items() if axis not in MESH_FLAGS}
        return make_mesh(**axes, devices=self.devices)

    @cached_property
    def transform(self) -> Any:
        return construct("transform", self.config.transform)

    @cached_property
    def buckets(self) -> Buckets:
        """The shapes of training batches: the section `buckets`; none if all have the shape of the transform."""
        return Buckets(**self.config.get("buckets", {}))

    @cached_property
    def parts(self) -> tuple["Run", ...]:
        """For each bucket the run of its shape and batch size; (this run,) without buckets.

        Samples have the shape of `transform`, which is one of the buckets.

        Raises:
            UserError: a bucket does not fit the transform, the codec, the network or the mesh; or the transform or batch_size is
                none of the buckets'.
        """
        if not len(self.buckets):
            return (self,)
        self.task  # makes what all buckets share
        parts = tuple(self._in_bucket(bucket) for bucket in self.buckets.all)
        own = [bucket for bucket, part in zip(self.buckets.all, parts, strict=True) if part.image_shape == self.image_shape]
        shown = ", ".join(map(str, self.buckets.all))
        if not own:
            raise UserError(
                f"transform makes {'x'.join(map(str, self.image_shape[:-1]))}, which is none of buckets.classes ({shown}); set "
                "the transform to the bucket whose size samples shall have"
            )
        if own[0].batch_size != self.config.batch_size:
            raise UserError(
                f"batch_size is {self.config.batch_size}, and the bucket of the transform's size, {own[0]}, has batches of "
                f"{own[0].batch_size}; set batch_size to {own[0].batch_size}"
            )
        return parts

    def _in_bucket(self, bucket: Bucket) -> "Run":
        """The run of a bucket, with the parts of this one that do not depend on shapes."""
        fields = registry.parameters("transform", self.config.transform.name)
        sizes: dict[str, Any] = {"size": (bucket.height, bucket.width), "frames": bucket.frames}
        if bucket.frames == 1 and "frames" not in fields:
            del sizes["frames"]
        for name in sizes:
            if name not in fields:
                raise UserError(
                    f"the bucket {bucket} needs a transform with the field {name}, and {self.config.transform.name!r} has none; "
                    + ("set transform.name to clip" if name == "frames" else "leave buckets.classes empty")
                )
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.batch_size = bucket.batch_size
        config.transform = {**config.transform, **sizes}
        del config.buckets
        run = self.with_config(config)
        run._base, run._shape_of_choices = self._base, self.latent_shape  # one network for all buckets
        shared = ("mesh", "codec", "process", "conditioner", "optimizer", "adaptation", "captions")
        run.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        try:
            run.check_batch()
            run.task  # checks the network
        except UserError as error:
            raise UserError(f"bucket {bucket}: {error}") from error
        return run

    @cached_property
    def codec(self) -> Any:
        """The codec. Fields that are None take the constructor's default until `with_codec_weights` reads them."""
        return construct("codec", {k: v for k, v in self.config.codec.items() if v is not None and k not in CODEC_FILES})

    @cached_property
    def process(self) -> Process:
        return construct("process", self.config.process)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) or (F, H, W, C) of one example.

        Raises:
            UserError: the images and the codec have different numbers of channels.
        """
        shape, channels = self.transform.shape, getattr(self.codec, "image_channels", self.transform.shape[-1])
        if shape[-1] != channels:
            raise UserError(f"transform.channels = {shape[-1]} and the codec's image_channels = {channels} must be equal")
        return shape

    @property
    def fps(self) -> float | None:
        """Frames per second of clips, where all have one rate: the field `fps` of the transform, or of the data set."""
        rates = [self.config[name].get("fps") for name in ("transform", "data") if name in self.config]
        return next((float(rate) for rate in rates if rate), None) if len(self.image_shape) == 4 else None

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, c) or (f, h, w, c) of the latents.

        Raises:
            UserError: the image size does not fit the codec.
        """
        return self.codec.latent_shape(self.image_shape)

    @cached_property
    def network(self) -> Network:
        channels = self.process.output_channels(self.latent_shape[-1])
        network = construct("model", self.config.model, out_channels=channels)
        network.check(self.latent_shape)
        network = for_input(network, self._shape_of_choices or self.latent_shape)
        if hasattr(network, "check_times"):
            ends = np.asarray(self.process.network_time(np.asarray([max(self.process.min_time, 1e-5), 1.0], np.float32)))
            network.check_times(float(ends.min()), float(ends.max()))
        return network if self.platform is None else for_platform(network, self.platform)

    @cached_property
    def conditioner(self) -> Conditioner:
        """The conditioner; one for labels has as many classes as the network."""
        section = self.config.conditioner
        takes_classes = "num_classes" in inspect.signature(registry.get("conditioner", section.name)).parameters
        classes = {"num_classes": self.config.model.get("num_classes", 0)} if takes_classes else {}
        return construct("conditioner", section, **classes)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer; one that treats matrices apart is given those of the network."""
        section = self.config.optimizer
        if "matrices" not in inspect.signature(registry.get("optimizer", section.name)).parameters:
            return construct("optimizer", section)
        matrices = getattr(self.network, "matrices", {}) if "model" in self.config else {}
        if not matrices:
            raise UserError(
                f"optimizer {section.name!r} needs a network that says which of its parameters are matrices, and this one has no "
                "`matrices` (models.network.Network); choose adamw"
            )
        return construct("optimizer", section, matrices=matrices)

    @cached_property
    def adaptation(self) -> Adaptation:
        """Which parameters are trained: all, without the section `init`.

        Raises:
            UserError: some are frozen, and there are no weights to start from.
        """
        section = self.config.get("init", {})
        fields = dict(section.get("lora", {}))
        if fields.get("rank") and not fields.get("targets"):
            fields.pop("targets", None)
        if not section.get("weights"):
            for name, default in (("step", None), ("average", "default"), ("class_names", "")):
                if section.get(name, default) != default:
                    raise UserError(f"init.{name} is {section[name]} and init.weights is empty; leave init.{name} out")
        adaptation = Adaptation(tuple(section.get("freeze", ())), Lora(**fields), getattr(self.network, "matrices", {}))
        if adaptation.active and not section.get("weights"):
            raise UserError(
                "init.freeze or init.lora.rank is set and init.weights is empty: random parameters would be frozen; give "
                "--config.init.weights=<a run, a weights file, an official .pt or a folder of diffusers>"
            )
        return adaptation

    @cached_property
    def task(self) -> Any:
        """The training task: its section, and the parts that its constructor has parameters for.

        Building it makes all checks that need neither data nor devices.
        """
        check_numbers(self.config)
        section = self.config.task
        fields = {k: v for k, v in section.items() if k not in TASK_FILES}
        parameters = inspect.signature(registry.get("task", section.name)).parameters
        return construct("task", fields, **{name: part(self) for name, part in PARTS.items() if name in parameters})

    @cached_property
    def entry(self) -> str:
        """The kind of data in a batch: "image", "moments" of a latent cache, or "row" of a cache on the devices."""
        if registry.get("data", self.config.data.name) is not LatentCache:
            return "image"
        return "row" if self.config.loader.get("resident") else "moments"

    @cached_property
    def source(self) -> Any:
        """The training data set, opened."""
        if self.entry != "image" and len(self.buckets):
            fields = self.config.data
            return LatentCaches(fields.path, fields.get("verify", True), [str(bucket) for bucket in self.buckets.all])
        return construct("data", self.config.data)

    @cached_property
    def captions(self) -> Captions:
        """How examples get their texts: the section `captions`, which configs of networks without text do not have."""
        return Captions(**self.config.get("captions", {}))

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of previews and samples: `preview.prompts`, else what the templates of captions make; () without text.

        Raises:
            UserError: the network takes text, and there are none.
        """
        if "conditioner" not in self.config or not isinstance(self.conditioner, Text):
            return ()
        prompts = self.config.preview.get("prompts", ())
        if not prompts and self.captions.templates:
            prompts = self.captions.all_of(self.source.class_names)
        if not prompts:
            raise UserError(
                "preview.prompts is empty, and previews of a network that takes text need prompts; give "
                "--config.preview.prompts=\"('a photo of a cat',)\""
            )
        return (prompts,) if isinstance(prompts, str) else tuple(prompts)

    def caption_entries(self, source: Any) -> CaptionEntries | None:
        """What makes the entries of a batch of the text of an example of this data set; None for a condition without text.

        Raises:
            UserError: the data set has no texts.
        """
        if "conditioner" not in self.config or not isinstance(self.conditioner, Text):
            return None
        self.captions.check(source)
        return CaptionEntries(self.captions, tuple(source.class_names), self.conditioner.tokenizer, self.conditioner.rates)

    def example_transform(self, source: Any) -> Any:
        """The transform of an example of this data set: the section `transform`, and the tokens of its text if there is one."""
        entries = self.caption_entries(source)
        return self.transform if entries is None else CaptionedImage(self.transform, entries)

    @cached_property
    def evaluation_source(self) -> Any:
        """The images of evaluation: `data` with `evaluation.split` if it is set."""
        split = self.config.evaluation.get("split")
        return construct("data", self.config.data, **({} if split is None else {"split": split}))

    @cached_property
    def loader(self) -> Loader | LatentLoader | LatentBuckets:
        """This host's loader of training batches. Checks the data set against the model and the batch against the mesh."""
        config = self.config
        self.check_batch()
        self.parts  # checks the buckets
        self.task.batch_spec(self.entry)
        classes = self.conditioner.num_classes if "conditioner" in config else 0
        if classes and self.source.num_classes != classes:
            have = self.source.num_classes
            raise UserError(
                f"the data set has {have or 'no'} classes and model.num_classes is {classes}; pass "
                f"--config.model.num_classes={have}" + (", or 0" if have else "") + " to train without labels"
            )
        if config.batch_size > len(self.source):
            epochs = config.batch_size / len(self.source)
            say(f"note: each batch of {config.batch_size} holds {epochs:.1f} epochs of the {len(self.source)} examples")
        part: dict[str, Any] = dict(zip(("process_index", "process_count"), reader_place(self.mesh), strict=True))
        if len(self.buckets):
            return self._bucket_loader(part)
        if self.entry == "image":
            loader = Loader(
                self.source, self.example_transform(self.source), config.batch_size, config.seed, **config.loader, **part
            )
            loader.check_small()
            return loader
        return self._latent_loader(self.source, config.seed, part)

    def _latent_loader(self, cache: LatentCache, seed: int, part: Mapping[str, Any]) -> LatentLoader:
        config = self.config
        cache.check(self.codec, config.codec.sha256, self.transform)
        entries = self.caption_entries(cache)
        return LatentLoader(cache, config.batch_size, seed, self.transform.flip, **config.loader, **part, entries=entries)

    def _bucket_loader(self, part: Mapping[str, Any]) -> Loader | LatentBuckets:
        """The loader of batches of several shapes; each bucket has a seed of its own."""
        config, buckets = self.config, self.buckets
        seeds = [int(np.random.SeedSequence(config.seed, spawn_key=(k,)).generate_state(1)[0]) for k in range(len(buckets))]
        if self.entry == "row":
            raise UserError("loader.resident is set, and the latent caches of buckets are read from disk; set it to False")
        if self.entry == "moments":
            triples = zip(self.parts, self.source.caches, seeds, strict=True)
            loaders = [run._latent_loader(cache, seed, part) for run, cache, seed in triples]
            return LatentBuckets(loaders, buckets.cycle, self.source)
        turned = {"upright": True} if getattr(self.transform, "upright", False) else {}
        sizes = self.source.sizes(**turned) if hasattr(self.source, "sizes") else None
        records = buckets.members(sizes, len(self.source), getattr(self.transform, "fps", None))
        parts = [
            Part(run.example_transform(self.source), run.config.batch_size, seed, numbers)
            for run, seed, numbers in zip(self.parts, seeds, records, strict=True)
        ]
        loader = Loader(
            self.source, parts[0].transform, parts[0].batch_size, config.seed, **config.loader, **part, parts=parts,
            cycle=buckets.cycle,
        )  # fmt: skip
        loader.check_small()
        return loader

    def check_batch(self) -> None:
        """Raises a UserError if the batch cannot be split over the mesh."""
        ways, microbatches = rows_per_step(self.mesh), self.config.microbatches
        if self.config.batch_size % (ways * microbatches):
            raise UserError(
                f"batch_size {self.config.batch_size} is not a multiple of mesh.data x mesh.fsdp x microbatches = "
                f"{ways} x {microbatches} = {ways * microbatches}"
            )

    @cached_property
    def abstract_state(self) -> TrainState:
        """The training state as ShapeDtypeStructs with shardings."""
        return abstract_state(self.task, self.mesh)

    def abstract_states(self) -> Iterator[TrainState]:
        """`abstract_state`, and those with and without clipping and a schedule, as an earlier start may have had it."""
        yield self.abstract_state
        if self.config.optimizer.name in RESTRUCTURED:
            for clip_norm, decay_steps in itertools.product((None, 1.0), (None, 1)):
                config = ml_collections.ConfigDict(self.config.to_dict())
                fields = {"clip_norm": clip_norm, "warmup_steps": 0, "decay_steps": decay_steps, "decay_start": None}
                config.optimizer.update(fields)
                yield Run(config, devices=self.devices, platform=self.platform).abstract_state

    @cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch as ShapeDtypeStructs with shardings; reads nothing."""
        rows, sharding = self.config.batch_size, batch_sharding(self.mesh)
        spec = self.task.batch_spec(self.entry)
        return {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=sharding) for name, x in spec.items()}

    @cached_property
    def frozen(self) -> dict[str, Any]:
        """The frozen weights that the task reads, on the mesh.

        Raises:
            UserError: task.perceptual_weight is not 0, and task.perceptual_path is empty or has no LPIPS weights; a text encoder
                has no weights or tokenizer.
        """
        arrays = {name: CONSTANTS[name](self) for name in self.task.constants()}
        placed = {name: place(tree, self._sharding_of_constant(name, tree)) for name, tree in arrays.items()}
        if "conditioner" in placed and isinstance(self.conditioner, Text):
            placed["conditioner"] = text_encoders.with_null(self.conditioner, placed["conditioner"], replicated(self.mesh))
        return placed

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The arrays that a training step reads and does not change, on the mesh: frozen weights, and a resident data set."""
        return self.frozen | ({"moments": resident_moments(self.source, self.mesh)} if self.entry == "row" else {})

    def abstract_constants(self, resident_rows: int = 0) -> dict[str, Any]:
        """`constants` as ShapeDtypeStructs with shardings; reads nothing.

        resident_rows: rows of the latent cache on the devices, if loader.resident is set.

        Raises:
            UserError: loader.resident is set and resident_rows is 0.
        """
        abstract = {}
        for name, tree in self.task.constants().items():
            sharding = self._sharding_of_constant(name, tree)
            sharding = jax.tree.map(lambda _, s=sharding: s, tree) if isinstance(sharding, NamedSharding) else sharding
            abstract[name] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)
        if self.entry == "row":
            if resident_rows < 1:
                raise UserError(
                    "loader.resident keeps the latent cache on the devices, and its size is not in the config; give "
                    "--resident_rows=<number of images, doubled if the cache holds mirror images>"
                )
            ways, moments = rows_per_step(self.mesh), self.task.batch_spec("moments")["moments"]
            shape = (-(-resident_rows // ways) * ways, *moments.shape)
            abstract["moments"] = jax.ShapeDtypeStruct(shape, moments.dtype, sharding=batch_sharding(self.mesh))
        return abstract

    def with_config(self, config: ml_collections.ConfigDict) -> "Run":
        """The run of another config, with the same weights of the codec."""
        return Run(config, devices=self.devices, codec_params=self._codec_params, platform=self.platform)

    def with_base(self, base: Any) -> "Run":
        """This run with the frozen parameters of its network, where a part of it is trained; arrays on the host or the mesh."""
        run = copy.copy(self)  # with what was built already, such as the data set
        run._base = base
        return run

    @property
    def base(self) -> Any:
        """The frozen parameters of the network.

        Raises:
            ValueError: they were not given (`with_base`).
        """
        if self._base is None:
            raise ValueError("the frozen parameters of the network were not read; call Run.with_base first")
        return self._base

    def placed_base(self) -> Any:
        """The frozen parameters of the network, on the mesh."""
        return place(self.base, self._sharding_of_constant("base", self.base))

    def whole(self) -> "Run":
        """The run of the whole network, as it is sampled: nothing is frozen and there are no adapters."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.init = without_adaptation(config.get("init", {}))
        return self.with_config(config)

    def _sharding_of_constant(self, name: str, tree):
        rules = self.task.constant_rules().get(name)
        return replicated(self.mesh) if rules is None else shardings(tree, self.mesh, rules)

    @cached_property
    def codec_params(self) -> Any:
        """The codec's parameters as NumPy arrays.

        Raises:
            UserError: the codec has weights, and they were not read (`with_codec_weights`).
        """
        if self._codec_params is not None:
            return self._codec_params
        if self.has_codec_weights:
            raise UserError(no_codec_path(self.config.codec.name))
        return jax.tree.map(np.asarray, self.codec.init(jax.random.key(0)))

    @property
    def has_codec_weights(self) -> bool:
        """Whether the weights of a frozen codec must be read. An autoencoder's run trains its codec."""
        return "path" in self.config.codec

    def with_codec_weights(self, workdir: str | os.PathLike | None = None) -> "Run":
        """This run with the frozen codec's weights, and the fields of `codec` that come with the weights.

        A run's own copy of the codec is preferred; the path in the config need not exist any more. If `codec.scale` or
        `codec.shift` is None, it is read from the folder of the weights. `codec.sha256` is set to the hash of the weights.

        Raises:
            UserError: the codec's weights are missing, do not fit the config, or have another hash than `codec.sha256`.
        """
        if not self.has_codec_weights:
            return self
        section, own = dict(self.config.codec), local_path(workdir) / codec_folder.FOLDER if workdir else None
        path = self._codec_path(own)
        if path.is_dir():
            stored = vae.read_codec(path)
            for field in ("scale", "shift"):
                if section.get(field) is None:
                    section[field] = getattr(stored, field)
                elif getattr(self.codec, field) != getattr(stored, field) and path != own:
                    say(f"using codec.{field} {section[field]} of the config, not {getattr(stored, field)} of {path}")
        elif section.get("scale") is None or section.get("shift") is None:
            section |= {name: x for name, x in vae.scaling_of_file(path).items() if section.get(name) is None}
        if section.get("scale") is None:
            raise UserError(
                f"codec.path {path} is a file, which does not contain the scale of the latents; give codec.scale, or the "
                "folder with config.json"
            )
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.codec = section
        settled = Run(config, devices=self.devices, platform=self.platform)
        params = vae.load_diffusers(path, settled.codec)
        sha256, wanted = vae.weights_sha256(params), section.get("sha256")
        if wanted and sha256 != wanted:
            raise UserError(
                f"the weights in {path} have the SHA-256 {sha256}, and codec.sha256 is {wanted}; give those weights, or "
                "leave codec.sha256 empty"
            )
        config.codec.sha256 = sha256
        return Run(config.lock(), devices=self.devices, codec_params=params, platform=self.platform)

    def _codec_path(self, own: Path | None, fetch: bool = True) -> Path:
        given = self.config.codec.path
        if own and own.exists():
            if given and given not in vae.PUBLISHED and not local_path(given).exists():
                say(f"codec.path {given} does not exist; using the copy in {own}")
            return own
        if not given:
            raise UserError(no_codec_path(self.config.codec.name))
        return vae.find(given, fetch)

    def check_files(self, workdir: Path | None, *checks: Callable[[], object]) -> None:
        """Opens what the run reads: its data, the weights of its loss and its codec. Downloads a codec only if all else is there.

        Args:
            workdir: folder of the run, whose copy of the codec is preferred; None for a run without.
            checks: calls that raise a UserError for what else is missing.

        Raises:
            UserError: everything that is missing or does not fit, in one message, with the remedy of each.
        """
        missing = failures(lambda: self.source, *checks)
        if "perceptual" in self.task.constants():
            missing += failures(lambda: CONSTANTS["perceptual"](self))
        if "conditioner" in self.config and isinstance(self.conditioner, Text):
            missing += failures(*(partial(text_encoders.check, self.conditioner, name) for name in self.conditioner.frozen))
        if self.has_codec_weights:
            own = workdir / codec_folder.FOLDER if workdir else None
            missing += failures(lambda: self._codec_path(own, fetch=not missing))
        raise_all(missing)

    @cached_property
    def sampler(self) -> Any:
        return self.checked_sampler(self.config.sampler)

    @cached_property
    def scoring_sampler(self) -> Any:
        """The cheap sampler of scores during training."""
        return self.checked_sampler(self.config.scoring.sampler)

    def checked_sampler(self, fields: Mapping) -> Any:
        """Builds a sampler and traces it with the process, so that an incompatible pair fails before training.

        Raises:
            UserError: the sampler does not support the process, or has more steps than the process has timesteps.
        """
        sampler = construct("sampler", fields)
        x, keys = jax.eval_shape(lambda: (jnp.zeros((1, 1, 1, 1)), jax.random.split(jax.random.key(0), 1)))
        denoise = Memoryless(lambda x, t: Prediction(x, x, 0.0))
        jax.eval_shape(lambda x, keys: sampler(self.process, denoise, x, keys), x, keys)
        return sampler

    @cached_property
    def guidance(self) -> Guidance:
        """The guidance of samples, checked against the network.

        Raises:
            UserError: more channels than the data has; a scale other than 1 and the null condition is not trained.
        """
        guidance = self.guidance_by_second_network
        if guidance.active and not self.task.has_null_condition:
            raise UserError(
                f"guidance.scale is {guidance.scale}, and the network is not trained on the null condition (model.num_classes = "
                f"{self.conditioner.num_classes}, task.cond_dropout = {self.task.cond_dropout}); set the scale to 1"
            )
        return guidance

    @cached_property
    def guidance_by_second_network(self) -> Guidance:
        """The guidance for a second, weaker network (autoguidance), which needs no null condition."""
        guidance, channels = construct("guidance", self.config.guidance), self.latent_shape[-1]
        if guidance.channels is not None and guidance.channels > channels:
            raise UserError(
                f"guidance.channels is {guidance.channels} and the data has {channels}; it must be at most {channels}, or None "
                "for all"
            )
        return guidance

    @cached_property
    def forecast(self) -> Forecast:
        """Selects the calls of the network that run its blocks."""
        return self.checked_forecast(self.sampler)

    def checked_forecast(self, sampler: Any) -> Forecast:
        """`forecast` for this sampler. Without the section in the config, all calls run the blocks.

        Raises:
            UserError: the sampler, the guidance or the network does not support forecasts.
        """
        forecast = Forecast(**self.config.get("forecast", {}))
        if not forecast.active:
            return forecast
        if sampler.evaluations(self.process) != getattr(sampler, "num_steps", 0):
            raise UserError(
                f"forecast.interval is {forecast.interval}, and the sampler {type(sampler).__name__} evaluates the network "
                "several times per step or goes back in t; choose ddpm, ddim, euler, ab of order 2, sde, dpmpp or unipc, or set "
                "the interval to 1"
            )
        if self.guidance_by_second_network.active and self.guidance_by_second_network.is_partial:
            raise UserError(
                f"forecast.interval is {forecast.interval}, and guidance acts on an interval of t; the forecast needs the "
                "unconditional output at every t. Set guidance.low = 0 and high = 1, or interval 1"
            )
        missing = [name for name in ("embed", "run_blocks", "head") if not callable(getattr(self.network, name, None))]
        if missing:
            raise UserError(
                f"forecast.interval is {forecast.interval}, and {type(self.network).__name__} has no method {missing[0]}: a "
                "forecast needs a network in three parts (embed, run_blocks, head); set it to 1"
            )
        return forecast

    def predicts(self) -> dict[str, Any]:
        """The settings that must be equal for one network to guide another: {name: value}."""
        config = self.config
        process = registry.defaults("process", config.process.name) | dict(config.process)  # older configs lack newer fields
        return {
            "process": {k: v for k, v in process.items() if k not in (*TRAINING_ONLY, *SAMPLING_ONLY)},
            "codec": {k: v for k, v in config.codec.items() if k not in (*CODEC_FILES, "dtype")},
            "image size": list(self.image_shape),
            "number of classes": self.conditioner.num_classes,
        }


def no_codec_path(name: str) -> str:
    """The message for a codec without weights, which says what has them."""
    where = "(--config.codec.path=... or, to sample, --codec_path=...)"
    if name == "vq_vae":
        return f"codec.path is empty; give a folder of diffusers' VQModel, or a checkpoint of CompVis' vq-f4 or cin256-v2 {where}"
    return (
        "codec.path is empty; give the folder or .safetensors file of a VAE's weights, the --workdir of a run that trained one, "
        f"or {' or '.join(vae.PUBLISHED)}, which is downloaded {where}"
    )


def _discriminator(run: Run) -> PatchDiscriminator | None:
    """The discriminator of an autoencoder's loss; None if its weight is 0.

    Raises:
        UserError: the codec has no parameters to train, or is one that is not trained here.
    """
    section = run.config.task
    if isinstance(run.codec, VQVAE):
        raise UserError(
            "codec.name is 'vq_vae', which is used with trained weights and not trained: its loss would need the codebook's "
            "terms. Choose kl_vae, or causal_vae for clips, to train an autoencoder"
        )
    if not isinstance(run.codec, KLAutoencoder):
        raise UserError(
            f"codec.name is {run.config.codec.name!r}, which has no parameters to train; choose an autoencoder, such as kl_vae, or causal_vae "
            "for clips"
        )
    return PatchDiscriminator(**section.discriminator) if section.discriminator_weight else None


def _low_resolution(run: Run) -> LowResolution | None:
    """What a super-resolution stage is given; None without the section.

    Raises:
        UserError: the run draws samples on its own, which such a stage cannot.
    """
    section, config = dict(run.config.task.get("low_resolution", {})), run.config
    if not section:
        return None
    unknown = [name for name in section if name not in inspect.signature(LowResolution).parameters]
    if unknown:
        known = [*inspect.signature(LowResolution).parameters]
        raise UserError(f"task.low_resolution has no field {', '.join(unknown)}{suggest(unknown[0], known)}")
    drawn = {"preview.every_steps": config.preview.every_steps, "evaluation.num_images": config.evaluation.num_images}
    drawn["scoring.every_steps"] = config.get("scoring", {}).get("every_steps", 0)
    if asked := [f"--config.{name}=0" for name, value in drawn.items() if value]:
        raise UserError(
            "a super-resolution stage draws from samples of the stage before, which its training does not have: set "
            f"{' '.join(asked)}, and draw with sample --stages"
        )
    return LowResolution(**section)


def _perceptual(run: Run):
    path = run.config.task.perceptual_path
    if not path:
        raise UserError(
            "task.perceptual_weight is not 0 and task.perceptual_path is empty; give the LPIPS weights that "
            "dit_jax.convert --from=lpips writes, or set --config.task.perceptual_weight=0"
        )
    return lpips.load(path)


def _text_encoders(conditioner: Any) -> dict[str, Any]:
    if not isinstance(conditioner, Text):
        raise UserError(f"the conditioner {type(conditioner).__name__} has constants, and only that of text has weights to read")
    return text_encoders.read_all(conditioner)


PARTS = {  # of a task: parameters of its constructor that are not in its section
    "network": lambda run: run.network,
    "process": lambda run: run.process,
    "codec": lambda run: run.codec,
    "conditioner": lambda run: run.conditioner,
    "optimizer": lambda run: run.optimizer,
    "image_shape": lambda run: run.image_shape,
    "latent_shape": lambda run: run.latent_shape,
    "discriminator": _discriminator,
    "low_resolution": _low_resolution,
    "ema_decay": lambda run: run.config.ema_decay,
    "ema_warmup": lambda run: run.config.get("ema_warmup", False),
    "averages": lambda run: parse_all(run.config.get("averages", ())),
    "adaptation": lambda run: run.adaptation,
    "microbatches": lambda run: run.config.microbatches,
    "zero1": lambda run: run.config.mesh.get("zero1", False),
    "offload": lambda run: run.config.mesh.get("offload", "none"),
}
CONSTANTS = {  # by the names of `Task.constants`
    "codec": lambda run: run.codec_params,
    "perceptual": _perceptual,
    "base": lambda run: run.base,
    "conditioner": lambda run: _text_encoders(run.conditioner),
}


def without_adaptation(init: Mapping[str, Any]) -> dict[str, Any]:
    """The section `init` of a run of the same network that trains all of it."""
    return {**init, "freeze": (), "lora": {**init.get("lora", {}), "rank": 0}}


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError if a number of the training loop is out of range."""
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay is {config.ema_decay}; it must lie in [0, 1)")
    for field in ("num_steps", "batch_size", "microbatches"):
        if config[field] < 1:
            raise UserError(f"{field} is {config[field]}; it must be at least 1")
    if "log" in config and config.log.every_steps < 1:
        raise UserError(f"log.every_steps is {config.log.every_steps}; it must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed is {config.seed}; it must lie in 0 to 2**32 - 1")


def check_dtypes(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError if the trained network has a dtype in which training loses updates. Sampling and plans may use it."""
    place = "model" if "model" in config else "codec"
    section = config[place]
    param_dtype, dtype = (str(section.get(name, "float32")) for name in ("param_dtype", "dtype"))
    if param_dtype != "float32":
        raise UserError(
            f"{place}.param_dtype is {param_dtype!r}; training keeps parameters in float32, because smaller updates than their "
            f"rounding are lost. Give --config.{place}.param_dtype=float32, and --config.{place}.dtype=bfloat16 for speed"
        )
    if dtype == "float16":
        raise UserError(
            f"{place}.dtype is 'float16', and there is no loss scaling, without which its gradients underflow; give "
            f"--config.{place}.dtype=bfloat16 or float32"
        )
