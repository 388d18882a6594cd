"""The benchmark: its arithmetic by hand, its program against the training loop's, each mode once; never how fast anything is."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from verbs import ROOT, refused, run_verbs, start

from dit_jax import build, recipes
from dit_jax.benchmark import clip_loading, images, latents, machine, network, peer, saving, scaling, startup, subject, timing
from dit_jax.benchmark.timing import Timing, Work
from dit_jax.data.latents import LatentCache
from dit_jax.diffusion import samplers
from dit_jax.diffusion.guidance import Guidance
from dit_jax.errors import UserError
from dit_jax.models.mmdit import MMDiT
from dit_jax.models.published import Published
from dit_jax.parallel.mesh import make_mesh
from dit_jax.tasks.state import abstract_state, count_parameters


def small(**overrides):
    return subject.of_config(tiny.config(**overrides))


def one_device(**overrides):
    """A tiny subject on one device, as --compare wants it."""
    task = build.Run(tiny.config(**overrides)).task
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return subject.Subject(task, mesh, 4, samplers.DDIM(3), Guidance(1.5), {"codec": {}})


class Clock:
    """A clock that moves only when work is started (by 1 s, on the host) or waited for (by `device` s a call)."""

    def __init__(self, monkeypatch, device):
        self.now, self.pending, self.device = 0.0, 0.0, device
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.jax, "block_until_ready", self.wait)

    def work(self, images=8, host=1.0):
        def call():
            self.now += host
            self.pending += self.device

        return Work(call, images)

    def wait(self, out):
        self.now += self.pending
        self.pending = 0.0


def test_rates_by_hand():
    """Images per second from the median or from the mean of rates, so that images = rate x seconds no longer holds."""
    found = Timing(np.array([0.1, 0.2, 0.3, 0.4]), images=8, cpu_seconds=0.5)
    assert found.rates() == pytest.approx({"images_per_second": 32, "images": 32, "measured_seconds": 1.0, "steps": 4})
    assert found.quantiles() == pytest.approx({"step_seconds_p50": 0.25, "step_seconds_p99": 0.397})


def test_measure_waits_for_every_call(monkeypatch):
    """Timing that stops when the work is started, not when the device has finished it; too few calls for a percentile."""
    clock = Clock(monkeypatch, device=2.0)
    assert timing.measure(clock.work(), 10.0).seconds.tolist() == [3.0] * 4
    assert timing.measure(clock.work(), 0.0).seconds.tolist() == [3.0] * timing.MIN_STEPS
    queued = timing.measure_queued(clock.work(), 5)
    assert queued.seconds.sum() == pytest.approx(5 * 1.0 + 5 * 2.0) and clock.pending == 0


def test_compare_alternates(monkeypatch):
    """Peers measured after all of ours, a ratio upside down, or a warm-up that is counted."""
    clock, order = Clock(monkeypatch, device=0.0), []

    def work(name, seconds):
        def call():
            order.append(name)
            clock.now += seconds

        return Work(call, 8, {"name": name})

    found = timing.compare(work("A", 3.0), {"B": work("B", 2.0)}, 12.0, warm_up_steps=1)
    assert "".join(order) == "AB" + "AAA" + "BBB" + "AAA" + "BBB"
    assert found["ratio"] == {"B": 1.5} and found["images"] == 48 and found["images_per_second"] == pytest.approx(8 / 3)
    assert found["peers"]["B"]["step_seconds_p50"] == 2.0 and found["peers"]["B"]["name"] == "B"


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, teraflops):
    """The peak of another device, or a made-up one for a device that is not in the table."""
    assert machine.peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


def test_utilization_by_hand():
    """MFU that forgets the number of devices, or counts a MAC as one FLOP: XL/2 at 695 images/s on an H200 is 50 %."""
    device = SimpleNamespace(device_kind="NVIDIA H200")
    flops = 6 * 118.621e9
    assert machine.utilization(695, flops, [device]) == pytest.approx(0.500, abs=1e-3)
    assert machine.utilization(8 * 695, flops, [device] * 8) == pytest.approx(0.500, abs=1e-3)
    assert machine.utilization(695, flops, [SimpleNamespace(device_kind="cpu")]) is None


@pytest.mark.parametrize("name", recipes.MODELS)
def test_models_are_the_recipes(name):
    """A --model that is not the network, process or task that the paper's config trains."""
    config = recipes.dit(name, 256)
    bare, whole = subject.of_model(name, (256, 256), 8, "bfloat16").task, build.Run(config.lock()).task
    for field in (
        "network",
        "process",
        "codec",
        "image_shape",
        "latent_shape",
        "conditioner",
        "cond_dropout",
        "ema_decay",
        "microbatches",
    ):
        assert getattr(bare, field) == getattr(whole, field), field


