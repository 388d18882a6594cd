"""Short runs against golden/loss_curves.json, which golden/make_loss_curves.py wrote."""

import json

import numpy as np
import pytest
from make_loss_curves import FILE, GROUPS, curves

TOLERANCE = 1e-3
# Points that are compared. Two networks that train against each other amplify rounding: an AMD EPYC, whose first two points are
# those of the Intel Xeon that wrote the file to 7e-4, is off by 1.6e-3 in the loss and by half in the discriminator's afterwards.
POINTS = {"discriminator": 2}

GOLDEN = json.loads(FILE.read_text())


def drifts(golden: dict, found: dict) -> list[str]:
    """A line for each number that is not the golden one."""
    lines = []
    for curve, numbers in golden.items():
        points = slice(POINTS.get(curve))
        for name, values in numbers.items():
            values, now = values[points], found[curve].get(name, [])[points]
            if not now or len(now) != len(values):
                lines.append(f"{curve}: {name} was {values} and is {now}")
            elif not np.allclose(now, values, rtol=TOLERANCE, atol=0):
                worst = np.abs(np.array(now) / np.array(values) - 1).max()
                lines.append(f"{curve}: {name} was {values} and is {now}, off by up to {worst:.1e}")
    return lines


def test_every_curve_is_recorded():
    """A run that was added to the table and not to the file, which would then be checked against nothing."""
    assert {group: set(runs) for group, runs in GROUPS.items()} == {group: set(runs) for group, runs in GOLDEN.items()}


# CI compares the training of the digits, of their autoencoder and in its latents; .ci/nightly compares the variants.
IN_CI = ("recipe", "autoencoder", "latents")


def mark(group: str) -> list:
    return [pytest.mark.slow if group in IN_CI else pytest.mark.exhaustive]


@pytest.mark.parametrize("group", [pytest.param(group, marks=mark(group)) for group in GROUPS])
def test_curves(group, tmp_path):
    """A recipe that drifts silently: another initialisation, noise, order of data, target, weight, rate or clipping."""
    lines = drifts(GOLDEN[group], curves(group, tmp_path))
    assert not lines, "training differs from golden/loss_curves.json:\n" + "\n".join(lines)
