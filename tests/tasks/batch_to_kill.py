"""A batch in a process of its own, for a test that kills it: `batch_to_kill.py IN OUT N`. It never answers line N."""

import asyncio
import sys

from fake_task_model import FakeModel

from llmasos.tasks.batch import run_batch


class Stuck(FakeModel):
    async def ask(self, messages, schema, *, max_tokens):
        if messages[-1]["content"] == f"text {sys.argv[3]}":
            await asyncio.Event().wait()
        return await super().ask(messages, schema, max_tokens=max_tokens)


run_batch("chat", sys.argv[1], sys.argv[2], model=Stuck(lambda question, _: question.upper()))
