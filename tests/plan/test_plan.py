import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import bucketed
import jax
import numpy as np
import pytest
import tiny
from verbs import refused, run_verbs

from dit_jax import build, recipes
from dit_jax.errors import UserError
from dit_jax.parallel.mesh import shard_batch
from dit_jax.plan import estimate, lowering, search
from dit_jax.plan import text as plan_text
from dit_jax.plan.remedies import least_bytes
from dit_jax.programs import chips, memory, roofline, topology
from dit_jax.programs.collectives import Collective
from dit_jax.programs.traffic import Traffic
from dit_jax.tasks.compiled_step import compile_step
from dit_jax.tasks.state import abstract_state, create_sharded

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def eight(usable_bytes=2**33):
    found = topology.find("cpu:8")
    return dataclasses.replace(found, chip=dataclasses.replace(found.chip, usable_bytes=usable_bytes))


@pytest.fixture(scope="module")
def found():
    """The plan of a small DiT on data=2, fsdp=4."""
    return estimate.plan_training(tiny.config(mesh__fsdp=4), eight(), traffic=True)


def test_memory_is_what_the_run_allocates(found):
    """Bytes per device from shapes that are not those of the arrays, or a program that is not the one a run compiles."""
    config = tiny.config(mesh__fsdp=4)
    mesh, task = build.Run(config).mesh, build.Run(config).task
    state = create_sharded(task, jax.random.key(0), mesh)
    device = mesh.devices.flat[5]

    def allocated(tree):
        return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == device)

    assert found["memory"]["parameters"] == allocated(state.params)
    assert found["memory"]["moving_average"] == allocated(state.ema_params)
    assert found["memory"]["optimizer"] == allocated((state.opt_state, state.step))
    batch = shard_batch(mesh, {"image": np.zeros((16, 8, 8, 1), np.uint8), "label": np.zeros(16, np.int32)})
    compiled, _, _ = compile_step(task, mesh, config.seed, state, {"codec": {}}, batch)
    sizes = memory.of_program(compiled)
    assert {k: found["memory"][k] for k in ("outputs", "aliased", "temporaries")} == {
        k: sizes[k] for k in ("outputs", "aliased", "temporaries")
    }
    assert found["bytes_per_device"] == sizes["total"] > 0


@pytest.mark.exhaustive
def test_offloaded_moments_are_not_on_the_device(found):
    """Moments in host memory that the plan counts as the device's, or forgets; memory of another program than the run's."""
    config = tiny.config(mesh__fsdp=4, mesh__offload="optimizer_and_ema")
    mesh, task = build.Run(config).mesh, build.Run(config).task
    state = create_sharded(task, jax.random.key(0), mesh)
    device, held = mesh.devices.flat[5], {"device": 0, "pinned_host": 0}
    for x in jax.tree.leaves(state):
        held[x.sharding.memory_kind] += sum(shard.data.nbytes for shard in x.addressable_shards if shard.device == device)
    offloaded = estimate.plan_training(config, eight())
    parts = offloaded["memory"]
    assert offloaded["host_bytes_per_device"] == held["pinned_host"] > 2.9 * parts["parameters"]
    assert sum(parts[name] for name in ("parameters", "moving_average", "optimizer")) == held["device"]
    assert offloaded["bytes_per_device"] < found["bytes_per_device"] - 0.9 * held["pinned_host"]
    batch = shard_batch(mesh, {"image": np.zeros((16, 8, 8, 1), np.uint8), "label": np.zeros(16, np.int32)})
    compiled, _, _ = compile_step(task, mesh, config.seed, state, {"codec": {}}, batch)
    assert memory.of_program(compiled, held["pinned_host"])["total"] == offloaded["bytes_per_device"]
    assert "in host memory" in "".join(plan_text.training(offloaded))


