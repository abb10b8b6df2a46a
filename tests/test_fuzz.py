"""A short, seeded part of `fuzz.py`."""

import pytest

from fuzz import TARGETS, make_test


@pytest.mark.parametrize("name, examples", [("images", 60), ("tables", 20), ("checkpoints", 40), ("latents", 60)])
def test_damaged_input_is_refused_in_a_sentence(name, examples, tmp_path):
    make_test(TARGETS[name](tmp_path), examples, seed=0)()
