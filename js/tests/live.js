/**
 * Against a real server, which tests/js starts: `node tests/live.js URL`. Its model "fake" answers with the prompt's last
 * line and "!"; "slow" does the same one token at a time. Prints one JSON line per check: {title, error?}.
 */

import assert from "node:assert/strict";

import * as sdk from "../llmasos.js";

const client = new sdk.LLMasOS({ baseURL: process.argv[2], maxRetries: 0 });

const checks = {
  async chat() {
    const answer = await client.chat("Hi", { model: "fake" });
    assert.equal(answer.text, "Hi!");
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(answer.usage.completion_tokens > 0);
  },

  async stream() {
    const stream = client.streamChat("Hello there", { model: "fake", stream_options: { include_usage: true } });
    let text = "";
    for await (const chunk of stream) text += chunk.text;
    const whole = await stream.final();
    assert.equal(text, "Hello there!");
    assert.equal(whole.text, text);
    assert.deepEqual(Object.keys(whole.usage).slice(0, 3), ["prompt_tokens", "completion_tokens", "total_tokens"]);
  },

  async "a stream is the answer that comes without one"() {
    const options = { model: "fake", n: 2, logprobs: true, top_logprobs: 1, stream_options: { include_usage: true } };
    const { stream_options: _, ...whole } = options;
    const streamed = await client.streamChat("Hello", options).final();
    const { id: _a, created: _b, ...found } = streamed;
    const { id: _c, created: _d, ...expected } = await client.chat("Hello", whole);
    for (const { message } of [...found.choices, ...expected.choices]) {
      for (const [name, value] of Object.entries(message)) if (value === null) delete message[name];
    }
    for (const { logprobs } of expected.choices) delete logprobs.refusal;
    for (const { logprobs } of found.choices) delete logprobs.refusal;
    assert.deepEqual(found, expected);
  },

  async "abort by signal, abort() and break"() {
    const controller = new AbortController();
    await assert.rejects(async () => {
      for await (const _ of client.streamChat("a long tale", { model: "slow", signal: controller.signal })) controller.abort();
    }, sdk.AbortError);
    const stream = client.streamChat("a long tale", { model: "slow" });
    await assert.rejects(async () => {
      for await (const _ of stream.text) stream.abort();
    }, sdk.AbortError);
    for await (const _ of client.streamChat("a long tale", { model: "slow" })) break;
    const waiting = new AbortController();
    setTimeout(() => waiting.abort(), 100);
    await assert.rejects(client.chat("a long tale", { model: "slow", signal: waiting.signal }), sdk.AbortError);
  },

  async completions() {
    assert.equal((await client.complete("ab", { model: "fake", echo: true })).text, "abab!");
    assert.equal((await client.streamComplete("ab", { model: "fake" }).final()).text, "ab!");
  },

  async embeddings() {
    const { data } = await client.embed(["abc", "a"], { model: "fake" });
    assert.deepEqual(data.map((row) => row.embedding), [[3, 0.5, -0.25], [1, 0.5, -0.25]]);
  },

  async "rerank, score and tokens"() {
    const { results } = await client.rerank("pets", ["a", "a long text"], { model: "fake", top_n: 1 });
    assert.equal(results.length, 1);
    assert.equal((await client.score("pets", ["a", "b"], { model: "fake" })).data.length, 2);
    assert.deepEqual((await client.tokenize("Hi", { model: "fake" })).tokens, [72, 105]);
    assert.equal(await client.detokenize([72, 105], { model: "fake" }), "Hi");
    assert.equal(await client.countTokens([{ role: "user", content: "Hi" }], { model: "fake" }), "user: Hi".length);
  },

  async models() {
    assert.deepEqual((await client.models()).map((model) => model.id), ["fake", "slow"]);
    assert.equal((await client.model("fake")).context_length, 1000);
  },

  async tools() {
    const call = (city) => `<tool_call>{"name": "weather", "arguments": {"city": "${city}"}}</tool_call>`;
    const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const weather = { name: "weather", description: "Tells it.", parameters, run: ({ city }) => ({ city, degrees: 18 }) };
    const asked = { model: "fake", messages: call("Bern") + call("Oslo"), tools: [weather] };
    for (const more of [{}, { onChunk() {} }]) {
      const found = await client.runTools({ ...asked, ...more });
      assert.equal(found.text, 'tool: {"city":"Oslo","degrees":18}!');
      assert.deepEqual(found.messages.map((message) => message.role), ["user", "assistant", "tool", "tool", "assistant"]);
      assert.equal(found.messages[1].tool_calls.length, 2);
    }
  },

  async responses() {
    const first = await client.responses.create({ model: "fake", input: "Hello" });
    assert.equal(first.text, "Hello!");
    const stream = client.responses.stream({ model: "fake", input: "More", previous_response_id: first.id });
    let text = "";
    for await (const piece of stream.text) text += piece;
    const second = await stream.final();
    assert.deepEqual([text, second.text, second.previous_response_id], ["More!", "More!", first.id]);
    assert.equal((await client.responses.retrieve(second.id)).text, "More!");
    assert.equal((await client.responses.inputItems(second.id)).data.length, 3);
    assert.equal((await client.responses.delete(first.id)).deleted, true);
    await assert.rejects(client.responses.retrieve(first.id), sdk.NotFoundError);
    assert.ok((await client.responses.countTokens({ model: "fake", input: "Hello" })) > 4);
    const begun = client.responses.stream({ model: "fake", input: "Hello there", background: true });
    let last;
    for await (const event of begun) {
      last = event;
      break;
    }
    const followed = client.responses.follow(last.response.id, { starting_after: last.sequence_number });
    assert.equal((await followed.final()).text, "Hello there!");
    const waiting = await client.responses.create({ model: "fake", input: "Later", background: true });
    assert.equal((await client.responses.wait(waiting.id, { interval: 5 })).text, "Later!");
    const failed = client.responses.stream({ model: "fake", input: "boom late" });
    await assert.rejects(async () => {
      const response = await failed.final();
      throw Object.assign(new sdk.APIError(response.error.message), response.error);
    }, sdk.APIError);
  },

  async "files and batches"() {
    const line = (content) => ({
      custom_id: content,
      method: "POST",
      url: "/v1/chat/completions",
      body: { model: "fake", messages: [{ role: "user", content }] },
    });
    const file = await client.files.upload([line("a"), line("b")].map((one) => JSON.stringify(one)).join("\n"));
    assert.ok((await client.files.list({ limit: 5 })).data.some((one) => one.id === file.id));
    const made = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions" });
    const done = await client.batches.wait(made.id, { interval: 5 });
    assert.deepEqual([done.status, done.request_counts.completed], ["completed", 2]);
    const text = await (await client.files.content(done.output_file_id)).text();
    const answers = text.trim().split("\n").map((answer) => JSON.parse(answer));
    assert.deepEqual(answers.map((answer) => answer.custom_id).sort(), ["a", "b"]);
    assert.equal((await client.files.delete(file.id)).deleted, true);
  },

  async "fine-tuning"() {
    const file = await client.files.upload("{}", { purpose: "fine-tune", filename: "chats.jsonl" });
    const wrong = { model: "fake", training_file: file.id, suffix: "a b" };
    await assert.rejects(client.fineTuning.create(wrong), (error) => error.param === "suffix");
    assert.deepEqual((await client.fineTuning.list()).data, []);
    for (const ask of ["retrieve", "cancel", "pause", "resume", "events", "checkpoints"]) {
      await assert.rejects(client.fineTuning[ask]("ftjob-none"), (error) => error.status === 404);
    }
  },

  async conversations() {
    const made = await client.conversations.create({ metadata: { team: "blue" } });
    await client.responses.create({ model: "fake", input: "Hello", conversation: made.id });
    const { data } = await client.conversations.items(made.id, { order: "asc" });
    assert.deepEqual(data.map((item) => item.role), ["user", "assistant"]);
    assert.equal((await client.conversations.update(made.id, { metadata: { team: "red" } })).metadata.team, "red");
    const [added] = (await client.conversations.addItems(made.id, [{ role: "user", content: "More" }])).data;
    assert.equal((await client.conversations.item(made.id, added.id)).id, added.id);
    await client.conversations.deleteItem(made.id, added.id);
    assert.equal((await client.conversations.delete(made.id)).deleted, true);
    await assert.rejects(client.conversations.retrieve(made.id), sdk.NotFoundError);
  },

  async "the server's own API"() {
    const status = await client.native.status();
    assert.deepEqual(status.map((model) => model.name).sort(), ["fake", "slow"]);
    assert.deepEqual(await client.native.models(), []);
    assert.ok((await client.native.catalog({ query: "gpt2" })).some((model) => model.name === "gpt2"));
    const controller = new AbortController();
    const running = client.chat("a long tale", { model: "slow", signal: controller.signal }).catch((e) => e);
    let requests = [];
    while (!requests.length) requests = (await client.native.requests()).filter((request) => request.model === "slow");
    await client.native.cancelRequest(requests[0].id);
    assert.equal((await running).code, "request_cancelled");
    for await (const line of client.native.logs({ limit: 3 })) assert.ok(line.message);
    await assert.rejects(client.native.model("none"), sdk.NotFoundError);
  },

  async "tasks, jobs, knowledge, packages"() {
    assert.ok((await client.tasks.list()).some((task) => task.name === "chat"));
    assert.equal((await client.tasks.run("chat", { model: "fake", message: "Hi" })).text, "Hi!");
    const job = await client.tasks.batch("chat", { model: "fake", lines: ["a", "b"] });
    const done = await client.jobs.wait(job.id);
    assert.deepEqual([done.state, done.progress, done.result.done], ["done", 1, 2]);
    assert.equal((await client.jobs.list({ kind: "task_batch" }))[0].id, job.id);
    const pipeline = { steps: [{ id: "a", task: "chat", inputs: { message: "${inputs.x}" } }] };
    const run = await client.tasks.pipeline(pipeline, { x: "Ho" }, { model: "fake" });
    assert.equal((await client.jobs.wait(run.id)).result.output.text, "Ho!");
    await assert.rejects(client.jobs.cancel(job.id), sdk.APIError);
    await client.knowledge.create("js", { model: "fake" });
    assert.equal((await client.knowledge.add("js", "a b/tea.md", "# Tea\n\nBoil it.")).state, "added");
    assert.equal((await client.knowledge.search("js", "boil", { mode: "text" }))[0].path, "a b/tea.md");
    await assert.rejects(client.knowledge.ask("js", "boil", { model: "fake", mode: "text" }), sdk.APIError); // says no JSON
    assert.equal(await client.knowledge.delete("js"), undefined);
    assert.deepEqual((await client.packages.index()).apps, {});
    await assert.rejects(client.packages.report("ann/none", "1.0.0"), sdk.NotFoundError);
    await assert.rejects(client.packages.publish(new Uint8Array(3), { owner: "ann" }), sdk.APIError);
  },

  async errors() {
    const missing = await client.chat("x", { model: "none" }).catch((e) => e);
    assert.ok(missing instanceof sdk.NotFoundError && missing.requestId, String(missing));
    const wrong = await client.chat("x", { model: "fake", temperature: 9 }).catch((e) => e);
    assert.ok(wrong instanceof sdk.BadRequestError, String(wrong));
    assert.equal(wrong.param, "temperature");
    const long = await client.complete("x", { model: "fake", max_tokens: 5000 }).catch((e) => e);
    assert.equal(long.code, "context_length_exceeded");
    const failed = await client.chat("boom", { model: "fake" }).catch((e) => e);
    assert.deepEqual([failed.status, failed.code], [500, "internal_error"]);
    const late = await client.streamChat("boom late", { model: "fake" }).final().catch((e) => e);
    assert.ok(late instanceof sdk.APIError, String(late));
    assert.equal(late.code, "internal_error");
  },
};

for (const [title, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(JSON.stringify({ title }));
  } catch (e) {
    console.log(JSON.stringify({ title, error: e.stack ?? String(e) }));
  }
}
