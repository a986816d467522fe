"""`llmasos run`: one prompt in, one answer out; an encoder fills masks, classifies or embeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmasos.cli.engine import take_engine
from llmasos.cli.messages import t
from llmasos.cli.render import emit, pairs, say
from llmasos.errors import InvalidInputError, NoChatTemplateError, NotFoundError
from llmasos.inference.request import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from llmasos.cli.answer import Messages
    from llmasos.inference.llm import LLM
    from llmasos.inference.remote import RemoteLLM

SHOWN_NUMBERS = 8
"""Numbers of an embedding that people get to see; --json has all."""


def run(
    model: str | None = None,
    /,
    *prompt: str,
    system: str | None = None,
    raw: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "auto",
    adapter: str | None = None,
    json_schema: str | None = None,
    regex: str | None = None,
    choice: tuple[str, ...] = (),
    no_stats: bool = False,
    json: bool = False,
    **sampling: Any,
) -> int | None:
    """`llmasos run`. Without a prompt on a terminal it is `llmasos chat`."""
    from llmasos.store import DEFAULT_MODEL

    if model is not None and is_prompt(model):
        prompt, model = (model, *prompt), None
    engine = take_engine(sampling)
    if (form := _form(json_schema, regex, choice)) is not None:
        sampling["structured"] = form
    SamplingParams.of(**sampling)  # what is wrong here should be said before a model is loaded
    place: dict[str, Any] = {"device": device, "dtype": dtype, "quantization": quantization, "adapter": adapter}
    if not (prompt or raw or json or no_stats) and sys.stdin.isatty():
        from llmasos.cli.chat import converse

        return converse(model, system, place | engine, sampling)
    text = read_prompt(prompt)
    from llmasos.cli.fetch import load

    with load(model or DEFAULT_MODEL, **place, **engine) as llm:
        if llm.is_encoder:
            if system is not None:
                from llmasos.cli.chat import check_writes

                check_writes(llm)
            _encode(llm, text, as_json=json)
        else:
            asked = _asked(llm, text, system, raw)
            _generate(llm, asked, sampling, adapter=adapter, stats=not no_stats, as_json=json)
    return None


_JSON_STARTS = ("{", "[")


def _form(schema: str | None, regex: str | None, choice: tuple[str, ...]) -> StructuredOutput | None:
    """What the answer must look like; `schema` is JSON text or the name of a file with it."""
    if schema is None and regex is None and not choice:
        return None
    if schema is not None and not schema.lstrip().startswith(_JSON_STARTS):
        try:
            schema = Path(schema).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFoundError(t("run.no_schema", path=schema), hint=t("run.no_schema.hint")) from None
        except (OSError, ValueError) as e:
            raise InvalidInputError(t("run.bad_schema", path=schema, reason=e), param="json_schema") from None
    return StructuredOutput(json=schema, regex=regex, choice=choice or None)


def is_prompt(word: str) -> bool:
    """Whether the first argument is a prompt for the default model: no model's name has spaces or exotic letters."""
    odd = any(c.isspace() or not c.isascii() for c in word)
    return odd and not word.startswith(("file:", "http:", "https:")) and not Path(word).expanduser().exists()


def read_prompt(words: tuple[str, ...]) -> str:
    """The prompt from arguments, where `-` stands for standard input; without arguments it is standard input."""
    text = " ".join(_stdin() if word == "-" else word for word in words or ("-",))
    if not text.strip():
        raise InvalidInputError(t("run.empty_prompt"), hint=t("run.empty_prompt.hint"), param="prompt")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(t("run.not_utf8"), param="prompt") from None
    return text


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise InvalidInputError(t("run.not_utf8"), param="prompt") from None


def _asked(llm: LLM | RemoteLLM, text: str, system: str | None, raw: bool) -> str | Messages:
    if system is not None and (raw or not llm.has_chat_template):
        raise NoChatTemplateError(t("run.no_system", model=llm.name), hint=t("run.no_system.hint"), param="system")
    if raw or not llm.has_chat_template:
        return text
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def _generate(
    llm: LLM | RemoteLLM,
    prompt: str | Messages,
    options: dict[str, Any],
    *,
    adapter: str | None,
    stats: bool,
    as_json: bool,
) -> None:
    if options.get("n", 1) > 1 or options.get("num_beams", 1) > 1:
        _complete(llm, prompt, options, {} if adapter is None else {"adapter": adapter}, as_json=as_json)
        return
    from llmasos.cli.answer import Answer

    answer = Answer(llm, prompt, options, adapter=adapter)
    try:
        for piece in answer:
            if not as_json:
                print(piece, end="", flush=True)
    finally:  # also after Ctrl-C: what there is has been paid for
        if not as_json:
            if answer.text and not answer.text.endswith("\n"):
                print(flush=True)
            if stats and answer.seconds:
                say(answer.stats())
    if as_json:
        emit(
            {"model": llm.name, "text": answer.text, "finish_reason": answer.finish_reason}
            | {"usage": answer.usage(), "timings": answer.timings()}
        )


def _complete(
    llm: LLM | RemoteLLM, prompt: str | Messages, options: dict[str, Any], request: dict[str, Any], *, as_json: bool
) -> None:
    """Several completions, or beams, which cannot stream."""
    make = getattr(llm, "params", SamplingParams.of)
    params = make(**options)
    if isinstance(prompt, str):
        [output] = llm.complete(prompt, params, **request)
    else:
        output = llm.complete_chat(prompt, params, **request)
    if not as_json:
        print("\n\n".join(completion.text for completion in output.outputs))
        return
    metrics, num_prompt, num_output = output.metrics, len(output.prompt_token_ids), output.num_output_tokens
    outputs = [{"index": c.index, "text": c.text, "finish_reason": c.finish_reason} for c in output.outputs]
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
    timings = {
        "time_to_first_token": round(metrics.time_to_first_token, 4),
        "seconds": round(metrics.time_to_first_token + metrics.decode_seconds, 4),
        "tokens_per_second": round(metrics.tokens_per_second, 2),
    }
    emit({"model": llm.name, **outputs[0], "outputs": outputs, "usage": usage, "timings": timings})


def _encode(llm: Any, text: str, *, as_json: bool) -> None:
    config, tokenizer = llm.model.config, llm.tokenizer
    mask = tokenizer.mask_token_id
    if mask is not None and config.masked_lm and tokenizer.token(mask) in text:
        found = llm.fill_mask(text)
        if as_json:
            emit({"model": llm.name, "masks": [[{"token": w, "probability": p} for w, p in row] for row in found]})
        else:
            print("\n\n".join(pairs([(word, f"{p:.4f}") for word, p in row]) for row in found))
    elif config.num_labels:
        labels = llm.classify(text)
        ranked = sorted(labels.items(), key=lambda item: -item[1])
        if as_json:
            emit({"model": llm.name, "labels": dict(ranked)})
        else:
            print(pairs([(label, f"{p:.4f}") for label, p in ranked]))
    else:
        vector = llm.embed(text)
        if as_json:
            emit({"model": llm.name, "embedding": vector})
        else:
            print(" ".join(f"{x:.4f}" for x in vector[:SHOWN_NUMBERS]) + (" …" if len(vector) > SHOWN_NUMBERS else ""))
            say(t("run.embedding", count=len(vector)))
