/**
 * Against a real application, which tests/js starts: `node tests/app.js URL CALLS`. CALLS is JSON: [path, method, inputs,
 * result, streams] each. Prints what was found: [result, elements of the stream, result of the job].
 */

import assert from "node:assert/strict";

import { File } from "node:buffer";

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
const files = [new Blob(["hello"], { type: "text/plain" }), new Uint8Array([1, 2]), "AAEC"];
const sizes = await apps.run(url, "/sizes", { files, note: new File(["hi"], "你 好.txt", { type: "text/plain" }) });
assert.deepEqual(sizes.map((one) => one.bytes), [5, 2, 3, 2]);
assert.equal(sizes[3].name, "你 好.txt");
await assert.rejects(apps.run(url, "/add", { a: "x" }), BadRequestError);
const broken = await apps.start(url, "/box", { points: [] });
await assert.rejects(apps.wait(url, broken.id), (e) => e instanceof APIError && e.status === 500);
assert.equal((await apps.job(url, broken.id)).state, "failed");
assert.equal((await apps.cancel(url, broken.id)).state, "failed");
assert.equal((await apps.jobs(url))[0].id, broken.id);
console.log(JSON.stringify(found));
