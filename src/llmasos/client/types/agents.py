"""Runs of agents: their steps, their events, and what is asked of the server below `/llmasos/v1/agents`.

A run is also what is kept in the database and written to files: a trace.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field, JsonValue

from llmasos.client.types.base import KeptRequest, WireRequest, WireResponse
from llmasos.client.types.openai import ChatMessage
from llmasos.client.types.openai import Tool as FunctionTool

AgentState = Literal["running", "requires_action", "done", "stopped", "cancelled", "failed"]
StopReason = Literal["steps", "tokens", "seconds", "repeats", "context", "length", "output"]
ContextMode = Literal["drop", "summarise", "stop"]
ApprovalState = Literal["not_needed", "waiting", "approved", "always", "denied"]


class AgentLimits(WireRequest):
    """What ends a run. `steps`: answers of the model; `tokens`: of all prompts and answers together; `seconds`: without
    the time that people took to approve; `repeats`: equal calls with equal results in a row of answers."""

    steps: int = Field(default=10, ge=1, le=1000)
    tokens: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=300.0, gt=0, le=86_400)
    tool_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="Of one call, where the tool sets no limit itself."
    )
    answer_tokens: int = Field(default=1024, ge=1, description="Of one answer of the model.")
    result_chars: int = Field(default=20_000, ge=100, description="Of one result; what is cut is said.")
    repeats: int = Field(default=3, ge=1, le=100)
    parallel: int = Field(default=8, ge=1, le=64, description="Calls of one answer that run at once.")


class AgentToolInfo(WireResponse):
    """A tool that the model could call. `source`: where one comes from that is none of the program's."""

    name: str
    description: str
    parameters: dict[str, Any]
    read_only: bool = False
    destructive: bool = False
    source: str = ""


class AgentCall(WireResponse):
    """A call of a tool. `arguments`: JSON text as the model wrote it; `result`: the text that the model was told, None
    as long as there is none. `started`: seconds after the run began."""

    id: str
    name: str
    arguments: str
    result: str | None = None
    is_error: bool = False
    approval: ApprovalState = "not_needed"
    started: float = 0.0
    seconds: float = 0.0


class AgentWindow(WireResponse):
    """What of a conversation is no longer shown to the model: `num_hidden` messages, all before the place `start`
    (system messages aside, and without the user's last one); and what stands for them."""

    start: int = 0
    num_hidden: int = 0
    notice: str = ""


class AgentStep(WireResponse):
    """One answer of the model with the calls that it asked for; or, as `summary`, what it made of messages that no
    longer fit. `finish_reason` is None as long as it is not whole. `problem`: why it was not taken as the answer.
    `is_estimated`: the model's API told no number of tokens."""

    kind: Literal["answer", "summary"] = "answer"
    number: int
    text: str = ""
    reasoning: str = ""
    calls: list[AgentCall] = Field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    problem: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_estimated: bool = False
    window: AgentWindow = Field(default_factory=AgentWindow)
    started: float = 0.0
    seconds: float = 0.0


class AgentStop(WireResponse):
    """Why a run ended without an answer; `message` is for people."""

    reason: StopReason
    message: str


class AgentError(WireResponse):
    code: str
    message: str
    hint: str = ""


