"""Scores samples against a reference: chooses the possible metrics, checks comparability, and records all settings.

N samples, M reference images, F features.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.data.size import size_text
from dit_jax.encode.cache_folder import differences
from dit_jax.errors import UserError, failures, raise_all
from dit_jax.evaluate import reference as references
from dit_jax.evaluate.extractors import Loaded, check_name, check_shape, load
from dit_jax.evaluate.images import ArrayImages, Frames, Images, captions_of, open_images, open_samples
from dit_jax.evaluate.reference import Reference
from dit_jax.evaluate.snapshots import Snapshots
from dit_jax.evaluate.statistics import CHUNK_IMAGES, Extracted, Wanted, default_batch_size, extract, output_shapes
from dit_jax.metrics import bootstrap
from dit_jax.metrics import kernel_distance as kernels
from dit_jax.metrics.bootstrap import bootstrap_interval, influences
from dit_jax.metrics.clip import FORMULAS, clip_scores
from dit_jax.metrics.frechet import Moments, frechet_distance, frechet_gradient
from dit_jax.metrics.inception_score import PARTITIONS, TENTHS, inception_score
from dit_jax.metrics.kernel_distance import kernel_distance
from dit_jax.metrics.precision_recall import precision_recall
from dit_jax.runtime import phases
from dit_jax.runtime.console import say
from dit_jax.runtime.versions import device_kind, provenance, version
from dit_jax.sample.samples_file import Samples
from dit_jax.storage.paths import local_path

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid", "clip_score", "frame_cosine")
WITHOUT_REFERENCE = ("is", "clip_score", "frame_cosine")
EMBEDDINGS = ("clip", "dinov2")  # extractors whose features are compared by their cosine
OF_FEATURES = ("precision", "recall", "kid")  # these need the reference's features, not only their moments
NEIGHBOURS = 3
LABELS_SHOWN = 10


class Options(NamedTuple):
    """Options of an evaluation.

    Fields:
        metrics: None computes all that are possible.
        replicates: of the bootstrap; 0 computes no interval, so that FID does not keep features.
        batch_size: images per batch of a process; None chooses by the device.
        every_seconds: time between snapshots.
        protocol: of an extractor of clips, see `metrics.i3d.PROTOCOLS`; None for its own.
    """

    metrics: tuple[str, ...] | None = None
    kid_subset_size: int = 1_000
    replicates: int = 1_000
    level: float = 0.95
    batch_size: int | None = None
    every_seconds: float = 30.0
    protocol: str | None = None


def check(reference: str, features: str, weights: str | None, shape: tuple[int, ...]) -> None:
    """Raises UserError if samples of `shape` cannot be scored; call before drawing them. A folder is listed, not read."""
    raise_all(
        failures(
            lambda: check_name(features, weights),
            lambda: check_shape(features, shape),
            lambda: open_reference(reference, shape),
        )
    )


def check_options(options: Options) -> None:
    """Raises UserError if a number is out of range; call before extracting features, which may take hours."""
    kernels.check(kernels.SUBSETS, options.kid_subset_size)
    if options.replicates:
        bootstrap.check(options.replicates, options.level)


def open_reference(reference: str | Images, shape: tuple[int, ...], split: str | None = None) -> Reference | Images:
    """Opens a reference: an npz of statistics, or images of that shape.

    Args:
        split: of a data set; None for all of it.

    Raises:
        UserError: it cannot be read, its images have another shape, or an npz is to be split.
    """
    if not isinstance(reference, str):
        if tuple(reference.shape) != tuple(shape):
            raise UserError(
                f"the samples are {' x '.join(map(str, shape))} and {reference.name} is {' x '.join(map(str, reference.shape))}; "
                "they must be equal"
            )
        return reference
    if split and reference.endswith(".npz"):
        raise UserError(f"--split={split} has no effect with --reference={reference}, an npz; omit it")
    if reference.endswith(".npz") and references.holds_statistics(local_path(reference)):
        return references.read(local_path(reference))
    return open_images(reference, shape, split)


def score(
    samples: str | os.PathLike | Samples | np.ndarray,
    reference: str | os.PathLike | Samples | np.ndarray | None = "digits",
    features: str = "pixels",
    weights: str | os.PathLike | None = None,
    *,
    metrics: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores images against a reference: the Frechet distance in the features, with a bootstrap interval, and others.

        dit_jax.score(pipe(num_samples=1000), "digits")["fid"]

    Args:
        samples: of a pipeline; uint8 [N, H, W, C], or [N, F, H, W, C] of clips; an npz of them; or a folder of `dit_jax.sample`.
        reference: the same; an npz of statistics; a data set (digits, a folder of images, tfds:NAME:PATH, tars:PATTERN), cropped
            to the size of the samples; None for only the Inception Score.
        features: "pixels" (for tiny images), "pixels8" (means of 8 x 8 cells), "inception", "dinov2", "clip", or "i3d"
            of clips. All others but "pixels" take the frames of clips as images.
        weights: of the extractor, a .safetensors file of `convert`.
        metrics: of METRICS; None computes all that are possible.
        options: other fields of `Options`.

    Returns:
        {"fid": ..., "fid_interval": [low, high], ...} and everything that the numbers depend on, as JSON values.

    Raises:
        UserError: a file cannot be read, a metric is not possible, or the reference is not comparable.
    """
    if unknown := sorted(options.keys() - set(Options._fields)):
        raise UserError(f"score has no option {', '.join(unknown)}; there are {', '.join(Options._fields)}")
    if isinstance(metrics, str):
        raise UserError(f"metrics={metrics!r} is one text; give a list, as in [{metrics!r}]")
    against = None if reference is None else _source(reference, "reference")
    chosen = Options(None if metrics is None else tuple(metrics), **options)
    return evaluate(_source(samples, "samples"), against, features, None if weights is None else os.fspath(weights), chosen)


