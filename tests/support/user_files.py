"""Writes Python files of a user for a test, and unregisters their names after it."""

import textwrap

import pytest

from dit_jax import registry
from dit_jax.runtime import user_code


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def forgetful(monkeypatch):
    """Undoes the registrations and imports of a test."""
    monkeypatch.setattr(registry, "_ENTRIES", {section: dict(entries) for section, entries in registry._ENTRIES.items()})
    monkeypatch.setattr(registry, "_RECORDED", {})
    monkeypatch.setattr(user_code, "_IMPORTS", [])
