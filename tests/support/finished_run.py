"""The folder of a run with made-up records and pictures, without a training."""

import json

import numpy as np
import tiny

from dit_jax.config_file import plain
from dit_jax.sample.grid import write_image_grid

MACHINE = {"device": "TPU v5", "num_devices": 4, "platform": "tpu", "cpu": "Abacus", "cores": 3, "versions": {"jax": "0.10.2"}}
RESULT = {
    "step": 90,
    "loss": 0.25,
    "samples": "/moved/samples/00000090_final.npz",
    "fid": 0.32,
    "fid_interval": [0.3, 0.34],
    "fid_interval_level": 0.95,
    "features": "pixels",
    "num_samples": 1000,
    "machine": MACHINE,
}


def write_run(folder, finished, config=None):
    """A run's folder with made-up records and pictures. config: of another network than a tiny DiT."""
    config = plain(config or tiny.config(num_steps=90)) | {"imports": []}
    config["data"]["name"] = "<script>alert(1)</script>"
    (folder / "scores").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": step, "loss": "NaN" if step == 50 else 9 / step, "images_per_second": 80.0} for step in range(10, 91, 10)]
    lines = [json.dumps(row) for row in [*rows, {"step": 90, "wall_seconds": 75.0, "goodput": 0.5}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"st')
    for step, fid in ((30, 3.0), (60, 1.0)):
        (folder / "scores" / f"{step:08d}.json").write_text(json.dumps({"step": step, "fid": fid}))
    noise = np.random.default_rng(0)
    for step in range(10, 90, 10):
        write_image_grid(folder / "samples" / f"{step:08d}.png", noise.integers(0, 256, (4, 8, 8, 1), np.uint8), caption="x")
    if finished:
        for name in ("00000090_final", "00000090_denoising", "real"):
            images = noise.integers(0, 256, (4, 256, 256, 3), np.uint8)
            write_image_grid(folder / "samples" / f"{name}.png", images, caption=name)
        (folder / "result.json").write_text(json.dumps(RESULT))
    return folder
