"""What every test stands on: no network for models, one torch thread a process, and the demo model for some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# set before anything imports torch or transformers, and handed on to the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of demo:smollm2-135m, converted on first use; fails with the one line that names the remedy."""
    from compress.checkpoint.source import locate
    from compress.errors import CompressError

    try:
        return locate("demo:smollm2-135m").folder
    except CompressError as error:
        pytest.fail(error.message, pytrace=False)
