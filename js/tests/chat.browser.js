/**
 * Chats by hand: `node tests/chat.browser.js URL OUT PART`. URL: a server whose models "fake" and "slow" answer with the last
 * line of what they are asked, "letters" makes vectors, and "fake" calls a tool where it is told to.
 */

import { readFileSync, writeFileSync } from "node:fs";

import { walk } from "./walking.js";

const DOT = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");

await walk(({ page, url, out, told, button, dialog, shot, audit, narrow, look, focus }) => {
  const box = page.getByLabel("Write a message");
  const last = page.locator(".answer .markdown").last();
  const idle = () => button("Send", page.locator(".composer")).waitFor();
  const chats = page.locator(".chats li");
  const alert = page.locator(".composer .attention-bad");

  async function fresh(model) {
    await page.goto(`${url}/console/#/chat?model=${model}`);
    await page.waitForFunction((model) => document.querySelector(".model-choice select")?.value === model, model);
  }

  async function say(text) {
    await box.fill(text);
    await page.keyboard.press("Enter");
    await idle();
  }

  return {
    branches: [
      async () => {
        await fresh("fake");
        await say("One");
        await say("Two");
        await page.locator(".asked-message").last().getByRole("button", { name: "Edit" }).focus();
        await page.keyboard.press("Enter");
        await focus("textarea", "Edit");
        await page.keyboard.press("Escape");
        await focus("button", "Edit");
        await page.keyboard.press("Enter");
        await focus("textarea", "Edit");
        await page.keyboard.press("Control+A");
        await page.keyboard.type("Three");
        await page.keyboard.press("Enter");
        await page.getByText("2/2").waitFor();
        await idle();
        await focus("textarea", "Write a message");
        told.edited = (await last.textContent()).trim();
        await button("Previous version").click();
        await page.getByText("1/2").waitFor();
        told.before = (await last.textContent()).trim();
        await page.reload();
        await page.getByText("1/2").waitFor(); // the branch that was shown is kept
        await button("Next version").click();
        await page.locator(".asked-text", { hasText: "Three" }).waitFor();
        await button("Answer again").last().click();
        await page.locator(".answer .branches", { hasText: "2/2" }).waitFor();
        await idle();
        told.nodes = await page.locator(".message").count();
        await audit("branches");
      },
      async () => {
        // a name that is given while the answer comes stays, and Escape in the box ends the answer
        await fresh("slow");
        await box.fill("A question that is answered letter by letter until somebody stops it. ".repeat(30));
        await page.keyboard.press("Enter");
        await last.waitFor();
        await page.locator(".chats li", { hasText: "A question" }).getByRole("button", { name: "Rename" }).click();
        await dialog.getByLabel("Name").fill("Renamed");
        await page.keyboard.press("Enter");
        await dialog.waitFor({ state: "detached" });
        await box.focus();
        await page.keyboard.press("Escape");
        await page.getByText("stopped", { exact: true }).waitFor();
        await idle();
        told.titles = (await chats.locator("a .truncate").allTextContents()).sort();
        // one that is deleted while its answer comes stays deleted, and its page is empty
        await button("Answer again").click();
        await last.waitFor();
        await button("Delete Renamed").click();
        await button("Delete", dialog).click();
        await page.waitForURL(`${url}/console/#/chat`);
        await page.waitForTimeout(300);
        told.afterDeletion = [await chats.count(), await page.locator(".message").count()];
      },
    ],

    tabs: [
      async () => {
        await fresh("fake");
        await say("One");
        const tab = async () => {
          const made = await page.context().newPage();
          made.setDefaultTimeout(60_000);
          made.on("pageerror", (error) => told.errors.push(String(error)));
          return made;
        };
        const answers = (where) => where.locator(".answer .markdown");
        const second = await tab();
        await second.goto(page.url());
        await answers(second).waitFor();
        // what is said and renamed in one is seen in the other
        await say("Two");
        await answers(second).nth(1).filter({ hasText: "Two!" }).waitFor();
        await button("Rename One").click();
        await dialog.getByLabel("Name").fill("Renamed");
        await page.keyboard.press("Enter");
        await second.locator("h1", { hasText: "Renamed" }).waitFor();
        // both go on without hearing of each other: branches
        await second.addInitScript(() => delete globalThis.BroadcastChannel);
        await second.reload();
        await answers(second).nth(1).waitFor();
        const there = async (text) => {
          await second.getByLabel("Write a message").fill(text);
          await second.keyboard.press("Enter");
          await answers(second).filter({ hasText: `${text}!` }).waitFor();
          await button("Send", second.locator(".composer")).waitFor();
        };
        const toldIn = (where) => where.getByText("“Renamed” was gone on with in another tab, too.").waitFor();
        await there("Said there");
        await Promise.all([toldIn(page), say("Said here")]);
        await Promise.all([toldIn(second), there("And more")]);
        for (const where of [page, second]) await where.locator(".asked-message", { hasText: "Said" }).getByText(/[12]\/2/).waitFor();
        told.here = await page.locator(".asked-text").allTextContents();
        told.there = await second.locator(".asked-text").allTextContents();
        await audit("tabs");
        await second.close();
        await page.reload();
        await last.waitFor();
        told.kept = await page.evaluate(async () => {
          const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
          const database = await done(indexedDB.open("llmasos"));
          const chats = await done(database.transaction("chats").objectStore("chats").getAll());
          return chats.map((chat) => [chat.title, Object.values(chat.nodes).map((node) => node.content).sort()]);
        });
        // what is deleted in one is gone in the other
        const third = await tab();
        await third.goto(page.url());
        await answers(third).first().waitFor();
        await button("Delete Renamed").click();
        await button("Delete", dialog).click();
        await third.locator(".chats li").waitFor({ state: "detached" });
        // an answer comes in one: the other sees it come, also when it is opened meanwhile, and end when that one is closed
        await third.goto(`${url}/console/#/chat?model=slow`);
        await third.waitForFunction(() => document.querySelector(".model-choice select")?.value === "slow");
        await third.getByLabel("Write a message").fill("A question that is answered letter by letter. ".repeat(60));
        await third.keyboard.press("Enter");
        await third.waitForURL(/#\/chat\/./);
        await page.goto(third.url());
        await page.reload();
        const coming = page.locator(".answer[aria-busy=true]");
        await coming.waitFor();
        await page.evaluate(() => {
          const tabs = new BroadcastChannel("llmasos.chats");
          let replies = 0;
          return new Promise((resolve) => (tabs.onmessage = ({ data }) => data.writing && ++replies === 4 && resolve()));
        });
        told.coming = await coming.count();
        await third.close();
        await coming.waitFor({ state: "detached" });
        told.left = await page.locator(".answer header").allTextContents();
      },
    ],

    history: [
      async () => {
        for (const text of ["Apples and pears", "Trains and ships"]) {
          await fresh("fake");
          await say(text);
          await button("New chat").first().click();
        }
        await page.getByPlaceholder("Search chats").fill("PEARS apples");
        await chats.nth(1).waitFor({ state: "detached" });
        told.found = await chats.locator("a .truncate").allTextContents();
        await page.getByPlaceholder("Search chats").fill("zebra");
        await page.getByText("No chat has these words.").waitFor();
        await page.getByPlaceholder("Search chats").fill("");
        const [download] = await Promise.all([page.waitForEvent("download"), button("Export").last().click()]);
        await download.saveAs(`${out}/chats.json`);
        const body = JSON.parse(readFileSync(`${out}/chats.json`, "utf8"));
        told.exported = body.chats.length;
        for (const title of ["Apples and pears", "Trains and ships"]) {
          await button(`Delete ${title}`).click();
          await button("Delete", dialog).click();
          await dialog.waitFor({ state: "detached" });
        }
        told.emptied = await chats.count();
        const file = page.locator(".chats input[type=file]");
        await file.setInputFiles(`${out}/chats.json`);
        await page.getByText("2 chats imported.").waitFor();
        await file.setInputFiles(`${out}/chats.json`);
        await page.getByText("0 chats imported.").waitFor(); // they are here already
        told.imported = await chats.count();
        const [one] = body.chats;
        for (const node of Object.values(one.nodes)) node.parent = node.id; // a ring
        writeFileSync(`${out}/ring.json`, JSON.stringify({ ...body, chats: [one] }));
        writeFileSync(`${out}/other.json`, "{}");
        for (const name of ["ring", "other"]) {
          await file.setInputFiles(`${out}/${name}.json`);
          await page.getByText(`${name}.json is no export of chats.`).waitFor();
        }
        await page.reload();
        await page.locator(".chats a", { hasText: "Trains" }).click();
        await page.locator(".answer .markdown", { hasText: "Trains and ships!" }).waitFor();
        told.kept = await chats.count();
        await audit("history");
      },
    ],

    attachments: [
      async () => {
        await fresh("fake");
        const file = page.locator(".composer input[type=file]");
        await file.setInputFiles({ name: "dot.png", mimeType: "image/png", buffer: DOT });
        told.refused = await alert.textContent();
        await shot("image-refused");
        await file.setInputFiles({ name: "tea.md", mimeType: "text/markdown", buffer: Buffer.from("# Tea\n\nGreen tea is steeped at 70 degrees.") });
        await alert.waitFor({ state: "detached" });
        await say("What is in the file?");
        told.chips = await page.locator(".bubble .chip").allTextContents();
        // a new knowledge base, and a file that goes into it instead of the message
        await page.getByLabel("Knowledge base", { exact: true }).selectOption({ label: "New knowledge base…" });
        await dialog.waitFor();
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
        told.unchosen = await page.getByLabel("Knowledge base", { exact: true }).inputValue();
        await page.getByLabel("Knowledge base", { exact: true }).selectOption({ label: "New knowledge base…" });
        await dialog.getByLabel("Name").fill("drinks");
        await page.keyboard.press("Enter");
        await page.waitForFunction(() => document.querySelector(".composer select").value === "drinks");
        await file.setInputFiles({ name: "tea.md", mimeType: "text/markdown", buffer: Buffer.from("# Tea\n\nGreen tea is steeped at 70 degrees.") });
        await button("Put tea.md into drinks instead of the message").click();
        await page.getByText("tea.md is in the knowledge base drinks now.").waitFor();
        told.alone = await button("Send").isDisabled();
        await audit("attachments");
        await say("How hot is green tea steeped?");
        await page.getByText("1 passage", { exact: true }).click();
        told.passage = await page.locator(".answer").last().locator(".clip").textContent();
        await audit("passages");
      },
    ],

    both: [
      async () => {
        // two models side by side have the tools, and each is allowed its own calls
        await fresh("fake");
        await button("Settings of this chat").click();
        await dialog.getByText("Tools", { exact: true }).click();
        await dialog.getByLabel("sums").check();
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
        await button("Compare two models").click();
        await page.getByLabel("Second model").selectOption("other");
        await box.fill("Call sums_add");
        await page.keyboard.press("Enter");
        const sides = [page.locator(".twins .answer").first(), page.locator(".twins .answer").last()];
        for (const side of sides) await button("Deny", side).waitFor();
        await audit("two approvals");
        await button("Allow", sides[1].locator(".decide")).click();
        await sides[1].locator(".markdown", { hasText: "42" }).waitFor();
        told.waits = await button("Deny", sides[0]).isVisible();
        await button("Deny", sides[0]).click();
        await sides[0].locator(".markdown").waitFor();
        await idle();
        told.sides = await Promise.all(sides.map((side) => side.locator(".markdown").textContent()));
        // both at once
        await box.fill("Call sums_add");
        await page.keyboard.press("Enter");
        const next = page.locator(".twins").last().locator(".answer");
        await page.locator(".decide").nth(1).waitFor();
        for (const button of await page.locator(".decide").getByRole("button", { name: "Allow", exact: true }).elementHandles()) await button.click();
        for (const at of [0, 1]) await next.nth(at).locator(".markdown", { hasText: "42" }).waitFor();
        await idle();
      },
    ],

    tools: [
      async () => {
        await fresh("fake");
        await button("Settings of this chat").click();
        await dialog.getByLabel("Tokens at most").fill("300");
        await dialog.getByText("Tools", { exact: true }).click();
        await dialog.getByLabel("sums").check();
        await dialog.getByLabel("Your own functions (JSON)").fill('[{"name": "weather", "description": "Tell the weather.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]');
        await audit("tools");
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
        await box.fill("Call sums_add");
        await page.keyboard.press("Enter");
        await button("Deny").waitFor();
        told.wants = await page.locator(".decide code").textContent();
        await audit("approval");
        await narrow("approval");
        await page.reload(); // it waits on
        await button("Deny").click();
        await idle();
        told.denied = await last.textContent();
        await box.fill("Call sums_add");
        await page.keyboard.press("Enter");
        await button("Allow", page.locator(".decide")).click();
        await idle();
        told.allowed = await last.textContent();
        await box.fill("Call weather");
        await page.keyboard.press("Enter");
        await page.getByLabel("What the function returns").fill("rain");
        await button("Go on").click();
        await idle();
        told.own = await last.textContent();
        await button("Copy as code").click();
        told.curl = await dialog.locator("code").textContent();
        told.languages = await dialog.getByRole("tab").allTextContents();
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
      },
      async () => {
        await page.goto(`${url}/console/#/chat?model=fake`);
        await button("New chat").first().click();
        await button("Settings of this chat").click();
        await dialog.getByRole("spinbutton", { name: "Temperature" }).fill("0.5");
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
        await say("It's one question");
        await button("Copy as code").click();
        await dialog.getByRole("tab", { name: "Command line" }).click();
        told.shell = await dialog.locator("code").textContent();
        await page.keyboard.press("Escape");
        await dialog.waitFor({ state: "detached" });
        await look("zh", "dark");
        await page.getByText("对话").first().waitFor();
        await page.locator(".chats a").last().click();
        await page.locator(".call-head").first().waitFor();
        await audit("calls in Chinese");
        await narrow("calls");
      },
    ],
  };
});
