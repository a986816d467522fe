/** The checks in Deno: `deno run -A tests/deno.js`. */

import * as sdk from "../llmasos.js";
import { startFakeServer } from "./fake_server.js";
import { checks } from "./suite.js";

const server = await startFakeServer();
let failed = 0;
for (const [title, check] of Object.entries(checks)) {
  try {
    await check({ sdk, url: server.url });
    console.log(`ok: ${title}`);
  } catch (e) {
    failed++;
    console.log(`not ok: ${title}: ${e.stack ?? e}`);
  }
}
await server.close();
Deno.exit(failed ? 1 : 0);
