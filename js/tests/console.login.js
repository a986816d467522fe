/** The console of a server that asks for a key: `node tests/console.login.js URL KEY`. Prints what it saw as JSON. */

import { openBrowser } from "./browser.js";

const [, , url, key] = process.argv;
const { page, close, missing } = await openBrowser();
if (missing) {
  console.log(JSON.stringify({ missing }));
  process.exit();
}
page.setDefaultTimeout(20_000);
await page.addInitScript(() => localStorage.setItem("llmasos.language", '"en"'));
const enter = (text) => page.getByLabel("Key", { exact: true }).fill(text).then(() => page.getByRole("button", { name: "Use this key" }).click());
try {
  await page.goto(`${url}/console/`);
  await enter("sk-llmasos-wrong");
  await page.locator(".field-error").waitFor();
  const refused = await page.locator(".field-error").textContent();
  await enter(key);
  await page.locator("dialog").waitFor({ state: "detached" });
  await page.getByLabel("Model", { exact: true }).locator("option", { hasText: "fake" }).waitFor({ state: "attached" });
  const told = await page.evaluate((key) => ({ kept: { ...localStorage }, session: sessionStorage["llmasos.key"]?.includes(key), address: location.href }), key);
  told.models = await page.getByLabel("Model", { exact: true }).locator("option").allTextContents();
  console.log(JSON.stringify({ ...told, refused }));
} finally {
  await close();
}
