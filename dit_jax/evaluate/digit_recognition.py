"""Which digits images show, by their nearest neighbours among scikit-learn's: no learned network."""

import numpy as np

from dit_jax.data.sources.digits import WORDS, Digits

NEIGHBOURS = 5
SIDE = 8


def recognised(images: np.ndarray, without_itself: bool = False) -> np.ndarray:
    """int64[N], the digit that each image shows: the vote of the 5 digits with the highest normalised cross-correlation.

    Of equal counts, the digit with the nearer neighbours wins. An image without contrast is -1.

    Args:
        images: uint8[N, 8, 8] or [N, 8, 8, 1].
        without_itself: the images are those of `Digits()` in order, and none is its own neighbour.
    """
    data = Digits()
    known = _normalized(np.stack([data[i]["image"] for i in range(len(data))]))
    given = _normalized(images)
    similar = given @ known.T
    if without_itself:
        np.fill_diagonal(similar, -np.inf)
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.zeros((len(given), len(WORDS)))
    for place in range(NEIGHBOURS):
        votes[np.arange(len(given)), data.labels[nearest[:, place]]] += 1 + 0.01 * (NEIGHBOURS - place)
    return np.where(given.any(1), votes.argmax(1), -1)


def _normalized(images: np.ndarray) -> np.ndarray:
    """f64[N, 64] with mean 0 and length 1; zeros for an image without contrast."""
    x = images.reshape(len(images), SIDE * SIDE).astype(np.float64)
    x -= x.mean(1, keepdims=True)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def recognised_all(images: np.ndarray) -> np.ndarray:
    """int64[N, W / 8]: the digits of images uint8[N, 8, W, 1], from left to right."""
    parts = np.split(np.asarray(images), images.shape[2] // SIDE, axis=2)
    return np.stack([recognised(part) for part in parts], axis=1)


def asked(prompts: list[str] | tuple[str, ...]) -> list[tuple[int, ...]]:
    """The digits that prompts name, in their order."""
    return [tuple(WORDS.index(word) for word in prompt.replace(",", " ").split() if word in WORDS) for prompt in prompts]
