"""Files -> Tokenizer: a Hugging Face folder in any of its shapes, or a GGUF file.

Folders: `tokenizer.json`, or else `tokenizer.model` (SentencePiece), `vocab.json` + `merges.txt` (GPT-2) or
`vocab.txt` (BERT); beside them tokenizer_config.json, special_tokens_map.json, added_tokens.json,
generation_config.json, config.json and the chat templates, each optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llmasos.errors import FormatError, NotFoundError
from llmasos.text.gguf_vocab import frame, gguf_chat_templates, read_vocabulary, word_piece_backend
from llmasos.text.pretokenizers import PRE_TOKENIZERS
from llmasos.text.sentencepiece import added_tokens, build_backend, read_model
from llmasos.text.tokenizer import ROLES, Tokenizer, add_special

_GPT2_LIKE = {
    "GPT2Tokenizer",
    "RobertaTokenizer",
    "BartTokenizer",
    "LongformerTokenizer",
    "GPTNeoXTokenizer",
    "CodeGenTokenizer",
}
_SPM_LIKE = {"LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "T5Tokenizer"}
_CONVERT = (
    'Make a tokenizer.json once, with transformers: AutoTokenizer.from_pretrained("FOLDER").save_pretrained("FOLDER").'
)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a model folder or a GGUF file.

    Raises NotFoundError if there is none, FormatError if its files are damaged or of an unknown kind.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        from llmasos.formats import read_gguf_header

        return tokenizer_from_gguf(read_gguf_header(path).metadata)
    if path.is_file():
        raise FormatError(f"{path} is neither a model folder nor a .gguf file.", hint="Name the folder of the model.")
    raise NotFoundError(f"There is no {path}.", hint="Name a model folder or a .gguf file.")


def read_chat_template(path: Path) -> str | None:
    """The chat template of a model folder or a GGUF file, without building its tokenizer. Raises FormatError."""
    if path.suffix.lower() == ".gguf":
        from llmasos.formats import read_gguf_header

        return gguf_chat_templates(read_gguf_header(path).metadata).get("default")
    return _chat_templates(path, _json(path / "tokenizer_config.json")).get("default")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises FormatError."""
    vocabulary = read_vocabulary(metadata)
    return Tokenizer(
        vocabulary.backend,
        special=vocabulary.special,
        eos_token_ids=vocabulary.eos_ids,
        chat_templates=vocabulary.chat_templates,
    )


def _from_folder(folder: Path) -> Tokenizer:
    config = _json(folder / "tokenizer_config.json")
    complete = (folder / "tokenizer.json").is_file()
    if complete:
        backend, names = _tokenizer_json(folder / "tokenizer.json"), dict[str, str]()
    else:
        backend, names = _from_vocabulary(folder, config)
    names |= _special_names(folder, config)
    _add_declared(backend, folder, config, strict=not complete)
    special = add_special(backend, names)
    if not complete and ("add_bos_token" in config or "add_eos_token" in config):
        # tokenizer.json says itself what is put around a text; transformers ignores these switches beside it, too
        bos, eos = (names.get(role) if config.get(f"add_{role}_token") else None for role in ("bos", "eos"))
        frame(backend, bos=bos, eos=eos)
    model, generation = _json(folder / "config.json"), _json(folder / "generation_config.json")
    size = backend.get_vocab_size(with_added_tokens=True)
    for role in ("bos", "eos", "pad"):
        if role not in special and (ids := _ids(model.get(f"{role}_token_id"), size)):
            special[role] = ids[0]
    ends = _ids(generation.get("eos_token_id"), size) or _ids(model.get("eos_token_id"), size)
    kept = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
    return Tokenizer(
        backend,
        special=special,
        eos_token_ids=ends,
        chat_templates=_chat_templates(folder, config),
        config={key: config[key] for key in kept if key in config},
    )


