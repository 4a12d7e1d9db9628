"""A model server that the tests script."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from model_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
