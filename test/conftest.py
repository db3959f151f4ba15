"""Fixtures of the tests that talk to real servers. A server starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triton_device  # noqa: F401  (before anything that imports Triton)
from real_server import Server, Servers

# Files that share servers, in the order that needs the fewest starts. A group runs in one worker,
# and no server is in two groups. They take about as long as one another.
SERVER_GROUPS = (
    (
        "test_server_smoke.py",
        "test_server_identity.py",
        "test_server_shared_prefix.py",
        "test_server_abuse.py",
        "test_server_dropin.py",
    ),
    (
        "test_server_host_tier.py",
        "test_server_sight.py",
        "test_server_tenants.py",
        "test_server_aborts.py",
        "test_server_faults.py",
        "test_server_calibrated.py",
        "test_server_tensor_parallel.py",
        "test_server_errors.py",
    ),
)
SERVER_FILES = tuple(file for files in SERVER_GROUPS for file in files)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Tests of servers come last, and first where other workers have the rest meanwhile.
    others = len(SERVER_FILES) if hasattr(config, "workerinput") else -1
    items.sort(key=lambda item: SERVER_FILES.index(item.path.name) if item.path.name in SERVER_FILES else others)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker has a group of servers, or a file of other tests, at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class ServersTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0].rpartition("/")[2]
            return next((files[0] for files in SERVER_GROUPS if file in files), file)

    return ServersTogether(config, log)


@pytest.fixture(scope="session")
def model() -> Path:
    """Checkpoint of the embedded default model."""
    from sglang_mosaic.embedded_model import ensure_model

    return ensure_model(quiet=True)


@pytest.fixture(scope="session")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Every server that these tests know (real_server.py), by name."""
    servers = Servers(model, tmp_path_factory.mktemp("servers"))
    try:
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture
def off_server(servers: Servers) -> Server:
    """Ours, with nothing compressed."""
    return servers["off"]


@pytest.fixture
def seal_server(servers: Servers) -> Server:
    """Ours, compressing every page that leaves the recent window."""
    return servers["seal"]


@pytest.fixture
def pressure_server(servers: Servers) -> Server:
    """Ours, compressing when memory runs out, in a small pool; started by SGLang's own launcher."""
    return servers["pressure"]


@pytest.fixture
def host_server(servers: Servers) -> Server:
    """Ours, with a host tier behind a pool of two prompts, and a key."""
    return servers["host"]


@pytest.fixture
def exact_server(servers: Servers) -> Server:
    """Ours, in 32 bits and with nothing compressed, with a host tier behind a pool of three prompts."""
    return servers["exact"]


@pytest.fixture
def smallest_server(servers: Servers) -> Server:
    """Ours, with the smallest pool that it accepts."""
    return servers["smallest"]
