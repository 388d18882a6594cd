"""The folder of a run."""

import os

import pytest

from dit_jax.errors import UserError
from dit_jax.storage.run_folder import default_workdir


@pytest.mark.parametrize(
    "config, folder",
    [
        ("configs/xl2_imagenet256.py", "runs/xl2_imagenet256"),
        ("configs/imagenet.py:XL/2,512,latents", "runs/imagenet-XL-2-512-latents"),
        ("digits:process=flow", "runs/digits-process-flow"),
        ("/home/me/net.v2.py:", "runs/net.v2"),
    ],
)
def test_default_workdir(config, folder):
    """Two configs that train in one folder, or a folder in a folder."""
    assert os.fspath(default_workdir(config, 1)) == folder


def test_several_processes_have_no_default():
    """Every host training in a folder of its own."""
    with pytest.raises(UserError, match=r"give --workdir=.* on storage that all hosts share"):
        default_workdir("configs/digits.py", 2)
