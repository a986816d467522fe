/** A JSON value as a tree that opens and closes. */

import { html, useState } from "../core/html.js";
import { t } from "../core/i18n.js";

const FEW = 100;

function Leaf({ value }) {
  const kind = value === null ? "null" : typeof value;
  return html`<span class=${`json-${kind}`}>${kind === "string" ? JSON.stringify(value) : String(value)}</span>`;
}

function Branch({ name, value, depth, open }) {
  const [isOpen, setOpen] = useState(depth < open);
  const [all, setAll] = useState(false);
  const isList = Array.isArray(value);
  const entries = Object.entries(value);
  const [left, right] = isList ? ["[", "]"] : ["{", "}"];
  const shown = all ? entries : entries.slice(0, FEW);
  return html`
    <div class="json-branch">
      <button type="button" class="json-toggle" aria-expanded=${isOpen ? "true" : "false"} onClick=${() => setOpen(!isOpen)}>
        ${name !== undefined && html`<span class="json-key">${name}: </span>`}${left}${!isOpen &&
        html`<span class="muted"> ${entries.length} ${right}</span>`}
      </button>
      ${isOpen &&
      html`<div class="json-inner">
          ${shown.map(([key, one]) => html`<${Node} key=${key} name=${isList ? undefined : key} value=${one} depth=${depth + 1} open=${open} />`)}
          ${shown.length < entries.length &&
          html`<button type="button" class="button button-small" onClick=${() => setAll(true)}>
            ${t("word.more", { n: entries.length - shown.length })}
          </button>`}
        </div>
        ${right}`}
    </div>
  `;
}

function Node({ name, value, depth, open }) {
  if (value !== null && typeof value === "object") return html`<${Branch} ...${{ name, value, depth, open }} />`;
  return html`<div>${name !== undefined && html`<span class="json-key">${name}: </span>`}<${Leaf} value=${value} /></div>`;
}

/** `open`: how many levels are open at first. */
export const Json = ({ value, open = 2 }) => html`<div class="json mono">
  <${Node} value=${value} depth=${0} open=${open} />
</div>`;
