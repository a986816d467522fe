/**
 * Against a real application, which tests/js starts: `node tests/app.js URL CALLS`. CALLS is JSON: [path, method, inputs,
 * result, streams] each. Prints what was found: [result, elements of the stream, result of the job].
 */

import assert from "node:assert/strict";

import { BadRequestError, APIError, LLMasOS } from "../llmasos.js";

const [, , url, calls] = process.argv;
const { apps } = new LLMasOS({ maxRetries: 0 });
const found = [];
for (const [path, method, inputs, , streams] of JSON.parse(calls)) {
  const result = await apps.run(url, path, inputs, { method });
  const items = [];
  if (streams) for await (const item of apps.stream(url, path, inputs, { method })) items.push(item);
  const job = await apps.start(url, path, inputs, { method });
  found.push([result, items, (await apps.wait(url, job.id)).result]);
}
await assert.rejects(apps.run(url, "/add", { a: "x" }), BadRequestError);
const broken = await apps.start(url, "/box", { points: [] });
await assert.rejects(apps.wait(url, broken.id), (e) => e instanceof APIError && e.status === 500);
assert.equal((await apps.job(url, broken.id)).state, "failed");
assert.equal((await apps.cancel(url, broken.id)).state, "failed");
assert.equal((await apps.jobs(url))[0].id, broken.id);
console.log(JSON.stringify(found));
