/** Where a message is written: text, files, images, a knowledge base. */

import { toast } from "../../components/toast.js";
import { Button, IconButton, Select, TextArea } from "../../components/ui.js";
import { ask, client, errorText, maybe } from "../../core/api.js";
import { bytes } from "../../core/format.js";
import { useLoad } from "../../core/hooks.js";
import { html, useEffect, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { Attached } from "./message.js";

const MOST = 2 ** 20;

const asURL = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

const isText = (bytes) => !bytes.subarray(0, 4096).includes(0);

/** What a file is for the model, or a reason why it is nothing for it. */
async function attachmentOf(file, { canSee, base }) {
  if (file.type.startsWith("image/")) {
    if (!canSee) throw new Error(t("chat.no_images"));
    return { kind: "image", name: file.name, url: await asURL(file) };
  }
  const content = new Uint8Array(await file.arrayBuffer());
  if (isText(content) && content.length <= MOST) return { kind: "text", name: file.name, text: new TextDecoder().decode(content) };
  if (!base) throw new Error(t(isText(content) ? "chat.too_long" : "chat.no_text", { name: file.name, size: bytes(file.size) }));
  await client().knowledge.add(base, file.name, file);
  return { kind: "knowledge", name: file.name };
}

export function Composer({ model, base, onBase, busy, onSend, onStop, inputRef }) {
  const [text, setText] = useState("");
  const [files, setFiles] = useState([]);
  const [reading, setReading] = useState(false);
  const chooser = useRef();
  const bases = useLoad((signal) => maybe(ask("GET", "/llmasos/v1/knowledge", { signal }), { data: [] }), []);
  const canSend = (text.trim() || files.length) && model && !busy && !reading;
  const attach = async (list) => {
    setReading(true);
    for (const file of list) {
      try {
        const made = await attachmentOf(file, { canSee: model?.capabilities?.vision, base });
        setFiles((old) => [...old, made]);
      } catch (e) {
        toast(errorText(e), { tone: "bad" });
      }
    }
    setReading(false);
  };
  const send = () => {
    if (!canSend) return;
    onSend(text.trim(), files);
    setText("");
    setFiles([]);
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
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
  useEffect(() => inputRef.current?.focus({ preventScroll: true }), []);
  return html`<div class="composer" onDragOver=${(event) => event.preventDefault()} onDrop=${dropped}>
    ${files.length > 0 && html`<div class="row chips">
      ${files.map((file, i) => html`<${Attached} key=${i} file=${file} onRemove=${() => setFiles(files.filter((_, j) => j !== i))} />`)}
    </div>`}
    <${TextArea} value=${text} onChange=${setText} rows=${2} maxRows=${12} inputRef=${inputRef} onKeyDown=${onKeyDown} onPaste=${pasted}
      placeholder=${t("chat.write")} aria-label=${t("chat.write")} />
    <div class="row composer-tools">
      <${IconButton} icon="attach" label=${t("chat.attach")} onClick=${() => chooser.current.click()} disabled=${reading} />
      <input type="file" multiple hidden ref=${chooser} aria-label=${t("chat.attach")} onChange=${(event) => {
        attach([...event.currentTarget.files]);
        event.currentTarget.value = "";
      }} />
      ${bases.data?.data.length > 0 && html`<${Select} class="base" aria-label=${t("chat.knowledge")} value=${base ?? ""} onChange=${onBase}
        options=${[{ value: "", label: t("chat.no_knowledge") }, ...bases.data.data.map((one) => ({ value: one.name, label: t("chat.knowledge_named", { name: one.name }) }))]} />`}
      <span class="grow small muted composer-hint">${t("chat.keys")}</span>
      ${busy
        ? html`<${Button} icon="stop" onClick=${onStop}>${t("word.stop")}<//>`
        : html`<${Button} kind="primary" icon="send" disabled=${!canSend} onClick=${send}>${t("chat.send")}<//>`}
    </div>
  </div>`;
}
