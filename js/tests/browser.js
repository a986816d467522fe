/** Headless Chromium, or why there is none. CHROMIUM names a program other than the usual ones. */

import { accessSync, constants, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";

const FLAGS = [
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const NAMES = ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome"];

function program() {
  const folders = (process.env.PATH ?? "").split(delimiter);
  const candidates = [process.env.CHROMIUM, ...NAMES.flatMap((name) => folders.map((folder) => join(folder, name)))];
  return candidates.filter(Boolean).find((path) => {
    try {
      accessSync(path, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** {page, close}, or {missing: the reason}. */
export async function openBrowser() {
  let playwright;
  try {
    playwright = await import("playwright-core");
  } catch {
    return { missing: "playwright-core is not installed; run npm install" };
  }
  const executablePath = program();
  if (!executablePath) return { missing: "there is no chromium; install it or name it in CHROMIUM" };
  const profile = mkdtempSync(join(tmpdir(), "llmasos-chromium-"));
  const options = { executablePath, headless: true, chromiumSandbox: false, args: FLAGS };
  const context = await playwright.chromium.launchPersistentContext(profile, options);
  const close = async () => {
    await context.close();
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  };
  return { page: await context.newPage(), close };
}
