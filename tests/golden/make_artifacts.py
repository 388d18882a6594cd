"""Files that commit e778c7f wrote, in e778c7f/, and expected.json: what that commit computes from them.

    PYTHONPATH=tests/support python tests/golden/make_artifacts.py                       the files and expected.json
    PYTHONPATH=tests/support python tests/golden/make_artifacts.py --expected [NAME ...] expected.json alone, or these parts of it

Both in a checkout of e778c7f with this folder added.
Later commits must read these files. The files are never made again; files of a later commit get a folder of their own.
"""

import base64
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from golden_runs import GOLDEN, ROOT, overrides, records, run
from PIL import Image

FILES = GOLDEN / "e778c7f"
ARCHIVES = ("run", "autoencoder", "latent_run", "cache", "samples", "sweep")
LOOSE = (
    "samples.npz",
    "weights.safetensors",
    "official.pt",
    "reference.npz",
    "reference_kept.npz",
    "samples.pixels.json",
    "samples.kept.json",
)
LEFT_OUT = ("tensorboard", ".lock", "log.txt", "attempts.jsonl", "figures", "report.html")  # of the archives

EVERY = {"batch_size": 16, "log.every_steps": 10, "preview.every_steps": 0, "evaluation.num_images": 0, "ema_decay": 0.9}
OPTIMIZER = {"optimizer.warmup_steps": 5, "optimizer.decay_steps": 100}
NETWORK = {"model.depth": 2, "model.width": 8, "model.heads": 2, "sampler.num_steps": 6}
DIGITS = {"model.patch_size": 4, "process.prediction": "noise", "optimizer.learning_rate": 2e-3}
CODEC = {"codec.block_out_channels": "(4,4)", "codec.norm_groups": 2}
DISCRIMINATOR = {
    "task.discriminator_weight": 0.5,
    "task.discriminator.base_features": 4,
    "task.discriminator.num_layers": 1,
    "task.discriminator.norm_groups": 2,
}


def train(config: str, workdir: str, num_steps: int, fields: dict) -> list[str]:
    fields = EVERY | {"num_steps": num_steps} | fields
    return ["main", f"--config=configs/{config}", *overrides(fields), f"--workdir={workdir}"]


def train_run(num_steps: int = 40) -> list[str]:
    return train("digits.py", "run", num_steps, OPTIMIZER | NETWORK | DIGITS | {"checkpoint.every_steps": 20})


def train_autoencoder(num_steps: int = 30) -> list[str]:
    return train("vae_digits.py", "autoencoder", num_steps, OPTIMIZER | CODEC | DISCRIMINATOR | {"checkpoint.every_steps": 30})


def train_latent_run(num_steps: int = 40) -> list[str]:
    return train(
        "digits_latent.py",
        "latent_run",
        num_steps,
        OPTIMIZER | NETWORK | CODEC | {"model.patch_size": 2, "codec.path": "autoencoder", "checkpoint.every_steps": 40},
    )


def train_on_cache(resident: bool) -> list[str]:
    sizes = {"codec.image_channels": 1, "codec.latent_channels": 2, "transform.channels": 1, "transform.flip": True}
    return train(
        "folder_latent.py:S/2,8,2",
        f"on_cache{int(resident)}",
        20,
        NETWORK
        | CODEC
        | sizes
        | {
            "codec.path": "autoencoder",
            "data.path": "cache",
            "loader.resident": resident,
            "optimizer.learning_rate": 1e-3,
            "checkpoint.every_steps": 20,
        },
    )


ENCODE = ["encode", "--data=images", "--codec=autoencoder", "--resolution=8", "--shard_records=20"]
SAMPLE = ["sample", "--num_samples=12", "--guidance_scale=1.5", "--seed=3"]
AS_THEN = "--chunk_size=8"  # rows that a CPU computed at a time in e778c7f; bits depend on them
SCORE = ["evaluate", "--features=pixels"]
KEPT = ["--reference=reference_kept.npz", "--kid_subset_size=12"]

