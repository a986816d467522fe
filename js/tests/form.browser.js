/**
 * The console's form of an application in headless Chromium: `node tests/form.browser.js PAGE OWN CALLS`. PAGE: its address in
 * the console but for the route's name; OWN: that of the page that it serves itself; CALLS as JSON: [route, inputs] each. Fills
 * the fields in as people do, runs, and prints what the page shows: [result, result of a job] each, or {"missing": why there is
 * no browser}.
 */

import { openBrowser } from "./browser.js";

const [, , inConsole, own, calls] = process.argv;
const { page, close, missing } = await openBrowser();
if (missing) {
  console.log(JSON.stringify({ missing }));
  process.exit();
}
page.setDefaultTimeout(15_000);
await page.addInitScript(() => localStorage.setItem("llmasos.language", '"en"'));

const idOf = (path) => `#f-${path.join("-").replace(/[^\w-]/g, "_")}`;

/** `data:text/plain;name=a.txt;base64,aGk=`, base64 alone, or percent-encoded text: what a person would choose as a file. */
function fileOf(text) {
  const [, head = "", data = text] = /^data:([^,]*),(.*)$/s.exec(text) ?? [];
  const isBase64 = /;base64$/.test(head) || !text.startsWith("data:");
  const named = /;name=([^;]*)/.exec(head)?.[1];
  const mimeType = head.split(";")[0];
  // An unnamed file gets its name from its kind, as the server would name it.
  const usual = mimeType === "text/plain" ? "file.txt" : mimeType ? "file" : "file.bin";
  return { name: named ? decodeURIComponent(named) : usual, mimeType: mimeType || "application/octet-stream", buffer: Buffer.from(data, isBase64 ? "base64" : "utf8") };
}

async function fill(path, value) {
  const at = page.locator(idOf(path));
  if (Array.isArray(value)) {
    const add = at.locator(":scope > .list > button");
    for (const [i, one] of value.entries()) {
      await add.click();
      await fill([...path, i], one);
    }
    return;
  }
  if (value !== null && typeof value === "object") {
    for (const [key, one] of Object.entries(value)) await fill([...path, key], one);
    return;
  }
  const kind = await at.evaluate((element) => (element.tagName === "INPUT" ? element.type : element.tagName.toLowerCase()));
  if (kind === "checkbox") await at.setChecked(value);
  else if (kind === "select") await at.selectOption({ label: String(value) });
  else if (kind === "file") await at.setInputFiles(fileOf(value));
  else await at.fill(String(value));
}

/** The result as the page has it: its JSON, or the text in whole. */
async function shown() {
  await page.locator(".run-output .badge-ok").waitFor();
  const bar = page.locator(".result-bar");
  for (const view of ["JSON", "Text"]) {
    const button = bar.getByRole("button", { name: view, exact: true });
    if (await button.count()) await button.click();
  }
  const json = page.locator(".run-output .result > .code code");
  if (await json.count()) return JSON.parse(await json.textContent());
  return page.locator(".run-output .plain-text").textContent();
}

/** The form of a route, empty. */
async function open(route, query = "", at = inConsole) {
  await page.goto(`${at}${route}${query}`);
  await page.locator(`.run-form[data-route="${route}"]`).waitFor();
  if (!query) await page.getByRole("button", { name: "Clear" }).click();
}

const found = [];
try {
  for (const [route, inputs] of JSON.parse(calls)) {
    await open(route);
    for (const [key, value] of Object.entries(inputs)) await fill([key], value);
    await page.getByRole("button", { name: "Run", exact: true }).click();
    const result = await shown();
    await page.getByRole("button", { name: "Run as a job" }).click();
    await page.waitForURL(/[?&]job=/);
    found.push([result, await shown()]);
  }
  // What is wrong is said beside its field; the server's word, too.
  await open("add");
  await page.locator(idOf(["b"])).fill("101");
  await page.getByRole("button", { name: "Run", exact: true }).click();
  const wrong = await page.locator(".field-error").allTextContents();
  await page.goto("about:blank"); // a link is opened
  await open("add", `?in=${encodeURIComponent('{"a":4,"b":5}')}`);
  await page.getByRole("button", { name: "Run", exact: true }).click();
  const linked = await shown();
  await page.getByRole("button", { name: "As code" }).click();
  const snippets = {};
  for (const language of ["curl", "Python", "JavaScript", "CLI"]) {
    await page.getByRole("tab", { name: language }).click();
    snippets[language] = await page.locator(".snippets code").textContent();
  }
  await open("box", "", own);
  await fill(["points"], [{ x: 1 }, { x: 3, y: -2 }]);
  await page.getByRole("button", { name: "Run", exact: true }).click();
  const alone = await shown();
  console.log(JSON.stringify({ alone, found, wrong, linked, snippets }));
} finally {
  await close();
}
