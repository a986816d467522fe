/**
 * What walks through the console have in common: a browser that notes what goes wrong, and axe-core. A walk is a program
 * `node tests/NAME.browser.js URL OUT PART`; it prints what it saw as JSON, or {"missing": why there is no browser}.
 */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import { openBrowser } from "./browser.js";

/** Opens the console of `url` and goes through `steps(tools)[part]`: functions that are called one after the other. */
export async function walk(steps) {
  const [, , url, out, part] = process.argv;
  const { page, close, missing } = await openBrowser();
  const axe = axeSource();
  if (missing || !axe) {
    console.log(JSON.stringify({ missing: missing ?? "axe-core is not installed; run npm install" }));
    return close?.();
  }
  page.setDefaultTimeout(Number(process.env.WALK_TIMEOUT ?? 60_000)); // processes of a busy machine begin slowly
  const told = { elsewhere: [], errors: [], serious: {}, wide: [] };
  page.on("request", (request) => request.url().startsWith(`${url}/`) || /^(data|blob|about):/.test(request.url()) || told.elsewhere.push(request.url()));
  page.on("pageerror", (error) => told.errors.push(String(error)));
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && told.errors.push(`${message.text()} ${message.location().url}`));
  const tools = { page, url, out, told, ...helpers(page, url, out, told, axe) };
  let now = -1;
  const functions = steps(tools)[part];
  try {
    await tools.look("en", "light");
    for (const step of functions) {
      now += 1;
      await step();
    }
    console.log(JSON.stringify(told));
  } catch (error) {
    await tools.shot("failed");
    console.error(`at "${functions[now]?.name || now}" of "${part}":`, error, JSON.stringify(told));
    process.exitCode = 1;
  } finally {
    await close();
  }
}

function axeSource() {
  try {
    return readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
  } catch {
    return null;
  }
}

function helpers(page, url, out, told, axe) {
  return {
    button: (name, within = page) => within.getByRole("button", { name, exact: true }),
    dialog: page.locator("dialog[open]"),
    shot: (name) => page.screenshot({ path: `${out}/${name}.png` }),

    /** Serious findings of axe-core on the page as it is now. The page's own policy keeps scripts out: axe runs beside it. */
    async audit(name) {
      await page.evaluate(`${axe}; undefined`);
      const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
      const bad = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
      for (const one of bad) (told.serious[name] ??= []).push(`${one.id}: ${one.nodes.map((node) => `${node.target} ${node.any[0]?.message ?? ""}`).join("; ")}`);
    },

    /** Notes what is wider than a small phone. */
    async narrow(name) {
      await page.setViewportSize({ width: 360, height: 720 });
      const spills = await page.evaluate(() => {
        const main = document.querySelector("main");
        if (document.documentElement.scrollWidth <= innerWidth && main.scrollWidth <= main.clientWidth + 1) return [];
        const isOut = (one) => one.getBoundingClientRect().right > innerWidth + 1 && !one.parentElement.closest(".scroll-x");
        return [...main.querySelectorAll("*")].filter(isOut).map((one) => `${one.tagName} ${one.className}`).concat("main");
      });
      if (spills.length) told.wide.push([name, ...spills.slice(0, 5)]);
      await page.screenshot({ path: `${out}/${name}-narrow.png` });
      await page.setViewportSize({ width: 1280, height: 720 });
    },

    /** The console anew in a language and a theme. */
    async look(language, theme, hash = "#/chat") {
      await page.goto(`${url}/console/${hash}`);
      await page.evaluate(([language, theme]) => ((localStorage["llmasos.language"] = JSON.stringify(language)), (localStorage["llmasos.theme"] = JSON.stringify(theme))), [language, theme]);
      await page.reload();
      await page.locator("main h1").waitFor();
    },

    /** Waits until the focus is on what has this tag and is read aloud so. */
    focus: (tag, label) => page.waitForFunction(([tag, label]) => document.activeElement?.matches(tag) && document.activeElement.getAttribute("aria-label") === label, [tag, label]),
  };
}