def _source(given: str | os.PathLike | Samples | np.ndarray, what: str) -> str | Images:
    if isinstance(given, Samples):
        texts = getattr(given, "texts", None)
        return ArrayImages(given.images, f"the {what}", given.made_by, given.labels, texts)
    return ArrayImages(np.asarray(given), f"the {what}") if hasattr(given, "__array__") else os.fspath(given)


def evaluate(
    samples: str | Images,
    reference: str | Images | None,
    features: str,
    weights: str | None = None,
    options: Options | None = None,
    *,
    split: str | None = None,
    folder: Path | None = None,
    processes: tuple[int, int] | None = None,
) -> dict:
    """Computes the metrics of a file of images; returns them, with everything they depend on, as a JSON object.

    Args:
        samples: npz of images, or a folder of `dit_jax.sample`; or opened images.
        reference: npz of statistics or images, or a data set as in `named_source`; opened images; None for only the Inception
            Score and CLIPScore.
        features, weights: name and weights file of the extractor.
        split: of the reference, if it is a data set; None for all of it.
        folder: for snapshots, from which an interrupted evaluation resumes; remove it once the result is written. None writes
            no snapshots.
        processes: see `extract`; all of several processes must call this, and all get the result.
    Raises:
        UserError: a file cannot be read, a metric is not possible, or the reference is not comparable.
    """
    options = options or Options()
    check_options(options)
    check_name(features, weights, options.protocol)
    images = open_samples(samples) if isinstance(samples, str) else samples
    check_shape(features, images.shape)
    against = None if reference is None else open_reference(reference, images.shape, split)
    loaded = load(features, weights, options.protocol)
    clip_frames = images.shape[0] if len(images.shape) == 4 else 1
    images = as_taken(images, loaded.extractor)
    against = against if against is None or isinstance(against, Reference) else as_taken(against, loaded.extractor)
    if isinstance(reference, str) and isinstance(against, Reference):
        check_comparable(against, reference, loaded, images)
    metrics, remarks = choose_metrics(images, against, loaded, options)
    remarks += compare_labels(images, against)

    def take(taken: Images, wanted: Wanted, what: str) -> Extracted:
        return take_features(taken, loaded, wanted, options, what, folder, processes)

    extracted = take(images, wanted_of_samples(metrics, options), "samples")
    if against is not None and not isinstance(against, Reference):
        others = take(against, wanted_of_reference(metrics), "the reference")
        against = references.of_images(against, others, loaded)
    elif against is not None and against.features is None and against.images is not None and set(OF_FEATURES) & set(metrics):
        others = take(against.images, Wanted((), True), "the reference")
        against = against._replace(
            features=others.features, recipe=against.recipe | {"features_of": others.count, "features_sha256": others.sha256}
        )
    result, more = compute(metrics, extracted, against, options)
    result, more = with_clips(result, more, metrics, extracted, images, loaded)
    if "clip_score" in metrics:
        scored, cut = score_captions(_kept(extracted.features), captions_of(images) or (), loaded)
        result, more = result | scored, more + cut
    return {
        **result,
        "features": features,
        "samples": samples if isinstance(samples, str) else samples.name,
        "num_samples": extracted.count,
        "samples_sha256": extracted.sha256,
        "image_shape": list(images.shape),
        **({"frames_per_clip": clip_frames} if clip_frames > 1 else {}),
        "reference": reference if reference is None or isinstance(reference, str) else reference.name,
        **({} if split is None else {"reference_split": split}),
        **(
            {}
            if against is None
            else {
                "num_reference": against.recipe["count"],
                "reference_sha256": against.sha256,
                "reference_recipe": against.recipe,
            }
        ),
        "extractor": loaded.describe(),
        "extraction": {"batch_size": options.batch_size or default_batch_size(loaded.extractor), "sums": "float64"},
        "made_by": images.made_by,
        "remarks": remarks + more,
        **provenance(),
    }


