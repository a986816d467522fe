"""A hub, a package index and a file server in one, on the loopback; tiny models to serve."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Resource:
    body: bytes
    content_type: str = "application/octet-stream"
    status: int = 200
    etag: str = ""
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # one response each is cut after so many bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Web:
    """The server's state; `url` is its root, `requests` what it was asked."""

    url: str = ""
    resources: dict[str, Resource] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, path: str, body: bytes | dict[str, Any], **facts: Any) -> Resource:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        facts.setdefault("etag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.resources[path] = Resource(data, **facts)
        return self.resources[path]

    def asked(self, path: str, method: str = "GET") -> list[dict[str, str]]:
        return [headers for verb, asked, headers in self.requests if asked == path and verb == method]

    def add_repo(self, repo: str, files: dict[str, bytes], *, licence: str = "apache-2.0") -> dict[str, Resource]:
        """A repository as the hub shows it: weights in its large-file store, the rest in git."""
        siblings: list[dict[str, Any]] = []
        for name, data in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if name.endswith((".safetensors", ".gguf", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
            siblings.append(entry)
        info = {"id": repo, "sha": COMMIT, "cardData": {"license": licence}, "siblings": siblings}
        for revision in ("main", COMMIT):
            self.add(f"/api/models/{repo}/revision/{revision}?blobs=true", info, content_type="application/json")
        return {name: self.add(f"/{repo}/resolve/{COMMIT}/{name}", data) for name, data in files.items()}

    def add_wheel(self, project: str, version: str, data: bytes, *, html: bool = False, sha256: str = "") -> Resource:
        """A project with one wheel on the index at `/simple`."""
        filename = f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        if html:
            page = f'<html><body><a href="../../files/{filename}#sha256={sha256}">{filename}</a></body></html>'.encode()
            self.add(f"/simple/{project}/", page, content_type="text/html")
        else:
            file = {"filename": filename, "url": f"../../files/{filename}", "hashes": {"sha256": sha256}}
            kind = "application/vnd.pypi.simple.v1+json"
            self.add(f"/simple/{project}/", {"name": project, "files": [file]}, content_type=kind)
        return self.add(f"/files/{filename}", data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(self.command)

        do_HEAD = do_GET

        def _answer(self, method: str) -> None:
            web.requests.append((method, self.path, dict(self.headers)))
            resource = web.resources.get(self.path, Resource(b"not here", status=404))
            body, status, headers = resource.body, resource.status, dict(resource.headers)
            asked = self.headers.get("Range") if resource.ranges and status == 200 else None
            if asked and self.headers.get("If-Range", resource.etag) == resource.etag:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or len(body)) + 1, len(body))
                if start >= len(body):
                    status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
                else:
                    status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(body)}"
                    body = body[start:stop]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", resource.content_type)
            if resource.etag:
                self.send_header("ETag", resource.etag)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if method == "GET":
                if resource.drop_after:
                    self.wfile.write(body[: resource.drop_after.pop(0)])
                    self.close_connection = True
                else:
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """The server running, and every source of the store pointed at it with an empty home."""
    from huggingface_hub import constants

    from llmasos.store import transfer

    state = Web()
    server = Server(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for name in ("LLMasOS_HOME", "LLMASOS_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMASOS_PYPI_INDEX", f"{state.url}/simple")
    monkeypatch.setattr(constants, "ENDPOINT", state.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transfer, "BACKOFF", 0.001)
    yield state
    server.shutdown()
    server.server_close()
    transfer.close_clients()
    thread.join()


def tiny_weights(*, layers: int = 2, seed: int = 0) -> bytes:
    """A safetensors file; 64 x 256 embeddings and two square matrices a layer are enough to count bytes."""
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((256, 64)).astype(np.float32)}
    for i in range(layers):
        for part in ("q_proj", "o_proj"):
            name = f"model.layers.{i}.self_attn.{part}.weight"
            tensors[name] = rng.standard_normal((64, 64)).astype(np.float32)
    return bytes(save(tensors))


def tiny_repo(**config: Any) -> dict[str, bytes]:
    return {
        "config.json": json.dumps({**LLAMA_CONFIG, **config}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": tiny_weights(),
        "README.md": b"# tiny",
        "pytorch_model.bin": b"never fetched",
        "onnx/model.onnx": b"never fetched",
    }


def tiny_gguf(folder: Path, architecture: str = "llama") -> bytes:
    import gguf

    path = folder / "tiny-Q8_0.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    blocks = np.zeros((256, 2 * 34), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def wheel_of(files: dict[str, bytes], *, project: str = "tiny", version: str = "1.0") -> bytes:
    """A wheel with `files` and the metadata of a wheel."""
    info = f"{project}-{version}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\nLicense: MIT\n"
        )
        archive.writestr(f"{info}/LICENSE", "Do what you like.")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()
