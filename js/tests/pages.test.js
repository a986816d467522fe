/** What the console's pages work out before they draw: tokens, endpoints, activity, views of results. */

import assert from "node:assert/strict";
import { test } from "node:test";

import * as facts from "../../src/llmasos/serve/console/pages/activity/facts.js";
import * as openapi from "../../src/llmasos/serve/console/pages/playground/openapi.js";
import { alphabetOf, cosine, pieces } from "../../src/llmasos/serve/console/pages/playground/tokens.js";
import { mediaOf, tableOf, viewsOf } from "../../src/llmasos/serve/console/components/views.js";

const texts = (tokens) => pieces(tokens.map((_, i) => i), tokens).map(({ text }) => text);

test("tokens of every alphabet are shown as text, and characters in parts as one", () => {
  assert.deepEqual(texts(["Hello", "Ġworld", "Ċ"]), ["Hello", " world", "\n"]);
  assert.deepEqual(texts(["Ġ", "ä½", "ł", "å¥½"]), [" ", "你", "好"]);
  assert.deepEqual(texts(["▁Hi", "<0xE4>", "<0xBD>", "<0xA0>", "!"]), [" Hi", "你", "!"]);
  assert.deepEqual(texts(["[CLS]", "hello", "##s", "é"]), ["[CLS]", "hello", "##s", "é"]);
  assert.deepEqual(texts(["▁a", "<0xE4>"]), [" a", "\ufffd"], "an end inside of a character is not lost");
  assert.equal(alphabetOf(["a", "b"]), "plain");
  assert.deepEqual(pieces([7, 8], ["ä½", "ł"])[0].ids.length > 0, true);
});

test("cosines", () => {
  assert.equal(cosine([1, 0], [0, 1]), 0);
  assert.ok(Math.abs(cosine([1, 2], [2, 4]) - 1) < 1e-12);
  assert.equal(cosine([0, 0], [1, 1]), 0);
});

const DOCUMENT = {
  paths: {
    "/v1/chat/completions": { post: { summary: "Answer", requestBody: { content: { "application/json": { schema: { $ref: "#/c/Chat" } } } } } },
    "/llmasos/v1/models/{name}": {
      parameters: [{ name: "name", in: "path", required: true, schema: { type: "string" } }],
      get: { summary: "One model", parameters: [{ name: "tag", in: "query", schema: { type: "array", items: { type: "string" } } }] },
    },
    "/apps/{name}/{path:path}": { delete: {} },
    "/healthz": { get: {} },
  },
  c: { Chat: { type: "object", properties: { model: { type: "string" }, messages: { type: "array", items: {} } }, required: ["model", "messages"] } },
};

test("every operation of a document is found, grouped, searched", () => {
  const all = openapi.operationsOf(DOCUMENT);
  assert.deepEqual(all.map(({ id, group }) => [id, group]), [
    ["post /v1/chat/completions", "OpenAI"],
    ["get /llmasos/v1/models/{name}", "LLMasOS"],
    ["delete /apps/{name}/{path:path}", "apps"],
    ["get /healthz", "other"],
  ]);
  assert.deepEqual(openapi.found(all, "get MODEL").map(({ path }) => path), ["/llmasos/v1/models/{name}"]);
  assert.deepEqual(openapi.groupsOf(all), ["OpenAI", "LLMasOS", "apps", "other"]);
  const [chat, model] = all;
  const body = openapi.sampleBody(chat.path, chat.operation, DOCUMENT, { chat: "m" });
  assert.equal(body.model, "m");
  assert.equal(body.messages[0].role, "user");
  assert.deepEqual(openapi.parameterSchema(model.operation).required, ["name"]);
});

test("addresses have their values in their places, and what lacks is named", () => {
  const [, model, app] = openapi.operationsOf(DOCUMENT);
  const values = { name: "a/b", tag: ["x", "y z"] };
  assert.deepEqual(openapi.urlOf("http://h", model.path, model.operation, values), { url: "http://h/llmasos/v1/models/a%2Fb?tag=x&tag=y+z", missing: [] });
  assert.deepEqual(openapi.urlOf("", model.path, model.operation, {}).missing, ["name"]);
  assert.equal(openapi.urlOf("", app.path, app.operation, { name: "n", path: "a/b c" }).url, "/apps/n/a/b%20c");
});