@pytest.mark.parametrize("name", ["ADM@64", "LDM-4@256", "HDiT-S@256", "DiffiT@256"])
def test_published_networks_are_the_recipes(name):
    """A --model=ADM@64 with another network, input or process than its recipe; guidance of a network without a null label."""
    whole = build.Run(recipes.PUBLISHED[name]().lock())
    bare = subject.of_published(name, 8, "bfloat16", {"remat": "full"})
    assert bare.task.network == whole.network.clone(remat="full") and bare.entry == (
        "moments" if "A" != name[0] != "H" else "image"
    )
    assert (bare.task.latent_shape, bare.task.image_shape) == (whole.latent_shape, whole.image_shape)
    assert type(bare.task.process) is type(whole.process) and bare.task.cond_dropout == whole.task.cond_dropout
    assert bare.macs == whole.task.macs()
    if name == "ADM@64":
        with pytest.raises(UserError, match="no null label"):
            subject.of_published(name, 8, "float32", {}, guidance_scale=1.5)
    with pytest.raises(UserError, match="--unroll has no effect on --model=ADM@64"):
        subject.of_published("ADM@64", 8, "float32", {"unroll": True})
    with pytest.raises(UserError, match=r"model\.remat is .dots.; it must be one of"):
        subject.of_published("ADM@64", 8, "float32", {"remat": "dots"})


@pytest.mark.slow
def test_text_networks(monkeypatch):
    """Catches a text network without a condition or with another in the three measurements; guidance that is refused."""
    fields = {"patch_size": 2, "depth": 1, "width": 16, "heads": 2, "out_channels": 16, "context_width": 6, "pooled_width": 5}
    published = Published(fields, (8, 8, 16), process="flow", cond_shapes={"context": (3, 6), "pooled": (5,)})
    monkeypatch.setitem(MMDiT.published, "Tiny@64", published)
    it = subject.of_published("Tiny@64", 8, "float32", {}, sampler="euler", num_steps=1, guidance_scale=2.0)
    assert it.describe()["condition"] == {"random_embeddings": {"context": (3, 6), "pooled": (5,)}}
    assert it.task.latent_shape == (8, 8, 16) and it.task.image_shape == (64, 64, 3) and it.entry == "moments"
    for work in (network.train_step(it), network.forward(it), network.sampler(it)):
        work.call()
    assert work.facts["evaluations"] == 2


def program(text):
    """A compiled program without the names of the source files and functions it came from."""
    return [line.split(", metadata=")[0] for line in text.splitlines() if " = " in line]


def test_batches_are_what_the_tasks_read():
    """Noise of another shape, dtype or sharding than the loader's batches."""
    autoencoder = subject.of_config(tiny.autoencoder())
    subjects = {"pixels": small(), "latents": subject.of_model("S/8", (64, 64), 8, "float32"), "autoencoder": autoencoder}
    shapes = {name: {k: (x.shape, x.dtype.name) for k, x in it.batch().items()} for name, it in subjects.items()}
    assert shapes == {
        "pixels": {"image": ((16, 8, 8, 1), "uint8"), "label": ((16,), "int32")},
        "latents": {"moments": ((8, 8, 8, 8), "float16"), "label": ((8,), "int32")},
        "autoencoder": {"image": ((16, 8, 8, 1), "uint8"), "label": ((16,), "int32")},
    }
    assert len(small().batch()["label"].sharding.device_set) == 8
    assert small().macs == pytest.approx(1e9 * small().describe()["gmacs"]) and autoencoder.macs is None


