"""The results of an autoencoder's run."""

import jax
import latents
import numpy as np
import pytest

from dit_jax.errors import NotFinite
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.reconstructions import Reconstructor


def test_reconstructions_that_are_not_finite_are_refused():
    """NaN rounded to black images, and scored; a codec of NaN that the run hands on."""
    params = latents.params()
    params["decoder"]["conv_out"]["bias"][0] = np.nan
    reconstruct = Reconstructor(latents.CODEC, make_mesh(1, 1, 1, jax.devices()[:1]), 2)
    with pytest.raises(NotFinite, match="3 of 3 reconstructions hold NaN or infinity, the first is image 0"):
        reconstruct(params, np.zeros((3, 8, 8, 3), np.uint8))
