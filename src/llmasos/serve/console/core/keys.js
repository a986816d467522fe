/** Commands: what the palette lists and keys run. */

import { useEffect } from "./html.js";
import { signal } from "./store.js";

/** Lists of commands {id, label, run, keys?, group?}, the latest last. */
export const commands = signal([]);

export function useCommands(list, deps = []) {
  useEffect(() => {
    commands.value = [...commands.value, list];
    return () => (commands.value = commands.value.filter((one) => one !== list));
  }, deps);
}

export const isMac = /Mac|iP(hone|ad)/.test(navigator.platform);
export const modifier = isMac ? "⌘" : "Ctrl";

const writes = (target) => target?.closest?.("input, textarea, select, [contenteditable]");

let before = ""; // the first key of two, as "g" of "g c"
let timer;

/** Runs the command whose `keys` ("n", "g c", "mod+enter") were pressed. */
export function onKey(event) {
  const mod = event.metaKey || event.ctrlKey;
  if (event.isComposing || event.altKey || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]") || (!mod && writes(event.target))) return;
  const key = event.key.toLowerCase();
  const pressed = mod ? `mod+${key}` : key;
  const all = commands.value.flat().filter((one) => one.keys);
  const found = all.findLast((one) => one.keys === `${before} ${pressed}`.trim() || one.keys === pressed);
  clearTimeout(timer);
  before = "";
  if (found) {
    event.preventDefault();
    found.run();
  } else if (all.some((one) => one.keys.startsWith(`${pressed} `))) {
    before = pressed;
    timer = setTimeout(() => (before = ""), 1200);
  }
}
