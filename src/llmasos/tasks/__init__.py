"""Tasks: summarise, translate, answer and more, each one call on any chat model.

    from llmasos import tasks
    print(tasks.summarise(text, words=50, model="smollm2-135m-instruct"))

`TASKS` lists them. `Pipeline` (`llmasos.tasks.pipeline`) joins several, `run_batch` (`llmasos.tasks.batch`) runs one
over a file of JSON lines.
"""

from types import MappingProxyType

from llmasos.tasks.base import TASKS, Progress, Run, Task, find_task, task
from llmasos.tasks.labels import classify, sentiment
from llmasos.tasks.model import Model, model_of
from llmasos.tasks.reading import answer, extract, keywords, ner
from llmasos.tasks.vectors import embed, rerank
from llmasos.tasks.writing import chat, rewrite, summarise, translate, write_code

BUILT_IN = MappingProxyType(dict(TASKS))
"""Without those that a program has made of its own: what a server offers."""

__all__ = [
    "BUILT_IN",
    "TASKS",
    "Model",
    "Progress",
    "Run",
    "Task",
    "answer",
    "chat",
    "classify",
    "embed",
    "extract",
    "find_task",
    "keywords",
    "model_of",
    "ner",
    "rerank",
    "rewrite",
    "sentiment",
    "summarise",
    "task",
    "translate",
    "write_code",
]
