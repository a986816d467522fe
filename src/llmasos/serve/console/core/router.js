/** What is shown is in the URL's hash: `#/page/part/part?name=value`. */

import { signal, useSignal } from "./store.js";

export const PAGES = ["chat", "models", "apps", "playground", "activity", "system"];

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a link cut in half
  }
}

export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [page, ...parts] = path.split("/").filter(Boolean).map(decoded);
  return {
    page: PAGES.includes(page) ? page : PAGES[0],
    path: PAGES.includes(page) ? parts : [],
    query: Object.fromEntries(new URLSearchParams(search)),
  };
}

const current = signal(parse(location.hash));
addEventListener("hashchange", () => (current.value = parse(location.hash)));

export const route = () => current.value;
export const useRoute = () => useSignal(current);

/** `path` is "/page/part" (parts encoded by `segment`); names of the query that are null or "" are left out. */
export function href(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return `#${path}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
}

export const segment = encodeURIComponent;

export function go(path, query, { replace = false } = {}) {
  const hash = href(path, query);
  if (hash === location.hash) return;
  if (replace) {
    history.replaceState(null, "", hash);
    current.value = parse(hash);
  } else {
    location.hash = hash;
  }
}

/** Changes names of the query and leaves the rest; no new entry in the history unless `replace` is false. */
export function setQuery(changes, { replace = true } = {}) {
  const { page, path, query } = current.value;
  go(`/${[page, ...path.map(segment)].join("/")}`, { ...query, ...changes }, { replace });
}
