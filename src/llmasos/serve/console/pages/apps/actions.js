/** Installing, updating and what else changes applications; what they ask for is shown and must be accepted. */

import { toast } from "../../components/toast.js";
import { APIError, ask, errorText } from "../../core/api.js";
import { html, render } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { segment } from "../../core/router.js";
import { Sheet } from "./sheet.js";

export const API = "/llmasos/v1/apps";
export const at = (name, more = "") => `${API}/${segment(name)}${more}`;

/** Shows the sheet; the word that accepts it, or null. */
function decide(sheet) {
  const place = document.body.appendChild(document.createElement("div"));
  return new Promise((resolve) => {
    const answer = (accept) => {
      render(null, place);
      place.remove();
      resolve(accept);
    };
    render(html`<${Sheet} sheet=${sheet} onAnswer=${answer} />`, place);
  });
}

/** `work(accept)` until it is done or refused; undefined if somebody said no. */
async function accepted(work) {
  let accept = false;
  for (;;) {
    try {
      return await work(accept);
    } catch (e) {
      const sheet = e instanceof APIError && e.status === 409 ? e.body?.sheet : undefined;
      if (!sheet) throw e;
      accept = await decide(sheet);
      if (accept === null) return undefined;
    }
  }
}

export async function install(reference, index = []) {
  const app = await accepted((accept) => ask("POST", API, { body: { reference, index, accept } }));
  if (app) toast(t("apps.installed_now", { name: app.name, version: app.version }), { tone: "ok" });
  return app;
}

export async function upload(file) {
  const app = await accepted((accept) => ask("PUT", API, { query: { accept: accept || undefined }, body: file, headers: { "content-type": "application/octet-stream" } }));
  if (app) toast(t("apps.installed_now", { name: app.name, version: app.version }), { tone: "ok" });
  return app;
}

/** start stop restart update rollback; `more`: fields of the body. */
export async function act(name, action, more = {}) {
  return accepted((accept) => ask("POST", at(name, `/${action}`), { body: { ...more, accept } }));
}

/** A button's work whose failure is a toast: the app, or undefined. */
export const said = (work) => async (...args) => {
  try {
    return await work(...args);
  } catch (e) {
    toast(errorText(e), { tone: "bad" });
    return undefined;
  }
};
