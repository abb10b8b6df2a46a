"""A short, seeded part of `fuzz.py`."""

import time

import pytest
from hypothesis import strategies as st

import fuzz
from fuzz import TARGETS, Target, make_test
from helper import UserError


@pytest.mark.parametrize("name, examples", [("images", 60), ("tables", 20), ("checkpoints", 40), ("latents", 60)])
def test_damaged_input_is_refused_in_a_sentence(name, examples, tmp_path):
    make_test(TARGETS[name](tmp_path), examples, seed=0)()


def test_any_other_error_and_any_hang_is_a_finding(monkeypatch):
    with pytest.raises(KeyError):
        make_test(Target(st.just(("x",)), lambda key: {}[key]), 1, seed=0)()

    def waits():
        try:
            time.sleep(10)
        except Exception:  # noqa: BLE001  as a reader does that takes every error for a broken file
            raise UserError("broken") from None

    monkeypatch.setattr(fuzz, "SECONDS_A_CASE", 1)
    with pytest.raises(fuzz.Hang):
        make_test(Target(st.just(()), waits), 1, seed=0)()
