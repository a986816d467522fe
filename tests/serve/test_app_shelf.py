"""What the server's indexes have: `GET /llmasos/v1/store`."""

from pathlib import Path
from typing import Any

import pytest
from access_world import LOOPBACK, REQUIRED, bearer, guarded, make_key
from app_packages import package

from llmasos.store.database import Database
from llmasos.store.packages import Apps, Index


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two indexes of the server: the first has `ask` in two versions, the second `ask` and `other`."""
    first, second = tmp_path / "first", tmp_path / "second"
    for place, name, version in (
        (first, "ask", "1.0.0"),
        (first, "ask", "1.1.0"),
        (second, "ask", "9.0.0"),
        (second, "other", "1.0.0"),
    ):
        owner = "ann" if name == "other" else None
        Index(place).publish(package(tmp_path / f"{place.name}-packed", version, name=name), owner)
    monkeypatch.setenv("LLMASOS_APP_INDEX", f"{first},{second},{tmp_path / 'none'}")
    return first, second


async def ask(tmp_path: Path, *, query: dict[str, Any] | None = None) -> dict[str, Any]:
    with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
        access, client = guarded(database, LOOPBACK)
        async with client:
            answer = await client.get("/llmasos/v1/store", params=query)
        await access.close()
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_application_is_that_of_the_first_index_with_all_its_versions(places, tmp_path: Path) -> None:
    first, second = places
    Apps().install("ask==1.0.0", [Index(first)], accept=True)
    found = await ask(tmp_path)
    apps = {one["name"]: one for one in found["data"]}
    assert found["indexes"][:2] == [str(first), str(second)]
    assert (apps["ask"]["version"], apps["ask"]["index"], apps["ask"]["installed"]) == ("1.1.0", str(first), "1.0.0")
    assert [one["version"] for one in apps["ask"]["versions"]] == ["1.1.0", "1.0.0"]
    other = apps["ann/other"]
    assert (other["app"], other["index"], other["installed"]) == ("other", str(second), None)


async def test_an_index_that_cannot_be_read_is_named_beside_what_the_others_have(places, tmp_path: Path) -> None:
    found = await ask(tmp_path, query={"query": "OTHER answers"})
    assert [one["name"] for one in found["data"]] == ["ann/other"]
    [fault] = found["faults"]
    assert fault["index"] == str(tmp_path / "none") and "index.json" in fault["message"]


async def test_what_is_withdrawn_is_said_and_not_chosen(places, tmp_path: Path) -> None:
    first, _ = places
    Index(first).yank("ask", "1.1.0", "loses data")
    found = await ask(tmp_path, query={"query": "ask", "index": str(first)})
    [app] = found["data"]
    assert app["version"] == "1.0.0" and app["versions"][0]["yanked"] == "loses data"
    assert found["indexes"] == [str(first)]


async def test_only_who_manages_the_server_looks_into_indexes(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
        users, managers = make_key(database), make_key(database, "boss", scopes=("manage",))
        access, client = guarded(database, REQUIRED)
        async with client:
            assert (await client.get("/llmasos/v1/store", headers=bearer(users))).status_code == 403
            assert (await client.get("/llmasos/v1/store", headers=bearer(managers))).status_code == 200
        await access.close()
