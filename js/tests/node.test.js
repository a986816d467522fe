import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";

import * as sdk from "../llmasos.js";
import { startFakeServer } from "./fake_server.js";
import { checks } from "./suite.js";

let server;
before(async () => (server = await startFakeServer()));
after(() => server.close());

for (const [title, check] of Object.entries(checks)) test(title, () => check({ sdk, url: server.url }));

test("every export and every method is declared", async () => {
  const declared = await readFile(new URL("../llmasos.d.ts", import.meta.url), "utf8");
  const client = new sdk.LLMasOS();
  const namespaces = [client, client.responses, client.conversations, client.files, client.batches, client.fineTuning, client.native, client.access, client.apps];
  const methods = namespaces.flatMap((object) => Object.getOwnPropertyNames(Object.getPrototypeOf(object)));
  for (const name of [...Object.keys(sdk), ...methods]) assert.match(declared, new RegExp(`\\b${name}\\b`));
});
