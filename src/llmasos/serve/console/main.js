/** Starts the console. */

import { App } from "./app.js";
import { html, render } from "./core/html.js";
import { loadLanguage } from "./core/i18n.js";
import { onKey } from "./core/keys.js";

await loadLanguage();
addEventListener("keydown", onKey);
render(html`<${App} />`, document.getElementById("app"));
