/** A value, in the way that shows it best, with the others beside it. */

import { number } from "../core/format.js";
import { html, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { Code, CopyButton } from "./code.js";
import { Json } from "./json.js";
import { Markdown } from "./markdown.js";
import { IconButton } from "./ui.js";
import { mediaOf, tableOf, viewsOf } from "./views.js";

const SHOWN_ROWS = 200;

/** `live`: a text that still grows; `wanted`: see viewsOf. */
export function Result({ value, live = false, wanted }) {
  const views = live ? ["text"] : viewsOf(value, wanted);
  const [chosen, setChosen] = useState(null);
  const view = views.includes(chosen) ? chosen : views[0];
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  return html`<div class="result">
    ${!live &&
    html`<div class="row result-bar">
      ${views.length > 1 &&
      html`<span class="segments" role="group" aria-label=${t("form.view")}>
        ${views.map(
          (one) =>
            html`<button type="button" key=${one} class="segment" aria-pressed=${String(one === view)} onClick=${() => setChosen(one)}>${t(`form.view_${one}`)}</button>`,
        )}
      </span>`}
      <span class="grow"></span>
      <${CopyButton} text=${text} /><${Download} value=${value} text=${text} />
    </div>`}
    <${View} ...${{ view, value, text, live }} />
  </div>`;
}

function View({ view, value, text, live }) {
  if (view === "markdown") return html`<${Markdown} text=${value} />`;
  if (view === "text") return html`<div class=${`plain-text${live ? " live" : ""}`} tabindex="0">${text}</div>`;
  if (view === "table") return html`<${Rows} value=${value} />`;
  if (view === "tree") return html`<${Json} value=${value} />`;
  if (view === "image") return html`<img class="result-image" src=${value} alt=${t("form.image")} />`;
  if (view === "audio") return html`<audio controls src=${value} aria-label=${t("form.audio")}></audio>`;
  if (view === "file") return html`<p class="muted">${mediaOf(value).type}</p>`;
  return html`<${Code} text=${text} language="json" label=${t("form.view_json")} />`;
}

function Rows({ value }) {
  const { columns, rows } = tableOf(value);
  const cell = (one) => (one === null || one === undefined ? "" : typeof one === "object" ? one.join(", ") : typeof one === "number" ? number(one, 6) : String(one));
  const isNumber = (name) => rows.every((row) => row[name] === undefined || row[name] === null || typeof row[name] === "number");
  const numeric = new Set(columns.filter(isNumber));
  return html`<div class="scroll-x" tabindex="0">
      <table>
        <thead><tr>${columns.map((name) => html`<th key=${name} scope="col" class=${numeric.has(name) ? "end" : ""}>${name}</th>`)}</tr></thead>
        <tbody>
          ${rows.slice(0, SHOWN_ROWS).map(
            (row, i) =>
              html`<tr key=${i}>${columns.map((name) => html`<td key=${name} class=${numeric.has(name) ? "end" : ""}>${cell(row[name])}</td>`)}</tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${rows.length > SHOWN_ROWS && html`<p class="muted">${t("form.more_rows", { n: rows.length - SHOWN_ROWS })}</p>`}`;
}

function Download({ value, text }) {
  const media = mediaOf(value);
  const extension = media ? media.type.split("/")[1].replace(/\+.*|^x-/, "") : typeof value === "string" ? "txt" : "json";
  const save = () => {
    const url = media ? value : URL.createObjectURL(new Blob([text]));
    Object.assign(document.createElement("a"), { href: url, download: `result.${extension}` }).click();
    if (!media) URL.revokeObjectURL(url);
  };
  return html`<${IconButton} small icon="download" label=${t("form.download")} onClick=${save} />`;
}
