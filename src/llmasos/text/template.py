"""Chat templates: Jinja programs that come with a model and turn messages into its prompt.

The environment is the one that templates are written for (transformers' `apply_chat_template`): `trim_blocks`,
`lstrip_blocks`, loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, `{% generation %}`.

A template is a stranger's program. It runs in Jinja's sandbox, sees only plain data, and works within a budget of
steps and characters, so it can neither reach Python nor run for ever. What the budget does not cover: memory that one
string method asks for at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from llmasos.errors import InvalidInputError
from llmasos.text.schema import json_schema

MAX_STEPS = 2_000_000  # in one rendering; a loop turn is one, a call ten; real templates need some dozens per message
MAX_CHARACTERS = 50_000_000

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that clients and templates use for the same thing
_MARK = "\u0001end of the final message\u0001 "


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render the template `source`.

    `tools`: JSON schemas or Python functions with type hints and a docstring. `variables`: further names for the
    template (bos_token, enable_thinking, ...). `continue_final_message` ends the prompt where the last message ends,
    for the model to go on writing it.

    Raises InvalidInputError naming the message that is malformed, or with the template's own complaint.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidInputError(
            "continue_final_message and add_generation_prompt exclude each other: one continues the last message, "
            "the other begins a new one.",
            hint="Set one of them.",
            param="continue_final_message",
        )
    plain = validate_messages(messages)
    if any(isinstance(m.get("content"), list) for m in plain) and not takes_parts(source):
        plain = [_flatten(message, at) for at, message in enumerate(plain)]
    if continue_final_message:
        plain[-1] = _marked(plain[-1])
    text = _run(
        source,
        {
            **_plain(dict(variables or {}), "template variables"),
            "messages": plain,
            "tools": None if tools is None else [_tool(tool, at) for at, tool in enumerate(tools)],
            "documents": None if documents is None else _plain(list(documents), "documents"),
            "add_generation_prompt": add_generation_prompt,
        },
    )
    return _cut(text) if continue_final_message else text


def validate_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A plain copy without None values. Raises InvalidInputError with the index of the first message that is
    malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidInputError(
            f"messages is a {type(messages).__name__}, not a list of messages.",
            hint='Example: [{"role": "user", "content": "Hello"}].',
            param="messages",
        )
    checked = [_message(message, at) for at, message in enumerate(messages)]
    if not checked:
        raise InvalidInputError("messages is empty.", hint="Give at least one message.", param="messages")
    return checked


@lru_cache(maxsize=64)
def takes_parts(source: str) -> bool:
    """Whether a template understands content given as a list of parts; found out by trying."""
    probe = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
    try:
        text = _run(source, {"messages": [probe], "tools": None, "documents": None, "add_generation_prompt": False})
    except InvalidInputError:
        return False
    return "probe" in text and "'text'" not in text and '"text"' not in text


def _message(message: Any, at: int) -> dict[str, Any]:
    where = f"messages[{at}]"

    def wrong(what: str, hint: str = "") -> InvalidInputError:
        return InvalidInputError(f"{where} {what}.", hint=hint, param=where)

    if callable(getattr(message, "model_dump", None)):
        message = message.model_dump()
    if not isinstance(message, Mapping):
        raise wrong(f"is a {type(message).__name__}, not a dict with role and content")
    plain: dict[str, Any] = {k: v for k, v in _plain(message, where).items() if v is not None}
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str) or not role:
        raise wrong(f"has the role {role!r}", "Use system, user, assistant or tool.")
    if content is None:
        if role != "assistant" or not any(plain.get(key) for key in ("tool_calls", "function_call", *_REASONING)):
            raise wrong("has no content", "Only an assistant message with tool_calls may go without.")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise wrong(f"has a content part {i} without a type", 'Example: {"type": "text", "text": "Hello"}.')
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise wrong(f"has a text part {i} whose text is {part.get('text')!r}")
    elif not isinstance(content, str):
        raise wrong(f"has content of type {type(content).__name__}", "Content is text or a list of parts.")
    calls = plain.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise wrong("has tool_calls that are no list of dicts")
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _flatten(message: dict[str, Any], at: int) -> dict[str, Any]:
    """Text parts as one text, for templates that know only text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if other := next((part["type"] for part in content if part["type"] != "text"), None):
        raise InvalidInputError(
            f"messages[{at}] has a part of type {other!r}, and this model's chat template takes only text.",
            hint="Send text, or use a model for that kind of input.",
            param=f"messages[{at}]",
        )
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    parts = list(content or [])
    for at in reversed(range(len(parts))):
        if "text" in parts[at]:
            parts[at] = {**parts[at], "text": parts[at]["text"] + _MARK}
            return {**message, "content": parts}
    raise InvalidInputError("The final message has no text to continue.", param="continue_final_message")


