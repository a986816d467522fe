/** Every command by name: type, arrows, Enter. */

import { html, useEffect, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { commands, modifier } from "../core/keys.js";
import { signal, useSignal } from "../core/store.js";
import { Input } from "./ui.js";

export const palette = signal(false);

const fits = (label, words) => words.every((word) => label.toLowerCase().includes(word));
const written = (keys) => keys.replace("mod", modifier).split(/[ +]/);

export function Palette() {
  return useSignal(palette) ? html`<${Open} />` : null;
}

function Open() {
  const ref = useRef();
  const [query, setQuery] = useState("");
  const [at, setAt] = useState(0);
  const all = useSignal(commands)
    .flat()
    .filter((one) => !one.hidden)
    .reverse(); // the page's own first
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = all.filter((one) => fits(one.label, words));
  const close = () => (palette.value = false);
  useEffect(() => {
    const dialog = ref.current;
    const opener = document.activeElement;
    dialog.showModal();
    return () => {
      dialog.close();
      opener?.focus?.();
    };
  }, []);
  useEffect(() => setAt(0), [query]);
  useEffect(() => ref.current.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" }), [at]);
  const run = (command) => {
    close();
    setTimeout(command.run); // after the focus is back
  };
  const onKeyDown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && found.length) {
      event.preventDefault();
      setAt((at + step + found.length) % found.length);
    } else if (event.key === "Enter" && !event.isComposing && found[at]) {
      event.preventDefault();
      run(found[at]);
    }
  };
  return html`
    <dialog
      ref=${ref}
      class="dialog palette"
      aria-label=${t("palette.title")}
      onCancel=${(event) => (event.preventDefault(), close())}
      onMouseDown=${(event) => event.target === ref.current && close()}
    >
      <${Input}
        value=${query}
        onChange=${setQuery}
        onKeyDown=${onKeyDown}
        placeholder=${t("palette.hint")}
        role="combobox"
        aria-label=${t("palette.title")}
        aria-expanded="true"
        aria-controls="palette-list"
        aria-activedescendant=${found[at] && `palette-${found[at].id}`}
        autofocus
      />
      <ul id="palette-list" role="listbox" aria-label=${t("palette.title")}>
        ${found.map(
          (one, index) => html`
            <li
              key=${one.id}
              id=${`palette-${one.id}`}
              role="option"
              aria-selected=${index === at ? "true" : "false"}
              onClick=${() => run(one)}
              onMouseMove=${() => setAt(index)}
            >
              <span class="grow">${one.label}</span>
              ${one.keys && written(one.keys).map((name) => html`<kbd key=${name}>${name}</kbd>`)}
            </li>
          `,
        )}
      </ul>
      ${!found.length && html`<p class="muted palette-none">${t("palette.none")}</p>`}
    </dialog>
  `;
}
