"""The table of who may call what, route by route."""

from collections.abc import Iterator

import httpx
import pytest
from access_world import INSECURE, LOOPBACK, REQUIRED, bearer, client_of, make_key
from argon2 import PasswordHasher
from fake_llm import FakeLLM

from llmasos.serve.access import directory, keys
from llmasos.serve.access.access import Access
from llmasos.serve.access.guard import Guard
from llmasos.serve.access.policy import Policy
from llmasos.serve.access.routes import RULES, Rule, methods_of, rule_for
from llmasos.serve.server import create_app
from llmasos.store.database import Database

OPEN = {("GET", path) for path in ("/", "/healthz", "/readyz", "/console", "/console/{path:path}")}
CALLERS = ("nobody", "local", "wrong", "inference", "manage", "publish", "both")
ALLOWED = {
    "open": set(CALLERS),
    "any": {"inference", "manage", "publish", "both"},
    "inference": {"inference", "both"},
    "manage": {"manage", "both"},
    "publish": {"manage", "publish", "both"},
    "metrics": {"local", "manage", "both"},
}
"""Where keys are required. `local`: without a key, from this machine; `nobody`: without one, from elsewhere."""


def routes_of(found) -> Iterator[tuple[str, str]]:
    """Method and path of every route, in included routers too."""
    for route in found:
        if hasattr(route, "effective_candidates"):  # FastAPI keeps an included router whole
            yield from routes_of(route.effective_candidates())
        else:
            assert route.methods, f"{route.path}: a route of a kind that the table does not know"
            yield from ((method, route.path) for method in route.methods - {"HEAD"})


@pytest.fixture(scope="module")
def all_routes(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    with Database.open("sqlite://") as database:
        app = create_app(FakeLLM(), access=Access(database), enable_lora_loading=True)
        return set(routes_of(app.routes))


def test_every_route_has_its_line_in_the_table(all_routes: set[tuple[str, str]]) -> None:
    table = {(rule.method, rule.path) for rule in RULES}
    assert len(table) == len(RULES), "a route is in the table twice"
    assert len(all_routes) > 40 and ("POST", "/v1/chat/completions") in all_routes
    missing = sorted(all_routes - table)
    assert not missing, f"add them to llmasos.serve.access.routes: {missing}"


def test_every_line_of_the_table_has_its_route(all_routes: set[tuple[str, str]]) -> None:
    assert sorted({(rule.method, rule.path) for rule in RULES} - all_routes) == []


def test_only_these_are_open_to_everybody() -> None:
    assert {(rule.method, rule.path) for rule in RULES if rule.access == "open"} == OPEN


def test_what_changes_the_server_needs_the_right_to() -> None:
    for rule in RULES:
        if rule.path.startswith("/llmasos/v1/tasks"):
            assert rule.access == ("any" if rule.method == "GET" else "inference"), rule
        elif rule.path.startswith("/llmasos/v1/jobs"):
            assert rule.access == "any", rule  # the room looks whose job it is
            continue
        elif rule.path.startswith("/llmasos/v1/index"):
            assert rule.access == ("any" if rule.method == "GET" else "publish"), rule
            continue
        elif rule.path.startswith(("/llmasos/v1/agents", "/llmasos/v1/conversations")):
            assert rule.access == ("any" if rule.path.endswith("/tools") else "inference"), rule
        elif rule.path.startswith("/llmasos/v1/apps") and rule.method == "GET" and not rule.path.endswith("/logs"):
            assert rule.access == "any", rule  # those that the key may use
        elif rule.path.startswith("/apps/"):
            assert rule.access == "inference" and rule.counted, rule
            continue
        elif rule.path in ("/llmasos/v1/knowledge/{name}/search", "/llmasos/v1/knowledge/{name}/ask"):
            assert rule.access == "inference", rule
        elif rule.path.startswith("/llmasos/") and rule.path != "/llmasos/v1/usage":
            assert rule.access == "manage", rule
        if rule.counted:
            assert rule.access == "inference" and rule.method == "POST", rule
        if rule.method != "GET" and rule.path != "/api/show":  # that reads
            assert rule.access in ("inference", "manage"), rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.method} {rule.path}")
