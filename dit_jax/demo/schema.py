"""The fields of a request: as JSON, from which the page makes its form, and the checks of what comes back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dit_jax import recipes, registry
from dit_jax.errors import UserError, suggest
from dit_jax.pipeline import Pipeline
from dit_jax.sample.labels import CHOICES

MOST_GUIDANCE = 100
MOST_LABELS = 1000  # of one request
MOST_CHARACTERS = 4000  # of a prompt
DEFAULT_IMAGES = 8
SHOWN = 40  # characters of a wrong value in a message


class Limits(NamedTuple):
    """The most that one request may ask for."""

    max_images: int = 64
    max_steps: int = 1000


LIMITS = Limits()


class Request(NamedTuple):
    """A checked request.

    Fields:
        labels: int32[N] of the images.
        evaluations: of the network for each image; None if the sampler chooses its steps.
        fields: as they were asked for, defaults filled in.
        arguments: of the call of the pipeline.
    """

    labels: np.ndarray
    evaluations: int | None
    fields: dict[str, Any]
    arguments: dict[str, Any]


class Schema:
    """The fields of a request to one pipeline, and their checks.

    Raises:
        UserError: the network draws clips, for which the page has no player; the limits are below 1.
    """

    def __init__(self, pipe: Pipeline, name: str, limits: Limits = LIMITS):
        for flag, limit in limits._asdict().items():
            if limit < 1:
                raise UserError(f"{flag} is {limit}; it must be at least 1")
        if len(pipe.image_shape) != 3:
            raise UserError(f"the network draws clips {pipe.image_shape}; the demo page shows images. Use dit_jax.sample")
        self.pipe, self.limits = pipe, limits
        self.model = _model(pipe, name)
        self.fields = _fields(pipe, limits)

    def describe(self) -> dict[str, Any]:
        """JSON for the page: the model, and the fields in the order of the form."""
        return {"model": self.model, "fields": self.fields}

    def check(self, given: Mapping[str, Any]) -> Request:
        """Checks the fields of a request, those that are left out or None being the defaults.

        Raises:
            UserError: an unknown field; a value that the limits or the pipeline refuse.
        """
        for name in given:
            if name not in self.fields:
                raise UserError(f"there is no field {_shown(name)}{suggest(name, list(self.fields))}")
        asked = {name: field["default"] for name, field in self.fields.items()}
        asked |= {name: value for name, value in given.items() if value is not None}
        sampler, steps = asked["sampler"], {choice["name"]: choice["num_steps"] for choice in self.fields["sampler"]["choices"]}
        if not isinstance(sampler, str) or sampler not in steps:
            raise UserError(f"sampler={_shown(sampler)} is not offered; choose one of {', '.join(steps)}")
        if given.get("num_steps") is None:  # the default belongs to the sampler
            asked["num_steps"] = steps[sampler]
        for name, field in self.fields.items():
            if field["kind"] in ("integer", "number") and asked[name] is not None:
                _check_number(name, asked[name], field)
            if field["kind"] == "text":
                _check_text(name, asked[name])
        if "labels" in self.fields:
            _check_labels(asked["labels"])
        asked_for = asked if asked.get("negative_prompt") else {**asked, "negative_prompt": None}
        arguments = {name: value for name, value in asked_for.items() if name != "num_images"} | {
            "num_samples": asked["num_images"]
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        labels, evaluations = self.pipe.check(**arguments)
        return Request(labels, evaluations, asked, arguments)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        UserError: it is not UTF-8, not JSON, no object, has a key twice, or NaN or Infinity, which JSON has not.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def constant(name: str):
        raise ValueError(f"{name} is no number of JSON")

    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"the request is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise UserError(f'the request is {_shown(found)}; send an object, as in {{"labels": [3], "num_images": 4}}')
    return found


def _model(pipe: Pipeline, name: str) -> dict[str, Any]:
    """What the page says of the model."""
    height, width, channels = pipe.image_shape
    return {
        "name": name,
        "network": pipe.run.network.describe(),
        "step": pipe.step,
        "height": height,
        "width": width,
        "channels": channels,
    }


def _fields(pipe: Pipeline, limits: Limits) -> dict[str, dict[str, Any]]:
    """{name of a field: kind, label, default, range or choices}."""
    config = pipe.run.config
    fields: dict[str, dict[str, Any]] = {}
    text = {"prompt": ""} if pipe.takes_text else {}  # the least that a call needs
    if pipe.takes_text:
        of_text = {"kind": "text", "maximum": MOST_CHARACTERS, "default": ""}
        fields["prompt"] = {**of_text, "label": "Prompt"}
        if _accepts(pipe, guidance_scale=1.5, **text):
            fields["negative_prompt"] = {**of_text, "label": "Negative prompt", "hint": "guidance leads away from it"}
    if pipe.num_classes:
        names = [text.encode("utf-8", "backslashreplace").decode() for text in pipe.class_names]
        names = names or [str(k) for k in range(pipe.num_classes)]
        words = [word for word in CHOICES if word != "none" or _accepts(pipe, labels="none", num_samples=1)]
        fields["labels"] = {"kind": "labels", "label": "Classes", "default": "balanced", "classes": names, "choices": words}
    images = {"minimum": 1, "maximum": limits.max_images, "default": min(DEFAULT_IMAGES, limits.max_images)}
    fields["num_images"] = {"kind": "integer", "label": "Images", **images}
    fields["sampler"] = {
        "kind": "choice",
        "label": "Sampler",
        "default": config.sampler.name,
        "choices": _samplers(pipe, limits, text),
    }
    steps = {"minimum": 1, "maximum": limits.max_steps, "default": None}  # the sampler's
    fields["num_steps"] = {"kind": "integer", "label": "Steps", **steps}
    if (pipe.num_classes or text) and _accepts(pipe, guidance_scale=1.5, **text):
        scale = {"minimum": 0, "maximum": MOST_GUIDANCE, "step": 0.1, "default": float(config.guidance.scale)}
        fields["guidance_scale"] = {"kind": "number", "label": "Guidance", **scale, "hint": "1 is off"}
    fields["seed"] = {"kind": "integer", "label": "Seed", "minimum": 0, "maximum": 2**32 - 1, "default": 0}
    return fields


def _samplers(pipe: Pipeline, limits: Limits, text: Mapping[str, str]) -> list[dict[str, Any]]:
    """Names and default steps of the samplers that fit the process; None where a sampler chooses its steps.

    text: more arguments of a call.
    """
    own = dict(pipe.run.config.sampler)
    choices = []
    for name in registry.names("sampler"):
        if name == own["name"] or _accepts(pipe, sampler=name, **text):
            steps = (own if name == own["name"] else recipes.default_sampler(name)).get("num_steps")
            choices.append({"name": name, "num_steps": steps and min(steps, limits.max_steps)})
    return choices


def _accepts(pipe: Pipeline, **arguments: Any) -> bool:
    try:
        pipe.check(**arguments)
    except UserError:
        return False
    return True


def _check_number(name: str, value: Any, field: Mapping[str, Any]) -> None:
    low, high = field["minimum"], field["maximum"]
    wanted = int if field["kind"] == "integer" else (int, float)
    noun = "a whole number" if field["kind"] == "integer" else "a number"
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise UserError(f"{name}={_shown(value)} must be {noun} from {low} to {high}")
    if not low <= value <= high:  # of 1e400, which is infinity, too
        raise UserError(f"{name}={_shown(value)} is out of range; this server takes {low} to {high}")


def _check_labels(labels: Any) -> None:
    """The pipeline checks the labels themselves."""
    if not isinstance(labels, list | str):
        raise UserError(f"labels={_shown(labels)}: give class numbers, as in [3, 5], or one of {', '.join(CHOICES)}")
    if isinstance(labels, list) and len(labels) > MOST_LABELS:
        raise UserError(f"there are {len(labels)} labels; give at most {MOST_LABELS}")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name}={_shown(text)} must be a text")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name} has {len(text):,} characters; this server takes at most {MOST_CHARACTERS:,}")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number"
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