def test_traffic_by_place(found):
    """Bytes that the table by module loses or counts twice, kernels of a block counted once for all blocks, an empty place."""
    rows, depth = found["traffic"], tiny.config().model.depth
    assert sum(row["bytes"] for row in rows) == found["hbm_traffic_bytes"]
    assert {row["kind"] for row in rows} == {"products", "copies", "arithmetic"}
    kernels = {row["place"]: row["kernels"] for row in rows if row["kind"] == "products"}
    assert (kernels["forward blocks/mlp/in"], kernels["backward blocks/mlp/in"]) == (depth, 2 * depth)
    lines = list(plan_text.traffic(rows, chips.CHIPS["h200"]))
    assert len(lines) > 5 and "forward blocks/mlp" in "".join(lines)


def test_more_fsdp_is_less_memory(found):
    """A state that is whole on every device whatever mesh.fsdp says."""
    whole, split = state_bytes(tiny.config()), state_bytes(tiny.config(mesh__fsdp=8))
    for part in ("parameters", "moving_average", "optimizer"):
        assert whole[part] > found["memory"][part] > split[part] > whole[part] / 8.5


@pytest.mark.slow
@pytest.mark.parametrize("name, zero1", [("muon", False), ("adafactor", True)])
def test_the_memory_of_a_state_is_what_is_allocated(name, zero1):
    """Catches averages, momentum or sums that a plan leaves out, or that are whole on every device."""
    averages = ("0.5", "power:0.05", "power:0.1")
    config = tiny.config(optimizer={"name": name}, averages=averages, model__depth=1, mesh__fsdp=4, mesh__zero1=zero1)
    run = build.Run(config)
    state = create_sharded(run.task, jax.random.key(0), run.mesh)

    def allocated(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    planned = state_bytes(config)
    assert planned["parameters"] == allocated(state.params)
    assert planned["moving_average"] == allocated((state.ema_params, state.averages))
    assert planned["optimizer"] == allocated((state.opt_state, state.step))
    whole = sum(x.nbytes for x in jax.tree.leaves(state.ema_params))
    assert planned["moving_average"] < 4 * whole / 3  # of four averages, split over four devices but for small arrays
    if name == "muon":  # one momentum for the matrices, two moments for the others
        assert planned["optimizer"] < 2 * whole / 3


def state_bytes(config):
    state = abstract_state(build.Run(config).task, build.Run(config).mesh)
    return estimate.state_memory({"state": state, "constants": {}, "batch": {}, "sums": {}})


def test_plan_says_what_a_script_asks(found):
    """A field of the contract that is missing, or a verdict that is not of this program."""
    assert found["fits"] and found["hbm_bytes"] > 0 and found["collective_bytes"] > 0 and found["step_seconds"] is None
    assert found["mesh"]["data"] == 2 and found["mesh"]["fsdp"] == 4 and found["unknown_loops"] == 0
    assert "fsdp" in found["collectives"]["all-gather"]
    assert found["collectives_hidden"] == 0  # simulated devices wait for every collective
    assert "0% of these bytes overlap with matrix products" in "".join(plan_text.training(found))
    json.dumps(found)


@pytest.mark.parametrize("remat, forwards", [("none", 3), ("full", 4)])
def test_flops(remat, forwards):
    """Rematerialisation that is not counted, or counted as useful; FLOPs of one block out of all."""
    config = tiny.config(model__remat=remat, model__depth=4)
    run = build.Run(config)
    traced, _ = lowering.train_step(run)
    executed, useful = estimate.jaxpr_flops.count(traced.jaxpr), 6 * run.task.macs() * config.batch_size
    assert executed == pytest.approx(useful * forwards / 3, rel=0.05)


def test_model_flops_are_the_papers():
    """MFU against other FLOPs than 3 forwards of 118.6 GMACs at 2 per MAC."""
    assert 6 * build.Run(recipes.dit("XL/2", 256)).task.macs() == pytest.approx(711.73e9, rel=1e-4)


class Refused:
    """A traced program that the compiler refuses for its size."""

    jaxpr = jax.make_jaxpr(lambda x: x)(1.0)

    @staticmethod
    def lower():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.23G) exceeds available HBM (15.75G)."
        )


