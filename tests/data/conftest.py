"""Fixtures of the tests of data."""

import pytest
from absl import flags


@pytest.fixture
def parsed_flags():
    """Workers need parsed absl flags; pytest parses none."""
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not was_parsed:
        flags.FLAGS.unparse_flags()