@pytest.mark.slow
def test_a_skipped_step_is_no_speed():
    """Images per second of steps whose loss was not finite, which skip their update."""
    with pytest.raises(UserError, match="not finite"):
        network.train_step(one_device(codec__std=1e-40))


@pytest.mark.parametrize(
    "argument, text",
    [
        (("S/3", (256, 256), 8, "float32"), "choose one of S/8"),
        (("S/2", (250, 250), 8, "float32"), "not a positive multiple"),
        (("S/8", (72, 72), 8, "float32"), "not a multiple of model.patch_size"),
        (("S/8", (64, 64), 12, "float32"), "batch size 12"),
    ],
)
def test_bad_models(argument, text):
    """A benchmark of something else than what was asked for."""
    with pytest.raises(UserError, match=text):
        subject.of_model(*argument)


# Runs benchmarks in forks of a process in which only jax, flax and optax can be imported.
BARE = """
import json, os, runpy, sys

class OnlyThree:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ml_collections", "grain", "tensorflow_datasets", "array_record", "orbax", "sklearn", "PIL",
                                  "tensorboardX", "safetensors", "torch", "diffusers", "etils"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyThree())
import dit_jax.benchmark.subject, dit_jax.benchmark.vae
dit_jax.models.sizes.SIZES["S"] = dit_jax.models.sizes.Size(2, 32, 2)
for args in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = ["benchmark", *args]
        runpy.run_module("dit_jax.benchmark", run_name="__main__")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {args}")
"""


def check(result, images):
    """Counts and finite numbers of one measurement."""
    assert result["images"] == images * result["steps"] and result["steps"] >= timing.MIN_STEPS
    assert result["images_per_second"] * result["measured_seconds"] == pytest.approx(result["images"])
    assert 0 < result["step_seconds_p50"] <= result["step_seconds_p99"] < math.inf


@pytest.mark.slow
def test_bare_machine(tmp_path):
    """A benchmark that needs more than jax, flax and optax where it promised not to."""
    model = ["--model=S/8", "--resolution=64", "--batch_size=2", "--seconds=0"]
    process = start(
        [
            "-c",
            BARE,
            json.dumps(
                [
                    ["--what=train_step", *model, "--table"],
                    ["--what=sampler", *model, "--sampler=ddim", "--num_steps=2", "--guidance_scale=1.5"],
                    ["--what=vae", "--preset=small", "--resolution=8", "--batch_size=2", "--seconds=0"],
                ]
            ),
        ],
        tmp_path,
    )
    assert process.returncode == 0, process.stderr
    step, sampler, vae = map(json.loads, process.stdout.splitlines())
    for result in (step, sampler, vae["encode"], vae["decode"]):
        check(result, 2)
    gmacs = 1e9 * step["gmacs"]
    assert (step["flops_per_image"], sampler["flops_per_image"]) == pytest.approx((6 * gmacs, 2 * 2 * 2 * gmacs))
    assert sampler["evaluations"] == 4 and step["parameters"] == sampler["parameters"]
    assert step["mfu"] is None and step["device"] == "cpu" and step["versions"]["flax"] and step["compile_seconds"] > 0
    assert step["program_bytes"]["peak"] > 4 * 4 * step["parameters"]  # parameters, their average, two moments
    assert "versions.jax " in process.stderr and vae["encode"]["gmacs"] < vae["decode"]["gmacs"]