def as_taken(images: Images, extractor: Any) -> Images:
    """Clips as their frames for an extractor of images, and everything else as it is."""
    is_clips = len(images.shape) == 4 and not getattr(extractor, "takes_clips", False)
    return Frames(images) if is_clips else images


def with_clips(
    result: dict, remarks: list[str], metrics: tuple[str, ...], samples: Extracted, images: Images, loaded: Loaded
) -> tuple[dict, list[str]]:
    """(result, remarks) with what is known of clips: FVD by its name, the cosine of consecutive frames, and their remarks."""
    if hasattr(loaded.extractor, "remarks"):
        remarks = [*remarks, *loaded.extractor.remarks(len(images), images.shape)]
    if loaded.extractor.name == "i3d":
        result = result | {name.replace("fid", "fvd"): value for name, value in result.items() if name.startswith("fid")}
    if isinstance(images, Frames):
        if "fid_interval" in result:
            remarks = [*remarks, "fid: the interval takes frames of a clip as independent, and is too narrow"]
        if "frame_cosine" in metrics:
            result = result | {"frame_cosine": frame_cosine(_kept(samples.features), images.count)}
    return result, remarks


def frame_cosine(features: np.ndarray, frames: int) -> float:
    """Mean cosine of the embeddings of consecutive frames, of embeddings [N frames, F] in the order of `Frames`."""
    x = features.reshape(-1, frames, features.shape[-1]).astype(np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return float((x[:, 1:] * x[:, :-1]).sum(-1).mean())


def make_reference(
    images: Images, loaded: Loaded, keep_features: bool, options: Options | None = None, folder: Path | None = None
) -> Reference:
    """Computes the statistics of all of the extractor's outputs for these images; write them with `reference.write`."""
    check_shape(loaded.extractor.name, images.shape)
    images = as_taken(images, loaded.extractor)
    widths = output_shapes(loaded.extractor, loaded.params, images.shape)
    wanted = Wanted(tuple(name for name in references.KEYS if name in widths), keep_features)
    extracted = take_features(images, loaded, wanted, options or Options(), "the reference", folder, None)
    return references.of_images(images, extracted, loaded)


def take_features(
    images: Images,
    loaded: Loaded,
    wanted: Wanted,
    options: Options,
    what: str,
    folder: Path | None,
    processes: tuple[int, int] | None,
) -> Extracted:
    """Calls `extract`, with snapshots if a folder is given."""
    index, total = processes or (jax.process_index(), jax.process_count())
    snapshots = None
    if folder is not None:
        key = {
            "images": images.identity,
            "extractor": loaded.describe(),
            "wanted": list(wanted),
            "chunk_images": CHUNK_IMAGES,
            "batch_size": options.batch_size or default_batch_size(loaded.extractor),
            "devices": jax.local_device_count(),
            "device": device_kind(),
            "jax": version("jax"),
            "dit_jax": version("dit_jax"),
        }
        snapshots = Snapshots(folder, key, index, total, options.every_seconds)
    if wanted.features:
        width = output_shapes(loaded.extractor, loaded.params, images.shape)["features"]
        if (size := 4 * width * len(images)) > 2**27:
            say(f"keeping features of {what} in memory: {size / 2**20:.0f} MiB")
    return extract(
        images,
        loaded.extractor,
        loaded.params,
        wanted,
        batch_size=options.batch_size,
        snapshots=snapshots,
        processes=(index, total),
        what=what,
    )


def check_comparable(reference: Reference, name: str, loaded: Loaded, images: Images) -> None:
    """Raises UserError if the reference was made with another extractor or of images of another shape."""
    ours = json.loads(json.dumps(loaded.describe()))
    if reference.published and ours["name"] != "inception":
        raise UserError(
            f"{name} has published statistics of Inception, but the samples' features are {ours['name']}: "
            f"use --features=inception, or make a reference with --make_reference --features={ours['name']}"
        )
    if not reference.published and (lines := differences(reference.recipe["extractor"], ours)):
        raise UserError(
            f"{name} was made with another extractor than the one for the samples; make it again "
            "with --make_reference, or use its extractor. Different:\n  " + "\n  ".join(lines)
        )
    shape = reference.recipe["image_shape"]
    if shape is not None and list(shape) != list(images.shape):
        raise UserError(
            f"the samples are {' x '.join(map(str, images.shape))}, but the reference {name} was made of "
            f"{' x '.join(map(str, shape))} images; they must have the same shape: make a reference with "
            f"--resolution={size_text(images.shape[-3:-1])}"
        )


def compare_labels(images: Images, reference: Reference | Images | None) -> list[str]:
    """A remark if one side has classes that the other lacks, for the scores then measure that; [] if the labels are not known."""
    if reference is None or isinstance(reference, Reference) or images.labels is None or reference.labels is None:
        return []
    ours, theirs = set(images.labels.tolist()), set(reference.labels.tolist())
    if ours == theirs or (images.made_by or {}).get("labels") == "none":  # the null label stands for all classes
        return []
    return [
        f"the samples have the labels {_in_words(ours)} and the reference {reference.name} has {_in_words(theirs)}: the scores "
        "measure the missing classes too; draw with --labels=balanced, or give a reference with the same labels"
    ]


def _in_words(labels: set[int]) -> str:
    ordered = sorted(labels)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered[:LABELS_SHOWN])) + ", ..." * (len(ordered) > LABELS_SHOWN)


