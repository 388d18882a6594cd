"""Opens data sets by a name on the command line."""

from dit_jax.data.sources.clip_folder import ClipFolder
from dit_jax.data.sources.digits import Digits
from dit_jax.data.sources.folder import ImageFolder
from dit_jax.data.sources.source import Source
from dit_jax.data.sources.tars import TarShards
from dit_jax.data.sources.tfds import TFDS
from dit_jax.errors import UserError


def named_source(data: str, split: str | None = None) -> Source:
    """Opens the data set of --data and --split: digits, folder:PATH or PATH, clips:PATH, tfds:NAME:PATH, tars:PATTERN.

    Raises:
        UserError: the kind of data set is unknown, or as the data set's constructor.
    """
    kind, colon, place = data.partition(":")
    if data == "digits":
        return Digits(split=split or "all")
    if not colon or kind not in ("folder", "clips", "tfds", "tars"):
        return ImageFolder(data, split or "")
    if kind == "folder":
        return ImageFolder(place, split or "")
    if kind == "clips":
        return ClipFolder(place, split or "")
    if kind == "tfds":
        name, _, path = place.partition(":")
        if not name or not path or not split:
            raise UserError(f"--data={data}: write tfds:NAME:PATH, as in tfds:imagenet2012:/data/tfds, and give --split")
        source = TFDS(name, path, split)
        return TFDS(name, path, split, caption_key="caption") if "caption" in source.text_features else source
    if split:
        raise UserError(
            f"--split={split} has no effect with --data={data}; omit it, and give a pattern for the files of the split"
        )
    return TarShards(place)