test("what wants a decision is told, and nothing else", () => {
  const now = Date.now();
  const at = (ago) => new Date(now - ago).toISOString();
  const job = (state, ago) => ({ id: state, state, updated: at(ago) });
  const jobs = [job("failed", 1000), job("failed", 7.2e6), job("paused", 9e9), job("done", 0), job("running", 0)];
  const runs = [{ state: "requires_action" }, { state: "running" }];
  const faults = [{ time: at(9e9) }, { time: at(2000) }, { time: at(1000) }];
  assert.deepEqual(facts.wanting({ jobs, runs, faults }, now).map(({ what }) => what), ["approval", "failed", "paused", "error"]);
  assert.deepEqual(facts.wanting({ jobs: null, runs: null, faults: null }, now), []);
  assert.equal(facts.isLooking({ route: "GET /llmasos/v1/jobs" }), true);
  assert.equal(facts.isLooking({ route: "POST /v1/chat/completions" }), false);
});

test("lines of the log by level and words", () => {
  const line = (level, message, more = {}) => ({ level, logger: "l", message, ...more });
  const lines = [line("debug", "a"), line("INFO", "loaded qwen"), line("error", "it failed", { fields: { model: "qwen" } })];
  assert.equal(facts.filtered(lines, "debug", "").length, 3);
  assert.deepEqual(facts.filtered(lines, "info", "QWEN").map(({ message }) => message), ["loaded qwen", "it failed"]);
  assert.deepEqual(facts.filtered(lines, "warning", "qwen").map(({ message }) => message), ["it failed"]);
});

test("the losses of a training job by step, with what was measured beside them", () => {
  const step = (step, loss) => ({ type: "metrics", data: { step, total_steps: 4, train_loss: loss, learning_rate: 1e-4 } });
  const events = [{ type: "message", data: { step: 9 } }, step(1, 3), step(2, null), { type: "metrics", data: { step: 2, valid_loss: 2.5 } }, step(2, 2)];
  const curve = facts.curveOf(events);
  assert.deepEqual([curve.steps, curve.train, curve.valid], [[1, 2], [3, 2], [null, 2.5]]);
  assert.deepEqual([curve.last.step, curve.last.valid_loss, curve.last.total_steps], [2, 2.5, 4]);
  assert.deepEqual(facts.curveOf([]), { steps: [], train: [], valid: [], last: null });
});

test("steps of an agent on a line of time stay on it", () => {
  const run = { seconds: 10, steps: [{ number: 1, kind: "answer", started: 0, seconds: 4, calls: [{ name: "f", started: 4, seconds: 8 }] }] };
  const [step] = facts.timeline(run);
  assert.deepEqual([step.left, step.width, step.calls[0].left], [0, 0.4, 0.4]);
  assert.equal(facts.timeline({ seconds: 0, steps: [] }).length, 0);
});

test("results are looked at in the way that shows them best", () => {
  assert.deepEqual(viewsOf("data:image/png;name=a%20b.png;base64,AA=="), ["image", "text"]);
  assert.deepEqual(viewsOf("data: is a word"), ["text", "markdown"]);
  assert.equal(viewsOf("# Title\n\ntext")[0], "markdown");
  assert.equal(viewsOf("2 * 3 * 4 - 5")[0], "text");
  assert.deepEqual(viewsOf([{ a: 1 }, { a: 2, b: "x" }]), ["table", "tree", "json"]);
  assert.deepEqual(viewsOf([{ a: 1 }], "json"), ["tree", "table", "json"]);
  assert.deepEqual(viewsOf("plain", "markdown"), ["markdown", "text"]);
  assert.deepEqual(viewsOf(null, "image"), ["json"]);
  assert.equal(tableOf([{ a: { b: 1 } }]), undefined);
  assert.equal(tableOf([]), undefined);
  assert.equal(mediaOf("data:text/html,<script>")?.kind, "file");
});