class AgentRun(WireResponse):
    """A run, whole: enough to show it, to go on with it, to replay it.

    `messages`: the conversation in OpenAI's form, the first `num_given` of them were given. `text`: the answer;
    `output`: the same as JSON where a `form` (a JSON Schema) was asked for. `pending`: ids of the calls that wait for
    somebody's word or result (state `requires_action`). `trusted`: tools whose calls need no approval any more.
    `conversation`: where the messages are kept as well, `num_kept` of them so far. `notices`: what else people should
    know, e.g. of servers of tools. `context`: what becomes of messages that no longer fit. `parallel_calls`:
    one answer may call several tools.
    """

    id: str
    object: Literal["agent.run"] = "agent.run"
    agent: str = "agent"
    model: str
    state: AgentState = "running"
    created: datetime
    updated: datetime
    seconds: float = 0.0
    text: str = ""
    output: Any = None
    stop: AgentStop | None = None
    error: AgentError | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    messages: list[dict[str, Any]] = Field(default_factory=list)
    num_given: int = 0
    steps: list[AgentStep] = Field(default_factory=list)
    pending: list[str] = Field(default_factory=list)
    trusted: list[str] = Field(default_factory=list)
    tools: list[AgentToolInfo] = Field(default_factory=list)
    limits: AgentLimits = Field(default_factory=AgentLimits)
    form: dict[str, Any] | None = None
    context: ContextMode = "drop"
    parallel_calls: bool = True
    window: AgentWindow = Field(default_factory=AgentWindow)
    notices: list[str] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)
    conversation: str | None = None
    num_kept: int = 0

    @property
    def num_answers(self) -> int:
        return sum(step.kind == "answer" for step in self.steps)

    def waiting(self) -> list[AgentCall]:
        """The calls that `pending` names."""
        return [call for step in self.steps for call in step.calls if call.id in self.pending]


class AgentRunInfo(WireResponse):
    """A run in a list."""

    id: str
    agent: str
    model: str
    state: AgentState
    input: str
    created: datetime
    updated: datetime


class AgentRunList(WireResponse):
    data: list[AgentRunInfo]


class AgentEvent(WireResponse):
    """Something that happened in a run. Those with `text`: a piece of it, or a notice; with `call`: a call, as it is
    now; with `run`: the run so far, its id and state at first, all of it at last."""

    type: Literal[
        "run.started",
        "answer.delta",
        "reasoning.delta",
        "answer.done",
        "call.started",
        "call.done",
        "notice",
        "approval.required",
        "run.done",
    ]
    step: int = 0
    text: str | None = None
    call: AgentCall | None = None
    run: AgentRun | None = None


class AgentRunRequest(KeptRequest):
    """A new run. `tools`: names of the server's (`GET /llmasos/v1/agents/tools`) and functions of the client's, for
    whose results the run waits (`requires_action`). `output`: a JSON Schema of the answer."""

    model: str = Field(min_length=1, max_length=500)
    input: str | list[ChatMessage] = Field(description="A question, or a conversation that ends with one.")
    system: str | None = None
    tools: list[str | FunctionTool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["auto", "required"] = Field(default="auto", description="Of the first answer.")
    limits: AgentLimits = Field(default_factory=AgentLimits)
    output: dict[str, JsonValue] | None = None
    context: ContextMode = Field(
        default="drop", description="What becomes of messages that no longer fit; the model and the events are told."
    )
    parallel_calls: bool = Field(default=True, description="Whether one answer may call several tools.")
    approve: list[str] = Field(default_factory=list, description="Tools whose calls need no approval in this run.")
    conversation: str | None = Field(
        default=None, description="Go on with this one (`/v1/conversations`); what is said is added to it."
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    stream: bool = False


class AgentDecision(WireRequest):
    """What becomes of a call that waits: `approve` it (`always`: and all of this tool in this run) or not, with a
    reason for the model; or its `result`, for a function of the client's."""

    approve: bool | Literal["always"] | None = None
    reason: str | None = None
    result: str | None = None
    is_error: bool = False


class AgentContinueRequest(KeptRequest):
    """`decisions` by the id of the call; all that the run waits for."""

    decisions: dict[str, AgentDecision]
    stream: bool = False


class AgentToolList(WireResponse):
    data: list[AgentToolInfo]


class ConversationInfo(WireResponse):
    """A stored conversation. `snippet`: where a search found something."""

    id: str
    title: str
    created: datetime
    updated: datetime
    num_messages: int
    snippet: str = ""


class ConversationInfoList(WireResponse):
    data: list[ConversationInfo]