def test_too_large_gets_remedies(monkeypatch):
    """A program that the compiler refuses taken for a crash, or no word of what would help."""
    config = tiny.config(model__remat="none")
    state = abstract_state(build.Run(config).task, build.Run(config).mesh)
    monkeypatch.setattr(lowering, "train_step", lambda *_: (Refused, {"state": state, "constants": {}, "batch": {}, "sums": {}}))
    found = estimate.plan_training(config, eight())
    assert not found["fits"] and found["limit"] == "hbm capacity" and found["step_seconds"] is None and found["mfu"] is None
    assert found["bytes_per_device"] > 29.23 * 2**30 and "29.23G" in found["refusal"]
    words = " ".join(remedy["what"] for remedy in found["remedies"])
    for word in (
        "mesh.fsdp=8",
        "model.remat=full",
        "model.remat=elementwise",
        "mesh.offload=optimizer ",
        "optimizer_and_ema",
        "microbatches=2",
        "batch_size=8",
    ):
        assert word in words
    assert "param_dtype" not in words  # which training refuses
    savings = [remedy["saves_bytes"] for remedy in found["remedies"]]
    assert savings == sorted(savings, reverse=True) and savings[-1] > 0
    assert "DOES NOT FIT" in "".join(plan_text.training(found))
    for share, enough in ((0.90, True), (0.99, False)):  # an estimate that only just suffices is not to be promised
        usable = found["bytes_per_device"] - int(share * savings[0])
        assert estimate.plan_training(config, eight(usable))["remedies"][0]["enough"] == enough


def test_more_than_there_is_does_not_fit():
    """A program that compiles, for devices that are too small for it, and is said to fit."""
    sizes = {"arguments": 0, "outputs": 0, "aliased": 0, "temporaries": 100, "code": 0, "host": 0, "total": 100}
    compiled = estimate.Compiled(sizes, None, 1, Traffic(1, 1), [], [], None, 0, 1.0)
    mesh = build.Run(tiny.config()).mesh
    assert estimate.analysis(eight(usable_bytes=100), mesh, compiled)["fits"]
    assert not estimate.analysis(eight(usable_bytes=99), mesh, compiled)["fits"]


def test_bound_is_below_what_is_needed(found):
    """A bound that prunes what would fit."""
    config = tiny.config(mesh__fsdp=4)
    least = least_bytes(build.Run(config), state_bytes(config))
    assert 0 < least < found["bytes_per_device"]


def test_sampling():
    """A sampler planned without its steps or its decoder, or for a batch that is not rounded up to whole chunks."""
    found = estimate.plan_sampling(tiny.config(evaluation__batch_size=17, sampler__num_steps=3), eight())
    assert found["fits"] and found["evaluations"] == 3 and found["batch_size"] == 256  # 8 chunks of 32
    one = build.Run(tiny.config()).task.macs()
    assert found["executed_flops"] == pytest.approx(3 * 256 * 2 * one, rel=0.05)
    assert estimate.plan_sampling(tiny.autoencoder(), eight()) is None


def test_sampler_holds_bfloat16_weights():
    """A plan of a sampler that holds float32 weights where it computes in bfloat16."""

    def held(dtype):
        config = tiny.config(model__dtype=dtype)
        return memory.bytes_per_device(lowering.sampling(build.Run(config))[1]["params"])

    assert held("float32") == 2 * held("bfloat16") > 0


def test_codec_and_resident_cache_are_counted():
    """A frozen encoder, LPIPS or a data set on the devices that the plan forgets; a guess where only the data can tell."""
    config = tiny.digits_latent("")
    run = build.Run(config)
    frozen = memory.bytes_per_device(run.abstract_constants())
    assert frozen == 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(run.codec.init, jax.random.key(0)))) > 0
    config.unlock()
    config.data, config.loader = {"name": "latents", "path": ""}, {"resident": True}
    with pytest.raises(UserError, match="--resident_rows"):
        build.Run(config).abstract_constants()
    constants = build.Run(config).abstract_constants(100)
    assert memory.bytes_per_device(constants["moments"]) == 13 * 4 * 4 * 4 * 2
    autoencoder = tiny.autoencoder(task__perceptual_weight=1.0, transform__resolution=16)
    constants = build.Run(autoencoder).abstract_constants()["perceptual"]
    assert constants["conv1_1"]["kernel"].shape == (3, 3, 3, 64) and constants["lin5"].shape == (512,)
    assert constants["scaling"]["scale"].shape == (3,)


