"""Writes diffusion.npz: what the official DiT and SiT code computes for given inputs, noise and a tiny analytic network.

    python tests/golden/make_golden.py --dit=DIR --sit=DIR

DIR are checkouts of github.com/facebookresearch/DiT and github.com/willisma/SiT; needs torch and torchdiffeq. Arrays are
channels-last, inputs are in/..., outputs dit/... and sit/...
"""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import torch

BATCH, HEIGHT, WIDTH, CHANNELS, HIDDEN = 2, 2, 1, 4, 8
LOSS_TIMES = (0, 1, 250, 999)
SIT_TIMES = (0.0, 0.01, 0.5, 1.0)
CFG_SCALE = 1.5


def make_inputs(rng) -> dict[str, np.ndarray]:
    shape = (BATCH, HEIGHT, WIDTH, CHANNELS)
    x0 = np.round(np.clip(rng.normal(size=shape) * 0.6, -1, 1) * 127.5) / 127.5
    x0.flat[:2] = -1, 1  # the decoder's open bins
    arrays = {
        "x0": x0,
        "start": rng.normal(size=shape),
        "noise": rng.normal(size=(250, *shape)),
        "label": np.array([3, 7]),
        "w_in": rng.normal(size=(CHANNELS, HIDDEN)) * 0.7,
        "w_time": rng.normal(size=HIDDEN),
        "w_label": rng.normal(size=(11, HIDDEN)) * 0.5,
        "w_out": rng.normal(size=(HIDDEN, 2 * CHANNELS)) * 0.5,
    }
    return {name: a.astype(np.int32 if name == "label" else np.float32) for name, a in arrays.items()}


class Network:
    """tanh(x w_in + t w_time + w_label[y]) w_out per pixel, for NCHW tensors; t is divided by `time_scale`."""

    def __init__(self, inputs, time_scale, out_channels):
        self.w = {name: torch.from_numpy(a) for name, a in inputs.items() if name.startswith("w_")}
        self.time_scale, self.out_channels, self.in_channels = time_scale, out_channels, CHANNELS

    def forward(self, x, t, y):
        def expand(v):
            return v[:, None, None]

        hidden = x.movedim(1, -1) @ self.w["w_in"] + expand((t.float() / self.time_scale)[:, None] * self.w["w_time"])
        out = torch.tanh(hidden + expand(self.w["w_label"][y])) @ self.w["w_out"]
        return out.movedim(-1, 1)[:, : self.out_channels]

    __call__ = forward


