"""Where models come from: the hub, wheels on a package index, single files over HTTPS.

Each source answers with a `Listing`: the files that would be in the model's folder, a way to read parts of them before
anything is downloaded (for headers), and a way to obtain all of them. Nothing here writes into the library.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol
from urllib.parse import quote, unquote, urljoin, urlsplit

from llmasos import __version__
from llmasos.errors import (
    FormatError,
    InvalidInputError,
    NetworkError,
    NotFoundError,
    PickleRefusedError,
)
from llmasos.settings import settings
from llmasos.store.card import Upstream, stays_inside
from llmasos.store.catalog import SourceRef
from llmasos.store.transfer import (
    Download,
    Meter,
    RangeReader,
    StatusError,
    download,
    fetch,
    file_git_sha1,
    file_sha256,
    redact,
    request,
)

PARALLEL = 4  # files at once

# Quantisations to take when nobody chose one: small and good first.
GGUF_PREFERENCE = tuple(
    "Q4_K_M Q4_K_S Q5_K_M Q5_K_S Q4_0 Q4_1 Q6_K Q5_0 Q5_1 Q8_0 Q3_K_M Q3_K_L Q3_K_S BF16 F16 F32 Q2_K".split()  # noqa: SIM905
)
_PICKLE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".mar")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(?:gguf|safetensors)$)")
_COMPANIONS = re.compile(
    r"""(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|modules
        |config_sentence_transformers|sentence_bert_config)\.json
    |(tokenizer|spiece|sentencepiece\.bpe)\.model | merges\.txt | vocab\.txt | chat_template\.jinja
    |additional_chat_templates/[\w.-]+\.jinja | \d+_\w+/config\.json | config\.json
    |(licen[cs]e|notice|readme)[\w-]*(\.(md|txt))?""",
    re.VERBOSE | re.IGNORECASE,
)
_PAPERS = re.compile(r"(licen[cs]e|notice|readme)[\w-]*(\.(md|txt))?", re.IGNORECASE)


def is_pickle_name(path: str) -> bool:
    return path.lower().endswith(_PICKLE)


def belongs_to_model(path: str) -> bool:
    """Whether a model's folder has files of such a name: weights, configuration, tokenizer, papers."""
    weights = path.lower().endswith((".gguf", ".safetensors", ".safetensors.index.json"))
    return (weights and "/" not in path) or bool(_COMPANIONS.fullmatch(path))


@dataclass(frozen=True)
class RemoteFile:
    """One file as it will lie in the model's folder; `size` in bytes where it is known beforehand."""

    path: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None


class Listing(Protocol):
    """What a source offers under one reference."""

    source: str  # exact, with the revision that was found
    upstream: Upstream
    licence: str | None
    files: tuple[RemoteFile, ...]  # empty only if the source cannot be looked into before the download
    download_bytes: int | None  # what crosses the wire
    disk_bytes: int | None  # what lies on the disk at the worst moment

    def open(self, path: str) -> IO[bytes]:
        """A seekable view of one file that fetches only what is read."""

    def obtain(self, folder: Path, meter: Meter) -> Path:
        """Fetch everything, with `folder` for partial files, and return the folder of finished files."""


