"""Agents: a model that calls tools until it has an answer, within limits, with approval, leaving a trace.

    agent.py      Agent: what a program holds            loop.py       ask, call, tell, until it ends
    tools.py      Python, knowledge, tasks as tools      mcp_tools.py  servers of the Model Context Protocol
    models.py     what an agent asks of a model          context.py    what of a long conversation is shown
    traces.py     runs in the database                   replaying.py  a run once more, from its trace
    shown.py      a run as people read it                forms.py      answers in a form

Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmasos.apps.agent.agent import Agent as Agent
    from llmasos.apps.agent.mcp_tools import McpServer as McpServer
    from llmasos.apps.agent.mcp_tools import mcp_config as mcp_config
    from llmasos.apps.agent.models import ScriptedModel as ScriptedModel
    from llmasos.apps.agent.replaying import Replay as Replay
    from llmasos.apps.agent.replaying import replay as replay
    from llmasos.apps.agent.shown import tree as tree
    from llmasos.apps.agent.tools import knowledge_tool as knowledge_tool
    from llmasos.apps.agent.tools import python_tool as python_tool
    from llmasos.apps.agent.tools import task_tool as task_tool
    from llmasos.apps.agent.tools import tools_of_file as tools_of_file
    from llmasos.apps.agent.traces import Traces as Traces
    from llmasos.apps.agent.traces import open_traces as open_traces
    from llmasos.client.tools import Tool as Tool
    from llmasos.client.tools import tool as tool
    from llmasos.client.types.agents import AgentDecision as AgentDecision
    from llmasos.client.types.agents import AgentEvent as AgentEvent
    from llmasos.client.types.agents import AgentLimits as AgentLimits
    from llmasos.client.types.agents import AgentRun as AgentRun

_HOMES = {
    "Agent": "apps.agent.agent",
    "AgentDecision": "client.types.agents",
    "AgentEvent": "client.types.agents",
    "AgentLimits": "client.types.agents",
    "AgentRun": "client.types.agents",
    "McpServer": "apps.agent.mcp_tools",
    "Replay": "apps.agent.replaying",
    "ScriptedModel": "apps.agent.models",
    "Tool": "client.tools",
    "Traces": "apps.agent.traces",
    "knowledge_tool": "apps.agent.tools",
    "mcp_config": "apps.agent.mcp_tools",
    "open_traces": "apps.agent.traces",
    "python_tool": "apps.agent.tools",
    "replay": "apps.agent.replaying",
    "task_tool": "apps.agent.tools",
    "tool": "client.tools",
    "tools_of_file": "apps.agent.tools",
    "tree": "apps.agent.shown",
}
__all__ = [
    "Agent",
    "AgentDecision",
    "AgentEvent",
    "AgentLimits",
    "AgentRun",
    "McpServer",
    "Replay",
    "ScriptedModel",
    "Tool",
    "Traces",
    "knowledge_tool",
    "mcp_config",
    "open_traces",
    "python_tool",
    "replay",
    "task_tool",
    "tool",
    "tools_of_file",
    "tree",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"llmasos.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
