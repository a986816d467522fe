import { after, before, test } from "node:test";

import { openBrowser } from "./browser.js";
import { startFakeServer } from "./fake_server.js";
import { checks } from "./suite.js";

let server;
let browser;
before(async () => {
  browser = await openBrowser();
  if (browser.missing) return;
  server = await startFakeServer();
  await browser.page.goto(server.url);
});
after(async () => {
  await browser.close?.();
  await server?.close();
});

for (const title of Object.keys(checks)) {
  test(`Chromium: ${title}`, async (t) => {
    if (browser.missing) return t.skip(browser.missing);
    await browser.page.evaluate(
      async ({ title, url }) => {
        const [sdk, { checks }] = [await import("/llmasos.js"), await import("/suite.js")];
        await checks[title]({ sdk, url });
      },
      { title, url: server.url },
    );
  });
}