def choose_files(
    names: Iterable[str], where: str, *, variant: str | None = None, index: Callable[[str], bytes] | None = None
) -> list[str]:
    """The files of a model among everything that lies beside it: weights, configuration, tokenizer, papers.

    Safetensors win over GGUF unless a GGUF `variant` is asked for; a sharded index, read through `index`, decides which
    shards count. Raises PickleRefusedError if only pickles are there, InvalidInputError for a variant that is not.
    """
    everything = sorted(names)
    gguf = [name for name in everything if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    tensors = [name for name in everything if name.endswith(".safetensors") and "/" not in name]
    if "config.json" in everything and tensors and not (variant and gguf):
        if variant:
            raise InvalidInputError(f"{where} has no GGUF files, so no variant {variant!r}.", param="ref")
        companions = [name for name in everything if _COMPANIONS.fullmatch(name)]
        return companions + _safetensors(tensors, everything, where, index)
    if gguf:
        return [name for name in everything if _PAPERS.fullmatch(name)] + _one_gguf(gguf, variant, where)
    if tensors:
        raise FormatError(f"{where} has weights but no config.json: their architecture is unknown.")
    if pickles := [name for name in everything if name.lower().endswith(_PICKLE)]:
        raise PickleRefusedError(
            f"{where} has its weights only as pickle ({pickles[0]}), which can run any code when it is loaded.",
            hint="Use a repository with .safetensors or .gguf files, or convert it where you trust it: "
            "transformers' `from_pretrained(...).save_pretrained(folder)`, then `llmasos import folder`.",
        )
    raise NotFoundError(f"{where} has no model: neither .safetensors nor .gguf files.")


def _safetensors(
    tensors: list[str], everything: list[str], where: str, index: Callable[[str], bytes] | None
) -> list[str]:
    if "model.safetensors" in tensors:
        return ["model.safetensors"]
    name = "model.safetensors.index.json"
    if name in everything and index:
        from llmasos.formats.safetensors import parse_safetensors_index

        shards = sorted(set(parse_safetensors_index(index(name), name=f"{name} of {where}")[0].values()))
        if missing := [shard for shard in shards if shard not in tensors]:
            raise FormatError(f"{where} lacks {missing[0]}, which its {name} names.")
        return [name, *shards]
    if len(tensors) == 1:
        return tensors
    raise FormatError(f"{where} has {len(tensors)} .safetensors files and no {name}.")


def _one_gguf(gguf: list[str], variant: str | None, where: str) -> list[str]:
    """The file, or all parts of the split file, of one quantisation."""
    groups: dict[str, list[str]] = {}
    for name in gguf:
        groups.setdefault(SHARD.sub("", name), []).append(name)

    def matches(word: str) -> list[str]:
        return [group for group in groups if re.search(rf"(^|[^a-z0-9]){re.escape(word)}(?![a-z0-9_])", group, re.I)]

    wanted = [variant] if variant else GGUF_PREFERENCE
    chosen = list(groups) if len(groups) == 1 and not variant else next(filter(None, map(matches, wanted)), [])
    if len(chosen) != 1:
        found = f"has no single GGUF file for {variant!r}" if variant else "has several GGUF files"
        raise InvalidInputError(
            f"{where} {found}.",
            hint=f"Choose one with `:variant`. There are: {', '.join(PurePosixPath(name).name for name in groups)}.",
            param="ref",
        )
    parts = groups[chosen[0]]
    if (split := SHARD.search(parts[0])) and len(parts) != int(split[2]):
        raise FormatError(f"{where} has {len(parts)} of the {int(split[2])} parts of {chosen[0]}.")
    return parts


def obtain_all(items: list[Download], folder: Path, meter: Meter) -> None:
    """Download several files at once; the first failure, or Ctrl-C, stops the others (their bytes are kept)."""
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="llmasos-pull") as pool:
        futures = [pool.submit(download, item, folder, meter) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception()]
        except BaseException:
            meter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failed:
            meter.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            failed[0].result()


