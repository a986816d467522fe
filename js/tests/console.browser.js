/**
 * The console in headless Chromium: `node tests/console.browser.js URL OUT REFERENCE PART`. URL: a server whose model "tiny" answers
 * and which can pull REFERENCE, of which one half comes when there is a file OUT/go. PART says what is done: "chat" (with
 * streaming, branches, two models), "manage" (a pull, its plan, a key, the keyboard) or "pages" (all, in both languages and
 * themes). Prints what it saw, or {"missing": why there is no browser}; screenshots are written to OUT.
 */

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

import { openBrowser } from "./browser.js";

const [, , url, out, reference, part] = process.argv;
const { page, close, missing } = await openBrowser();
let axe;
try {
  axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
} catch {
  axe = null;
}
if (missing || !axe) {
  console.log(JSON.stringify({ missing: missing ?? "axe-core is not installed; run npm install" }));
  await close?.();
  process.exit();
}
page.setDefaultTimeout(90_000); // processes of a busy machine begin slowly
const told = { elsewhere: [], errors: [], serious: {}, sizes: {}, wide: [] };
page.on("request", (request) => request.url().startsWith(`${url}/`) || /^(data|blob|about):/.test(request.url()) || told.elsewhere.push(request.url()));
page.on("pageerror", (error) => told.errors.push(String(error)));
page.on("console", (message) => ["error", "warning"].includes(message.type()) && told.errors.push(message.text()));

const button = (name, within = page) => within.getByRole("button", { name, exact: true });
const dialog = page.locator("dialog[open]");
const shot = (name) => page.screenshot({ path: `${out}/${name}.png` });

/** Serious findings of axe-core on the page as it is now. The page's own policy keeps scripts out: axe runs beside it. */
async function audit(name) {
  await page.evaluate(`${axe}; undefined`);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const bad = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
  for (const one of bad) (told.serious[name] ??= []).push(`${one.id}: ${one.nodes.map((node) => `${node.target} ${node.any[0]?.message ?? ""}`).join("; ")}`);
}

const settled = () => page.locator(".waiting").waitFor({ state: "detached" });

