import os

import httpx
from tried import attack, tried

server = httpx.Client(
    transport=httpx.HTTPTransport(uds=os.environ["LLMASOS_SERVER"].removeprefix("unix:")),
    base_url="http://localhost",
    timeout=60,
)
OWN = {"authorization": f"Bearer {os.environ['LLMASOS_API_KEY']}"}


def ask(method, path, headers=OWN, **options):
    answer = server.request(method, path, headers=headers, **options)
    if answer.status_code >= 400:
        raise PermissionError(f"{answer.status_code} {answer.json()['error']['code']}")


def chat(model, **more):
    ask("POST", "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "hi"}], **more})


def many():
    for _ in range(200):
        chat("fake", max_tokens=10)


@attack
def app() -> dict:
    return {"first": tried(first=lambda: chat("fake", max_tokens=1))["first"]} | tried(
        another_model=lambda: chat("other"),
        another_app=lambda: chat("app/victim"),
        without_a_key=lambda: ask("GET", "/v1/models", headers={}),
        a_key_of_its_own=lambda: ask("POST", "/llmasos/v1/keys", json={"name": "mine", "scopes": ["manage"]}),
        install_another=lambda: ask("POST", "/llmasos/v1/apps", json={"reference": "evil", "accept": True}),
        other_permissions=lambda: ask("PATCH", "/llmasos/v1/apps/exceed-tokens", json={"config": {}}),
        call_another_app=lambda: ask("GET", "/apps/victim/read"),
        store_files=lambda: ask("POST", "/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}),
        batches=lambda: ask("GET", "/v1/batches"),
        load_models=lambda: ask("POST", "/llmasos/v1/load", json={"model": "fake"}),
        knowledge=lambda: ask("POST", "/llmasos/v1/knowledge/docs/search", json={"query": "x"}),
        pretend_to_be_here=lambda: ask(
            "GET", "/llmasos/v1/keys", headers={"host": "127.0.0.1", "x-forwarded-for": "::1"}
        ),
        many=many,
    )
