// The JavaScript clients against a running server: `node packages.mjs <client> <facts>`, started by
// official_clients.py. Writes a line of JSON for each feature.

import assert from "node:assert/strict";

const [client, facts] = [process.argv[2], JSON.parse(process.argv[3])];
const { url, model, embedder, weather, example, similar } = facts;
const question = [{ role: "user", content: "What is the capital of Germany?" }];
const rainy = [{ role: "user", content: "What is the weather in Paris?" }];
const plain = { max_tokens: 24, temperature: 0 };
const called = { max_tokens: 80, temperature: 0 };
const tool = { type: "function", function: weather };
const found = "18 degrees and wind";

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const isNearer = ([a, b, c]) => dot(a, b) > dot(a, c) + 0.2;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function feature(name, work) {
  const start = performance.now();
  const line = { name, ok: true };
  try {
    await work();
  } catch (e) {
    Object.assign(line, { ok: false, error: e.stack ?? String(e) });
  }
  console.log(JSON.stringify({ ...line, s: (performance.now() - start) / 1000 }));
}

function batchLines(num) {
  const body = { model, messages: question, max_tokens: 4, temperature: 0 };
  const lines = Array.from({ length: num }, (_, i) => ({ custom_id: `q${i}`, method: "POST", url: "/v1/chat/completions", body }));
  return lines.map((line) => JSON.stringify(line)).join("\n");
}

function checkBatch(text, num) {
  const answers = text.trim().split("\n").map((line) => JSON.parse(line));
  const ids = Array.from({ length: num }, (_, i) => `q${i}`);
  assert.deepEqual(answers.map((answer) => answer.custom_id).sort(), ids);
  for (const { response } of answers) assert.ok(response.body.choices[0].message.content);
}

