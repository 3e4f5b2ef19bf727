"""Each key opens what it is for and nothing else, over real sockets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from driftgate.client import Client
from driftgate.errors import AccessError
from driftgate.gateway.app import create_app
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.keys import (
    KEY_PREFIX,
    Access,
    Keys,
    TrajectoryKeys,
    access_of,
    digest_of,
    is_loopback,
    private_name,
)
from tests.gateway.conftest import Agent, StandIn

CALL, READ, ADMIN = (
    "call-key-0123456789abcdef",
    "read-key-0123456789abcdef",
    "admin-key-0123456789abcdef",
)
SIGNING = "0123456789abcdef" * 2
SETTINGS: dict[str, Any] = {
    "call_keys": [digest_of(CALL)],
    "read_keys": [digest_of(READ)],
    "admin_keys": [digest_of(ADMIN)],
    "signing_key": SIGNING,
}
OWN = TrajectoryKeys(SIGNING).make("own")
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "input": "hi",
    "max_tokens": 5,
}
"""A body that every model route takes."""

Connect = Callable[..., Any]


@pytest.fixture
async def agent(connect: Connect) -> Agent:
    agent: Agent = await connect(**SETTINGS)
    return agent


async def ask(
    agent: Agent,
    method: str,
    path: str,
    key: str | None,
    *,
    header: str = "Authorization",
    **more: Any,
) -> int:
    value = f"Bearer {key}" if header == "Authorization" else str(key)
    headers = more.pop("headers", {}) | ({header: value} if key is not None else {})
    async with agent.http.request(method, agent.url + path, headers=headers, **more) as answer:
        await answer.read()
        return answer.status


EVERYONE = {"nobody", "stranger", "forger", "call", "read", "admin", "own", "other"}

# Method, path, who may; the rest is 401 without a key and 403 with one of another kind
TABLE: list[tuple[str, str, set[str]]] = [
    ("GET", "/healthz", EVERYONE),
    ("GET", "/readyz", EVERYONE),
    ("GET", "/metrics", {"read", "admin"}),
    ("POST", "/v1/chat/completions", {"call", "admin", "own", "other"}),
    ("POST", "/t/own/v1/chat/completions", {"call", "admin", "own"}),
    ("POST", "/t/%6fwn/v1/chat/completions", {"call", "admin", "own"}),
    ("POST", "/t/own%20/v1/chat/completions", set()),
    ("POST", "/v1/responses", {"call", "admin", "own", "other"}),
    ("POST", "/t/own/v1/responses", {"call", "admin", "own"}),
    ("GET", "/v1/responses/resp_none", set()),
    ("POST", "/v1/messages", {"call", "admin", "own", "other"}),
    ("POST", "/t/own/v1/messages", {"call", "admin", "own"}),
    ("POST", "/v1/messages/count_tokens", {"call", "admin", "own", "other"}),
    ("POST", "/t/own/v1/messages/count_tokens", {"call", "admin", "own"}),
    ("GET", "/v1/models", {"call", "admin", "own", "other"}),
    ("GET", "/t/own/v1/models", {"call", "admin", "own"}),
    ("GET", "/api/trajectories", {"read", "admin"}),
    ("POST", "/api/trajectories", {"admin"}),
    ("GET", "/api/trajectories/own", {"read", "admin", "own"}),
    ("GET", "/api/trajectories/own/steps/0", {"read", "admin", "own"}),
    ("GET", "/api/trajectories/own/mismatch", {"read", "admin", "own"}),
    ("GET", "/api/trajectories/own/explain", {"read", "admin", "own"}),
    ("GET", "/api/trajectories/own/verdict", {"read", "admin", "own"}),
    ("GET", "/api/trajectories/own/tree", {"read", "admin", "own"}),
    ("GET", "/api/feedback", {"read", "admin"}),
    ("POST", "/api/trajectories/own/reward", {"admin"}),
    ("GET", "/api/trajectories/own/steps/0/routes", {"read", "admin", "own"}),
    ("GET", "/api/weights", {"read", "admin"}),
    ("POST", "/api/weights", {"admin"}),
    ("GET", "/api/cells", {"read", "admin"}),
    ("GET", "/api/cells/pair?a=e/t/m&b=e/t/m", {"read", "admin"}),
    ("GET", "/api/cells/load?cell=e/t/m", {"read", "admin"}),
    ("GET", "/api/overview", {"read", "admin"}),
    ("GET", "/api/series", {"read", "admin"}),
    ("GET", "/api/glossary", {"read", "admin"}),
    ("GET", "/api/drift", {"read", "admin"}),
    ("GET", "/api/drift?trajectory=own", {"read", "admin", "own"}),
    ("GET", "/api/drift?trajectory=own&trajectory=more", set()),
    ("GET", "/api/openapi.json", {"read", "admin"}),
    ("GET", "/api/nothing", set()),
    ("DELETE", "/api/trajectories/own", set()),
]
WHO: dict[str, str | None] = {
    "nobody": None,
    "stranger": "stranger-0123456789abcdef",
    "forger": OWN[:-1] + ("A" if OWN[-1] != "A" else "B"),
    "call": CALL,
    "read": READ,
    "admin": ADMIN,
    "own": OWN,
    "other": TrajectoryKeys(SIGNING).make("other"),
}


async def test_each_key_opens_its_own(agent: Agent) -> None:
    await ask(agent, "POST", "/t/own/v1/chat/completions", CALL, json=CHAT)
    await agent.flush()
    found: dict[tuple[str, str], set[str]] = {}
    for method, path, _ in TABLE:
        bodies: dict[str, dict[str, Any]] = {"reward": {"value": 1}, "weights": {"resume": True}}
        body = bodies.get(path.rsplit("/", 1)[-1], {} if "/api/" in path else CHAT)
        for who, key in WHO.items():
            status = await ask(agent, method, path, key, json=body if method == "POST" else None)
            if status < 400:
                found.setdefault((method, path), set()).add(who)
            elif who in ("nobody", "stranger", "forger"):
                assert status == 401, (method, path, who)
            else:
                assert status in (400, 403, 404, 405), (method, path, who, status)
    assert found == {(method, path): who for method, path, who in TABLE if who}


async def test_every_route_is_in_the_table(agent: Agent) -> None:
    app = create_app(agent.gateway.config)
    for route in app.router.routes():
        assert route.resource is not None
        access = access_of(route.method, route.resource.canonical)
        known: set[Access] = {"open", "call", "read", "admin"}
        assert access in known
        if access == "open":
            path = route.resource.canonical
            assert path in ("/", "/healthz", "/readyz") or path.startswith("/static/")
    assert access_of("GET", "/something/new") == "admin"
    assert access_of("POST", "/api/something/new") == "admin"
    assert access_of("POST", "/healthz/x") == "admin"


async def test_openapi_says_which_key_opens_what(agent: Agent) -> None:
    headers = {"Authorization": f"Bearer {READ}"}
    async with agent.http.get(agent.url + "/api/openapi.json", headers=headers) as answer:
        document = await answer.json()
    assert set(document["components"]["securitySchemes"]) == {"read", "admin", "trajectory"}
    of_kind = {"read": "read", "admin": "admin", "own": "trajectory"}
    told = {(method, path): who for method, path, who in TABLE}
    told["GET", "/api/drift"] = told["GET", "/api/drift?trajectory=own"]
    told["GET", "/api/cells/pair"] = told["GET", "/api/cells/pair?a=e/t/m&b=e/t/m"]
    told["GET", "/api/cells/load"] = told["GET", "/api/cells/load?cell=e/t/m"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            asked = path.replace("{trajectory}", "own").replace("{step}", "0")
            opens = {of_kind[who] for who in told[method.upper(), asked]}
            assert {name for one in operation["security"] for name in one} == opens, path


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
async def test_no_key_of_the_gateway_reaches_the_engine(
    agent: Agent, engine: StandIn, header: str
) -> None:
    for key in (CALL, ADMIN, OWN):
        extra = {"Authorization": f"Bearer {key}", "x-api-key": key}
        path = "/v1/chat/completions"
        assert await ask(agent, "POST", path, key, header=header, json=CHAT, headers=extra) == 200
        assert not {"Authorization", "x-api-key"} & set(engine.headers[-1])
        assert key not in str(engine.headers[-1])


async def test_a_trajectorys_key_calls_for_no_other(agent: Agent) -> None:
    path, named = "/v1/chat/completions", {"x-driftgate-trajectory": "other"}
    assert await ask(agent, "POST", path, OWN, json=CHAT, headers=named) == 403
    assert await ask(agent, "POST", path, CALL, json=CHAT, headers=named) == 200
    body = CHAT | {"metadata": {"trajectory_id": "other"}}
    for headers in ({"x-session-id": "other"}, {}):
        assert await ask(agent, "POST", path, OWN, json=body, headers=headers) == 200
    assert [t.meta.trajectory for t in await agent.traces()].count("own") == 2


async def test_a_forged_key_before_the_own_one_opens_nothing_more(agent: Agent) -> None:
    other = TrajectoryKeys(SIGNING).make("other")
    headers = {"Authorization": f"Bearer {other}"}
    _, said = await agent.send(CHAT, path="/v1/responses", headers=headers)
    given = json.loads(said)["id"]
    for first in ("dgk_forged", OWN):
        both = {"headers": {"Authorization": f"Bearer {first}"}, "header": "x-api-key"}
        assert await ask(agent, "GET", f"/v1/responses/{given}", OWN, **both) == 404
        body = CHAT | {"previous_response_id": given}
        assert await ask(agent, "POST", "/t/own/v1/responses", OWN, json=body, **both) == 400
    assert await ask(agent, "GET", f"/v1/responses/{given}", other) == 200
    both = {"headers": {"Authorization": "Bearer dgk_forged"}, "header": "x-api-key"}
    assert await ask(agent, "GET", f"/v1/responses/{given}", CALL, **both) == 400


async def test_a_refusal_says_what_is_missing_and_is_counted(agent: Agent) -> None:
    async with agent.http.post(agent.url + "/v1/chat/completions", json=CHAT) as answer:
        error = (await answer.json())["error"]
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert (error["type"], error["code"]) == ("authentication_error", 401)
    assert "Authorization: Bearer" in error["message"]
    async with agent.http.get(agent.url + "/api/cells", headers={"x-api-key": CALL}) as answer:
        error = (await answer.json())["error"]
    assert error["code"] == "no_access"
    assert "reading" in error["message"]
    text = agent.gateway.metrics.render()
    assert b'driftgate_refused_total{why="no_key"} 1.0' in text
    assert b'driftgate_refused_total{why="wrong_key"} 1.0' in text


async def test_a_body_is_not_read_without_a_key(agent: Agent) -> None:
    """The length alone is beyond the limit, and still it is the key that is asked for."""
    headers = {"Content-Length": str(1 << 40), "Expect": "100-continue"}
    status = await ask(agent, "POST", "/v1/chat/completions", None, headers=headers)
    assert status == 401


async def test_the_client_sends_its_key(agent: Agent) -> None:
    await ask(agent, "POST", "/t/own/v1/chat/completions", CALL, json=CHAT)
    await agent.flush()
    async with Client(agent.url, key=OWN) as client:
        assert (await client.trajectory("own")).trajectory.trajectory == "own"
        assert [
            event async for event in client.drift(after=0, follow=False, trajectory="own")
        ] == []
        with pytest.raises(AccessError) as wrong:
            await client.cells()
        assert wrong.value.status == 403
    async with Client(agent.url) as client:
        with pytest.raises(AccessError, match="DRIFTGATE_KEY") as none:
            await client.cells()
        assert none.value.status == 401
    async with Client(agent.url, key=ADMIN) as client:
        assert (await client.mint("own")).key == OWN  # made anew, always the same


async def test_health_says_little_to_strangers(agent: Agent) -> None:
    await ask(agent, "POST", "/v1/chat/completions", CALL, json=CHAT)  # waits for the first probe
    async with agent.http.get(agent.url + "/readyz") as answer:
        assert await answer.json() == {"ready": True}
    headers = {"Authorization": f"Bearer {READ}"}
    async with agent.http.get(agent.url + "/readyz", headers=headers) as answer:
        assert (await answer.json())["engine"]["engine"] == "vllm"


# Pages in a browser on this machine, where no keys are set.


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"Host": "localhost:8787"}, 200),
        ({"Host": "gpu-7:8787"}, 200),
        ({"Host": "host.docker.internal:8787"}, 200),
        ({"Host": "[::1]:8787"}, 200),
        ({"Host": "attacker.example:8787"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000", "Host": "localhost:8787"}, 403),
        ({"Origin": "http://localhost:8787", "Host": "localhost:8787"}, 200),
    ],
)
async def test_no_other_sites_page_gets_in(
    connect: Connect, headers: dict[str, str], expected: int
) -> None:
    agent = await connect()
    assert await ask(agent, "GET", "/api/trajectories", None, headers=headers) == expected
    assert (
        await ask(agent, "POST", "/v1/chat/completions", None, json=CHAT, headers=headers)
        == expected
    )


async def test_with_keys_any_name_and_page_may(agent: Agent) -> None:
    headers = {"Host": "drift.example", "Origin": "https://dashboard.example"}
    assert await ask(agent, "GET", "/api/cells", READ, headers=headers) == 200


# The configuration.


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "", "gpu-7", "127.0.0.1.example.com"]
)
def test_other_addresses_than_loopback_need_keys(host: str) -> None:
    with pytest.raises(ValueError, match="driftgate key"):
        GatewayConfig(upstream="http://e:1", host=host)
    GatewayConfig(upstream="http://e:1", host=host, read_keys=[digest_of(READ)])


def test_addresses_and_names() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "localhost.example.com", "8.8.8.8"]))
    assert all(
        map(private_name, ["10.1.2.3", "[::1]", "gpu-7", "a.local", "A.Internal", "x.localhost."])
    )
    assert not any(
        map(private_name, ["example.com", "localhost.example.com", "127.0.0.1.nip.example"])
    )


@pytest.mark.parametrize("setting", ["call_keys", "read_keys", "admin_keys"])
def test_a_configuration_holds_digests_and_shows_none(setting: str) -> None:
    with pytest.raises(ValueError, match="digests") as error:
        GatewayConfig(upstream="http://e:1", **{setting: [READ]})  # type: ignore[arg-type]
    assert READ not in str(error.value)
    settings: dict[str, Any] = {setting: [digest_of(READ)], "signing_key": SIGNING}
    shown = repr(GatewayConfig(upstream="http://e:1", upstream_key="sk-up", **settings))
    assert not any(secret in shown for secret in (digest_of(READ), SIGNING, "sk-up"))


@pytest.mark.parametrize("key", ["", "short", " " * 30, "é" * 30, f"{READ},{CALL}", f" {READ}"])
def test_a_key_that_is_none(key: str) -> None:
    with pytest.raises(ValueError, match="at least 20") as error:
        digest_of(key)
    assert key.strip() == "" or key not in str(error.value)


def test_a_trajectorys_key_is_not_forged() -> None:
    keys, source = TrajectoryKeys(SIGNING), random.Random(0)
    for name in ("a", "run/17", "x" * 200, "日本", ".", "dgk_"):
        key = keys.make(name)
        assert key.startswith(KEY_PREFIX)
        assert key.isascii()
        assert keys.trajectory_of(key) == name
        assert TrajectoryKeys("another one, of 32 characters ...").trajectory_of(key) is None
        assert TrajectoryKeys().trajectory_of(key) is None
        for _ in range(200):  # one character changed, added or taken away
            at, put = source.randrange(4, len(key)), source.choice("Aa0_-.=é\udcff ")
            changed = key[:at] + put + key[at + source.randrange(2) :]
            assert changed == key or keys.trajectory_of(changed) is None
    for junk in (
        "dgk_",
        "dgk_.",
        "dgk_..",
        "dgk_//8.AAAA",
        "dgk_" + "A" * 5000,
        "dgk_\udcff.\udcff",
    ):
        assert keys.trajectory_of(junk) is None


def test_without_keys_nothing_is_asked_for() -> None:
    keys = Keys()
    assert not keys.required
    keys.check("admin", {})
    with pytest.raises(AccessError):
        Keys(call=[digest_of(CALL)]).check("admin", {"authorization": f"Bearer {CALL}"})


def test_any_of_several_keys_will_do() -> None:
    keys = Keys(read=[digest_of(READ), digest_of(OWN + "x" * 9)], call=[digest_of(READ)])
    keys.check("read", {"authorization": f"bearer  {READ} "})
    keys.check("call", {"authorization": f"Bearer {READ}"})
    keys.check("read", {"authorization": "Bearer EMPTY", "x-api-key": READ})
