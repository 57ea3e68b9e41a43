"""A Hub and a client of it for each file of tests, for the conftests to import."""

import pytest
from hub.client import Client
from hub.server import OWNER, Hub


@pytest.fixture(scope="module")
def running_hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running_hub):
    """Without faults, and with an empty log."""
    running_hub.forgive()
    return running_hub


@pytest.fixture(scope="module")
def client(running_hub, tmp_path_factory):
    """Of the user `me`."""
    client = Client(tmp_path_factory.mktemp("client"), running_hub.url, OWNER)
    yield client
    client.close()
