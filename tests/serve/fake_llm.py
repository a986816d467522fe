"""A deterministic stand-in for LLM: its tokens are bytes, and it answers with the prompt's last words."""

import asyncio
import contextlib
import json
import threading

import httpx
import uvicorn
from simplest_json import simplest

from llmasos.apps.hosting import listen
from llmasos.errors import ContextOverflowError, NoChatTemplateError, UnsupportedError
from llmasos.inference.config import EngineConfig
from llmasos.inference.request import Chunk, Completion, RequestMetrics, RequestOutput, SamplingParams, TokenLogprob
from llmasos.serve.server import create_app

EOS = 256


class FakeTokenizer:
    vocab_size = 257
    special_ids = frozenset({EOS})

    def id(self, token):
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

    def token(self, id):
        return chr(id) if id < 256 else "<end>"

    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, *, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, id):
        return bytes([id]) if id < 256 else b""


class FakeLLM:
    """Answers `<the last line of the prompt>!`, or `answers`, one after the other. `delay`: seconds per token. A prompt
    with "boom" fails at that word's place: at once, or (`boom late`) after two tokens."""

    is_encoder = False

    adapters = ()
    scores_pairs = False

    CHAT_TEMPLATE = "{{ tools }} <tool_call>"

    def __init__(
        self,
        name="fake",
        *,
        delay=0.0,
        context_length=1000,
        template=True,
        takes_tools=True,
        defaults=(),
        max_num_seqs=64,
        chat_template=CHAT_TEMPLATE,
        answers=(),
    ):
        self.name, self.delay, self.context_length = name, delay, context_length
        self.tokenizer = FakeTokenizer()
        self.has_chat_template, self.takes_tools = template, takes_tools
        self.chat_template = chat_template if template else None
        self.answers = list(answers)
        self.num_running = self.max_running = self.num_tokens = self.num_cancelled = 0
        self.defaults = dict(defaults)
        self.prompts = []
        self.chat_seen = []
        self.params_seen = []
        self.requests = []
        self.engine_config = EngineConfig(max_num_seqs=max_num_seqs)
        self.closed = False

    @property
    def stats(self):
        from llmasos.inference.state import EngineStats

        return EngineStats(num_running=self.num_running, num_generated_tokens=self.num_tokens)

    def params(self, **options):
        return SamplingParams.of(**({"temperature": 0.0} | self.defaults | options))

    def chat_prompt(
        self, messages, tools=None, *, continue_final_message=False, add_generation_prompt=None, variables=None
    ):
        self.variables = variables
        self.chat_seen.append(messages)
        if not self.has_chat_template:
            raise NoChatTemplateError(f"{self.name} has no chat template.", hint="Use /v1/completions.")
        if tools and not self.takes_tools:
            raise UnsupportedError("The chat template has no place for tools.", param="tools")
        head = f"tools: {[t['function']['name'] for t in tools]}\n" if tools else ""
        return head + "\n".join(f"{m['role']}: {m['content']}{m.get('tool_calls', '')}" for m in messages)

    def _answer(self, prompt, params, index):
        """Token ids of one completion, and why it ends."""
        text = self.tokenizer.decode(prompt).split("\n")[-1].removeprefix("user: ") + "!"
        if self.answers:
            text = self.answers.pop(0)
        if params.temperature > 0 and params.seed is not None:
            text += str(params.seed)
        if params.logit_bias:
            text = chr(max(params.logit_bias, key=params.logit_bias.get)) * 5
        if index:
            text += f"#{index}"
        ids = list(text.encode())
        limit = self.context_length - len(prompt) if params.max_tokens is None else params.max_tokens
        if len(prompt) + limit > self.context_length:
            raise ContextOverflowError(len(prompt), limit, self.context_length)
        reason, stop = "stop", None
        for word in params.stop:
            if word in text:
                text, stop = text[: text.index(word)], word
                ids = list(text.encode())
        if len(ids) > limit:
            ids, reason = ids[:limit], "length"
        return ids, reason, stop

    def _logprob(self, token_id, count):
        token = self.tokenizer.decode([token_id])
        top = [(token_id, token, -0.5), (ord("~"), "~", -1.5), (ord("^"), "^", -2.5)][:count]
        return TokenLogprob(token_id, token, -0.5, tuple(top))

    async def acomplete(self, prompts, params, **request):
        tasks = [asyncio.ensure_future(self._complete(prompt, params, request)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _complete(self, prompt, params, request):
        chunks = [chunk async for chunk in self.astream_complete(prompt, params, **request)]
        completions = []
        for index in range(params.n):
            mine = [c for c in chunks if c.index == index]
            logprobs = tuple(lp for c in mine for lp in c.logprobs) if params.logprobs is not None else None
            ids = tuple(i for c in mine for i in c.token_ids)
            text = "".join(c.text for c in mine)
            completions.append(Completion(index, text, ids, mine[-1].finish_reason, mine[-1].stop_reason, logprobs))
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = (None, *(self._logprob(i, params.prompt_logprobs) for i in prompt[1:]))
        num_tokens = sum(len(c.token_ids) for c in completions)
        metrics = RequestMetrics(0.1, 0.1, num_tokens, num_cached_tokens=2)
        text = self.tokenizer.decode(prompt)
        return RequestOutput(text, tuple(prompt), tuple(completions), metrics, prompt_logprobs)

    async def astream_complete(self, prompt, params, **request):
        self.params_seen.append(params)
        self.requests.append(request)
        text = self.tokenizer.decode(prompt)
        self.prompts.append(text)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            if "boom" in text and "late" not in text:
                raise RuntimeError("the secret cause")
            for index in range(params.n):
                ids, reason, stop = self._answer(prompt, params, index)
                for i, token_id in enumerate(ids):
                    await asyncio.sleep(self.delay)
                    self.num_tokens += 1
                    if "boom" in text and i == 2:
                        raise RuntimeError("the secret cause")
                    logprobs = (self._logprob(token_id, params.logprobs),) if params.logprobs is not None else ()
                    yield Chunk(index, self.tokenizer.decode([token_id]), (token_id,), logprobs)
                metrics = RequestMetrics(0.1, 0.1, 9, num_cached_tokens=2) if index == params.n - 1 else None
                yield Chunk(index, "", (), (), reason, stop, metrics)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    matryoshka = False

    async def aembed(self, texts, **options):
        self.prompts += [text if isinstance(text, str) else self.tokenizer.decode(text) for text in texts]
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await asyncio.sleep(self.delay)
        self.num_running -= 1
        return [[len(text) * 1.0, 0.5, -0.25] for text in texts]

    async def ascore_pairs(self, query, texts):
        """By the share of the query's characters that a text has."""
        if not self.scores_pairs:
            raise UnsupportedError(f"{self.name} has no head that scores pairs of texts.", param="model")
        return [len(set(query) & set(text)) / len(set(query)) for text in texts]

    def close(self):
        self.closed = True


class ObedientLLM(FakeLLM):
    """Keeps to the schema that it is given, as engines do."""

    def _answer(self, prompt, params, index):
        form = params.structured
        if form is not None and form.json is not None and not self.answers:
            self.answers = [json.dumps(simplest(json.loads(form.json)))]
        return super()._answer(prompt, params, index)


@contextlib.contextmanager
def live_server(llms, **options):
    """A real uvicorn server on a free loopback port; gives its base URL (ending in /v1)."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = create_app(llms, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def asgi_client(llms, **options):
    """An httpx client that talks to the application without a socket."""
    transport = httpx.ASGITransport(create_app(llms, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
