"""What test_docs.py needs: Markdown taken apart, shell lines, tiny models under real names, a live server."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiny import CORPUS, write_tiny_model

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*/*.md"))
SERVED = ("smollm2-135m-instruct", "all-minilm-l6-v2")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its first line, counted from 1."""

    language: str
    text: str
    line: int


def blocks(text: str, language: str | None = None) -> list[Block]:
    found = [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in _FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", text)


def headings(text: str) -> list[int]:
    """Levels of the headings, in order."""
    return [len(m[1]) for m in re.finditer(r"^(#+) ", prose(text), re.MULTILINE)]


def links(text: str) -> list[str]:
    return _LINK.findall(prose(text))


def anchors(text: str) -> set[str]:
    """The fragments that a renderer makes of the headings: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def without_comments(block: Block) -> str:
    """The code of a block; comments are translated, and shown output (`# →`) must be the same."""
    text = re.sub(r"(?m)(^|\s+)#(?! →).*$", "", block.text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def shown_output(block: Block) -> list[str]:
    return re.findall(r"# → (.*)$", block.text, re.MULTILINE)


def commands(block: Block) -> list[list[str]]:
    """The words of every `llmasos` command in a shell block, without the leading `llmasos`."""
    found: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars=";|&")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words and words[0] == "llmasos":
                    found.append(words[1:])
                words = []
            else:
                words.append(word)
    return found


@dataclass(frozen=True)
class Curl:
    """One `curl` line of a shell block."""

    method: str
    url: str
    headers: dict[str, str]
    body: str | None


def curls(block: Block) -> list[Curl]:
    """Only what the pages use: URL, -X, -H, -d."""
    found: list[Curl] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["curl"]:
            continue
        given: dict[str, list[str]] = {"-X": [], "-H": [], "-d": [], "": []}
        rest = iter(words[1:])
        for word in rest:
            given[word if word.startswith("-") else ""].append(next(rest) if word.startswith("-") else word)
        [url], body = given[""], given["-d"]
        method = given["-X"][0] if given["-X"] else "POST" if body else "GET"
        headers = dict(header.split(": ", 1) for header in given["-H"])
        found.append(Curl(method, url, headers, body[0] if body else None))
    return found


def write_tiny_bert(folder: Path, architecture: str, **changes: object) -> Path:
    """A random two-layer BERT with a WordPiece tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    from llmasos.formats import save_safetensors
    from llmasos.models.encoder import Encoder
    from llmasos.models.families import config_from_hf, family_of
    from llmasos.models.families.mapping import to_hf

    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{token.strip('[]').lower()}_token": token for token in special}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **roles}))
    size = backend.get_vocab_size()
    hf = {**_TINY_BERT, "architectures": [architecture], "vocab_size": size, "pad_token_id": 0, **changes}
    (folder / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2 if tensor.dim() > 1 else torch.ones(tensor.shape)
        for name, tensor in Encoder(config).state_dict().items()
    }
    save_safetensors(dict(to_hf(family_of(config), config, state)), folder, metadata={"format": "pt"})
    return folder


def write_tiny_models(folder: Path) -> dict[str, Path]:
    """Random models under the names that the documents use."""
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 256}
    gpt2 |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "layer_norm_epsilon": 1e-5}
    labels = {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    return {
        "gpt2": write_tiny_model(folder / "gpt2", chat=False, **gpt2),
        "smollm2-135m-instruct": write_tiny_model(folder / "smollm2", max_position_embeddings=2048),
        "all-minilm-l6-v2": write_tiny_bert(folder / "minilm", "BertModel"),
        "bert-base-uncased": write_tiny_bert(folder / "bert", "BertForMaskedLM"),
        "distilbert-sst2": write_tiny_bert(folder / "sst2", "BertForSequenceClassification", **labels),
    }


@contextlib.contextmanager
def live_server(llms: Mapping[str, Any]) -> Iterator[str]:
    """The real server in a thread, on a free loopback port; gives `http://host:port`."""
    import uvicorn

    from llmasos.apps.hosting import listen
    from llmasos.serve.access.open import open_access
    from llmasos.serve.server import create_app

    listener = listen("127.0.0.1", 0)
    with open_access("", "127.0.0.1") as access:
        app = create_app(llms, access=access, enable_lora_loading=True)
        config = uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def visit(app: Any) -> None:
    """In place of `app.run()`: start, ask every route that takes only simple inputs, read the descriptions, stop."""
    with app.test_client() as client:
        assert app.routes, "an application is run without any route"
        for route in app.routes:
            simple = {"string": "Why?", "integer": 1, "number": 0.5, "boolean": True}
            inputs = {i.name: simple.get(i.schema.get("type", "string")) for i in route.inputs if i.required}
            answer = client.request(route.methods[0], route.path, params=inputs)
            assert answer.status_code == 200, answer.text
        for path in ("/", "/docs", "/openapi.json", "/healthz"):
            assert client.get(path).status_code == 200
