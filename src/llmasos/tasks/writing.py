"""Texts from texts: summarise, translate, rewrite, write code, chat. Long ones go through the model in pieces."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llmasos.errors import ContextOverflowError, InvalidInputError, UnsupportedError
from llmasos.tasks import texts
from llmasos.tasks.base import MARGIN, Inputs, Run, object_schema, shots, task, user
from llmasos.tasks.model import Messages

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]

TOKENS_PER_WORD = 3
"""Room for a word of most languages and most vocabularies."""
_FENCE = re.compile(r"^```[^\n]*\n(.*?)\n?```\s*$", re.DOTALL)


class Written(BaseModel):
    """A text that a task wrote."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Text(BaseModel):
    text: str = Field(min_length=1)


class _Points(BaseModel):
    points: list[str] = Field(min_length=1)


# summarise


class SummariseInput(Inputs):
    text: Text = Field(description="any length")
    words: int = Field(100, ge=5, le=2000, description="words of the summary, at most")
    style: Literal["paragraph", "bullets", "plain", "formal"] = Field("paragraph", description="how it is written")
    language: str | None = Field(None, description="language of the summary; default: the text's", max_length=40)


class Summary(Written):
    num_parts: int = Field(1, description="pieces of the text that were summarised by themselves")


_MOST_READ = 3000
"""Tokens of a piece, also where the context holds more: small models lose the thread, and long prompts cost most."""
_MOST_POINTS = 12
_STYLES = {
    "paragraph": "",
    "bullets": " as a list of short points",
    "plain": " in plain, simple words",
    "formal": " in a formal tone",
}


