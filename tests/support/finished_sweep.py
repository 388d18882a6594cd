"""The folder of a sweep that is done, without a training."""

import json

import numpy as np

from dit_jax.sweep import cost, grid
from dit_jax.sweep.folder import Folder, write_json
from dit_jax.sweep.grid import Sweep
from dit_jax.sweep.scores import file_of

SWEEP = Sweep(
    title="A <b>bold</b> title",
    base="configs/digits.py",
    seeds=[0, 1],
    samplers=[("ddim", 2), ("ddim", 4)],
    paper=True,
    variants={"a/1": {"model.width": 32}, "b/2": {"model.width": 64}, "c/4": {"model.width": 96}, "d/8": {"model.depth": 6}},
)


def write_finished(path):
    """Writes the folder of a sweep whose runs have made-up results, one of them failed; returns (folder, runs, costs)."""
    folder = Folder(path, SWEEP.title)
    runs = grid.expand(SWEEP)
    costs = [cost.count(run) for run in runs]
    for k, (run, c) in enumerate(zip(runs, costs, strict=True)):
        where, fid = folder.of(run), 3.0 - np.log10(1e4 * c.gmacs) + 0.1 * (k % 2)
        where.mkdir(parents=True)
        if k == 7:
            (where / "log.txt").write_text("Traceback\nRuntimeError: <script>alert(1)</script>\n")
            (where / "attempts.jsonl").write_text('{"started": "2026-01-02T03:04:05+00:00", "status": 1, "seconds": 3.0}\n')
            continue
        np.savez(where / "x_final.npz", arr_0=np.full((12, 8, 8, 1), 20 * k, np.uint8))
        (where / "samples").mkdir()
        (where / "x_final.npz").rename(where / "samples" / "x_final.npz")
        write_json(
            where / "result.json",
            {
                "step": 1500,
                "loss": 0.1,
                "stopped": False,
                "images_per_second": 10.0,
                "fid": fid,
                "features": "pixels",
                "num_samples": 1000,
                "reference_sha256": "ab",
                "samples": "/elsewhere/samples/x_final.npz",
                "extractor": {"name": "pixels", "weights_sha256": None},
                "commit": "c0ffee",
                "device": "TPU v5",
                "num_devices": 4,
                "made_by": {"sampler": {"name": "ddpm", "num_steps": 100}, "guidance": {"scale": 1.0}},
            },
        )
        (where / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "loss": "NaN" if step == 200 else 1 / step}) + "\n" for step in range(100, 1600, 100)
            )
            + '{"st'
        )
        (where / "attempts.jsonl").write_text(
            "".join(
                json.dumps({"started": "2026-01-02T03:04:05+00:00", "status": status, "seconds": seconds, "machine": "abacus"})
                + "\n"
                for status, seconds in ((75, 60.0), (0, 30.0))
            )
        )
        for step, early in ((500, 9.0), (1000, 8.0)):
            score = {
                "step": step,
                "fid": early,
                "num_samples": 50,
                "extractor": {"name": "pixels"},
                "made_by": {"sampler": {"name": "dpmpp", "num_steps": 16}},
            }
            write_json(where / "scores" / f"{step:08d}.json", score)
        write_json(where / "scores" / "best.json", {"step": 1000, "fid": 8.0})
        for name, steps in SWEEP.samplers:
            score = {"sampler": name, "num_steps": steps, "evaluations": steps, "seconds": 1.0, "fid": fid + 1 / steps}
            write_json(file_of(folder, run, name, steps), score)
    return folder, runs, costs
