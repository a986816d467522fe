/** The server: its client with the key in force, and what fails said in words. */

import { APIError, AbortError, Http, LLMasOS } from "../llmasos.js";
import { t } from "./i18n.js";
import { signal, stored } from "./store.js";

export { AbortError, APIError };

/** The server's URL without a slash at its end: the console is one folder below it. */
export const ROOT = new URL("..", document.baseURI).href.replace(/\/$/, "");

/** For this tab only. */
export const key = stored("key", null, globalThis.sessionStorage);
/** Whether the server has refused us for want of a key. */
export const keyWanted = signal(false);
/** null before the first answer; then whether the server answers. */
export const reachable = signal(null);

async function watched(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (e) {
    if (!options?.signal?.aborted) reachable.value = false;
    throw e;
  }
  reachable.value = true;
  if (response.status === 401) keyWanted.value = true;
  return response;
}

let made;
function connection() {
  if (made?.key !== key.value) {
    const options = { baseURL: `${ROOT}/v1`, apiKey: key.value ?? "", maxRetries: 0, fetch: watched };
    made = { key: key.value, client: new LLMasOS(options), http: new Http(options) };
  }
  return made;
}

/** The client with the key in force; not to be kept, as that may change. */
export const client = () => connection().client;

const options = ({ signal: ended, ...more }) => ({ ...more, signals: [ended] });

/** JSON of any route: `ask("GET", "/llmasos/v1/jobs", {query, body, headers, signal})`. */
export const ask = (method, path, more = {}) => connection().http.json(method, ROOT + path, options(more));

/** A route's answer as a Blob. */
export const blob = (method, path, more = {}) => connection().http.blob(method, ROOT + path, options(more));

/** Server-sent events {data, event, id} of any route, as an async iterator. */
export const events = (method, path, more = {}) => connection().http.events(method, ROOT + path, options(more));

/** A GET that may fail at any time and then has this value. */
export const maybe = async (work, otherwise = null) => {
  try {
    return await work;
  } catch (e) {
    if (e instanceof AbortError) throw e;
    return otherwise;
  }
};

/** What to tell people of an error. */
export function errorText(e) {
  if (e?.name === "ConnectionError") return t("error.connection");
  if (e?.status === 401) return t("error.key");
  if (e?.status === 403) return `${t("error.forbidden")} ${bare(e)}`;
  return bare(e);
}

const bare = (e) => String(e?.message ?? e).replace(/^\d{3}: /, "");
