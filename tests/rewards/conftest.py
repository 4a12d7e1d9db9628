"""A model server that the tests script, and a table at which episodes are played."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from episode_table import at_table_of
from model_server import Server


@pytest.fixture
def at_table(tiny_model: Path) -> Any:
    """See `episode_table.at_table_of`."""
    return partial(at_table_of, tiny_model)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
