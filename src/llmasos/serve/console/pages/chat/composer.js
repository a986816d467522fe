/** Where a message is written: text, files, images, a knowledge base. */

import { askText } from "../../components/dialog.js";
import { toast } from "../../components/toast.js";
import { Attention, Button, IconButton, Select, TextArea } from "../../components/ui.js";
import { ask, client, errorText, maybe } from "../../core/api.js";
import { bytes } from "../../core/format.js";
import { useAction, useLoad } from "../../core/hooks.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { Attached } from "./message.js";

const MOST = 2 ** 20;
const NEW = "\n"; // no name of a knowledge base

const asURL = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

const isText = (bytes) => !bytes.subarray(0, 4096).includes(0);
const sees = (model) => Boolean(model.capabilities?.vision);

/** What a file is for the models, or a reason why it is nothing for them. */
async function attachmentOf(file, { models, base }) {
  const content = new Uint8Array(await file.arrayBuffer());
  if (file.type.startsWith("image/") && !isText(content)) {
    const blind = models.find((one) => !sees(one));
    if (blind) throw new Error(t("chat.no_images", { name: file.name, model: blind.id }));
    return { kind: "image", name: file.name, url: await asURL(file) };
  }
  if (isText(content) && content.length <= MOST) return { kind: "text", name: file.name, text: new TextDecoder().decode(content) };
  if (!base) throw new Error(t(isText(content) ? "chat.too_long" : "chat.no_text", { name: file.name, size: bytes(file.size) }));
  return addTo(base, file.name, file);
}

async function addTo(base, name, data) {
  await client().knowledge.add(base, name, data);
  return { kind: "knowledge", name, base };
}

/** Asks for the name of a new knowledge base and makes it; null if nobody wants one. */
async function newBase(encoder) {
  const name = await askText({ title: t("chat.new_knowledge"), label: t("word.name"), hint: t("chat.new_knowledge_hint") });
  if (!name?.trim()) return null;
  await client().knowledge.create(name.trim(), encoder ? { model: encoder } : {});
  return name.trim();
}

export function Composer({ models, encoder, base, onBase, busy, onSend, onStop, inputRef }) {
  const [text, setText] = useState("");
  const [files, setFiles] = useState([]);
  const [reading, setReading] = useState(false);
  const [refused, setRefused] = useState([]);
  const [round, setRound] = useState(0); // the list shows what is chosen again
  const chooser = useRef();
  const bases = useLoad((signal) => maybe(ask("GET", "/llmasos/v1/knowledge", { signal })), []);
  const unseen = files.find((file) => file.kind === "image") && models.find((one) => !sees(one)); // chosen since
  const hasWords = text.trim() || files.some((file) => file.kind !== "knowledge");
  const canSend = hasWords && models.length && !busy && !reading && !unseen;
  const attach = async (list) => {
    setReading(true);
    const wrong = [];
    for (const file of list) {
      try {
        const made = await attachmentOf(file, { models, base });
        setFiles((old) => [...old, made]);
      } catch (e) {
        wrong.push(errorText(e));
      }
    }
    setRefused(wrong);
    setReading(false);
  };
  const [toBase] = useAction(async (file) => {
    const made = await addTo(base, file.name, new Blob([file.text], { type: "text/plain" }));
    setFiles((old) => old.map((one) => (one === file ? made : one)));
    toast(t("chat.added_to", { name: file.name, base }), { tone: "ok" });
  });
  const [choose] = useAction(async (name) => {
    const chosen = name === NEW ? await newBase(encoder) : name;
    if (name === NEW) bases.reload();
    if (chosen === null) setRound((n) => n + 1);
    else onBase(chosen);
  });
  const send = () => {
    if (!canSend) return;
    onSend(text.trim(), files);
    setText("");
    setFiles([]);
    setRefused([]);
  };
  const onKeyDown = (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    }
    if (event.key === "Escape" && busy) {
      event.preventDefault();
      onStop();
    }
  };
  const dropped = (event) => {
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  };
  const pasted = (event) => {
    const list = [...(event.clipboardData?.files ?? [])];
    if (list.length) {
      event.preventDefault();
      attach(list);
    }
  };
  const remove = (file) => {
    setFiles((old) => old.filter((one) => one !== file));
    inputRef.current?.focus();
  };
  const choices = () => [
    { value: "", label: t("chat.no_knowledge") },
    ...bases.data.data.map((one) => ({ value: one.name, label: t("chat.knowledge_named", { name: one.name }) })),
    ...(base && !bases.data.data.some((one) => one.name === base) ? [{ value: base, label: t("chat.knowledge_named", { name: base }) }] : []),
    { value: NEW, label: t("chat.new_knowledge") },
  ];
  useEffect(() => inputRef.current?.focus({ preventScroll: true }), []);
  return html`<div class="composer" onDragOver=${(event) => event.preventDefault()} onDrop=${dropped}>
    ${files.length > 0 && html`<div class="row chips">
      ${files.map((file, i) => html`<${Attached} key=${i} file=${file} onRemove=${() => remove(file)}>
        ${base && file.kind === "text" && html`<${IconButton} small icon="book" label=${t("chat.move_to", { name: file.name, base })} onClick=${() => toBase(file)} />`}
      <//>`)}
    </div>`}
    ${refused.map((why) => html`<${Attention} tone="bad" key=${why} action=${html`<${IconButton} small icon="close" label=${t("word.close")} onClick=${() => setRefused((old) => old.filter((one) => one !== why))} />`}>${why}<//>`)}
    ${unseen && html`<${Attention} tone="bad">${t("chat.images_unseen", { model: unseen.id })}<//>`}
    <${TextArea} value=${text} onChange=${setText} rows=${2} maxRows=${12} inputRef=${inputRef} onKeyDown=${onKeyDown} onPaste=${pasted}
      placeholder=${t("chat.write")} aria-label=${t("chat.write")} />
    <div class="row composer-tools">
      <${IconButton} icon="attach" label=${t("chat.attach")} onClick=${() => chooser.current.click()} disabled=${reading} />
      <input type="file" multiple hidden ref=${chooser} aria-label=${t("chat.attach")} onChange=${(event) => {
        attach([...event.currentTarget.files]);
        event.currentTarget.value = "";
      }} />
      ${bases.data && html`<${Select} key=${round} class="base" aria-label=${t("chat.knowledge")} value=${base ?? ""} onChange=${choose} options=${choices()} />`}
      <span class="grow small muted composer-hint">${t("chat.keys")}</span>
      ${busy
        ? html`<${Button} icon="stop" onClick=${onStop}>${t("word.stop")}<//>`
        : html`<${Button} kind="primary" icon="send" disabled=${!canSend} onClick=${send}>${t("chat.send")}<//>`}
    </div>
  </div>`;
}