def choose_metrics(
    images: Images, reference: Reference | Images | None, loaded: Loaded, options: Options
) -> tuple[tuple[str, ...], list[str]]:
    """Chooses the requested metrics, or all possible ones; returns (metrics, remarks about omitted ones).

    Raises:
        UserError: a metric is unknown, or requested but not possible (with the reason).
    """
    for name in options.metrics or ():
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
    outputs = output_shapes(loaded.extractor, loaded.params, images.shape)
    embeds_texts = hasattr(loaded.extractor, "text")
    skipped = {"clip_score": not embeds_texts, "frame_cosine": not isinstance(images, Frames)}
    possible = [name for name in METRICS if not skipped.get(name)]
    reasons = {
        name: _obstacle(name, images, reference, loaded.extractor.name, outputs, options) for name in options.metrics or possible
    }
    if "clip_score" in reasons and not embeds_texts:
        reasons["clip_score"] = f"the extractor {loaded.extractor.name} does not embed texts; use --features=clip"
    missing = {name: reason for name, reason in reasons.items() if reason}
    if options.metrics and missing:
        raise UserError("; ".join(f"metric {name}: {reason}" for name, reason in missing.items()))
    if len(missing) == len(reasons):
        raise UserError(f"no metric is possible: {missing['fid']}")
    return tuple(name for name in reasons if name not in missing), [f"no {name}: {why}" for name, why in missing.items()]


def _obstacle(
    metric: str, images: Images, reference: Reference | Images | None, extractor: str, outputs: dict[str, int], options: Options
) -> str | None:
    if metric == "is":
        if "probabilities" not in outputs:
            return f"the extractor {extractor} has no class probabilities"
        return f"{len(images)} samples are fewer than its {TENTHS} parts" if len(images) < TENTHS else None
    if metric == "clip_score":
        return None if captions_of(images) is not None else "the samples have no captions"
    if metric == "frame_cosine":
        if extractor not in EMBEDDINGS:
            return f"features {extractor} are no embeddings; use {' or '.join(EMBEDDINGS)}"
        return None if isinstance(images, Frames) and images.count > 1 else "the samples are not clips"
    if reference is None:
        return "it needs a reference"
    if metric == "sfid":
        if "spatial" not in outputs:
            return f"the extractor {extractor} has no spatial features"
        if isinstance(reference, Reference) and "spatial" not in reference.moments:
            return "the reference has no spatial statistics (mu_s, sigma_s)"
    if metric in OF_FEATURES:
        if not isinstance(reference, Reference):
            others = len(reference)
        elif reference.features is not None:
            others = len(reference.features)
        elif reference.images is not None:
            others = len(reference.images)
        else:
            return "the reference has only statistics, neither features nor images; make it with --keep_features"
        fewest = options.kid_subset_size if metric == "kid" else NEIGHBOURS + 1
        if min(len(images), others) < fewest:
            remedy = ", or a smaller --kid_subset_size" if metric == "kid" else ""
            return (
                f"it needs {fewest} images on each side, but there are {len(images)} samples and {others} reference images: "
                f"draw more{remedy}"
            )
    return None