# A sweep file imports the class from where configs/sweeps/digits.py does.
SWEEP = """{imports}

def get_sweep():
    return Sweep(title="Two tiny models", base="configs/digits.py", grid={{"model.width": [8, 16], **{settings!r}}})
"""


def write_sweep_file(folder: Path):
    lines = (ROOT / "configs" / "sweeps" / "digits.py").read_text().splitlines()
    imports = "\n".join(line for line in lines if line.startswith(("from ", "import ")))
    settings = (
        EVERY
        | OPTIMIZER
        | {k: v for k, v in NETWORK.items() if k != "model.width"}
        | DIGITS
        | {"num_steps": 20, "evaluation.num_images": 20, "evaluation.batch_size": 20, "sampler.name": "ddpm"}
    )
    (folder / "sweep.py").write_text(SWEEP.format(imports=imports, settings={k: [v] for k, v in settings.items()}))


def write_images(folder: Path):
    """36 grey images of 8 x 8 pixels in two classes, unlike their mirror images."""
    rng = np.random.default_rng(0)
    for number in range(36):
        y, x = np.mgrid[0:8, 0:8] / 8
        wave = np.sin(rng.uniform(1, 6) * x + rng.uniform(1, 6) * y + rng.uniform(0, 6))
        path = folder / "images" / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127.5 + 127 * wave).round().astype(np.uint8)).save(path)


def make(folder: Path):
    """Writes all files into the folder, then packs them into FILES."""
    write_images(folder)
    write_sweep_file(folder)
    run(
        folder,
        [
            train_run(),
            train_autoencoder(),
            train_latent_run(),
            [*ENCODE, "--out=cache"],
            [*SAMPLE, "--workdir=run", "--num_samples=80", "--out=samples"],
            [*SAMPLE, "--workdir=run", "--num_samples=24", "--out=samples.npz"],
            ["convert", "--from=workdir", "--weights=run", "--out=weights.safetensors"],
            ["convert", "--from=workdir", "--weights=run", "--to=official", "--out=official.pt"],
            ["evaluate", "--make_reference=reference.npz", "--data=digits", "--features=pixels", "--nokeep_features"],
            ["evaluate", "--make_reference=reference_kept.npz", "--data=samples.npz", "--features=pixels"],
            [*SCORE, "--samples=samples.npz", "--reference=reference.npz"],
            [*SCORE, "--samples=samples.npz", *KEPT, "--out=samples.kept.json"],
            ["sweep", "--sweep=sweep.py", "--workdir=sweep"],
        ],
    )
    pack_all(folder)


def without_place(path: Path, folder: Path) -> bytes:
    """The bytes of a file; in text, where the folder lay is left out, which nothing reads."""
    content = path.read_bytes()
    return content.replace(str(folder).encode(), b"/golden") if path.suffix in (".json", ".txt") else content


def pack_all(folder: Path):
    for name in LOOSE:
        (FILES / name).write_bytes(without_place(folder / name, folder))
    for name in ARCHIVES:
        pack(
            folder,
            [name, *(["images"] if name == "cache" else ["sweep.py"] if name == "sweep" else [])],
            FILES / f"{name}.tar.gz",
        )


def pack(folder: Path, names: list[str], out: Path):
    """A tar.gz whose bytes depend on the files' names and bytes alone. Of a sweep the checkpoints are left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(p for name in names for p in (folder / name, *(folder / name).rglob("*")) if p.is_file()):
            member = path.relative_to(folder)
            if any(part in LEFT_OUT for part in member.parts) or (member.parts[0] == "sweep" and "checkpoints" in member.parts):
                continue
            content = without_place(path, folder)
            info = tarfile.TarInfo(str(member))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    out.write_bytes(gzip.compress(buffer.getvalue(), 9, mtime=0))


def unpack(folder: Path, names=(*ARCHIVES, *LOOSE)):
    """Copies of the files, as their writer left them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in ARCHIVES:
            with tarfile.open(FILES / f"{name}.tar.gz") as tar:
                tar.extractall(folder, filter="data")
        else:
            (folder / name).write_bytes((FILES / name).read_bytes())