@pytest.mark.slow
def test_autoencoder():
    """A plan that only knows diffusion."""
    config = tiny.autoencoder(task__discriminator_weight=0.0)
    run = build.Run(config)
    traced, args = lowering.train_step(run)
    assert args["state"].params["codec"]
    assert estimate.jaxpr_flops.count(traced.jaxpr) == pytest.approx(6 * run.task.macs() * config.batch_size, rel=0.2)


def test_search_ranks_and_prunes(monkeypatch):
    """Illegal meshes that are tried, what cannot fit compiled all the same, or a ranking upside down."""
    wanted, left_out = search.choices(tiny.config(), 8, ["none", "full"], [16], [1, 2])
    shapes = {choice[:4] for choice in wanted}
    assert {(8, 1, 1, False), (1, 2, 4, False), (1, 8, 1, True)} <= shapes
    assert (1, 1, 8, False) not in shapes and (8, 1, 1, True) not in shapes  # 4 heads; ZeRO-1 without fsdp
    assert all(choice.data * choice.fsdp * choice.tensor == 8 for choice in wanted) and left_out == 80 - len(wanted)
    speeds = iter((10.0, 30.0, 20.0))

    def compiled(config, *_):
        return {"fits": True, "bytes_per_device": 1, "images_per_second": next(speeds), "compile_seconds": 1.0, "mesh": {}}

    monkeypatch.setattr(search.estimate, "plan_training", compiled)
    lines = []
    two = dataclasses.replace(eight(), devices=tuple(jax.devices()[:2]))
    result = search.search(tiny.config(), two, ["none"], [16], [1], 3, lines.append)
    assert [p["images_per_second"] for p in result["ranked"]] == [30.0, 20.0, 10.0] and result["pruned"] == 0
    assert len(lines) == 4 and result["not_tried"]
    too_small = dataclasses.replace(two, chip=dataclasses.replace(two.chip, usable_bytes=1))
    assert search.search(tiny.config(), too_small, ["none"], [16], [1], 3, lines.append)["pruned"] == 4
    with pytest.raises(UserError, match="splits its batch"):
        search.search(tiny.config(), two, ["none"], [3], [2], 3, lines.append)


def test_choice_changes_the_config():
    """A search that compiles the same config every time, or changes the caller's."""
    config = tiny.config()
    other = search.Choice(1, 4, 2, True, "full", 32, 2).apply(config)
    assert (other.mesh.fsdp, other.mesh.tensor, other.mesh.zero1, other.model.remat) == (4, 2, True, "full")
    assert (other.batch_size, other.microbatches) == (32, 2)
    assert config.mesh.fsdp == 1 and config.batch_size == 16


class Device:
    def __init__(self, *coords):
        self.coords = coords


class Slice:
    """A 4 x 4 slice as a mesh of data=4, fsdp=4."""

    devices = np.asarray([Device(x, y, 0) for x in range(4) for y in range(4)]).reshape(4, 4, 1)
    shape = {"data": 4, "fsdp": 4, "tensor": 1}  # noqa: RUF012


@pytest.mark.parametrize(
    "kind, sides, groups, links",
    [
        ("v5e", (4, 4), np.arange(16).reshape(4, 4), 1),  # a line
        ("v5e", (4, 4), np.arange(16).reshape(1, 16), 2),
        ("v4", (4, 4, 1), np.arange(16).reshape(4, 4), 2),  # a ring
        ("v4", (4, 4, 1), np.arange(16).reshape(1, 16), 4),
        ("v4", (4, 4, 1), np.arange(16).reshape(8, 2), 1),  # part of a side
    ],
)
def test_bandwidth_of_a_slice(kind, sides, groups, links):
    """A line taken for a ring, or one side of the torus for all."""
    place = topology.Topology("slice", (), chips.CHIPS[kind], sides)
    assert roofline.bandwidth(place, Slice, Collective("all-reduce", "r", groups, 1.0, 1)) == links * 50e9