class HubListing:
    """A repository on the Hugging Face hub at one commit.

    huggingface_hub supplies the endpoint, the token and its cache of files that are here already. The bytes come
    through our own downloader: huggingface_hub (2.4) keeps no partial file of an interrupted download.
    """

    def __init__(self, ref: SourceRef) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        token = settings().hf_token or None
        self._repo, self._endpoint = ref.repo, constants.ENDPOINT.rstrip("/")
        self._headers = build_hf_headers(token=token, library_name="llmasos", library_version=__version__)
        revision = ref.revision or "main"
        url = f"{self._endpoint}/api/models/{ref.repo}/revision/{quote(revision, safe='')}?blobs=true"
        info = self._ask(url)
        self._commit = str(info.get("sha") or revision)
        siblings = {str(file["rfilename"]): file for file in info.get("siblings", [])}
        where = f"hf:{ref.repo}" + (f"@{ref.revision}" if ref.revision else "")
        names = choose_files(siblings, where, variant=ref.variant, index=lambda name: self._document(name))
        self.files = tuple(_hub_file(siblings[name]) for name in names)
        self.source = f"hf:{ref.repo}@{self._commit}" + (f":{ref.variant}" if ref.variant else "")
        self.upstream = Upstream(repo=ref.repo, revision=self._commit, url=f"{self._endpoint}/{ref.repo}")
        facts = info.get("cardData")
        licence = facts.get("license_name") or facts.get("license") if isinstance(facts, dict) else None
        self.licence = str(licence) if licence else None
        sizes = [file.size for file in self.files]
        self.download_bytes = self.disk_bytes = None if None in sizes else sum(size or 0 for size in sizes)

    def _url(self, path: str) -> str:
        return f"{self._endpoint}/{self._repo}/resolve/{self._commit}/{quote(path)}"

    def _ask(self, url: str) -> dict[str, Any]:
        try:
            info = json.loads(fetch(url, self._headers)[0])
            if isinstance(info, dict):
                return info
        except ValueError:
            pass
        except (StatusError, NotFoundError) as e:
            raise self._refused(e) from e
        raise NetworkError(f"{redact(url)} did not answer with JSON.", hint="Check HF_ENDPOINT.")

    def _document(self, path: str) -> bytes:
        try:
            return fetch(self._url(path), self._headers)[0]
        except StatusError as e:
            raise self._refused(e) from e

    def _refused(self, e: StatusError | NotFoundError) -> StatusError | NotFoundError | NetworkError:
        """The hub's way of saying gated, private or misspelt, in words."""
        if isinstance(e, NotFoundError):
            return NotFoundError(
                f"The hub has no {self._repo} (or not this revision).", hint="`llmasos search` lists names."
            )
        if e.status not in (401, 403):
            return e
        return NetworkError(
            f"The hub refuses access to {self._repo} (HTTP {e.status}): it is gated, private or does not exist.",
            hint=f"Accept its terms at {self._endpoint}/{self._repo}, then set HF_TOKEN to your access token.",
        )

    def open(self, path: str) -> IO[bytes]:
        try:
            return io.BufferedReader(RangeReader(self._url(path), self._headers))
        except StatusError as e:
            raise self._refused(e) from e

    def obtain(self, folder: Path, meter: Meter) -> Path:
        meter.begin(self.download_bytes)
        headers = tuple(self._headers.items())
        target = folder / "files"
        items = [Download(f.path, self._url(f.path), f.size, f.sha256, f.git_sha1, headers) for f in self.files]
        try:
            obtain_all([item for item in items if not self._cached(item, target, meter)], target, meter)
        except StatusError as e:
            raise self._refused(e) from e
        return target

    def _cached(self, item: Download, folder: Path, meter: Meter) -> bool:
        """Link a file that huggingface_hub's cache already has; True if that could be done."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self._repo, item.path, revision=self._commit)
        target = folder / item.path
        if not isinstance(cached, str) or target.exists():
            return False
        blob = Path(cached).resolve()
        whole = file_sha256(blob) == item.sha256 if item.sha256 else file_git_sha1(blob) == item.git_sha1
        if not whole:
            return False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(blob)
        except OSError:
            return False  # another file system: the download is the simple way
        meter.at(item.path, target.stat().st_size, final=True)
        return True


def _hub_file(file: Mapping[str, Any]) -> RemoteFile:
    lfs = file.get("lfs") or {}
    name = str(file["rfilename"])
    check_path(name)
    size = lfs.get("size", file.get("size"))
    return RemoteFile(
        name, size if isinstance(size, int) else None, lfs.get("sha256"), None if lfs else file.get("blobId")
    )


def check_path(path: str) -> str:
    """`path` if it stays inside the folder it is put in, on every platform; FormatError otherwise."""
    if not stays_inside(path):
        raise FormatError(f"The file name {path!r} points outside its folder: refused.")
    return path


class UrlListing:
    """One .gguf (with the other parts if it is split) or one .safetensors with the configuration beside it."""

    def __init__(self, ref: SourceRef) -> None:
        self.source = ref.text
        self.licence: str | None = None
        self.upstream = Upstream(url=redact(ref.url))
        self._base = ref.url
        name = check_path(unquote(urlsplit(ref.url).path.rpartition("/")[2]))
        names = _parts(name)
        if name.lower().endswith(".safetensors"):
            names = [*self._neighbours(), *names]
        self.files = tuple(self._file(n, ref.sha256 if n == name else None) for n in names)
        sizes = [file.size for file in self.files]
        self.download_bytes = self.disk_bytes = None if None in sizes else sum(size or 0 for size in sizes)

    def _url(self, name: str) -> str:
        query = urlsplit(self._base).query
        return urljoin(self._base, quote(name)) + (f"?{query}" if query else "")

    def _neighbours(self) -> list[str]:
        """Which of the usual small files lie beside the weights; config.json must."""
        found = []
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            try:
                fetch(self._url(name))
                found.append(name)
            except NotFoundError as e:
                if name == "config.json":
                    raise FormatError(
                        f"{redact(self._url(name))} does not exist, so the architecture of the weights is unknown.",
                        hint="Download the model's whole folder and `llmasos import` it.",
                    ) from e
        return found

    def _file(self, name: str, sha256: str | None) -> RemoteFile:
        with request(self._url(name), method="HEAD") as response:
            length = response.headers.get("Content-Length", "")
        return RemoteFile(name, int(length) if length.isdigit() else None, sha256)

    def open(self, path: str) -> IO[bytes]:
        return io.BufferedReader(RangeReader(self._url(path)))

    def obtain(self, folder: Path, meter: Meter) -> Path:
        meter.begin(self.download_bytes)
        items = [Download(f.path, self._url(f.path), f.size, f.sha256) for f in self.files]
        obtain_all(items, folder / "files", meter)
        return folder / "files"


def _parts(name: str) -> list[str]:
    """All parts of a split GGUF, from the name of any."""
    split = SHARD.search(name)
    if not split:
        return [name]
    count = int(split[2])
    return [SHARD.sub(f"-{i:05d}-of-{count:05d}", name) for i in range(1, count + 1)]
