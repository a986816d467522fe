/** Short messages in the corner; what failed stays until it is closed. */

import { html } from "../core/html.js";
import { t } from "../core/i18n.js";
import { signal, useSignal } from "../core/store.js";
import { Icon } from "./icon.js";

const shown = signal([]);
let count = 0;

const drop = (id) => (shown.value = shown.value.filter((one) => one.id !== id));

/** `tone`: "ok" | "warn" | "bad"; `action`: {label, run}. */
export function toast(text, { tone, action } = {}) {
  const id = ++count;
  const same = shown.value.filter((one) => one.text !== text);
  shown.value = [...same, { id, text, tone, action }].slice(-4);
  if (tone !== "bad") setTimeout(() => drop(id), action ? 10_000 : 5_000);
}

export function Toasts() {
  const list = useSignal(shown);
  return html`
    <div class="toasts" role="region" aria-label=${t("word.messages")}>
      <div aria-live="polite">
        ${list.map(
          ({ id, text, tone, action }) => html`
            <div class=${`toast toast-${tone ?? "plain"}`} key=${id}>
              <span class="grow">${text}</span>
              ${action &&
              html`<button
                type="button"
                class="button button-small"
                onClick=${() => {
                  drop(id);
                  action.run();
                }}
              >
                ${action.label}
              </button>`}
              <button type="button" class="button button-quiet icon-button button-small" aria-label=${t("word.close")} onClick=${() => drop(id)}>
                <${Icon} name="close" size=${15} />
              </button>
            </div>
          `,
        )}
      </div>
    </div>
  `;
}