def test_estimate_by_hand():
    """Seconds that are not bytes over bandwidth, or a limit that is not the longest."""
    place = topology.Topology("slice", (), chips.CHIPS["v5e"], (4, 4))
    flops, traffic = 16 * 0.8 * 197e12, Traffic(int(0.45 * 0.819e12), int(0.9 * 0.819e12 * 2))
    gather = Collective("all-gather", "g", np.arange(16).reshape(4, 4), 0.4e9, 10)
    found = roofline.estimate(place, Slice, flops, traffic, [gather], 0.75)
    assert (found.compute, found.matmul_hbm, found.collectives) == pytest.approx((1, 0.5, 0.1))
    assert found.step == pytest.approx(3.025) and found.limit == "hbm" and found.without_overlap == pytest.approx(3.6)
    slow = dataclasses.replace(found, collectives=5.0)
    assert slow.step == pytest.approx(5) and slow.limit == "collectives"
    exposed = dataclasses.replace(slow, exposed=4.0)
    assert exposed.step == pytest.approx(7) and exposed.limit == "collectives"


@pytest.mark.parametrize(
    "name, text",
    [
        ("v5p:4x4", "has 2 sides, but v5p has 3"),
        ("v9:4x4", "known are v4"),
        ("v5litepod-16", "known are"),
        ("cpu:0", "known are"),
        ("cpu:64", "64 simulated devices, but this process has 8"),
        ("h200:2x2", "sides"),
    ],
)
def test_bad_topologies(name, text):
    """A slice that does not exist, planned as another."""
    with pytest.raises(UserError, match=text):
        topology.find(name)


def test_missing_compiler(monkeypatch):
    """An import error where a package is to be installed."""
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for name, text in (("v5e:4x4", r"dit_jax\[plan\]"), ("h200:8", r"dit_jax\[cuda\]")):
        with pytest.raises(UserError, match=text):
            topology.find(name)


def test_chip_of_a_device():
    """A device's figures guessed."""

    class Unknown:
        platform, device_kind = "tpu", "TPU v99"

    class H200:
        platform, device_kind = "gpu", "NVIDIA H200"

    assert chips.of_device(H200) is chips.CHIPS["h200"] and chips.of_device(jax.devices()[0]) is None
    with pytest.raises(UserError, match="v6e"):
        chips.of_device(Unknown)


def test_compiler_that_refuses():
    """A program that is too large, reported as a crash; its size misread."""
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        Refused.lower()
    assert memory.asked_for(str(refusal.value)) == ("HLO temporaries", int(29.23 * 2**30), int(15.75 * 2**30))
    assert memory.asked_for("INVALID_ARGUMENT: no such flag") is None


def test_batch_must_split():
    """A batch that does not divide, planned as another."""
    with pytest.raises(UserError, match="not a multiple"):
        estimate.plan_training(tiny.config(batch_size=12), eight())
    with pytest.raises(UserError, match="devices, but there are 8"):
        estimate.plan_training(tiny.config(mesh__fsdp=3), eight())


@pytest.mark.slow
def test_verb(tmp_path):
    """The command as a user runs it: a process, a topology of its own, mistakes in one line."""
    tiny_model = ["--config=configs/digits.py", "--config.model.depth=1", "--config.model.width=32", "--config.batch_size=16"]
    calls = [
        ["plan", *tiny_model, "--topology=cpu:4", "--config.mesh.fsdp=2", "--nosampler"],
        ["plan", "--config=configs/digits.py", "--topology=v5z:4x4"],
        ["plan", "--config=configs/nowhere.py"],
        ["plan"],
        ["plan", *tiny_model, "--search", "--search_remats=some", "--topology=cpu:2"],
    ]
    (status, stdout, stderr), *mistakes = run_verbs(tmp_path, calls)
    assert status == 0, stderr
    done = json.loads(stdout.splitlines()[-1])
    assert done["fits"] and done["mesh"]["data"] == 2 and done["mesh"]["fsdp"] == 2 and done["sampler"] is None
    for key in ("bytes_per_device", "hbm_bytes", "flops_per_step", "collective_bytes", "step_seconds", "mfu", "limit"):
        assert key in done
    assert "temporaries" in stderr and "fits in" in stderr
    for outcome, text in zip(mistakes, ("known are v4", "does not exist", "--models", "unknown policy some"), strict=True):
        refused(outcome, text)


