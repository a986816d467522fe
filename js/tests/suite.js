/** Checks of the SDK that run in Node.js, Deno and browsers alike: `checks[title]({sdk, url})` throws if it fails. */

function equal(found, expected, what = "") {
  const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
  if (a !== b) throw new Error(`${what} is ${a}, not ${b}`);
}

function ok(value, what) {
  if (!value) throw new Error(what);
}

async function failure(work, type) {
  try {
    await work();
  } catch (e) {
    if (!(e instanceof type)) throw new Error(`${type.name} was expected, not ${e?.stack ?? e}`);
    return e;
  }
  throw new Error(`${type.name} was expected, and nothing was thrown`);
}

async function all(iterable) {
  const found = [];
  for await (const item of iterable) found.push(item);
  return found;
}

const seen = async (url, test) => (await (await fetch(`${url}/seen`)).json()).filter(test);
const byModel = (model) => (entry) => entry.body?.model === model;

async function until(condition, what) {
  for (let i = 0; i < 200; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`${what}: did not come to be`);
}

/** mulberry32, so that failures can be repeated. */
function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function events(sdk, pieces) {
  const parser = new sdk.EventParser();
  return pieces.flatMap((piece) => parser.feed(piece));
}

const bytes = (text) => new TextEncoder().encode(text);
const weather = {
  name: "weather",
  description: "Weather of a city.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};

export const checks = {
  "events: names, ids, comments and several data lines"({ sdk }) {
    const text = ": ping\nevent: note\nid: 7\ndata: one\ndata:two\ndata\nretry: 5\nx: y\n\ndata: z\n\n\nevent: e\n\ndata: cut";
    const expected = [
      { data: "one\ntwo\n", event: "note", id: "7" },
      { data: "z", event: "message", id: "7" },
    ];
    equal(events(sdk, [bytes(text)]), expected);
  },

  "events: any split of the bytes gives the same events"({ sdk }) {
    const lines = ["data: héllo", "data:  two ", "data", "data:😀", "event: x", "id: 1", ": c", "", "", "id: \0", "data: \ufeff"];
    const next = random(1);
    const pick = (list) => list[Math.floor(next() * list.length)];
    for (let round = 0; round < 300; round++) {
      const bom = next() < 0.2 ? "\ufeff" : "";
      const length = Math.floor(next() * 12);
      const text = bom + Array.from({ length }, () => pick(lines) + pick(["\n", "\r\n", "\r"])).join("");
      const whole = bytes(text);
      const expected = events(sdk, [whole]);
      const pieces = [];
      for (let at = 0; at < whole.length; ) {
        const size = 1 + Math.floor(next() * 5);
        pieces.push(whole.subarray(at, at + size));
        at += size;
      }
      equal(events(sdk, pieces), expected, JSON.stringify(text));
      equal(events(sdk, [...whole].map((byte) => Uint8Array.of(byte))), expected, JSON.stringify(text));
    }
  },

  async "chat: the answer has its text, and only what was given is sent"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1`, apiKey: "k" });
    const answer = await client.chat("Hi", { model: "echo", max_tokens: 5, temperature: undefined });
    equal(answer.text, "Hi!");
    equal(Object.keys(answer).includes("text"), false);
    const [request] = await seen(url, byModel("echo"));
    equal(request.headers.authorization, "Bearer k");
    equal(request.body, { messages: [{ role: "user", content: "Hi" }], model: "echo", max_tokens: 5 });
  },

  async "stream: chunks, text and the whole answer"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1/` });
    const stream = client.streamChat("Grüezi 😀", { model: "streamed" });
    const chunks = await all(stream);
    equal(chunks.map((chunk) => chunk.text).join(""), "Grüezi 😀!");
    const whole = await stream.final();
    equal(whole.choices[0].message, { role: "assistant", content: "Grüezi 😀!" });
    equal([whole.text, whole.choices[0].finish_reason, whole.usage.total_tokens], ["Grüezi 😀!", "stop", 5]);
    equal((await all(client.streamChat("ab", { model: "streamed" }).text)).join(""), "ab!");
    equal((await client.streamChat("ab", { model: "streamed" }).final()).text, "ab!");
    await failure(() => all(stream), sdk.LLMasOSError);
  },

  async "stream: leaving the loop ends the request"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    let read = 0;
    const stream = client.streamChat("go", { model: "endless" });
    for await (const _ of stream) if (++read === 3) break;
    await until(async () => (await seen(url, byModel("endless"))).every((r) => r.closed), "the end of the request");
    await failure(() => stream.final(), sdk.LLMasOSError);
  },

  async "stream: abort() and a signal end it with AbortError"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const stream = client.streamChat("go", { model: "endless" });
    const run = async (pieces, stop) => {
      for await (const _ of pieces) stop();
    };
    equal((await failure(() => run(stream, () => stream.abort()), sdk.AbortError)).name, "AbortError");
    const controller = new AbortController();
    const signalled = client.streamChat("go", { model: "endless", signal: controller.signal });
    await failure(() => run(signalled.text, () => controller.abort()), sdk.AbortError);
    await until(async () => (await seen(url, byModel("endless"))).every((r) => r.closed), "the end of the requests");
  },

  async "a signal ends a call that waits, at once if it was given too late"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 20);
    await failure(() => client.chat("x", { model: "silent", signal: controller.signal }), sdk.AbortError);
    await failure(() => client.chat("x", { model: "echo", signal: controller.signal }), sdk.AbortError);
    const slow = new AbortController();
    setTimeout(() => slow.abort(), 20);
    await failure(() => client.chat("x", { model: "status-503-30", signal: slow.signal }), sdk.AbortError);
  },

  async "silence longer than the timeout is an error, before and within an answer"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1`, timeout: 40 });
    const before = (await seen(url, byModel("silent"))).length;
    const error = await failure(() => client.chat("x", { model: "silent" }), sdk.TimeoutError);
    ok(error instanceof sdk.ConnectionError, "a TimeoutError is a ConnectionError");
    equal((await seen(url, byModel("silent"))).length - before, 1, "requests sent");
    await failure(() => all(client.streamChat("x", { model: "stuck" })), sdk.TimeoutError);
  },

  async "a stream that breaks off or fails is an error after its text"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    for (const [model, type] of [["cut-off", sdk.ConnectionError], ["failing", sdk.APIError]]) {
      let text = "";
      const error = await failure(async () => {
        for await (const piece of client.streamChat("x", { model }).text) text += piece;
      }, type);
      equal(text, "a");
      if (model === "failing") ok(error instanceof sdk.UnavailableError, "a model that died can be asked again");
      if (model === "failing") equal([error.message, error.code, error.status], ["the model died", "model_crashed", 0]);
      equal((await seen(url, byModel(model))).length, 1, "requests sent");
    }
  },

  async "a stream of several choices ends when each of them has"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const read = (model) => client.streamChat("x", { model, n: 3 }).final();
    for (const model of ["ends-102", "ends-10D"]) {
      const { choices, text } = await read(model);
      equal(choices.map((choice) => choice.message.content), ["0", "1", "2"].slice(0, choices.length));
      equal([text, choices.length], ["0", model === "ends-102" ? 3 : 2]);
      equal((await all(client.streamChat("x", { model, n: 3 }).text)).join(""), "0", "the first choice's text");
    }
    await failure(() => read("ends-10"), sdk.ConnectionError);
    const prompts = ["a", "b"];
    await failure(() => all(client.streamComplete(prompts, { model: "ends-0" })), sdk.ConnectionError);
    equal((await all(client.streamComplete(prompts, { model: "ends-10" }))).length, 2);
    equal((await all(client.streamComplete([1, 2], { model: "ends-0" }))).length, 1);
  },

  async "each status has its own error with what the server told"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1`, maxRetries: 0 });
    const types = { 400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError" };
    Object.assign(types, { 404: "NotFoundError", 409: "APIError", 422: "BadRequestError", 429: "RateLimitError" });
    Object.assign(types, { 500: "APIError", 503: "UnavailableError" });
    for (const [status, name] of Object.entries(types)) {
      for (const call of ["chat", "streamChat"]) {
        const ask = () => client[call]("x", { model: `status-${status}-7` });
        const error = await failure(call === "chat" ? ask : () => all(ask()), sdk[name]);
        equal([error.name, error.status, error.code, error.param], [name, Number(status), "some_code", "model"]);
        equal([error.requestId, error.retryAfter, error.message], ["req_1", 7, `${status}: no such luck`]);
        ok(error instanceof sdk.APIError && error instanceof sdk.LLMasOSError, "the tree of errors");
      }
    }
  },

  async "retries wait as asked, give up, and are not made of what would fail again"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal((await client.chat("again", { model: "flaky-1" })).text, "again!");
    equal((await client.streamChat("again", { model: "flaky-2" }).final()).text, "again!");
    for (const [model, count] of [["status-503-0.01", 3], ["status-400-0", 1], ["status-429-3600", 1]]) {
      const before = (await seen(url, byModel(model))).length;
      await failure(() => client.chat("x", { model }), sdk.APIError);
      equal((await seen(url, byModel(model))).length - before, count, model);
    }
    await failure(() => client.batches.create({ input_file_id: "f", endpoint: "/v1/completions" }), sdk.APIError);
    equal((await seen(url, (r) => r.path === "/v1/batches")).length, 1, "what makes something is not done twice");
  },

  async "no server and no JSON are typed errors"({ sdk, url }) {
    const nobody = new sdk.LLMasOS({ baseURL: "http://127.0.0.1:9/v1", maxRetries: 0 });
    await failure(() => nobody.models(), sdk.ConnectionError);
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1`, maxRetries: 0 });
    ok((await failure(() => client.chat("x", { model: "page" }), sdk.APIError)).message.includes("<html>"), "the text");
    await failure(() => client.chat("x", { model: "echo", stream: true }), TypeError);
  },

  async "a fetch of one's own is used, with the headers that were given"({ sdk, url }) {
    const asked = [];
    const own = (...request) => (asked.push(request), fetch(...request));
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1`, fetch: own, headers: { "x-team": "blue" } });
    await client.models();
    equal([asked.length, asked[0][0], asked[0][1].headers["x-team"]], [1, `${url}/v1/models`, "blue"]);
  },

  async "tools: calls of one answer run at once and their results go back"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    let running = 0;
    let most = 0;
    const run = async ({ city }) => {
      most = Math.max(most, ++running);
      await new Promise((resolve) => setTimeout(resolve, 20));
      running--;
      return city === "Bern" ? "18 degrees" : { city, degrees: 25 };
    };
    const expected = '18 degrees | {"city":"Rome","degrees":25}';
    const chunks = [];
    for (const more of [{}, { onChunk: (chunk) => chunks.push(chunk) }]) {
      const found = await client.runTools({ model: "tools", messages: "Weather?", tools: [{ ...weather, run }], ...more });
      equal([found.text, found.steps, most], [expected, 2, 2]);
      equal(found.messages.map((m) => m.role), ["user", "assistant", "tool", "tool", "assistant"]);
    }
    ok(chunks.length > 4, "chunks are seen");
    const [first] = await seen(url, byModel("tools"));
    equal(first.body.tools, [{ type: "function", function: { ...weather, description: "Weather of a city." } }]);
  },

  async "tools: what the model got wrong is told to it"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const messages = JSON.stringify([["rain", {}], ["weather", "{oops"], ["weather", "[1]"], ["weather", ""]]);
    const tools = [{ ...weather, run: () => undefined }];
    const { text } = await client.runTools({ model: "tools", messages, tools });
    const [unknown, wrong, list, empty] = text.split(" | ");
    ok(unknown.includes('no tool "rain"') && unknown.includes("weather"), unknown);
    ok(wrong.startsWith("Error: the arguments are not JSON"), wrong);
    equal([list, empty], ["Error: the arguments are not a JSON object.", "null"]);
  },

  async "tools: limits and failures are typed and have the conversation"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const loop = (run) =>
      client.runTools({ model: "looping", messages: "x", maxSteps: 2, tools: [{ ...weather, run }] });
    const limit = await failure(() => loop(() => 1), sdk.ToolLimitError);
    equal(limit.messages.length, 5);
    const failed = await failure(
      () =>
        loop(() => {
          throw new Error("no wind");
        }),
      sdk.ToolError,
    );
    equal([failed.tool, failed.cause.message, failed.messages.length], ["weather", "no wind", 2]);
    ok(failed instanceof sdk.ToolLoopError, "the tree of errors");
    const twice = [weather, weather];
    await failure(() => client.runTools({ model: "tools", messages: "x", tools: twice }), TypeError);
  },

  async "completions, embeddings and models"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal((await client.complete("The lazy", { model: "m" })).text, "dog");
    equal((await client.streamComplete("x", { model: "m" }).final()).text, "ab");
    equal((await client.embed(["x"], { model: "m" })).data[0].embedding, [1, 2]);
    equal((await client.models()).map((model) => model.id), ["echo"]);
    equal((await client.model("a/b")).id, "a/b");
    await failure(() => client.model("none"), sdk.NotFoundError);
  },

  async "responses: text, stream, deletion"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal((await client.responses.create({ model: "m", input: "Capital?" })).text, "Paris");
    const stream = client.responses.stream({ model: "m", input: "Capital?" });
    equal((await all(stream.text)).join(""), "Paris");
    const whole = await stream.final();
    equal([whole.id, whole.text], ["r1", "Paris"]);
    equal((await client.responses.delete("r1")).deleted, true);
  },

  async "files and batches"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal(await client.files.upload('{"a": 1}\n', { filename: "x.jsonl" }), { id: "f1", filename: "x.jsonl" });
    equal((await client.files.upload(new Blob(["a"]))).filename, "file.jsonl");
    equal((await client.files.list({ limit: 2, after: undefined })).has_more, false);
    ok((await seen(url, (r) => r.path === "/v1/files?limit=2")).length, "the query");
    equal(await (await client.files.content("f1")).text(), '{"a": 1}\n{"b": 2}\n');
    equal((await client.batches.wait("b1", { interval: 1 })).status, "completed");
  },

  async "fine-tuning"({ sdk, url }) {
    const { fineTuning } = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const hyperparameters = { n_epochs: 2 };
    const made = await fineTuning.create({ model: "m", training_file: "f1", hyperparameters, options: { lr: 1 } });
    const method = { type: "supervised", supervised: { hyperparameters } };
    equal(made.asked, { method, llmasos: { lr: 1 }, model: "m", training_file: "f1" });
    equal((await fineTuning.wait("t1", { interval: 1 })).fine_tuned_model, "ft:m::1");
    equal((await fineTuning.list({ limit: 1 })).data[0].id, "t1");
    equal((await fineTuning.pause("t1")).status, "paused");
    equal((await fineTuning.resume("t1")).status, "queued");
    equal((await fineTuning.cancel("t1")).status, "cancelled");
    equal((await all(fineTuning.follow("t1"))).map((one) => one.message), ["Step 1", "made"]);
    equal((await fineTuning.events("t1", { limit: 1 })).has_more, true);
    equal((await fineTuning.checkpoints("t1")).data[0].step_number, 5);
  },

  async "the server's own API"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal((await client.native.status())[0].name, "gpt2");
    equal((await all(client.native.pull("gpt2"))).map((job) => [job.state, job.done]), [["running", 1], ["done", 2]]);
  },

  async "keys and usage"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    const made = await client.access.createKey("ci", { scopes: ["inference"] });
    equal(made, { id: "k1", name: "ci", scopes: ["inference"], key: "sk-1" });
    equal((await client.access.keys()).length, 1);
    equal(await client.access.updateKey("k1", { tokens_per_day: null }), { id: "k1", tokens_per_day: null });
    equal((await client.access.usage({ since: "2026-01-01" }))[0].requests, 3);
    ok((await seen(url, (r) => r.path === "/llmasos/v1/usage?since=2026-01-01")).length, "the query");
  },

  async "applications: results, path values, streams and problem documents"({ sdk, url }) {
    const client = new sdk.LLMasOS({ baseURL: `${url}/v1` });
    equal(await client.apps.run("notes", "/ask", { question: "Why" }), "Why?");
    equal(await client.apps.run(`${url}/apps/notes/`, "ask", { question: "Why" }), "Why?");
    const read = await client.apps.run("notes", "/notes/{name}", { name: "a b", deep: true }, { method: "GET" });
    equal(read, "kept");
    ok((await seen(url, (r) => r.path === "/apps/notes/notes/a%20b?deep=true")).length, "the query");
    equal(await all(client.apps.stream("notes", "/tell")), ["one", "two"]);
    const failed = await failure(() => all(client.apps.stream("notes", "/fail")), sdk.APIError);
    equal([failed.code, failed.message], ["bug", "It broke. See the log."]);
    const wrong = await failure(() => client.apps.run("notes", "/wrong"), sdk.BadRequestError);
    equal([wrong.code, wrong.detail], ["wrong_input", [{ loc: ["body", "a"] }]]);
    await failure(() => client.apps.run("notes", "/notes/{name}"), TypeError);
  },
};