@task("summarise", "A short version of a text of any length")
async def summarise(run: Run, given: SummariseInput) -> Summary:
    """A text that does not fit into the model's context is summarised in pieces, and the summaries again, until one is
    left."""
    context = run.model.context_length
    max_tokens = min(given.words * TOKENS_PER_WORD + 16, context // 4)
    part_words = max(20, max_tokens // TOKENS_PER_WORD // 2)
    part_tokens = max(8, min(part_words * TOKENS_PER_WORD, context // 6))

    def part(text: str) -> Messages:
        return _to_summarise(text, part_words, "", given.language)

    def last(text: str) -> Messages:
        return _to_summarise(text, given.words, _STYLES[given.style], given.language)

    async def one(text: str) -> _Text:
        return await run.ask(part(text), _Text, max_tokens=part_tokens)

    text, num_parts = given.text.strip(), 1
    while len(await run.pieces(text, last, max_tokens=max_tokens, most=_MOST_READ)) > 1:
        pieces = await run.pieces(text, part, max_tokens=part_tokens, most=_MOST_READ)
        num_parts = max(num_parts, len(pieces))
        found = await run.each(pieces, one)
        shorter = "\n".join(texts.whole_sentences(reply.text) for reply in found)
        if run.model.count_text(shorter) >= run.model.count_text(text):
            raise ContextOverflowError(run.model.count_text(text), max_tokens, context)
        text = shorter
    if given.style == "bullets":
        listed = {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 1, "maxItems": _MOST_POINTS}
        points = await run.ask(last(text), _Points, max_tokens=max_tokens, schema=object_schema({"points": listed}))
        return Summary(text=_lines(points.points, given.words), num_parts=num_parts)
    reply = await run.ask(last(text), _Text, max_tokens=max_tokens)
    return Summary(text=texts.shortened(texts.whole_sentences(reply.text), given.words), num_parts=num_parts)


def _to_summarise(text: str, words: int, style: str, language: str | None) -> Messages:
    length = "one short sentence" if words < 20 else f"at most {words} words"
    tongue = f" in {language}" if language else ""
    return [
        user(f"Summarize the following text{tongue} in {length}{style}. Give only the facts of the text.\n\n{text}")
    ]


def _lines(points: list[str], words: int) -> str:
    """Lines that begin with a dash, as many as `words` allow."""
    kept: list[str] = []
    for point in dict.fromkeys(" ".join(point.split()).lstrip("-*• ") for point in points):
        if kept and texts.num_words(" ".join([*kept, point])) > words:
            break
        kept += [texts.shortened(point, words)] if point else []
    return "\n".join(f"- {line}" for line in kept)


# translate and rewrite: piece by piece, so that the whole is as long as it has to be


class Translated(BaseModel):
    text: str
    translation: str


class TranslateInput(Inputs):
    text: Text = Field(description="any length")
    to: str = Field(description="the language to translate to, e.g. French", min_length=2, max_length=40)
    source: str | None = Field(None, description="the text's language; default: the model sees", max_length=40)
    examples: list[Translated] = Field(
        [], max_length=20, description="texts with their translation: a small model then keeps to the language"
    )


class Rewriting(Written):
    is_whole: bool = Field(True, description="false: the limit of tokens ended it, or a piece of it")


class Translation(Rewriting):
    to: str


@task("translate", "A text in another language")
async def translate(run: Run, given: TranslateInput) -> Translation:
    """Paragraph by paragraph; the white space between them stays."""
    source = f" from {given.source}" if given.source else ""

    def wish(text: str) -> str:
        return f"Translate this text{source} to {given.to}. Give only the translation.\n\n{text}"

    shown = shots(*((wish(one.text), _Text(text=one.translation)) for one in given.examples))

    def build(text: str) -> Messages:
        return [*shown, user(wish(text))]

    return Translation(**dict(await _piecewise(run, given.text, build)), to=given.to)


class RewriteInput(Inputs):
    text: Text = Field(description="any length")
    instruction: str = Field("", description="what to change, e.g. 'make it shorter'", max_length=1000)
    tone: Literal["", "formal", "friendly", "simple", "concise", "confident"] = Field("", description="how it sounds")


@task("rewrite", "A text with other words: by an instruction, in a tone")
async def rewrite(run: Run, given: RewriteInput) -> Rewriting:
    """Without an instruction and a tone, spelling and grammar are corrected."""
    asked = given.instruction.strip().rstrip(".") or ("" if given.tone else "correct spelling and grammar")
    tone = f"use a {given.tone} tone" if given.tone else ""
    wish = "; ".join(filter(None, (asked, tone)))

    def build(text: str) -> Messages:
        return [user(f"Rewrite this text: {wish}. Keep its meaning and its language.\n\n{text}")]

    return await _piecewise(run, given.text, build)


async def _piecewise(run: Run, text: str, build: Callable[[str], Messages]) -> Rewriting:
    """Pieces take a third of the context, so that their answers may be twice as long."""
    context = run.model.context_length
    most = max(8, (context - run.model.count(build("")) - MARGIN) // 3)
    pieces = [
        one
        for part in texts.paragraphs(text)
        for one in await run.pieces(part, build, max_tokens=min(2 * most, context // 2), most=most)
    ]

    async def one(piece: str) -> Rewriting:
        core = piece.strip()
        if not core:
            return Rewriting(text=piece, is_whole=True)
        cost, taken = await asyncio.to_thread(lambda: (run.model.count_text(core), run.model.count(build(core))))
        limit = max(1, min(context - taken - MARGIN, cost * 3 + 64))
        reply, is_cut = await run.ask_whole(build(core), _Text, max_tokens=limit)
        before, behind = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
        return Rewriting(text=before + reply.text.strip() + behind, is_whole=not is_cut)

    found = await run.each(pieces, one)
    return Rewriting(text="".join(one.text for one in found), is_whole=all(one.is_whole for one in found))


# code


class WriteCodeInput(Inputs):
    instruction: Text = Field(description="what the program does")
    language: str = Field("python", min_length=1, max_length=40)
    max_tokens: int = Field(512, ge=16, le=32768, description="tokens of the program, at most")
    check: bool = Field(False, description="run it in a sandbox (Python only); one that fails is mended once")
    tests: str = Field("", max_length=100_000, description="Python that is run behind it, such as asserts; checks it")


class CodeCheck(BaseModel):
    """How the last try ran. `reason`: exited, or the limit that ended it. Of the output only the ends."""

    ok: bool
    tries: int
    reason: str
    stdout: str
    stderr: str


class Code(BaseModel):
    code: str
    language: str
    is_whole: bool = Field(True, description="false: max_tokens ended it")
    check: CodeCheck | None = Field(None, description="null: it was not run")

    def __str__(self) -> str:
        return self.code


class _Code(BaseModel):
    code: str = Field(min_length=1)


_TRIES = 2
_SHOWN = 1500
"""Characters of a program's output that are kept, and shown to the model."""


@task("write_code", "A program by a description")
async def write_code(run: Run, given: WriteCodeInput) -> Code:
    """Code only, without fences around it. With `check` or `tests` it is run where it can do no harm, and one that
    fails goes back to the model once, with what it said."""
    wish, checks = given.instruction.strip(), given.check or bool(given.tests.strip())
    if checks:
        _check_runnable(run, given.language)
    messages = [user(f"Write {given.language} code. Answer with the code only, no explanation.\n\nTask: {wish}")]
    found = await _written(run, given, messages)
    if not checks:
        return found
    for tries in range(1, _TRIES + 1):
        assert run.run_code is not None
        ran = await asyncio.to_thread(run.run_code, f"{found.code}\n\n{given.tests}\n")
        said = (ran.stdout[-_SHOWN:], ran.stderr[-_SHOWN:])
        found.check = CodeCheck(ok=ran.ok, tries=tries, reason=ran.reason, stdout=said[0], stderr=said[1])
        if ran.ok or tries == _TRIES:
            break
        why = said[1] or f"It was ended: {ran.reason}."
        again = [
            *messages,
            {"role": "assistant", "content": _Code(code=found.code).model_dump_json()},
            user(f"It failed:\n\n{why}\n\nAnswer with the whole corrected code."),
        ]
        try:
            found = await _written(run, given, again)
        except ContextOverflowError:
            break  # what there is, with how it ran
    return found


def _check_runnable(run: Run, language: str) -> None:
    if language.strip().lower() not in ("python", "python3", "py"):
        raise UnsupportedError(
            f"Only Python is run, not {language}.", hint="Leave check and tests out.", param="language"
        )
    if run.run_code is None:
        raise UnsupportedError(
            "Nothing here runs programs.",
            hint="Give run_code=llmasos.apps.sandbox.run_python, or leave check and tests out.",
            param="check",
        )


async def _written(run: Run, given: WriteCodeInput, messages: Messages) -> Code:
    taken = await asyncio.to_thread(run.model.count, messages)
    room = run.model.context_length - taken - MARGIN
    if room < 1:
        raise ContextOverflowError(taken, 1, run.model.context_length)
    reply, is_cut = await run.ask_whole(messages, _Code, max_tokens=min(given.max_tokens, room))
    fenced = _FENCE.match(reply.code.strip())
    code = fenced[1] if fenced else reply.code
    return Code(code=code.strip("\n").rstrip() + "\n", language=given.language, is_whole=not is_cut, check=None)


# chat


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatInput(Inputs):
    message: str | list[ChatMessage] = Field(description="what is said, or a conversation")
    system: str = Field("", description="instructions that stand before it")
    max_tokens: int = Field(256, ge=1, le=32768, description="tokens of the answer, at most")


class ChatAnswer(Written):
    is_whole: bool = Field(True, description="false: max_tokens ended it")


@task("chat", "The answer to a message or a conversation")
async def chat(run: Run, given: ChatInput) -> ChatAnswer:
    """As the model's `chat`, without sampling."""
    said = [user(given.message)] if isinstance(given.message, str) else [one.model_dump() for one in given.message]
    if not said or not all(one["content"] for one in said):
        raise InvalidInputError("chat: message is empty.", param="message")
    first = [{"role": "system", "content": given.system}] if given.system else []
    reply = await run.counted(run.model.ask([*first, *said], None, max_tokens=given.max_tokens))
    return ChatAnswer(text=reply.text.strip(), is_whole=not reply.is_cut)