@needs_libtpu
@pytest.mark.parametrize(
    "name",
    [
        # tests/test_golden_programs.py compiles for a v5e in CI.
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name in ("v4:2x2x2", "v5e:2x2", "v5p:2x2x2", "v6e:2x2")
    ],
)
def test_tpu_slices(name):
    """A TPU compiler that prints what the parser does not read, or a slice whose devices are not its chips."""
    place = topology.find(name)
    config = tiny.config(mesh__fsdp=2, batch_size=64, model__width=128, model__depth=3)
    found = estimate.plan_training(config, place)
    assert found["fits"] and found["devices"] == len(place.devices) and found["unknown_loops"] == 0
    assert 0 < found["step_seconds"] < 1 and 0 < found["mfu"] < 1 and found["limit"] in ("compute", "hbm", "collectives")
    assert sum(found["collectives"].get("all-reduce", {}).values()) > 0
    held = sum(found["memory"][part] for part in ("parameters", "moving_average", "optimizer"))
    assert held == memory.bytes_per_device(estimate.run_on(config, place).abstract_state)


@pytest.mark.slow
@needs_libtpu
def test_tpu_that_is_too_small():
    """A program that XLA refuses for its size, reported as a crash instead of as too large with remedies."""
    config = recipes.dit("XL/2", 512)
    config.data = {"name": "latents", "path": "", "verify": True}
    config.loader = {"resident": False}
    config.batch_size = 64
    found = estimate.plan_training(config.lock(), topology.find("v5e:2x2"))
    assert not found["fits"] and found["bytes_per_device"] > found["usable_bytes"] and found["remedies"]


def test_a_gpu_gets_its_own_program():
    """The plan of a GPU made of the program that this machine, which has none, would run; a user's choice that is overruled."""
    h200 = SimpleNamespace(name="h200:1", devices=[SimpleNamespace(platform="cuda")])
    platform = estimate.platform_of(h200)
    model = build.Run(tiny.config(model__dtype="bfloat16"), platform=platform).network
    assert (model.unroll, model.remat, model.attention) == (True, "none", "cudnn")
    model = build.Run(tiny.config(model__unroll=False), platform=platform).network
    assert (model.unroll, model.remat, model.attention) == (False, "elementwise", "xla")


def test_buckets_are_all_planned():
    """A plan of one bucket only, that forgets the programs of the others, or whose means are not those of a cycle."""
    planned = estimate.plan_training(bucketed.config(mesh__data=8), eight())
    rows = planned["buckets"]
    assert [(row["bucket"], row["batch_size"], row["weight"]) for row in rows] == [("1x8x8", 16, 2), ("1x8x12", 8, 1)]
    assert [row["tokens"] for row in rows] == [16 * 16, 8 * 24]
    assert planned["fits"] and planned["bytes_per_device"] == max(row["bytes_per_device"] for row in rows)
    facts = {"refusal": None, "usable_bytes": 100, "flops_per_step": 1, "compile_seconds": 1.0}
    plans = [
        facts | {"memory": {"code": 7}, "bytes_per_device": 50, "step_seconds": 1.0, "images_per_second": 16.0},
        facts | {"memory": {"code": 3}, "bytes_per_device": 95, "step_seconds": 4.0, "images_per_second": 2.0},
    ]
    mean = estimate.of_buckets(build.Run(bucketed.config()), plans)
    assert mean["cycle"] == {"steps": 3, "step_seconds": 2.0, "images_per_second": (2 * 16 + 8) / 6}
    assert mean["bytes_per_device"] == 102 and not mean["fits"]  # with the code of the other
    assert "DOES NOT FIT" in "".join(plan_text.buckets(mean))