MISTAKES = {
    "nothing": ([], "choose what to measure"),
    "useless flag": (["--what=images", "--model=S/2"], "--model has no effect with --what=images"),
    "two subjects": (["--what=forward", "--config=configs/digits.py", "--batch_size=8"], "--config.batch_size=64"),
    "peers": (["--what=forward", "--peers=eager"], "without --compare"),
    "peer": (["--what=forward", "--compare", "--peers=lazy"], "names lazy"),
    "scaling": (["--what=scaling", "--config=configs/digits.py", "--config.mesh.data=4"], "lets it grow from 1"),
    "threads": (["--what=images", "--threads=1,many"], "must be integers of at least 1"),
    "cache": (["--what=latents", "--data=/nowhere"], "not a latent cache"),
    "autoencoder": (["--what=forward", "--config=configs/vae_digits.py"], "trains an autoencoder"),
}


CONFIG = [
    "--what=train_step",
    "--seconds=0",
    "--config=configs/digits_latent.py",
    "--config.data.path=/nowhere",
    "--config.model.depth=1",
    "--config.model.width=32",
    "--config.batch_size=4",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    calls = [["benchmark", *args] for args in [CONFIG, *(args for args, _ in MISTAKES.values())]]
    return dict(zip(["config", *MISTAKES], run_verbs(tmp_path_factory.mktemp("benchmarks"), calls), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(outcomes, mistake):
    """A flag that is ignored, a stack trace for a user's mistake, or a zero exit status."""
    refused(outcomes[mistake], MISTAKES[mistake][1])


@pytest.mark.slow
def test_a_config(outcomes):
    """Overrides that do not reach the benchmark, or a config that needs its data set."""
    status, stdout, stderr = outcomes["config"]
    assert status == 0, stderr
    result = json.loads(stdout)
    check(result, 4)
    assert result["model"]["depth"] == 1 and result["batch_size"] == 4 and result["resolution"] == 8


@pytest.mark.exhaustive
def test_scaling(monkeypatch):
    """A batch that does not grow with the devices, a mesh over others than were asked for, an efficiency upside down."""
    assert scaling.counts(8, 1) == [1, 2, 4, 8] and scaling.counts(7, 2) == [1, 2]
    with pytest.raises(UserError, match="at least 6 devices, but there are 5"):
        scaling.counts(5, 3)
    monkeypatch.setattr(scaling, "counts", lambda devices, group: [1, 2])
    config = tiny.config(model__depth=1, batch_size=4, mesh__tensor=2)
    found = scaling.run(
        lambda ways, devices: subject.of_config(scaling.grown(config, "fsdp", ways), devices), scaling.group(config, "fsdp"), 0.0
    )
    first, second = found["by_devices"]
    assert [(row["devices"], row["batch_size"], row["mesh"]["fsdp"]) for row in (first, second)] == [(2, 4, 1), (4, 8, 2)]
    assert found["efficiency"] == second["images_per_second"] / first["images_per_second"] and first["efficiency"] == 1
    axes = [{axis for row in rows["collective_bytes"].values() for axis in row} for rows in (first, second)]
    assert axes[0] == {"tensor"} and "fsdp" in axes[1]


def test_forward():
    """A forward that counts as a training step, or misses half of the batch."""
    it = one_device()
    work = network.forward(it)
    assert work.call().shape == (4, 8, 8, 2) and work.facts["flops_per_image"] == 2 * it.macs
    check(network.run(it, work, 0.0, queue=True), 4)


def test_clips(monkeypatch):
    """Frames that count as clips, or those that are decoded for those that are kept."""
    monkeypatch.setattr(clip_loading, "SYNTHETIC_CLIPS", 2)
    monkeypatch.setattr(clip_loading, "SYNTHETIC_FRAMES", 5)
    result = clip_loading.run(None, 4, (16, 24), 2, 0.0, [1, 2])
    assert result["mean_stored"] == {"frames": 5, "height": 128, "width": 128, "fps": 25} and result["num_clips"] == 2
    for row in result["by_threads"]:
        assert row["frames_per_second"] == 4 * row["images_per_second"]
        assert row["frames_per_cpu_second"] * row["cpu_seconds"] == pytest.approx(4 * row["images"])


def test_images(monkeypatch):
    """Images that are counted twice or not at all, or another number of threads than was asked for."""
    monkeypatch.setattr(images, "SYNTHETIC_IMAGES", 3)
    result = images.run(None, (16, 24), 4, 0.0, [1, 2])
    assert [row["threads"] for row in result["by_threads"]] == [1, 2] and result["num_images"] == 3
    for row in result["by_threads"]:
        check(row, 4)
        assert row["images_per_cpu_second"] * row["cpu_seconds"] == pytest.approx(row["images"])
    assert result["images_per_second"] == max(row["images_per_second"] for row in result["by_threads"])


def test_latents(tmp_path):
    """A made-up cache that is not one, or bytes per second of another row."""
    latents.write_cache(tmp_path, records=10, size=(16, 16))
    cache = LatentCache(tmp_path, verify=True)
    assert len(cache) == 10 and cache.views == 2 and cache.moments_shape == (2, 2, 8) and len(cache.manifest["shards"]) == 4
    assert 0.9 < cache.slice(0, 20).astype(np.float32).std() < 1.1
    result = latents.run(str(tmp_path), (16, 16), 10, 4, 0.0)
    check(result, 4)
    assert result["cache_bytes"] == 10 * 2 * 2 * 2 * 8 * 2
    assert result["bytes_per_second"] == pytest.approx(64 * result["images_per_second"])


def test_made_up_latents():
    """A size that becomes the side of a square on its way to the cache that is made up."""
    result = latents.run(None, (16, 24), 10, 4, 0.0)
    assert result["data"] == "synthetic" and result["records"] == 10 and result["moments_shape"] == (2, 3, 8)


def test_checkpoint(tmp_path, monkeypatch):
    """A state of zeros, which compresses to nothing; seconds out of order; files left behind."""
    monkeypatch.setattr(saving, "REPEATS", 1)
    it = one_device()
    result = saving.run(it, str(tmp_path))
    state = abstract_state(it.task, it.mesh)
    assert result["state_bytes"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert result["written_bytes"] > 0.8 * result["state_bytes"]
    assert 0 < result["blocking_seconds"] <= result["durable_seconds"] <= result["verified_seconds"]
    assert not list(tmp_path.iterdir())


# Ends well only if someone looks at the clock after its first step and before its end.
CHILD = """
import os, sys, time
os.makedirs(os.environ["JAX_COMPILATION_CACHE_DIR"], exist_ok=True)
print("compiled", "step 1/2  loss 1", sep="\\n", file=sys.stderr, flush=True)
for _ in range(100):
    if os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
else:
    sys.exit("error: nobody looked")
print("step 2/2", file=sys.stderr)
open(os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "x"), "a").write("ab")
"""


def test_startup_stops_the_watch_at_the_first_step(monkeypatch, tmp_path):
    """Time until the process ends instead of until its first step; a second start without the first one's programs."""
    looked, times = tmp_path / "looked", [0.0, 5.0, 20.0, 22.0]

    def clock():
        looked.unlink(missing_ok=True) if len(times) % 2 == 0 else looked.touch()
        return times.pop(0)

    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(startup, "child", lambda *_: [sys.executable, "-c", CHILD, str(looked)])
    found = startup.run(None, [], [])
    assert (found["cold_seconds"], found["cached_seconds"]) == (5.0, 2.0)
    assert (found["cache_files"], found["cache_bytes"]) == (1, 4)


def test_startup_that_fails(monkeypatch):
    """A number for a process that never took a step."""
    monkeypatch.setattr(startup, "child", lambda *_: [sys.executable, "-c", "import sys; sys.exit('error: no data')"])
    with pytest.raises(UserError, match="status 1: no data"):
        startup.run(None, [], [])


@pytest.mark.exhaustive
def test_startup(tmp_path):
    """Progress of training that the stopwatch no longer understands."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for args in (["--config=configs/digits.py", "--config.model.depth=1"], ["--model=S/8", "--resolution=64", "--batch_size=2"]):
        process = start(["-m", "dit_jax.benchmark", "--what=startup", *args], tmp_path)
        assert process.returncode == 0, process.stderr
        result = json.loads(process.stdout)
        assert result["cold_seconds"] > 0 and result["cached_seconds"] > 0 and result["cache_files"] > 0


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("diffusers")
    return pytest.importorskip("torch")


def test_peer_is_the_same_network(torch):
    """A peer with more parameters (a label table in every block), another batch or another output than ours."""
    it = one_device()
    theirs = peer.Peer(it, "eager")
    assert theirs.facts["parameters"] == count_parameters(abstract_state(it.task, it.mesh).params)
    x, t, labels = theirs.inputs()
    assert tuple(x.shape) == (4, 1, 8, 8) and int(t.max()) < 1000 and int(labels.max()) < 10
    assert tuple(theirs.model(x, t, labels).sample.shape) == (4, 2, 8, 8)


def test_peer_trains(torch):
    """A peer that skips the backward, the update or the average, and so is faster than a training step."""
    theirs = peer.Peer(one_device(), "eager")
    before = [p.detach().clone() for p in theirs.model.parameters()]
    calls = []
    monkey = torch._foreach_lerp_

    def spy(average, *args):
        monkey(average, *args)
        calls.append([a.clone() for a in average])

    torch._foreach_lerp_ = spy
    try:
        theirs.train_step().call()
    finally:
        torch._foreach_lerp_ = monkey
    moved = [not torch.equal(a, b) for a, b in zip(before, theirs.model.parameters(), strict=True)]
    assert any(moved) and len(calls) == 1 and any(not torch.equal(a, b) for a, b in zip(before, calls[0], strict=True))


def test_peer_samples(torch):
    """A peer that draws with fewer evaluations or without guidance."""
    theirs = peer.Peer(one_device(), "eager")
    batches = []
    theirs.model.register_forward_hook(lambda module, args, out: batches.append(len(args[0])))
    drawn = theirs.sampler().call()
    assert batches == [8, 8, 8] and drawn.shape == (4, 1, 8, 8) and drawn.dtype == np.uint8


def test_peer_is_refused(torch):
    """A ratio of one device to eight, or of DDPM to DDIM."""
    with pytest.raises(UserError, match="the mesh has 8"):
        peer.Peer(small(), "eager")
    other = dataclasses.replace(one_device(), sampler=samplers.Ancestral(3))
    with pytest.raises(UserError, match="--sampler=ddim"):
        peer.Peer(other, "eager").sampler()


def test_evaluation(monkeypatch):
    """Compilation or the first batches counted as time of the images that follow; images counted that were not waited for."""
    from dit_jax.benchmark import features

    class Slow:
        name = "slow"

        def __call__(self, params, x):
            pixels = x.reshape(len(x), -1)[:, :4].astype(np.float32)
            return {"features": pixels, "spatial": pixels, "probabilities": jax.nn.softmax(pixels)}

    class Weights:
        def init(self, key, x):
            return {"params": {}}

    monkeypatch.setattr(features, "Inception", Slow)
    monkeypatch.setattr(features, "InceptionV3", Weights)
    result = features.run((4, 4), 8, 48)
    assert result["images"] == 40 and result["measured_seconds"] < result["total_seconds"]
    assert result["images_per_second"] == 40 / result["measured_seconds"]
    with pytest.raises(UserError, match="give at least 32"):
        features.run((4, 4), 8, 31)


@pytest.mark.exhaustive
def test_overhead():
    """A count of the checks that is that of another program, or a loop whose cost is that of the device."""
    from dit_jax.benchmark import overhead

    result = overhead.run(subject.of_config(tiny.config(model__depth=1, batch_size=8)), 0.0)
    assert 0 < result["host_seconds"] < result["recorded_host_seconds"] < 0.1 and result["host_share"] > 0
    assert result["added_flops"] > 0 and result["added_bytes"] >= 0 and result["flops_share"] < 0.2
