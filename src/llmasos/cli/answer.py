"""One streamed answer and what it cost: the same for `run` and `chat`, local and remote models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmasos.cli.messages import t
from llmasos.inference.llm import LLM
from llmasos.inference.request import Chunk, FinishReason, RequestMetrics

if TYPE_CHECKING:
    from llmasos.inference.remote import RemoteLLM

Messages = list[dict[str, Any]]


def prompt_ids(llm: LLM, prompt: str | Messages) -> list[int]:
    """Token ids of a raw prompt, or of a conversation through the model's template."""
    if isinstance(prompt, str):
        return llm.tokenizer.encode(prompt)
    return llm.tokenizer.encode(llm.chat_prompt(prompt), add_special_tokens=False)


class Answer:
    """Iterate over it for the text as it comes; the rest is known afterwards, also after an interruption.

    Token counts are None where an API does not tell them; times are in seconds.
    """

    def __init__(
        self, llm: LLM | RemoteLLM, prompt: str | Messages, options: dict[str, Any], *, adapter: str | None = None
    ) -> None:
        self._llm, self._prompt, self._options, self._adapter = llm, prompt, options, adapter
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.num_prompt_tokens: int | None = None
        self.num_output_tokens: int | None = None
        self.time_to_first_token = self.seconds = 0.0
        self._metrics: RequestMetrics | None = None

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        chunks = self._chunks()
        try:
            for chunk in chunks:
                now = time.perf_counter() - started
                self.time_to_first_token = self.time_to_first_token or now
                self.seconds = now
                if chunk.token_ids:
                    self.num_output_tokens = (self.num_output_tokens or 0) + len(chunk.token_ids)
                self.text += chunk.text
                self.finish_reason = chunk.finish_reason or self.finish_reason
                self._metrics = chunk.metrics or self._metrics
                if chunk.text:
                    yield chunk.text
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def _chunks(self) -> Iterator[Chunk]:
        if not isinstance(self._llm, LLM):
            return self._llm.stream(self._prompt, **self._options)
        ids = prompt_ids(self._llm, self._prompt)
        self.num_prompt_tokens, self.num_output_tokens = len(ids), 0
        params = self._llm.params(len(ids), **self._options)
        return self._llm.stream_complete(ids, params, adapter=self._adapter)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first over the time after the first: as the engine measured it, whose tokens may come here
        several at once; else as they came."""
        decoding = self._metrics.decode_seconds if self._metrics else self.seconds - self.time_to_first_token
        if not self.num_output_tokens or decoding <= 0:
            return None
        return (self.num_output_tokens - 1) / decoding

    def usage(self) -> dict[str, int | None]:
        counts = (self.num_prompt_tokens, self.num_output_tokens)
        total = None if None in counts else sum(count or 0 for count in counts)
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": total}

    def timings(self) -> dict[str, float | None]:
        speed = self.tokens_per_second
        return {
            "time_to_first_token": round(self.time_to_first_token, 4),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": None if speed is None else round(speed, 2),
        }

    def stats(self) -> str:
        """Counts and speed in a line, and what cut the answer off if anything did."""
        parts = []
        if self.num_prompt_tokens is not None:
            parts.append(t("stats.prompt", count=self.num_prompt_tokens))
        if self.num_output_tokens is not None:
            parts.append(t("stats.output", count=self.num_output_tokens))
        if (speed := self.tokens_per_second) is not None:
            parts.append(t("stats.speed", speed=f"{speed:.1f}"))
        parts.append(t("stats.first", seconds=f"{self.time_to_first_token:.2f}"))
        if self.finish_reason == "length":
            parts.append(t("stats.length"))
        return "[" + ", ".join(parts) + "]"