def _tokenizer_json(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise FormatError(
            f"{path} is not a tokenizer: {e}.", hint="Download the file again, or update the tokenizers package."
        ) from e


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[Backend, dict[str, str]]:
    """A backend and its special tokens by role, for folders from before tokenizer.json."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder / "tokenizer.model", kind)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _gpt2(folder, config, kind)
    if (folder / "vocab.txt").is_file():
        return _bert(folder / "vocab.txt", config)
    if not folder.joinpath("spiece.model").is_file():
        raise NotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json + merges.txt or vocab.txt).",
            hint="Copy the tokenizer's files from the original model into this folder.",
        )
    return _sentencepiece(folder / "spiece.model", kind)


def _sentencepiece(path: Path, kind: str) -> tuple[Backend, dict[str, str]]:
    vocabulary = read_model(path)
    if kind and kind not in _SPM_LIKE:
        # several families number the pieces in their own way, which only their own code knows
        raise FormatError(f"{path} belongs to a {kind}, whose ids this build cannot derive from it.", hint=_CONVERT)
    backend = build_backend(vocabulary)
    backend.add_tokens(added_tokens(vocabulary.pieces, vocabulary.types))
    names = {role: vocabulary.pieces[id] for role, id in vocabulary.special_ids.items()}
    if vocabulary.unk_id is not None:
        names["unk"] = vocabulary.pieces[vocabulary.unk_id]
    if vocabulary.unigram:
        frame(backend, bos=None, eos=names.get("eos"))
    else:
        frame(backend, bos=names.get("bos"), eos=None)
    return backend, names


def _gpt2(folder: Path, config: Mapping[str, Any], kind: str) -> tuple[Backend, dict[str, str]]:
    if kind and kind not in _GPT2_LIKE | {"Qwen2Tokenizer"}:
        raise FormatError(
            f"{folder} belongs to a {kind}, whose words this build does not know how to cut.", hint=_CONVERT
        )
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        backend = Backend(models.BPE(vocab, merges))
    except Exception as e:  # the library raises bare Exception
        raise FormatError(f"{folder}/vocab.json and merges.txt do not make a BPE tokenizer: {e}.") from e
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space")), use_regex=kind != "Qwen2Tokenizer"
    )
    backend.pre_tokenizer = byte_level
    if kind == "Qwen2Tokenizer":
        split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].patterns[0]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if {"<s>", "</s>", "<mask>"} <= vocab.keys():  # RoBERTa's vocabulary, whatever its class is called
        backend.post_processor = processors.RobertaProcessing(("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))
        roles = {
            "bos": "<s>",
            "eos": "</s>",
            "cls": "<s>",
            "sep": "</s>",
            "unk": "<unk>",
            "pad": "<pad>",
            "mask": "<mask>",
        }
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
        return backend, {role: token for role, token in roles.items() if token in vocab}
    end = "<|endoftext|>"
    return backend, {"bos": end, "eos": end, "unk": end} if end in vocab else {}


def _bert(path: Path, config: Mapping[str, Any]) -> tuple[Backend, dict[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1] == "":
        del lines[-1]
    vocab = {line.rstrip("\r"): id for id, line in enumerate(lines)}
    roles = {
        role: str(_content(config.get(f"{role}_token")) or f"[{role.upper()}]")
        for role in ("unk", "cls", "sep", "pad", "mask")
    }
    if missing := [roles[role] for role in ("unk", "cls", "sep") if roles[role] not in vocab]:
        raise FormatError(f"{path} is not a BERT vocabulary: it has no {', '.join(missing)}.")
    backend = word_piece_backend(
        vocab,
        unk=roles["unk"],
        cls=(roles["cls"], vocab[roles["cls"]]),
        sep=(roles["sep"], vocab[roles["sep"]]),
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        chinese=bool(config.get("tokenize_chinese_chars", True)),
    )
    return backend, {role: token for role, token in roles.items() if token in vocab}


def _special_names(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    declared = _json(folder / "special_tokens_map.json")
    names = {role: _content(config.get(f"{role}_token", declared.get(f"{role}_token"))) for role in ROLES}
    return {role: token for role, token in names.items() if token}


def _add_declared(backend: Backend, folder: Path, config: Mapping[str, Any], *, strict: bool) -> None:
    """Tokens that only tokenizer_config.json or added_tokens.json know, in the order of their ids."""
    declared: dict[int, AddedToken] = {}
    for token, id in _json(folder / "added_tokens.json").items():
        if isinstance(id, int):
            declared[id] = AddedToken(token, normalized=True, special=False)
    for key, fields in (config.get("added_tokens_decoder") or {}).items():
        flags = {k: bool(fields.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        declared[int(key)] = AddedToken(str(_content(fields)), **flags)
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for id in sorted(declared):
        added = declared[id]
        if repr(added) in known:
            continue
        backend.add_tokens([added])
        if strict and backend.token_to_id(added.content) != id:
            raise FormatError(
                f"{folder} gives the added token {added.content!r} the id {id}, where its vocabulary has "
                f"{backend.token_to_id(added.content)}.",
                hint=_CONVERT,
            )


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates |= {str(entry["name"]): str(entry["template"]) for entry in declared}
    if isinstance(source := _json(folder / "chat_template.json").get("chat_template"), str):
        templates["default"] = source
    files = [("default", folder / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))]
    for name, path in files:
        if path.is_file():
            templates[name] = path.read_text(encoding="utf-8")
    return templates


def _content(token: Any) -> str | None:
    """A special token is written as its text or as a dict with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any, size: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and 0 <= v < size]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise FormatError(f"{path} is not valid JSON: {e}.", hint="Download the file again.") from e
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not an object.", hint="Download the file again.")
    return value
