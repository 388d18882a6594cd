"""Tells a callback on the host what the network predicts while a sampler runs."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.sample.generator import PADDING


class Evaluation(NamedTuple):
    """What a callback is told at an evaluation of the network.

    Fields:
        images: int32[n], indices of the images.
        number: of the evaluation, from 0; Heun's sampler has two in a step.
        t: f32[n], 1 is noise, 0 is data.
        x0: f32[n, h, w, c], the predicted latents; `Pipeline.decode` makes images of them.
    """

    images: np.ndarray
    number: int
    t: np.ndarray
    x0: np.ndarray


class Watcher:
    """Passes what the devices report to the callback of the current call; its first error ends the reports."""

    def __init__(self):
        self._lock, self._callback, self._error = threading.Lock(), None, None

    def calling(self, callback: Callable[[Evaluation], None] | None) -> "Watcher":
        self._callback, self._error = callback, None
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc_info):
        if self._callback is None:
            return
        jax.effects_barrier()
        error, self._callback = self._error, None
        if error is not None and kind is None:
            raise error

    def __call__(self, indices: np.ndarray, number: np.ndarray, t: np.ndarray, x0: np.ndarray) -> None:
        with self._lock:  # devices report at the same time
            if self._callback is None or self._error is not None:
                return
            rows = np.asarray(indices) != PADDING
            if not rows.any():
                return
            try:
                images, t, x0 = (np.asarray(x)[rows] for x in (indices, t, x0))
                self._callback(Evaluation(images, int(number), t, x0))
            except BaseException as error:
                self._error = error