def test_the_table_finds_its_own_lines_and_nothing_beside_them(rule: Rule) -> None:
    path = concrete(rule)
    assert rule_for(rule.method, path) == rule
    assert rule.method in methods_of(path)
    assert rule_for("TRACE", path) is None
    if ":path}" not in rule.path:
        assert rule_for(rule.method, f"{path}/more/and/more") != rule
    if rule.method == "GET":
        assert rule_for("HEAD", path) == rule


def concrete(rule: Rule) -> str:
    path = rule.path
    while "{" in path:
        start, end = path.index("{"), path.index("}")
        path = path[:start] + "x" + path[end + 1 :]
    return path


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Database, dict[str, str]]]:
    monkeypatch.setattr(keys, "_hasher", lambda: PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    monkeypatch.setattr(directory, "LOOK_EVERY", 0.0)  # hundreds of keys that there are not
    with Database.open("sqlite://") as database:
        yield (
            database,
            {
                "inference": make_key(database, "i", ("inference",)),
                "manage": make_key(database, "m", ("manage",)),
                "publish": make_key(database, "p", ("publish",)),
                "both": make_key(database, "b", ("inference", "manage")),
                "wrong": keys.text_of(*keys.new_text()),
            },
        )


async def reached(scope, receive, send) -> None:
    """Stands for the application: whoever gets here was let in."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def outcomes(access: Access, rule: Rule, texts: dict[str, str]) -> dict[str, int]:
    guard = Guard(reached, access=access)
    found = {}
    for who in CALLERS:
        local = who == "local"
        host, address = ("127.0.0.1:8000", "127.0.0.1") if local else ("server.lan", "192.168.1.9")
        headers = bearer(texts[who]) if who in texts else {}
        async with client_of(guard, address=address, host=host) as client:
            found[who] = (await client.request(rule.method, concrete(rule), headers=headers)).status_code
    return found


async def test_with_keys_required_each_route_lets_in_whom_its_line_says(world) -> None:
    database, texts = world
    access = Access(database, REQUIRED)
    for rule in RULES:
        found = await outcomes(access, rule, texts)
        let_in = {who for who, status in found.items() if status == 299}
        assert let_in == ALLOWED[rule.access], rule
        for who in set(CALLERS) - let_in:
            assert found[who] == (403 if who in ("inference", "manage", "publish") else 401), (rule, who)
    await access.close()


@pytest.mark.parametrize(("policy", "stranger"), [(LOOPBACK, set()), (INSECURE, {"any", "inference"})])
async def test_without_required_keys_this_machine_may_do_all_and_others_little(world, policy: Policy, stranger) -> None:
    database, texts = world
    access = Access(database, policy)
    for rule in RULES:
        found = await outcomes(access, rule, texts)
        assert found["local"] == 299, rule
        assert (found["nobody"] == 299) == (rule.access in stranger | {"open"}), rule
        assert (found["wrong"] == 299) == (rule.access == "open"), rule
        for who in ("inference", "manage", "both"):
            assert (found[who] == 299) == (who in ALLOWED[rule.access]), (rule, who)
    await access.close()


async def test_what_is_in_no_table_is_reached_by_nobody(world) -> None:
    database, texts = world
    access = Access(database, REQUIRED)
    guard = Guard(reached, access=access)
    async with client_of(guard) as client:
        for path in ("/v1/secret", "/v1/chat/completions/", "//v1/models", "/llmasos/v1/keys/", "/V1/models", "/admin"):
            assert (await client.get(path)).status_code == 401, path
            assert (await client.get(path, headers=bearer(texts["both"]))).status_code in (404, 405), path
        refused = await client.put("/v1/completions", headers=bearer(texts["both"]))
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    await access.close()


async def test_paths_that_only_look_like_open_ones_are_not(world) -> None:
    database, _ = world
    access = Access(database, REQUIRED)
    async with client_of(Guard(reached, access=access), address="10.0.0.9", host="server") as client:
        for path in ("/healthz/../v1/models", "/healthz%2f..%2fv1/models", "/healthz;x", "/readyz/x", "/./v1/models"):
            request = client.build_request("GET", "/")
            request.url = httpx.URL("http://server").copy_with(raw_path=path.encode())
            assert (await client.send(request)).status_code == 401, path
    await access.close()