def _cut(text: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise InvalidInputError(
            "The chat template drops the end of the final message, so it cannot be continued.",
            hint="Use add_generation_prompt instead.",
            param="continue_final_message",
        )
    # a template that trims messages would have trimmed the text without the mark too
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _tool(tool: Any, at: int) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        plain: dict[str, Any] = _plain(tool, f"tools[{at}]")
        return plain
    if callable(tool):
        return json_schema(tool)
    raise InvalidInputError(
        f"tools[{at}] is a {type(tool).__name__}, neither a JSON schema nor a function.", param=f"tools[{at}]"
    )


def _plain(value: Any, where: str) -> Any:
    """`value` rebuilt from JSON types, so that no object with methods of its own reaches the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    for kind in (str, int, float):  # subclasses: enums, NumPy scalars
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump(), where)
    raise InvalidInputError(f"{where} holds a {type(value).__name__}, which is no JSON value.", param=where)


# --- the sandbox -----------------------------------------------------------------------------------------------------


def _run(source: str, variables: dict[str, Any]) -> str:
    template = compile_template(source)
    budget = _Budget()
    pieces: list[str] = []
    try:
        for piece in template.generate({**variables, _BUDGET: budget}):
            budget.spend_characters(len(piece))
            pieces.append(piece)
    except InvalidInputError:
        raise
    except jinja2.TemplateError as e:
        raise InvalidInputError(f"The model's chat template refuses this input: {e.message}", param="messages") from e
    except Exception as e:  # the template is a program: it can fail in any way
        what = "endless recursion" if isinstance(e, RecursionError) else f"{type(e).__name__}: {e}"
        raise InvalidInputError(f"The model's chat template failed: {what}", param="messages") from e
    return "".join(pieces)


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Raises InvalidInputError with the line of a syntax error."""
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise _syntax_error(e) from e


def _syntax_error(e: jinja2.TemplateSyntaxError) -> InvalidInputError:
    return InvalidInputError(
        f"The chat template has a syntax error in line {e.lineno}: {e.message}", param="chat_template"
    )


@lru_cache(maxsize=64)
def free_variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not set itself: what it can be told. Raises InvalidInputError with the line
    of a syntax error."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source)))
    except jinja2.TemplateSyntaxError as e:
        raise _syntax_error(e) from e


_BUDGET = " budget"  # not an identifier, so that no template can name it
GENERATION = " generation"


class _Budget:
    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS

    def spend_steps(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise InvalidInputError(
                f"The chat template was stopped after {MAX_STEPS:,} steps.",
                hint="Use another template.",
                param="chat_template",
            )

    def spend_characters(self, count: int) -> None:
        self.characters -= count
        if self.characters < 0:
            raise _too_large()


def _too_large() -> InvalidInputError:
    return InvalidInputError(
        f"The chat template was stopped: it makes more than {MAX_CHARACTERS:,} characters.",
        hint="Send less text or use another template.",
        param="chat_template",
    )


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Any) -> Iterator[Any]:
    budget: _Budget = context.parent[_BUDGET]
    for item in items:
        budget.spend_steps(1)
        yield item


@jinja2.pass_context
def _mark(context: jinja2.runtime.Context, at: int) -> str:
    marks: Sequence[str] | None = context.parent.get(GENERATION)
    return marks[at] if marks else ""


def _sized(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARACTERS:
        raise _too_large()
    return value


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Every loop turn and call is counted; operators cannot make values out of all proportion."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = self._wrap(loop.iter, "__counted")
        for assignment in list(tree.find_all(jinja2.nodes.Assign)):
            assignment.node = self._wrap(assignment.node, "__sized")  # s ~ s, over and over
        return tree

    def _wrap(self, node: jinja2.nodes.Node, filter: str) -> jinja2.nodes.Expr:
        assert isinstance(node, jinja2.nodes.Expr)
        wrapped = jinja2.nodes.Filter(node, filter, [], [], None, None, lineno=node.lineno)
        wrapped.set_environment(self)
        return wrapped

    def call(  # names as in Jinja, whose own callers pass them by position
        __self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:
        __context.parent[_BUDGET].spend_steps(10)
        if any(isinstance(arg, int) and abs(arg) > MAX_CHARACTERS for arg in (*args, *kwargs.values())) and isinstance(
            getattr(__obj, "__self__", None), str
        ):
            raise _too_large()  # "".ljust(10**12)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if (
                    isinstance(many, (str, list, tuple))
                    and isinstance(times, int)
                    and len(many) * times > MAX_CHARACTERS
                ):
                    raise _too_large()
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * right > 1 << 16
        ):
            raise _too_large()
        if operator == "%" and isinstance(left, str) and _asks_for_width(left):
            raise _too_large()
        return _sized(super().call_binop(context, operator, left, right))


def _asks_for_width(text: str) -> bool:
    """Whether a format string has a width of eight digits or more, as in "%99999999d"."""
    return re.search(r"%[^a-zA-Z%]*\d{8}", text) is not None


def _narrow(name: str, function: Callable[..., str]) -> Callable[..., str]:
    """A filter of which a number could ask for endless padding."""

    def narrow(value: Any, *args: Any, **kwargs: Any) -> str:
        wide = any(isinstance(arg, int) and arg > 10_000 for arg in (*args, *kwargs.values()))
        if _asks_for_width(str(value)) if name == "format" else wide:
            raise _too_large()
        return function(value, *args, **kwargs)

    return narrow


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; for a prompt it is just its
    contents. With the variable GENERATION, a pair of texts, the first is put before and the second after them.
    """

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (self._mark(at, line) for at in (0, 1))
        return [jinja2.nodes.Scope([begin, *body, end], lineno=line)]

    def _mark(self, at: int, line: int) -> jinja2.nodes.Output:
        mark = jinja2.nodes.Filter(jinja2.nodes.Const(at), "__mark", [], [], None, None, lineno=line)
        mark.set_environment(self.environment)
        return jinja2.nodes.Output([mark], lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": _tojson, "__counted": _counted, "__sized": _sized, "__mark": _mark}
    for name in ("center", "indent", "format"):
        environment.filters[name] = _narrow(name, environment.filters[name])
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _make_dict}
    del environment.globals["lipsum"]
    return environment
