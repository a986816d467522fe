/** Dialogs: the browser's own, which keep the focus and close by Escape. */

import { html, useEffect, useId, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { signal, useSignal } from "../core/store.js";
import { Button, Field, IconButton, Input, classes } from "./ui.js";

/** Open as long as it is drawn. `wide`; `side`: a sheet at the right edge. */
export function Dialog({ title, onClose, footer, wide, side, children, class: extra }) {
  const ref = useRef();
  const id = useId();
  useEffect(() => {
    const dialog = ref.current;
    const opener = document.activeElement;
    dialog.showModal();
    dialog.querySelector("[autofocus]")?.focus();
    return () => {
      dialog.close();
      if (opener?.isConnected) opener.focus?.();
    };
  }, []);
  const cancelled = (event) => {
    event.preventDefault(); // who draws it closes it
    onClose?.();
  };
  return html`
    <dialog
      ref=${ref}
      class=${classes("dialog", wide && "dialog-wide", side && "dialog-side", extra)}
      aria-labelledby=${id}
      onCancel=${cancelled}
      onMouseDown=${(event) => event.target === ref.current && onClose?.()}
    >
      <div class="dialog-box">
        <header class="row">
          <h2 id=${id} class="grow">${title}</h2>
          <${IconButton} icon="close" label=${t("word.close")} onClick=${() => onClose?.()} />
        </header>
        <div class="dialog-body">${children}</div>
        ${footer && html`<footer class="row">${footer}</footer>`}
      </div>
    </dialog>
  `;
}

const asked = signal([]);

function ask(question) {
  return new Promise((resolve) => {
    const one = {
      ...question,
      answer: (value) => {
        asked.value = asked.value.filter((other) => other !== one);
        resolve(value);
      },
    };
    asked.value = [...asked.value, one];
  });
}

/** Whether the person agrees. */
export const confirm = (question) => ask({ ...question, kind: "confirm" }).then(Boolean);
/** What the person writes, null if nothing. */
export const askText = (question) => ask({ ...question, kind: "text" });

function Question({ kind, title, text, action, danger, label, value = "", type, hint, answer }) {
  const [written, setWritten] = useState(value);
  const agree = (event) => {
    event?.preventDefault();
    answer(kind === "text" ? written : true);
  };
  const footer = html`
    <span class="grow" />
    <${Button} onClick=${() => answer(null)}>${t("word.cancel")}<//>
    <${Button} kind=${danger ? "danger" : "primary"} autofocus=${kind === "confirm"} onClick=${agree}>${action ?? t("word.ok")}<//>
  `;
  return html`
    <${Dialog} title=${title} onClose=${() => answer(null)} footer=${footer}>
      ${text && html`<p>${text}</p>`}
      ${kind === "text" &&
      html`<form onSubmit=${agree}>
        <${Field} label=${label} hint=${hint}><${Input} value=${written} onChange=${setWritten} type=${type} autofocus /><//>
      </form>`}
    <//>
  `;
}

export const Questions = () => useSignal(asked).map((one) => html`<${Question} key=${one} ...${one} />`);
