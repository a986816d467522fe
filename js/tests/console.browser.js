/**
 * The console in headless Chromium: `node tests/console.browser.js URL OUT PART REFERENCE`. URL: a server whose model "tiny" answers
 * and which can pull REFERENCE, of which one half comes when there is a file OUT/go. PART says what is done: "chat" (with
 * streaming, branches, two models), "manage" (a pull, its plan, a key, the keyboard) or "pages" (all, in both languages and
 * themes). Prints what it saw, or {"missing": why there is no browser}; screenshots are written to OUT.
 */

import { writeFileSync } from "node:fs";

import { walk } from "./walking.js";

const PARTS = {
  chat: ["first load", "chat with streaming", "stop, compare, code, settings"],
  manage: ["pull, pause, go on", "make and revoke a key", "keyboard alone"],
  pages: ["all pages, both languages and themes"],
};

await walk(({ page, url, out, told, button, dialog, shot, audit, narrow, look }) => {
  const reference = process.argv[5];
  const settled = () => page.locator(".waiting").waitFor({ state: "detached" });

  /** Bytes of the first load: as the browser reads them, and as they come over the wire. */
  async function firstLoad() {
    const sizes = await page.evaluate(() =>
      performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation")).filter((one) => one.name.includes("/console/")).map((one) => [one.decodedBodySize, one.encodedBodySize]));
    const sum = (at) => sizes.reduce((total, one) => total + one[at], 0);
    return { files: sizes.length, decoded: sum(0), wire: sum(1) };
  }

  const steps = {
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
      await page.getByRole("heading", { name: "Delete tiny-model?" }).waitFor();
      await button("Delete", dialog.last()).click();
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
      await page.waitForFunction(() => document.activeElement?.matches("dialog input"));
      await page.keyboard.type("dark");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.documentElement.dataset.theme === "dark");
      told.theme = "dark";
      await page.evaluate(() => location.reload());
      await page.locator("nav").waitFor();
      await page.keyboard.press("Tab");
      told.skip = await page.evaluate(() => document.activeElement.className);
    },

    async "all pages, both languages and themes"() {
      for (const language of ["en", "zh"]) {
        for (const theme of ["light", "dark"]) {
          await look(language, theme);
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

  return Object.fromEntries(Object.entries(PARTS).map(([part, names]) => [part, names.map((name) => steps[name])]));
});