async function openai() {
  const { default: OpenAI, NotFoundError, toFile } = await import("openai");
  const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });

  await feature("chat", async () => {
    const answer = await api.chat.completions.create({ model, messages: question, ...plain });
    assert.ok(answer.choices[0].message.content);
    await assert.rejects(api.chat.completions.create({ model: "gpt-4o", messages: question }), NotFoundError);
  });
  await feature("streaming", async () => {
    const asked = { model, messages: question, ...plain };
    const whole = await api.chat.completions.create(asked);
    let text = "";
    let chunks = 0;
    for await (const chunk of await api.chat.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0]?.delta.content ?? "";
      chunks += 1;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.ok(chunks > 4);
    assert.equal(await api.chat.completions.stream(asked).finalContent(), text);
  });
  await feature("tools", async () => {
    const must = { model, messages: rainy, tools: [tool], tool_choice: "required", parallel_tool_calls: false, ...called };
    const answer = await api.chat.completions.create(must);
    const [call] = answer.choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
    const messages = [...rainy, answer.choices[0].message, { role: "tool", tool_call_id: call.id, content: found }];
    const last = await api.chat.completions.create({ model, messages, tools: [tool], tool_choice: "none", ...called });
    assert.ok(last.choices[0].message.content);
  });
  await feature("tools loop", async () => {
    const cities = [];
    const run = (given) => (cities.push(given.city), found);
    const tools = [{ type: "function", function: { ...weather, parse: JSON.parse, function: run } }];
    const runner = api.chat.completions.runTools({ model, messages: example, tools, ...called });
    assert.match(await runner.finalContent(), /18 degrees/);
    assert.deepEqual(cities, ["Paris"]);
  });
  await feature("json schema", async () => {
    const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
    const response_format = { type: "json_schema", json_schema: { name: "capital", schema, strict: true } };
    const answer = await api.chat.completions.parse({ model, messages: question, response_format, ...called });
    assert.equal(typeof answer.choices[0].message.parsed.city, "string");
  });
  await feature("embeddings", async () => {
    const { data } = await api.embeddings.create({ model: embedder, input: similar });
    assert.deepEqual(data.map((one) => one.embedding.length), [384, 384, 384]);
    assert.ok(isNearer(data.map((one) => one.embedding)));
  });
  await feature("files and batch", async () => {
    const file = await api.files.create({ file: await toFile(Buffer.from(batchLines(3)), "in.jsonl"), purpose: "batch" });
    let batch = await api.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
    for (let i = 0; i < 600 && !batch.output_file_id; i++) {
      await pause(250);
      batch = await api.batches.retrieve(batch.id);
    }
    assert.equal(batch.status, "completed");
    checkBatch(await (await api.files.content(batch.output_file_id)).text(), 3);
    for (const id of [file.id, batch.output_file_id]) assert.ok((await api.files.delete(id)).deleted);
  });
  await feature("responses with memory", async () => {
    const asked = { model, max_output_tokens: 24, temperature: 0 };
    const first = await api.responses.create({ input: "My name is Ada.", ...asked });
    const next = { input: "What is my name?", ...asked };
    const second = await api.responses.create({ ...next, previous_response_id: first.id });
    const alone = await api.responses.create(next);
    assert.ok(second.usage.input_tokens >= alone.usage.input_tokens + first.usage.output_tokens);
    let text = "";
    for await (const event of await api.responses.create({ ...next, previous_response_id: second.id, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.ok(text);
  });
}

async function anthropic() {
  const { default: Anthropic } = await import("@anthropic-ai/sdk");
  const api = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const asked = { model, messages: question, ...plain };

  await feature("messages", async () => {
    const answer = await api.messages.create(asked);
    assert.ok(answer.content[0].text);
    const count = await api.messages.countTokens({ model, messages: question });
    assert.equal(count.input_tokens, answer.usage.input_tokens + (answer.usage.cache_read_input_tokens ?? 0));
  });
  await feature("stream", async () => {
    const whole = await api.messages.create(asked);
    assert.equal(await api.messages.stream(asked).finalText(), whole.content[0].text);
  });
  await feature("tools", async () => {
    const tools = [{ name: weather.name, description: weather.description, input_schema: weather.parameters }];
    const tool_choice = { type: "tool", name: weather.name };
    const answer = await api.messages.create({ model, messages: rainy, tools, tool_choice, ...called });
    const call = answer.content.find((part) => part.type === "tool_use");
    assert.deepEqual(call.input, { city: "Paris" });
    const result = { type: "tool_result", tool_use_id: call.id, content: found };
    const messages = [...rainy, { role: "assistant", content: answer.content }, { role: "user", content: [result] }];
    const last = await api.messages.create({ model, messages, tools, tool_choice: { type: "none" }, ...called });
    assert.ok(last.content[0].text);
  });
}

async function llmasos() {
  const { LLMasOS, NotFoundError } = await import(facts.own);
  const api = new LLMasOS({ baseURL: `${url}/v1` });

  await feature("chat and stream", async () => {
    await api.chat(question, { model, ...plain });
    const whole = await api.chat(question, { model, ...plain });
    let text = "";
    for await (const piece of api.streamChat(question, { model, ...plain }).text) text += piece;
    assert.equal(text, whole.text);
    await assert.rejects(api.chat(question, { model: "none" }), NotFoundError);
  });
  await feature("tools loop", async () => {
    const cities = [];
    const tools = [{ ...weather, run: ({ city }) => (cities.push(city), found) }];
    const run = await api.runTools({ model, messages: example, tools, ...called });
    assert.deepEqual(cities, ["Paris"]);
    assert.match(run.text, /18 degrees/);
  });
  await feature("embeddings", async () => {
    const { data } = await api.embed(similar, { model: embedder });
    assert.ok(isNearer(data.map((one) => one.embedding)));
  });
  await feature("files and batch", async () => {
    const file = await api.files.upload(batchLines(3));
    const made = await api.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions" });
    const batch = await api.batches.wait(made.id, { interval: 250 });
    assert.equal(batch.status, "completed");
    checkBatch(await (await api.files.content(batch.output_file_id)).text(), 3);
    for (const id of [file.id, batch.output_file_id]) await api.files.delete(id);
  });
}

await { "openai-js": openai, "anthropic-js": anthropic, "llmasos-js": llmasos }[client]();
