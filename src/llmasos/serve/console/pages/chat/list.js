/** The conversations: search, rename, delete, files. */

import { askText, confirm } from "../../components/dialog.js";
import { toast } from "../../components/toast.js";
import { Button, IconButton, Input, Spinner } from "../../components/ui.js";
import { ago } from "../../core/format.js";
import { html, useRef, useState } from "../../core/html.js";
import { t } from "../../core/i18n.js";
import { go, href, route, segment } from "../../core/router.js";
import { useSignal } from "../../core/store.js";
import { stop } from "./engine.js";
import { chats, exported, imported, isKept, remove, save, wordsOf } from "./store.js";

export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export async function rename(chat) {
  const title = await askText({ title: t("word.rename"), label: t("word.name"), value: chat.title });
  if (!title?.trim()) return;
  chat.title = title.trim(); // not of a copy: an answer may be coming
  await save(chat, { touch: false });
}

export async function drop(chat) {
  if (!(await confirm({ title: t("chat.delete"), text: chat.title, action: t("word.delete"), danger: true }))) return;
  stop(chat);
  await remove([chat.id]);
  if (route().path[0] === chat.id) go("/chat");
}

export const exportOne = (chat) => download(exported([chat]), `${(chat.title || "chat").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.json`);

export function List({ active, onNew, onPick }) {
  const all = useSignal(chats);
  const kept = useSignal(isKept);
  const [query, setQuery] = useState("");
  const file = useRef();
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (all ?? []).filter((chat) => words.every((word) => wordsOf(chat).includes(word)));
  const read = async (event) => {
    const [chosen] = event.currentTarget.files;
    event.currentTarget.value = "";
    if (!chosen) return;
    try {
      toast(t("chat.imported", { n: await imported(await chosen.text()) }), { tone: "ok" });
    } catch {
      toast(t("chat.not_imported", { name: chosen.name }), { tone: "bad" });
    }
  };
  return html`<div class="chats">
    <div class="row nowrap"><${Button} class="grow" icon="plus" onClick=${onNew}>${t("chat.new")}<//></div>
    <${Input} type="search" value=${query} onChange=${setQuery} placeholder=${t("chat.search")} aria-label=${t("chat.search")} />
    ${!kept && html`<p class="small muted">${t("chat.not_kept")}</p>`}
    ${all === null && html`<${Spinner} label=${t("word.loading")} />`}
    <ul aria-label=${t("chat.history")}>
      ${found.map((chat) => html`<li key=${chat.id}>
        <a href=${href(`/chat/${segment(chat.id)}`)} aria-current=${chat.id === active ? "page" : undefined} onClick=${onPick}>
          <span class="truncate">${chat.title || t("chat.untitled")}</span><span class="small muted">${ago(chat.updated)}</span>
        </a>
        <span class="chat-tools">
          <${IconButton} small icon="edit" label=${t("chat.rename_named", { name: chat.title })} onClick=${() => rename(chat)} />
          <${IconButton} small icon="trash" label=${t("chat.delete_named", { name: chat.title })} onClick=${() => drop(chat)} />
        </span>
      </li>`)}
    </ul>
    ${all && !found.length && html`<p class="small muted">${t(all.length ? "chat.none_found" : "chat.no_history")}</p>`}
    <div class="row chats-foot">
      <${Button} small kind="quiet" icon="download" disabled=${!all?.length} onClick=${() => download(exported(all), "llmasos-chats.json")}>${t("chat.export")}<//>
      <${Button} small kind="quiet" icon="upload" onClick=${() => file.current.click()}>${t("chat.import")}<//>
      <input type="file" accept="application/json,.json" hidden ref=${file} onChange=${read} aria-label=${t("chat.import")} />
    </div>
  </div>`;
}
