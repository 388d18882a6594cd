"""Which text a training example has: its caption, a long caption, or a template with the name of its class."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from dit_jax.data.sources.source import Example
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError

TEMPLATE_FIELDS = ("name", "a")


@dataclass(frozen=True)
class Captions:
    """Chooses the text of an example.

    The short text is the example's own caption, or a template if it has none. The long text is its own long caption, or a long
    template; an example without either keeps its short text. An example without a short text, or with an empty one, is an error,
    which the loader counts as a bad record.

    Fields:
        templates: texts for examples without a caption, as "a photo of {a} {name}"; {name} is the name of the class, {a} is "a",
            or "an" before a vowel. One is drawn for each example of training.
        long_templates: the same in place of a long caption.
        names: of the classes, in place of those of the data set.
        long_caption_rate: rate at which an example of training has its long text.

    Source: Betker et al. 2023 (DALL-E 3), section 3.2: 95 % of long captions was best.
    """

    templates: tuple[str, ...] = ()
    long_templates: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    long_caption_rate: float = 0.0

    def __post_init__(self):
        for field in ("templates", "long_templates", "names"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        if not 0 <= self.long_caption_rate <= 1:
            raise UserError(f"captions.long_caption_rate is {self.long_caption_rate}; it must lie in 0 to 1")
        for template in (*self.templates, *self.long_templates):
            try:
                fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
            except ValueError:
                fields = {""}
            if not fields <= set(TEMPLATE_FIELDS):
                raise UserError(f"the caption template {template!r} may have {{name}} and {{a}} in braces, nothing else")

    def check(self, source: Any) -> None:
        """Raises a UserError if no example of a data set would have a text, or the templates have no names of its classes."""
        if self.names and len(self.names) != source.num_classes:
            raise UserError(f"captions.names has {len(self.names)} names and the data set {source.num_classes} classes")
        if self.templates and not source.num_classes:
            raise UserError(
                "captions.templates need the classes of labelled data, and this data set has none; leave them empty and give "
                "captions"
            )
        if not self.templates and getattr(source, "has_captions", True) is False:
            raise UserError(
                "the data set has no captions; write them beside the images (name.txt), or describe its classes: "
                "--config.captions.templates=\"('a photo of {a} {name}',)\""
            )

    def of(self, example: Mapping[str, Any], class_names: Sequence[str], rng: np.random.Generator | None) -> str:
        """The text of an example.

        rng: draws the template, and whether the text is long; None for the first template and the short text.

        Raises:
            UserError: it has none.
        """
        if rng is not None and self.long_caption_rate and rng.random() < self.long_caption_rate:
            text = example.get("caption_long") or self._filled(self.long_templates, example, class_names, rng)
            if text:
                return text
        text = example.get("caption") or self._filled(self.templates, example, class_names, rng)
        if not text:
            name = example.get("name", "an example")
            raise UserError(f"{name} has no caption; write it, or set --config.captions.templates for images without one")
        return text

    def _filled(
        self, templates: tuple[str, ...], example: Mapping[str, Any], class_names: Sequence[str], rng: np.random.Generator | None
    ) -> str:
        if not templates:
            return ""
        template = templates[0 if rng is None or len(templates) == 1 else int(rng.integers(len(templates)))]
        return filled(template, (self.names or class_names)[int(example["label"])])

    def all_of(self, class_names: Sequence[str]) -> list[str]:
        """All texts that the templates make, short ones first."""
        names = self.names or class_names
        return [filled(template, name) for template in (*self.templates, *self.long_templates) for name in names]


def filled(template: str, name: str) -> str:
    """A template with the name of a class: "{a} {name}" is "a three" or "an eight"."""
    return template.format(name=name, a="an" if name[:1].lower() in tuple("aeiou") else "a")


@dataclass(frozen=True)
class CaptionEntries:
    """The entries of a batch that the text of an example gives.

    Fields:
        captions: chooses the text.
        class_names: of the data set.
        tokenize: N texts -> arrays [N, ...] by name.
        dropout: rates at which the text encoders are dropped, giving "present" bool[number of encoders]; None for no such entry.
    """

    captions: Captions
    class_names: tuple[str, ...]
    tokenize: Callable[[Sequence[str]], Mapping[str, np.ndarray]]
    dropout: tuple[float, ...] | None = None

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
        """rng: draws what is random; None for an example that is evaluated, whose encoders are all present.

        Raises:
            UserError: the example has no text.
        """
        entries = {name: x[0] for name, x in self.tokenize([self.captions.of(example, self.class_names, rng)]).items()}
        if self.dropout is not None:
            draws = np.ones(len(self.dropout)) if rng is None else rng.random(len(self.dropout))
            entries["present"] = draws >= np.asarray(self.dropout)
        return entries


@dataclass(frozen=True)
class CaptionedImage(grain.transforms.RandomMap):
    """An example -> what `ImageTransform` makes of it, and the entries of its text."""

    image: ImageTransform
    entries: CaptionEntries

    def __call__(self, example: Example) -> dict[str, Any]:
        """The deterministic part: the image without mirroring, the short text."""
        return self.image(example) | self.entries(example, None)

    def random_map(self, element: Example, rng: np.random.Generator) -> dict[str, Any]:
        return self.image.random_map(element, rng) | self.entries(element, rng)
