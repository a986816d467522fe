/** Words: one table per language, loaded when it is wanted. */

import { signal, stored, useSignal } from "./store.js";

export const LANGUAGES = { en: "English", zh: "中文" };
export const chosen = stored("language", null);
const usual = () => (navigator.languages ?? ["en"]).find((name) => /^(en|zh)\b/i.test(name))?.slice(0, 2).toLowerCase();

let table = {};
const loaded = signal(null);

export const language = () => loaded.value ?? "en";
export const useLanguage = () => useSignal(loaded);

export async function loadLanguage() {
  const name = LANGUAGES[chosen.value] ? chosen.value : (usual() ?? "en");
  table = (await import(`../strings/${name}.js`)).default;
  document.documentElement.lang = name;
  loaded.value = name;
}

export async function setLanguage(name) {
  chosen.value = name;
  await loadLanguage();
}

/** The text of `key` with `{name}`s filled in; of "one|many" the form that `n` asks for. */
export function t(key, values = {}) {
  let text = table[key];
  if (text === undefined) {
    console.warn(`No text for ${key}`);
    return key;
  }
  if ("n" in values && text.includes("|")) {
    const [one, many] = text.split("|");
    text = new Intl.PluralRules(language()).select(Number(values.n)) === "one" ? one : many;
  }
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? shown(values[name]) : whole));
}

const shown = (value) => (typeof value === "number" ? value.toLocaleString(language()) : String(value));
