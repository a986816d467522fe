/**
 * Models, jobs and the log by hand: `node tests/rooms.browser.js URL OUT PART`. URL: a server that has the model "mouse" and a
 * training job; once there is a file OUT/next.go it logs "the second line".
 */

import { writeFileSync } from "node:fs";

import { walk } from "./walking.js";

await walk(({ page, url, out, told, button, dialog, shot, audit, narrow }) => ({
  models: [
    async () => {
      await page.goto(`${url}/console/#/models/mouse`);
      await button("Load", dialog).click();
      const stay = dialog.getByLabel("Unload it when unused for");
      await stay.waitFor();
      told.choices = await stay.locator("option").allTextContents();
      const set = async (seconds) => {
        const answered = page.waitForResponse((response) => response.url().endsWith("/load"));
        await stay.selectOption(seconds);
        await answered;
        await page.waitForResponse(async (response) => response.url().endsWith("/status") && (await response.json()).data.some((one) => String(one.keep_alive ?? -1) === seconds));
        while ((await stay.inputValue()) !== seconds) await page.waitForTimeout(20); // it is drawn
        return seconds;
      };
      told.kept = await set("1800");
      told.ever = await set("-1");
      await dialog.locator(".plan-bar").waitFor();
      await audit("model");
      await shot("model");
      await narrow("model");
      await button("Keep loaded", dialog).click();
      await stay.waitFor({ state: "detached" }); // a pinned model stays anyway
      await page.keyboard.press("Escape");
      await dialog.waitFor({ state: "detached" });
      told.pinned = await button("Do not keep mouse loaded").or(page.locator('[aria-pressed="true"]')).first().getAttribute("aria-pressed");
      await button("Unload").click();
      await button("Load").waitFor();
      await page.getByRole("tab", { name: "Loaded" }).click();
      told.why = await page.getByText("unloaded by hand").textContent();
    },
  ],

  training: [
    async () => {
      await page.goto(`${url}/console/#/activity`);
      await page.getByRole("link", { name: "ft:mouse::1" }).click();
      const curve = page.locator(".training .chart");
      await curve.locator("canvas").waitFor();
      told.curve = await curve.getAttribute("aria-label");
      told.drawn = await curve.locator("canvas").evaluate((canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some((value) => value > 0);
      });
      told.facts = Object.fromEntries(await page.locator(".training .pairs > div").evaluateAll((rows) => rows.map((row) => [row.querySelector("dt").textContent, row.querySelector("dd").textContent])));
      await page.getByText("1 message of the run").click();
      await page.getByText("Training has started: 4 steps").waitFor();
      await audit("training");
      await shot("training");
      await narrow("training");
      await button("Cancel ft:mouse::1").click();
      await button("Cancel", dialog).last().click();
      await page.getByText("cancelled", { exact: true }).waitFor();
    },
  ],

  logs: [
    async () => {
      await page.goto(`${url}/console/#/activity/logs`);
      const line = (text) => page.locator(".log-line", { hasText: text });
      await line("the first line").waitFor();
      await button("Hold").or(button("Pause")).click();
      writeFileSync(`${out}/next.go`, "");
      await page.getByRole("button", { name: /\(\+\d+\)/ }).waitFor();
      told.held = await line("the second line").count();
      await page.getByRole("button", { name: /\(\+\d+\)/ }).click();
      await line("the second line").waitFor();
      told.resumed = await line("the second line").count();
      await page.getByRole("searchbox").fill("SECOND line");
      await line("the first line").waitFor({ state: "detached" });
      told.filtered = await page.locator(".log-line").count();
      await audit("log");
      await narrow("log");
    },
  ],
}));