/** Bytes of the first load: as the browser reads them, and as they come over the wire. */
async function firstLoad() {
  const sizes = await page.evaluate(() =>
    performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation")).filter((one) => one.name.includes("/console/")).map((one) => [one.decodedBodySize, one.encodedBodySize]));
  const sum = (at) => sizes.reduce((total, one) => total + one[at], 0);
  return { files: sizes.length, decoded: sum(0), wire: sum(1) };
}

const PARTS = {
  chat: ["first load", "chat with streaming", "stop, compare, code, settings"],
  manage: ["pull, pause, go on", "make and revoke a key", "keyboard alone"],
  pages: ["all pages, both languages and themes"],
};
const walk = {
  async "first load"() {
    await page.goto(`${url}/`);
    await page.waitForURL(`${url}/console/`);
    await page.reload();
    await page.locator(".composer textarea").waitFor();
    await settled();
    told.sizes = await firstLoad();
  },

  async "chat with streaming"() {
    await page.goto(`${url}/console/#/chat?model=tiny`);
    await page.reload();
    await page.getByLabel("Write a message").fill("Hello there");
    await page.keyboard.press("Enter");
    await button("Answer again").waitFor();
    told.answer = await page.locator(".answer .markdown").textContent();
    told.figures = await page.locator(".figures").textContent();
    told.address = page.url();
    await button("Answer again").click();
    await page.locator(".branches").getByText("2/2").waitFor();
    await button("Answer again").waitFor();
    await button("Previous version").click();
    await page.locator(".branches").getByText("1/2").waitFor();
    await page.reload(); // it is kept
    await page.locator(".answer .markdown").waitFor();
    told.kept = await page.locator(".chats li").count();
    await audit("chat");
  },

  async "stop, compare, code, settings"() {
    await button("New chat").click();
    await button("Compare two models").click();
    await page.getByLabel("Second model").selectOption("slow");
    await page.getByLabel("Write a message").fill("A much longer question, which takes its time");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => {
      const text = document.querySelectorAll(".twins .answer")[1]?.querySelector(".markdown")?.textContent ?? "";
      globalThis.pieces = (globalThis.pieces ?? new Set()).add(text.length);
      return globalThis.pieces.size > 4; // of which the last is not the whole: it is stopped now
    });
    await button("Stop").click();
    await page.getByText("stopped", { exact: true }).first().waitFor();
    await shot("compare");
    await audit("compare");
    await button("Go on with this one").first().click();
    await button("Copy as code").click();
    told.code = await dialog.locator("code").textContent();
    await audit("code");
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "detached" });
    await button("Settings of this chat").click();
    await dialog.getByLabel("System prompt").fill("Be brief.");
    await dialog.getByText("Form of the answer").click();
    await dialog.getByLabel("JSON schema").fill("{");
    told.notJSON = await dialog.locator(".field-error").count();
    await dialog.getByLabel("JSON schema").fill("");
    await audit("settings");
    await shot("chat-settings");
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "detached" });
  },

  async "pull, pause, go on"() {
    await page.goto(`${url}/console/#/models?tab=catalog`);
    await page.locator("#pull-ref").fill(reference);
    await button("Pull", page.locator("form")).click();
    await page.locator(".pull").waitFor();
    await button("Pause the pull of tiny-model").click();
    await page.getByText("paused", { exact: true }).waitFor();
    await shot("pull");
    await audit("pull");
    writeFileSync(`${out}/go`, "");
    await button("Go on with the pull of tiny-model").click();
    await page.locator(".pull").waitFor({ state: "detached" });
    await page.getByRole("tab", { name: "Installed" }).click();
    await page.getByRole("link", { name: "tiny-model", exact: true }).click();
    await dialog.locator(".plan-bar").waitFor();
    const needs = () => dialog.locator(".plan strong").textContent();
    const before = await needs();
    await dialog.getByRole("slider").press("Home");
    told.needs = [before, await needs()];
    await audit("plan");
    await shot("plan");
    await button("Delete", dialog).click();
    await button("Delete", dialog.last()).last().click();
    await page.getByText("tiny-model is deleted", { exact: false }).waitFor();
    await dialog.waitFor({ state: "detached" });
  },

  async "make and revoke a key"() {
    await page.goto(`${url}/console/#/system/keys`);
    await button("New key").click();
    await dialog.getByLabel("Name").fill("walker");
    await audit("key");
    await button("Make the key").click();
    told.key = await dialog.locator("code").textContent();
    await button("Close", dialog).last().click();
    await button("Revoke walker").click();
    await button("Revoke").click();
    await button("Revoke walker").waitFor({ state: "detached" });
  },

  async "keyboard alone"() {
    await page.goto(`${url}/console/#/system`);
    await settled();
    await page.locator("main").focus();
    await page.keyboard.press("g");
    await page.keyboard.press("m");
    await page.waitForURL(/#\/models/);
    await page.keyboard.press("Control+k");
    await page.keyboard.type("dark");
    await page.keyboard.press("Enter");
    told.theme = await page.evaluate(() => document.documentElement.dataset.theme);
    await page.evaluate(() => location.reload());
    await page.locator("nav").waitFor();
    await page.keyboard.press("Tab");
    told.skip = await page.evaluate(() => document.activeElement.className);
  },

  async "all pages, both languages and themes"() {
    for (const language of ["en", "zh"]) {
      for (const theme of ["light", "dark"]) {
        await page.evaluate(([language, theme]) => ((localStorage["llmasos.language"] = JSON.stringify(language)), (localStorage["llmasos.theme"] = JSON.stringify(theme))), [language, theme]);
        await page.goto(`${url}/console/#/chat`);
        await page.reload();
        for (const name of ["chat", "models", "apps", "playground", "activity", "system"]) {
          await page.goto(`${url}/console/#/${name}`);
          await page.locator(`nav a[aria-current][href="#/${name}"]`).waitFor();
          await page.locator("main h1").waitFor();
          await settled();
          if ((language === "en") === (theme === "light")) await audit(`${name} ${language} ${theme}`);
          await shot(`${name}-${language}-${theme}`);
          if (language === "en" && theme === "light") await narrow(name);
        }
      }
    }
  },
};

async function narrow(name) {
  await page.setViewportSize({ width: 360, height: 720 });
  if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) told.wide.push(name);
  const spills = await page.evaluate(() => {
    const main = document.querySelector("main");
    return main.scrollWidth > main.clientWidth + 1;
  });
  if (spills) told.wide.push(`${name}: main`);
  await shot(`${name}-narrow`);
  await page.setViewportSize({ width: 1280, height: 720 });
}

let now;
try {
  await page.goto(`${url}/console/`);
  await page.evaluate(() => ((localStorage["llmasos.language"] = '"en"'), (localStorage["llmasos.theme"] = '"light"')));
  for (const name of PARTS[part]) {
    now = name;
    await walk[name]();
  }
  console.log(JSON.stringify(told));
} catch (error) {
  await shot("failed");
  console.error(`at "${now}":`, error, JSON.stringify(told));
  process.exitCode = 1;
} finally {
  await close();
}