# What is computed from the files.


def image_values(path: Path) -> dict:
    """The images and labels of an npz of samples."""
    with np.load(path) as file:
        images, labels = file["arr_0"], file["labels"]
    packed = base64.b64encode(zlib.compress(images.tobytes(), 9)).decode()
    return {
        "images": {"shape": list(images.shape), "uint8": packed, "sha256": hashlib.sha256(images.tobytes()).hexdigest()},
        "labels": labels.tolist(),
    }


def array_sums(tree, prefix: str = "") -> dict[str, dict]:
    """{path: {"shape", "sum", "size"}} of a tree of arrays; sums in float64, "size" of absolute values."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    elif tree is None:
        return {}
    else:
        values = np.asarray(tree).astype(np.float64)
        # Weights that differ from place to place: a transposed array has another sum.
        weights = 1 + np.arange(values.size).reshape(values.shape) / max(values.size, 1)
        return {
            prefix: {
                "shape": list(values.shape),
                "sum": float(f"{(values * weights).sum():.9g}"),
                "size": float(f"{np.abs(values).sum():.9g}"),
            }
        }
    found = {}
    for key, value in items:
        found |= array_sums(value, f"{prefix}/{key}" if prefix else str(key))
    return found


def checkpoint_sums(folder: Path) -> dict[str, dict]:
    """`array_sums` of a checkpoint, which Orbax alone can read."""
    import orbax.checkpoint as ocp

    return array_sums(ocp.PyTreeCheckpointer().restore(folder / "state"))


def safetensors_sums(path: Path) -> dict[str, dict]:
    from safetensors.numpy import load_file

    return array_sums(load_file(path))


def losses(workdir: Path) -> dict[str, list]:
    rows = records(workdir)
    return {name: [row[name] for row in rows] for name in ("step", "loss", "grad_norm")}


def samples(folder: Path, names=("older checkpoint", "ddim", "weights", "official", "latent run")) -> dict:
    """Images drawn from an older checkpoint, by another sampler, from two weights files and from the run in latents."""
    unpack(folder, ("run", "weights.safetensors", "official.pt", "latent_run"))
    calls = {
        "older checkpoint": ["--workdir=run", "--step=20"],
        "ddim": ["--workdir=run", "--sampler=ddim", "--num_steps=5"],
        "weights": ["--weights=weights.safetensors"],
        "official": ["--weights=back.safetensors"],
        "latent run": ["--workdir=latent_run"],
    }
    back = ["convert", "--from=official", "--weights=official.pt", "--like=run", "--out=back.safetensors"]
    draws = [[*SAMPLE, AS_THEN, *calls[name], f"--out=drawn{number}.npz"] for number, name in enumerate(names)]
    run(folder, [*([back] if "official" in names else []), *draws])
    return {name: image_values(folder / f"drawn{number}.npz") for number, name in enumerate(names)}


def quick_samples(folder: Path) -> dict:
    """Images drawn from the old run alone."""
    unpack(folder, ("run",))
    run(folder, [[*SAMPLE, AS_THEN, "--workdir=run", "--out=drawn.npz"]])
    return {"run": image_values(folder / "drawn.npz")}


def files(folder: Path) -> dict:
    """What needs no compiler: the cache checked, the old samples scored, the old results in a table, the run converted."""
    unpack(folder)
    write_sweep_file(folder)
    checked, scored, kept, many, table, swept, *_ = run(
        folder,
        [
            ["encode", "--verify", "--out=cache"],
            [*SCORE, "--samples=samples.npz", "--reference=reference.npz", "--out=new.json"],
            [*SCORE, "--samples=samples", *KEPT, "--out=new.kept.json"],
            [*SCORE, "--samples=samples", "--reference=digits", "--out=many.json"],
            ["evaluate", "--table=samples.pixels.json,new.json,samples.kept.json", "--format=csv", "--out=table.csv"],
            ["sweep", "--sweep=sweep.py", "--workdir=sweep", "--report"],
            ["convert", "--from=workdir", "--weights=run", "--out=again.safetensors"],
            ["convert", "--from=workdir", "--weights=run", "--to=official", "--out=again.pt"],
            ["convert", "--from=official", "--weights=official.pt", "--like=run", "--out=back.safetensors"],
        ],
    )
    metrics = ("fid", "fid_interval", "is", "precision", "recall", "kid", "num_samples", "num_reference")
    moments = {path.name: array_sums(np.load(path)) for path in sorted((folder / "cache").glob("*.moments.npy"))}
    return {
        "cache": {
            k: checked[k]
            for k in ("images", "shards", "bad_records", "latent_shape", "views", "unit_scale", "manifest_sha256", "verified")
        }
        | {"moments": moments},
        "scores": {
            name: {k: result[k] for k in metrics if k in result}
            for name, result in (("statistics", scored), ("kept features", kept), ("folder", many))
        },
        "table": {"results": table["results"], "lines": len((folder / "table.csv").read_text().splitlines())},
        "sweep": {"runs": swept["runs"], "done": swept["done"]},
        "weights again": safetensors_sums(folder / "again.safetensors"),
        "weights back": safetensors_sums(folder / "back.safetensors"),
        "official": {
            "old": hashlib.sha256((folder / "official.pt").read_bytes()).hexdigest(),
            "again": hashlib.sha256((folder / "again.pt").read_bytes()).hexdigest(),
        },
    }


def resumed(folder: Path, names=("run", "latent_run", "autoencoder")) -> dict:
    """Old runs trained for ten more steps: losses since the start, and every array of the last checkpoint."""
    unpack(folder, ("run", "autoencoder", "latent_run"))
    calls = {"run": train_run(50), "latent_run": train_latent_run(50), "autoencoder": train_autoencoder(40)}
    run(folder, [calls[name] for name in names])
    return {
        name: {
            "losses": losses(folder / name),
            "state": checkpoint_sums(folder / name / "checkpoints" / ("40" if name == "autoencoder" else "50")),
        }
        for name in names
    }


def from_disk(folder: Path) -> dict:
    """Training on the old cache with the old codec."""
    unpack(folder, ("autoencoder", "cache"))
    run(folder, [train_on_cache(False)])
    return losses(folder / "on_cache0")


def cached(folder: Path) -> dict:
    """Training on the old cache with the old codec; the images encoded again."""
    found = {"from disk": from_disk(folder)}
    encode = [[*ENCODE, "--out=cache"], [*ENCODE, "--out=new"]]
    *_, kept, again = run(folder, [train_on_cache(True), *encode])
    return found | {
        "resident": losses(folder / "on_cache1"),
        "same command": {"manifest_sha256": kept["manifest_sha256"]},
        "encoded again": {"unit_scale": again["unit_scale"]}
        | {path.name: array_sums(np.load(path)) for path in sorted((folder / "new").glob("*.moments.npy"))},
    }


OBSERVATIONS = {f.__name__: f for f in (quick_samples, files, samples, resumed, cached)}


def machine() -> dict:
    """What the last bits of images depend on."""
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return {
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "cores": os.cpu_count(),
        "cpu": hashlib.sha256(flags.encode()).hexdigest()[:8],
    }


def main():
    with tempfile.TemporaryDirectory() as temporary:
        if "--expected" not in sys.argv:
            make(Path(temporary) / "make")
        names, file = sys.argv[2:], FILES / "expected.json"
        expected = {**(json.loads(file.read_text()) if names else {}), "made_with": machine()}
        for name in names or OBSERVATIONS:
            expected[name] = OBSERVATIONS[name](Path(temporary) / name)
            file.write_text(to_json(expected) + "\n")


def to_json(value, indent: str = "") -> str:
    """JSON with a line for each value of the innermost objects."""
    if not isinstance(value, dict) or not any(isinstance(v, dict) for v in value.values()):
        return json.dumps(value)
    inner = indent + " "
    return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {to_json(v, inner)}" for k, v in value.items()) + f"\n{indent}}}"


if __name__ == "__main__":
    main()
