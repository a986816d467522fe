"""Hostile applications, installed on a real server: each is stopped, or what this system cannot hold is named by the
server's report; the server serves on, and its neighbour keeps its diary."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "apps" / "attacks"))

from driver import ATTACKS, Attacked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with Attacked(tmp_path_factory.mktemp("attacked")) as found:
        yield found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_stopped_or_named(server: Attacked, name: str) -> None:
    row = server.run(name)
    if row["outcome"] == "not enforced":
        pytest.skip(f"the report says that {', '.join(row['lacking'])} is not enforced here: {row['problems']}")
    assert row["outcome"] == "stopped", row
