"""Which part of a clip is given in training, so that one network animates, extends, connects and repairs clips.

B batch, F frames, h x w latents of a frame.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError

KINDS = "none, first, last, first_N and last_N (N frames), ends (the first and the last), random (each frame or not), box"


def masks_of(given: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """{kind: probability} of such a table, or of texts, as ("none=0.6", "first=0.4").

    Raises:
        UserError: as `check_masks`; a text is not kind=probability, or a kind stands twice.
    """
    if not isinstance(given, str) and hasattr(given, "items"):  # a ConfigDict is no Mapping
        masks = {str(kind): float(value) for kind, value in given.items()}
    else:
        masks = {}
        for text in (given,) if isinstance(given, str) else given:
            kind, _, value = text.partition("=")
            try:
                probability = float(value)
            except ValueError:
                raise UserError(f"task.masks has {text!r}; write kind=probability, as in none=0.6,first=0.4") from None
            if kind in masks:
                raise UserError(f"task.masks has the kind {kind!r} twice; give it once")
            masks[kind] = probability
    check_masks(masks)
    return masks


def check_masks(masks: Mapping[str, float]) -> None:
    """Raises a UserError unless the table has known kinds and probabilities with the sum 1."""
    for kind, probability in masks.items():
        _kind(kind)
        if not 0 <= probability <= 1:
            raise UserError(f"task.masks.{kind} is {probability}; it is a probability, in 0 to 1")
    if masks and abs(sum(masks.values()) - 1) > 1e-6:
        raise UserError(f"the probabilities of task.masks have the sum {sum(masks.values()):g}; it must be 1")


def draw_masks(key: jax.Array, masks: Mapping[str, float], shape: tuple[int, ...]) -> jax.Array:
    """f32[B, F, h, w, 1] or [B, h, w, 1]: 1 where an example is given, a kind of the table for each.

    An example of which all would be given has nothing given: an image is a clip of one frame, of which only a "box" leaves a
    given part.

    Args:
        masks: kind -> probability, with the sum 1. "first_2" gives the first two frames, "ends" the first and the last, "random"
            each frame with probability 1/2, and "box" all but a box in space and time; "none" nothing.
        shape: of the latents, (B, F, h, w, c) or (B, h, w, c).

    Source: the kinds and their mixture follow Open-Sora's (arXiv 2412.20404, section 3.2.2: mask strategies).
    """
    clips = shape if len(shape) == 5 else (shape[0], 1, *shape[1:])
    choice, own = jax.random.split(key)
    kinds = [kind for kind, probability in masks.items() if probability > 0]
    logits = jnp.log(jnp.asarray([masks[kind] for kind in kinds]))
    chosen = jax.random.categorical(choice, logits, shape=clips[:1])
    given = jnp.zeros((*clips[:-1], 1), bool)
    for i, kind in enumerate(kinds):
        draw = _kind(kind)(jax.random.fold_in(own, i), clips)
        given = jnp.where((chosen == i).reshape(-1, 1, 1, 1, 1), draw, given)
    given &= ~given.all((1, 2, 3, 4), keepdims=True)
    return given.astype(jnp.float32).reshape(*shape[:-1], 1)


def unknown_weight(mask: jax.Array) -> jax.Array:
    """The weight of each element of a loss, [B, ..., 1]: 0 where it is given, and elsewhere 1 over the unknown share.

    The weighted mean over an example is then the mean over its unknown elements.
    """
    unknown = 1 - mask
    return unknown / unknown.mean(tuple(range(1, mask.ndim)), keepdims=True)


def known_entries(x0: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The entries of a condition for the given part of latents [B, ..., c]: {"known", "known_mask"}."""
    return {"known": x0 * mask, "known_mask": mask}


Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, clips' shape) -> bool, broadcasts to [B, F, h, w, 1]


def _kind(name: str) -> Draw:
    if name in _DRAWS:
        return _DRAWS[name]
    match = re.fullmatch(r"(first|last)_([1-9]\d*)", name)
    if match is None:
        raise UserError(f"task.masks has no kind {name!r}; the kinds are {KINDS}")
    count = int(match[2])
    return (
        (lambda key, clips: _frames(clips) < count)
        if match[1] == "first"
        else (lambda key, clips: _frames(clips) >= clips[1] - count)
    )


def _frames(clips: tuple[int, ...]) -> jax.Array:
    """The number of each frame, [1, F, 1, 1, 1]."""
    return jnp.arange(clips[1]).reshape(1, -1, 1, 1, 1)


def _ends(key: jax.Array, clips: tuple[int, ...]) -> jax.Array:
    return (_frames(clips) == 0) | (_frames(clips) == clips[1] - 1)


def _random(key: jax.Array, clips: tuple[int, ...]) -> jax.Array:
    return jax.random.bernoulli(key, 0.5, (*clips[:2], 1, 1, 1))


def _box(key: jax.Array, clips: tuple[int, ...]) -> jax.Array:
    """All but a box; each side begins at a uniform place and ends at a uniform one behind it."""
    inside = jnp.ones((1, 1, 1, 1, 1), bool)
    for axis, side in enumerate(clips[1:4], 1):
        first, last = jnp.sort(jax.random.randint(jax.random.fold_in(key, axis), (2, clips[0]), 0, side), axis=0)
        places = jnp.arange(side).reshape([-1 if i == axis else 1 for i in range(5)])
        first, last = (end.reshape(-1, 1, 1, 1, 1) for end in (first, last))
        inside = inside & (places >= first) & (places <= last)
    return ~inside


_DRAWS: dict[str, Draw] = {
    "none": lambda key, clips: jnp.zeros((1,) * 5, bool),
    "first": lambda key, clips: _frames(clips) == 0,
    "last": lambda key, clips: _frames(clips) == clips[1] - 1,
    "ends": _ends,
    "random": _random,
    "box": _box,
}
