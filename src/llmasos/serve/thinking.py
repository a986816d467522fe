"""Whether a model thinks before it answers: what requests ask for, in the words that its chat template knows."""

from __future__ import annotations

from typing import Any

from llmasos.errors import UnsupportedError
from llmasos.serve.served import ServedModel
from llmasos.text.reply import reply_form
from llmasos.text.template import free_variables

_SWITCHES = ("enable_thinking", "thinking")
_EFFORT = "reasoning_effort"


def thinks(model: ServedModel) -> bool:
    """Whether the replies of the model's template have a place for reasoning."""
    form = reply_form(_template(model))
    return form.channels or form.reasoning is not None


def thinking_variables(model: ServedModel, wanted: bool, *, param: str) -> dict[str, Any]:
    """Variables for the template. Raises UnsupportedError naming `param` where it knows no other way than its own."""
    known = free_variables(_template(model))
    if switch := next((name for name in _SWITCHES if name in known), None):
        return {switch: wanted}
    if wanted and not thinks(model):
        raise UnsupportedError(f"{model.name} does not think.", hint="Leave it out, or ask another model.", param=param)
    if not wanted and thinks(model):
        raise UnsupportedError(
            f"{model.name} always thinks; its chat template has no switch for it.",
            hint="Leave it out, or ask another model.",
            param=param,
        )
    return {}


def effort_variables(model: ServedModel, effort: str) -> dict[str, Any]:
    """The same for how much to think. Empty where the template has no such variable."""
    return {_EFFORT: effort} if _EFFORT in free_variables(_template(model)) else {}


def _template(model: ServedModel) -> str:
    return model.chat_template or ""