def wanted_of_samples(metrics: tuple[str, ...], options: Options) -> Wanted:
    moments = tuple(output for output, metric in (("features", "fid"), ("spatial", "sfid")) if metric in metrics)
    keep = bool({*OF_FEATURES, "clip_score", "frame_cosine"} & set(metrics)) or ("fid" in metrics and options.replicates > 0)
    return Wanted(moments, keep, "is" in metrics)


def wanted_of_reference(metrics: tuple[str, ...]) -> Wanted:
    """Always includes the moments of the features, which identify the reference."""
    return Wanted(("features", "spatial") if "sfid" in metrics else ("features",), bool(set(OF_FEATURES) & set(metrics)))


def compute(
    metrics: tuple[str, ...], samples: Extracted, reference: Reference | None, options: Options
) -> tuple[dict, list[str]]:
    """Computes metrics; returns ({metric or related value: number}, remarks). Each metric has the whole limit of the watchdog."""
    result, remarks = {}, []
    moments, theirs, count = {}, None, None
    if reference is not None:
        moments, theirs, count = reference.moments, reference.features, reference.recipe["count"]
    if "fid" in metrics:
        result |= _fid(samples, moments["features"], options)
        width = len(samples.moments["features"].mean)
        if min(samples.count, count or width + 1) <= width:
            remarks.append(
                f"fid: {samples.count} samples and {count} reference images for {width} features: "
                "a covariance is singular, and the value depends more on these counts than on the images; compare "
                "it only at equal counts"
            )
    phases.beat()
    if "sfid" in metrics:
        result["sfid"] = frechet_distance(samples.moments["spatial"], moments["spatial"])
    if "is" in metrics:
        scores = {name: inception_score(samples.class_sums[name]) for name in PARTITIONS}
        result |= {
            "is": scores["tenths"][0],
            "is_std": scores["tenths"][1],
            "is_parts_of_5000": scores["fives"][0],
            "is_shuffled": scores["shuffled"][0],
            "is_shuffled_std": scores["shuffled"][1],
        }
    phases.beat()
    if "precision" in metrics or "recall" in metrics:
        precision, recall = precision_recall(_kept(samples.features), _kept(theirs), NEIGHBOURS)
        result |= {name: value for name, value in (("precision", precision), ("recall", recall)) if name in metrics}
        result["neighbours"] = NEIGHBOURS
    phases.beat()
    if "kid" in metrics:
        mean, std = kernel_distance(_kept(samples.features), _kept(theirs), subset_size=options.kid_subset_size)
        result |= {"kid": mean, "kid_std": std, "kid_subset_size": options.kid_subset_size}
    return result, remarks


def score_captions(features: np.ndarray, captions: Sequence[str], loaded: Loaded) -> tuple[dict, list[str]]:
    """({name: mean} of every formula, with the formulas; a remark if captions were cut), of embeddings of images [N, F]."""
    extractor: Any = loaded.extractor  # one that embeds texts
    texts, cut = extractor.text(loaded.params, captions)
    remark = f"clip_score: {cut} of {len(captions)} captions are longer than CLIP's {extractor.text.length} tokens and were cut"
    return {**clip_scores(features, texts), "clip_formulas": dict(FORMULAS)}, [remark] if cut else []


def _kept(features: np.ndarray | None) -> np.ndarray:
    """The features themselves; `choose_metrics` and `wanted_of_samples` see to it that those needed are kept."""
    assert features is not None
    return features


def _fid(samples: Extracted, reference: Moments, options: Options) -> dict:
    mine = samples.moments["features"]
    if not options.replicates:
        return {"fid": frechet_distance(mine, reference)}
    gradient = frechet_gradient(mine, reference)
    interval = bootstrap_interval(
        gradient.distance, influences(_kept(samples.features), mine.mean, gradient), options.replicates, options.level
    )
    return {
        "fid": gradient.distance,
        "fid_interval": [interval.low, interval.high],
        "fid_interval_level": interval.level,
        "fid_standard_error": interval.standard_error,
        "fid_replicates": interval.replicates,
    }