class Recorded:
    """Stands for torch.randn_like and torch.randn: hands out the recorded noise in order, twice over for a doubled batch."""

    def __init__(self, noise):
        self.noise, self.next = [torch.from_numpy(n).movedim(-1, 1) for n in noise], 0

    def __call__(self, like):
        noise, count = self.noise[self.next], like[0] if isinstance(like, torch.Size) else len(like)
        self.next += 1
        return torch.cat([noise] * (count // BATCH))


def load_models(path: Path, all_channels=False):
    """models.py of a checkout; timm's classes, which it imports but guidance does not need, are replaced by empty ones."""
    timm = types.ModuleType("timm.models.vision_transformer")
    timm.PatchEmbed = timm.Attention = timm.Mlp = object
    sys.modules.update(
        {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models"), "timm.models.vision_transformer": timm}
    )
    source = path.read_text()
    if all_channels:  # what the comment in the official code says to do
        now = "eps, rest = model_out[:, :3], model_out[:, 3:]"
        wanted = "eps, rest = model_out[:, :self.in_channels], model_out[:, self.in_channels:]"
        assert source.count("\n        " + now) == 1 and source.count("# " + wanted) == 1
        source = source.replace("\n        " + now, "\n        " + wanted)
    module = types.ModuleType(path.parent.name + "_models")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def numpy(x):
    return x.movedim(1, -1).numpy() if x.ndim == 4 else x.numpy()


def run_dit(root: Path, inputs) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(root))
    from diffusion import create_diffusion, gaussian_diffusion

    x0, start = (torch.from_numpy(inputs[name]).movedim(-1, 1) for name in ("x0", "start"))
    label = torch.from_numpy(inputs["label"]).long()
    out = {}

    def recorded():
        gaussian_diffusion.th.randn_like = Recorded(inputs["noise"])

    for name, fields in {
        "noise_learned": {},
        "cosine_learned": {"noise_schedule": "squaredcos_cap_v2"},
        "x0_learned": {"predict_xstart": True},
        "noise_large": {"learn_sigma": False},
        "x0_small": {"learn_sigma": False, "predict_xstart": True, "sigma_small": True},
    }.items():
        diffusion = create_diffusion("", **fields)
        network = Network(inputs, 1000, CHANNELS * (1 + fields.get("learn_sigma", True)))
        noise = torch.from_numpy(inputs["noise"][0]).movedim(-1, 1)
        for t in LOSS_TIMES:
            times = torch.full((BATCH,), t)
            terms = diffusion.training_losses(network, x0, times, {"y": label}, noise=noise)
            out |= {f"loss/{name}/{t}/{term}": terms[term].numpy() for term in ("loss", "mse", "vb") if term in terms}
            bound = diffusion._vb_terms_bpd(network, x0, diffusion.q_sample(x0, times, noise), times, False, {"y": label})
            out[f"bound/{name}/{t}"] = bound["output"].numpy()

    recorded()
    bound = create_diffusion("", diffusion_steps=100).calc_bpd_loop(
        Network(inputs, 1000, 2 * CHANNELS), x0, clip_denoised=False, model_kwargs={"y": label}
    )
    out |= {
        "bpd/total": bound["total_bpd"].numpy(),
        "bpd/prior": bound["prior_bpd"].numpy(),
        "bpd/terms": bound["vb"].numpy()[:, ::-1],
    }

    for name, (spacing, fields, loop, arguments) in {
        "ddpm_250": ("250", {}, "p_sample_loop", {}),
        "ddpm_7": ("7", {}, "p_sample_loop", {}),
        "ddpm_large_20": ("20", {"learn_sigma": False}, "p_sample_loop", {}),
        "ddpm_small_20": ("20", {"learn_sigma": False, "sigma_small": True}, "p_sample_loop", {}),
        "ddim_250": ("250", {}, "ddim_sample_loop", {}),
        "ddim_stride_50": ("ddim50", {}, "ddim_sample_loop", {"eta": 0.5}),
        "ddim_eta_20": ("20", {}, "ddim_sample_loop", {"eta": 1.0}),
    }.items():
        recorded()
        network = Network(inputs, 1000, CHANNELS * (1 + fields.get("learn_sigma", True)))
        sample = getattr(create_diffusion(spacing, **fields), loop)(
            network, start.shape, start, clip_denoised=False, model_kwargs={"y": label}, device="cpu", **arguments
        )
        out[name] = numpy(sample)

    double, labels = torch.cat([start, start]), torch.cat([label, torch.full_like(label, 10)])
    for name, all_channels in (("guided_3_250", False), ("guided_all_250", True)):
        recorded()
        network = Network(inputs, 1000, 2 * CHANNELS)
        forward = load_models(root / "models.py", all_channels).DiT.forward_with_cfg
        sample = create_diffusion("250").p_sample_loop(
            lambda x, t, y, n=network, f=forward: f(n, x, t, y, CFG_SCALE),
            double.shape,
            double,
            clip_denoised=False,
            model_kwargs={"y": labels},
            device="cpu",
        )
        out[name] = numpy(sample[:BATCH])

    diffusion, network = create_diffusion("50"), Network(inputs, 1000, 2 * CHANNELS)
    first = torch.zeros(BATCH, dtype=torch.long)
    # The official loop starts at the first timestep; the step from data to there is DDIM's with the network's noise at x0.
    x = diffusion.q_sample(x0, first, network(x0, first, label)[:, :CHANNELS])
    for t in range(49):
        x = diffusion.ddim_reverse_sample(network, x, first + t, clip_denoised=False, model_kwargs={"y": label})["sample"]
    out["invert_50"] = numpy(x)
    return {f"dit/{name}": a for name, a in out.items()}


def run_sit(root: Path, inputs) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(root))
    from transport import ModelType, PathType, Sampler, Transport, WeightType, integrators

    x0, start, noise = (torch.from_numpy(a).movedim(-1, 1) for a in (inputs["x0"], inputs["start"], inputs["noise"][0]))
    label = torch.from_numpy(inputs["label"]).long()
    network, out = Network(inputs, 1, CHANNELS), {}

    def transport(path, sample_eps=0):
        return Transport(
            model_type=ModelType.VELOCITY, path_type=path, loss_type=WeightType.NONE, train_eps=0, sample_eps=sample_eps
        )

    for name, path in (("linear", PathType.LINEAR), ("gvp", PathType.GVP)):
        for t in SIT_TIMES:
            flow = transport(path)
            flow.sample = lambda x1, t=t: (torch.full((BATCH,), t), noise, x1)
            out[f"loss/{name}/{t}"] = flow.training_losses(network, x0, {"y": label})["loss"].numpy()
        for method, points, tolerances in (("euler", 251, {}), ("heun2", 26, {}), ("dopri5", 2, {"rtol": 1e-5, "atol": 1e-6})):
            run = Sampler(transport(path)).sample_ode(sampling_method=method, num_steps=points, **tolerances)
            with torch.no_grad():
                out[f"{method}/{name}"] = numpy(run(start, network, y=label)[-1])
        for form in ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing"):
            for last in ("Mean", "Tweedie", "Euler", None):
                if last != "Mean" and form != "sigma":
                    continue
                integrators.th.randn = Recorded(inputs["noise"])
                # With sample_eps 0, SiT's own choice for velocities, SBDM divides by zero; 1e-3 is its choice elsewhere.
                sampler = Sampler(transport(path, 1e-3 if form == "SBDM" else 0))
                # SiT counts points of the grid: without a last step it makes one step less.
                norm = torch.tensor(0.7 if form == "decreasing" else 1.0)  # SiT's "constant" fails on a Python number
                run = sampler.sample_sde(
                    diffusion_form=form,
                    diffusion_norm=norm,
                    last_step=last,
                    num_steps=250 if last == "Mean" else 51 if last is None else 50,
                )
                form_name = form.replace("inccreasing-", "increasing_").lower()  # so spelt in SiT's code
                out[f"sde/{name}/{form_name}/{str(last).lower()}"] = numpy(run(start, network, y=label)[-1])
    double, labels = torch.cat([start, start]), torch.cat([label, torch.full_like(label, 10)])
    for name, all_channels in (("guided_3", False), ("guided_all", True)):
        forward = load_models(root / "models.py", all_channels).SiT.forward_with_cfg
        with torch.no_grad():
            run = Sampler(transport(PathType.LINEAR)).sample_ode(sampling_method="euler", num_steps=51)
            sample = run(double, lambda x, t, y, f=forward: f(network, x, t, y, CFG_SCALE), y=labels)[-1]
        out[name] = numpy(sample[:BATCH])
    return {f"sit/{name}": a for name, a in out.items()}


def checkouts(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dit", type=Path, required=True)
    parser.add_argument("--sit", type=Path, required=True)
    return parser.parse_args()


def write(name: str, arrays: dict[str, np.ndarray]):
    """Arrays -> `name` beside this script, float64 as float32.

    Raises:
        ValueError: an array is not finite.
    """
    arrays = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}
    bad = [name for name, a in arrays.items() if not np.isfinite(a).all()]
    if bad:
        raise ValueError(f"not finite: {', '.join(bad)}")
    path = Path(__file__).parent / name
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def main():
    arguments = checkouts(__doc__)
    inputs = make_inputs(np.random.default_rng(0))
    arrays = {f"in/{name}": a for name, a in inputs.items()}
    arrays |= run_dit(arguments.dit, inputs) | run_sit(arguments.sit, inputs)
    write("diffusion.npz", arrays)


if __name__ == "__main__":
    main()
