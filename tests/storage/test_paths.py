from pathlib import Path

import pytest
from verbs import refused, run_verbs

from dit_jax.errors import UserError
from dit_jax.storage.paths import local_path

URLS = [
    "main --config=digits --workdir=gs://bucket/run",
    "main --config=digits_latent --workdir=run --config.codec.path=gs://bucket/vae",
    "main --config=folder --workdir=run --config.data.path=s3://bucket/images",
    "sample --workdir=gs://bucket/run",
    "sample --weights=gs://bucket/xl2.safetensors",
    "sample --workdir=run --out=gs://bucket/x.npz",
    "evaluate --samples=gs://bucket/x.npz --reference=digits --features=pixels",
    "encode --data=digits --codec=gs://bucket/vae --resolution=8 --out=latents",
    "encode --data=digits --codec=vae --resolution=8 --out=s3://bucket/latents",
    "prepare --source=gs://bucket/train.tar --out=data --dataset=x",
    "convert --from=official --weights=https://host/dit.pt --out=x.safetensors",
    "convert --from=official --weights=dit.pt --out=s3://bucket/x.safetensors",
    "report --workdir=gs://bucket/run",
    "sweep --sweep=digits --workdir=gs://bucket/sweep",
    "benchmark --what=latents --data=gs://bucket/latents",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("urls")
    return folder, dict(zip(URLS, run_verbs(folder, [line.split() for line in URLS]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("line", URLS)
def test_urls_are_refused(outcomes, line):
    """A folder named gs: that appears in the current one, and a run that dies at its third save."""
    folder, found = outcomes
    refused(found[line], "is a URL")
    assert not [path for path in folder.iterdir() if ":" in path.name]


@pytest.mark.parametrize("path", ["gs://b/x", "gs:/b/x", "s3://b", "file:///x", Path("gs://b/x")])
def test_urls(path):
    """A URL that pathlib has shortened, taken for a path."""
    with pytest.raises(UserError, match="is a URL"):
        local_path(path)


def test_other_paths(monkeypatch):
    """A name with a colon taken for a URL; a home folder that is not filled in."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/x") == Path("/home/someone/x")
    assert [str(local_path(text)) for text in ("imagenet:256", "a/b:c", "runs/x")] == ["imagenet:256", "a/b:c", "runs/x"]


def test_no_home(monkeypatch):
    """A stack trace for a user without a home folder."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(UserError, match="set HOME"):
        local_path("~/x")
