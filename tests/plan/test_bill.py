"""The bill is arithmetic on plans and measurements: counts of calls, seconds of a call, chips."""

import dataclasses

import pytest
import tiny
from verbs import refused, run_verbs

from dit_jax import recipes
from dit_jax.errors import UserError
from dit_jax.plan import bill, estimate, text
from dit_jax.programs import chips, topology


@pytest.fixture(scope="module")
def slice_of_8():
    """Eight simulated devices that are said to be as fast as TPU v5e chips."""
    return dataclasses.replace(topology.find("cpu:8"), chip=dataclasses.replace(chips.CHIPS["v5e"], usable_bytes=2**34))


def config(**overrides):
    return tiny.config(num_steps=1000, preview__every_steps=100, preview__num_images=8, **overrides)


@pytest.fixture(scope="module")
def first(slice_of_8):
    return bill.bill(config(), slice_of_8, samples=500)


def test_a_bill_is_calls_times_seconds(first, slice_of_8):
    """Hours of one chip taken for those of the slice, a part that is counted twice or not at all, per-image time per batch."""
    step = estimate.plan_training(config(), slice_of_8)["step_seconds"]
    drawn = estimate.plan_sampling(config(), slice_of_8)
    image = drawn["batch_seconds"] / drawn["batch_size"]
    parts = {part["name"]: part for part in first["parts"]}
    assert list(parts) == ["training", "previews", "sampling", "evaluation"]
    assert parts["training"]["hours"] == pytest.approx(1000 * step / 3600)
    assert parts["previews"]["hours"] == pytest.approx(10 * 8 * image / 3600)
    assert parts["sampling"]["hours"] == pytest.approx(500 * image / 3600)
    assert parts["evaluation"]["hours"] > 0
    assert all(part["chip_hours"] == pytest.approx(8 * part["hours"]) for part in parts.values())
    assert first["chip_hours"] == pytest.approx(sum(part["chip_hours"] for part in parts.values()))
    lines = "\n".join(text.bill(first | {"price": 2.0, "cost": 2 * first["chip_hours"]}))
    assert "1,000 steps of 16" in lines and f"{2 * first['chip_hours']:,.2f}" in lines


def test_measurements_replace_estimates(first, slice_of_8):
    """A measurement of another batch, another number of chips or another network in the bill; images/s read as steps/s."""
    gmacs = estimate.run_on(config(), slice_of_8).task.macs() / 1e9
    place = {"device": "TPU v5 lite", "num_devices": 8, "gmacs": gmacs}
    row = {"what": "train_step", "batch_size": 16, "images_per_second": 32, **place}
    draw = {"what": "sampler", "evaluations": 4, "images_per_second": 10, **place}
    changes = ({"batch_size": 32}, {"num_devices": 4}, {"gmacs": 1.0}, {"device": "TPU v4"})
    others = [*(row | change for change in changes), draw | {"evaluations": 5}]
    result = bill.bill(config(), slice_of_8, samples=500, measurements=[row, draw, *others])
    parts = {part["name"]: part for part in result["parts"]}
    assert parts["training"] | {"amount": ""} == {
        "name": "training", "amount": "", "hours": 1000 * 0.5 / 3600, "chip_hours": 8 * 1000 * 0.5 / 3600, "source": "measurement"
    }  # fmt: skip
    assert parts["sampling"]["hours"] == 50 / 3600 and parts["previews"]["source"] == "measurement"
    assert parts["evaluation"]["source"] == "estimate"
    unmatched = bill.bill(config(), slice_of_8, samples=500, measurements=others)
    assert [part["source"] for part in unmatched["parts"]] == ["estimate"] * 4


@pytest.mark.exhaustive
def test_encoding_counts_mirror_images(slice_of_8):
    """A cache without its mirror images in the bill, or encoding in the bill of a config that does not need it."""
    latents = recipes.digits_latent().unlock()
    latents.data, latents.loader, latents.transform.flip = {"name": "latents", "path": "", "verify": True}, {}, True
    parts = {part["name"]: part for part in bill.bill(latents, slice_of_8, examples=3000)["parts"]}
    assert parts["encoding"]["amount"].startswith("6,000 views") and parts["encoding"]["hours"] > 0
    with pytest.raises(UserError, match="--examples=3000"):
        bill.bill(config(), slice_of_8, examples=3000)


def test_what_has_no_price_is_said():
    """A bill of 0 hours for devices without a speed."""
    with pytest.raises(UserError, match="simulated devices have no speed"):
        bill.bill(config(), topology.find("cpu:8"))


def test_files_and_flags_that_are_refused(tmp_path):
    """A price that is ignored; a file of measurements that is not one."""
    (tmp_path / "bad.jsonl").write_text('{"what": "train_step"}\nhello\n')
    outcomes = run_verbs(
        tmp_path,
        [
            ["plan", "--config=digits", "--price=2"],
            ["plan", "--bill", "--config=digits", "--measured=bad.jsonl"],
            ["plan", "--bill", "--config=digits", "--measured=none.jsonl"],
            ["plan", "--bill", "--config=digits", "--traffic"],
        ],
    )
    refused(outcomes[0], "--price=2.0 has no effect without --bill")
    refused(outcomes[1], "line 2 is not a result of dit_jax.benchmark")
    refused(outcomes[2], "--measured=none.jsonl cannot be read")
    refused(outcomes[3], "--traffic has no effect with --bill")
