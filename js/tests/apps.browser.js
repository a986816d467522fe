/**
 * The console's page of applications in headless Chromium: `node tests/apps.browser.js URL OUT`. URL: a server whose index
 * has `notes` 0.1.0, and from its file OUT/next.go on (this program writes it, and waits for OUT/published) 0.2.0, which asks
 * for more. Installs, runs, updates, rolls back, uninstalls, installs OUT/0.1.0.llmapp; prints what was shown, or
 * {"missing": why}.
 */

import { existsSync, writeFileSync } from "node:fs";

import { openBrowser } from "./browser.js";

const [, , url, out] = process.argv;
const { page, close, missing } = await openBrowser();
if (missing) {
  console.log(JSON.stringify({ missing }));
  process.exit();
}
page.setDefaultTimeout(30_000);
const told = { elsewhere: [], errors: [] };
page.on("request", (request) => request.url().startsWith(url) || /^(data|blob|about):/.test(request.url()) || told.elsewhere.push(request.url()));
page.on("pageerror", (error) => told.errors.push(String(error)));
await page.addInitScript(() => localStorage.setItem("llmasos.language", '"en"'));
const button = (name) => page.getByRole("button", { name, exact: true });
const dialog = page.locator("dialog[open]");
const grants = async () => (await dialog.locator(".grant").allTextContents()).map((text) => text.trim());

try {
  await page.goto(`${url}/console/#/apps/store`);
  await page.getByPlaceholder("Search applications").fill("keeps");
  await button("Install notes").click();
  await dialog.waitFor();
  told.sheet = await grants();
  await button("Cancel").click();
  await dialog.waitFor({ state: "detached" });
  told.refused = await page.evaluate(async () => (await (await fetch("/llmasos/v1/apps")).json()).data.length);
  await button("Install notes").click();
  await button("Allow and install").click();
  await page.waitForURL(/\/apps\/app\/notes\/run/);
  await page.locator(".chip").click();
  await button("Run").click();
  await page.locator(".run-output .badge-ok").waitFor();
  told.ran = await page.locator(".run-output code").last().textContent();
  await page.goto(`${url}/console/#/apps/app/notes/logs`);
  await page.locator(".log-line", { hasText: "kept milk" }).waitFor();
  told.logged = true;

  writeFileSync(`${out}/next.go`, "");
  while (!existsSync(`${out}/published`)) await page.waitForTimeout(50);
  await page.goto(`${url}/console/#/apps/app/notes/about`);
  await button("Update").click();
  await dialog.waitFor();
  told.widened = await grants();
  told.asked = await dialog.locator(".grant-new").allTextContents();
  await button("Allow and update").click();
  await page.getByText("0.2.0 is in use.").waitFor();
  await button("Roll back").click();
  await dialog.getByRole("button", { name: "Roll back" }).click();
  await page.getByText("0.1.0 is in use again.").waitFor();
  await button("Uninstall").click();
  await dialog.getByText("Delete its data too").click();
  await dialog.getByRole("button", { name: "Uninstall" }).click();
  await page.getByText("No application is installed.").waitFor();
  await page.locator("input[type=file]").first().setInputFiles(`${out}/0.1.0.llmapp`);
  await button("Allow and install").click();
  await page.waitForURL(/\/apps\/app\/notes\/run/);
  told.uploaded = true;
  console.log(JSON.stringify(told));
} catch (error) {
  await page.screenshot({ path: `${out}/failed.png` });
  throw error;
} finally {
  await close();
}
