"""Paths in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
STAND_INS = ROOT / "tests" / "support" / "stand_ins"
