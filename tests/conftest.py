"""Puts the repository root on the path and finds the real mammograms."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def mammogram_dir():
    """Folder of real mammograms, from the environment variable MAMMOGRAM_DIR."""
    folder = os.environ.get("MAMMOGRAM_DIR")
    if not folder:
        pytest.skip("MAMMOGRAM_DIR names no folder of real mammograms")
    return Path(folder)
