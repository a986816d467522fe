/** Chat: conversations with one model or two side by side. */

import { Code } from "../components/code.js";
import { Dialog } from "../components/dialog.js";
import { Attention, Button, Empty, Icon, IconButton, Page, Select, Spinner, Tabs } from "../components/ui.js";
import { client } from "../core/api.js";
import { useLoad } from "../core/hooks.js";
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { useCommands } from "../core/keys.js";
import { go, href, setQuery } from "../core/router.js";
import { stored, useSignal } from "../core/store.js";
import { answer, edit, goOn, keep, send, showBranch, stop } from "./chat/engine.js";
import { Composer } from "./chat/composer.js";
import { List, drop, exportOne, rename } from "./chat/list.js";
import { Message } from "./chat/message.js";
import { messagesOf, snippets } from "./chat/request.js";
import { Settings } from "./chat/settings.js";
import { branch, chats, emptyChat, find, live, readChats, save } from "./chat/store.js";

export const styles = ["pages/chat.css"];

const lastModel = stored("chat.model", null);

export default function Chat({ route }) {
  const all = useSignal(chats);
  const busyChats = useSignal(live);
  const models = useLoad((signal) => client().models({ signal }), []);
  const usable = (models.data ?? []).filter((one) => one.capabilities?.chat ?? true);
  const encoder = models.data?.find((one) => one.capabilities?.embeddings && !one.capabilities.chat)?.id;
  const [fresh, setFresh] = useState(() => emptyChat());
  const [drawer, setDrawer] = useState(false);
  const input = useRef();
  const id = route.path[0];
  useEffect(() => void readChats(), []);
  const kept = all && id ? find(id) : null;
  useEffect(() => setDrawer(false), [id, Boolean(kept)]);
  useEffect(() => {
    if (!id && Object.keys(fresh.nodes).length) setFresh(emptyChat()); // it was begun, and left or deleted
  }, [id]);
  const chat = kept ?? fresh;
  const { settings } = chat;
  const model = route.query.model ?? settings.model ?? usable.find((one) => one.id === lastModel.value)?.id ?? usable[0]?.id;
  const other = route.query.compare === undefined ? settings.compare : route.query.compare;
  const busy = Boolean(busyChats[chat.id]);
  const path = branch(chat);
  const facts = usable.find((one) => one.id === model);

  const change = (next) => {
    if (!kept) return setFresh({ ...chat, settings: next });
    chat.settings = next; // not of a copy: an answer may be coming
    save(chat, { touch: false });
  };
  const choose = (names) => {
    if (names.model) lastModel.value = names.model;
    change({ ...settings, model, ...names });
    setQuery({ model: null, compare: null });
  };
  const start = () => {
    setFresh(emptyChat());
    go("/chat");
    setDrawer(false);
    setTimeout(() => input.current?.focus());
  };
  const pair = other ? [model, other] : [model];
  const say = (text, files) => {
    chat.settings = { ...settings, model, compare: other };
    lastModel.value = model;
    send(chat, chat.head, text, files, pair);
    if (!kept) go(`/chat/${chat.id}`, route.query.panel ? { panel: route.query.panel } : {}, { replace: true });
  };
  /** The button that was pressed goes away, and the focus would with it. */
  const then = (act) => (...given) => (input.current?.focus({ preventScroll: true }), act(...given));
  const acts = {
    edit: then((node, text) => edit(chat, node, text, pair)),
    again: then((node) => answer(chat, chat.nodes[node.parent], pair)),
    show: (one) => showBranch(chat, one),
    keep: then((node, side) => keep(chat, node, side)),
    decide: then((_, one, decisions) => goOn(chat, one, decisions)),
  };
  useCommands(
    [
      { id: "chat-new", label: t("chat.new"), keys: "n", run: start },
      { id: "chat-settings", label: t("chat.settings"), keys: "s", run: () => setQuery({ panel: "settings" }) },
      { id: "chat-code", label: t("chat.as_code"), run: () => setQuery({ panel: "code" }) },
      { id: "chat-write", label: t("chat.write"), keys: "/", run: () => input.current?.focus() },
      ...(busy ? [{ id: "chat-stop", label: t("word.stop"), keys: "escape", run: () => stop(chat) }] : []),
      ...(kept ? [{ id: "chat-rename", label: t("word.rename"), run: () => rename(chat) }, { id: "chat-delete", label: t("chat.delete"), run: () => drop(chat) }] : []),
    ],
    [chat.id, busy, Boolean(kept), t("chat.new")],
  );

  const names = usable.map((one) => one.id);
  const withMissing = (name) => (name && !names.includes(name) ? [name, ...names] : names);
  const compares = other !== undefined && other !== null && other !== "";
  const actions = html`
    <span class="row nowrap model-choice">
      <${Select} aria-label=${t("word.model")} value=${model} onChange=${(name) => choose({ model: name })} options=${withMissing(model)} disabled=${!names.length} />
      ${compares && html`<span class="muted" aria-hidden="true">×</span>
        <${Select} aria-label=${t("chat.second")} value=${other} onChange=${(name) => choose({ compare: name })} options=${withMissing(other)} />`}
    </span>
    <${IconButton} icon="compare" label=${t("chat.compare")} aria-pressed=${compares ? "true" : "false"} disabled=${!names.length}
      onClick=${() => choose({ compare: compares ? null : (names.find((one) => one !== model) ?? model) })} />
    <${IconButton} icon="code" label=${t("chat.as_code")} disabled=${!model} onClick=${() => setQuery({ panel: "code" })} />
    ${kept && html`<${IconButton} icon="download" label=${t("chat.export")} onClick=${() => exportOne(chat)} />`}
    <${IconButton} icon="settings" label=${t("chat.settings")} onClick=${() => setQuery({ panel: "settings" })} />
  `;
  const closePanel = () => setQuery({ panel: null });
  return html`
    <div class=${`chat ${drawer ? "chat-drawer" : ""}`}>
      <aside class="chat-side" aria-label=${t("chat.history")}><${List} active=${kept?.id} onNew=${start} onPick=${() => setDrawer(false)} /></aside>
      ${drawer && html`<button type="button" class="chat-shade" aria-label=${t("word.close")} onClick=${() => setDrawer(false)} />`}
      <${Page} wide title=${kept?.title || t("nav.chat")} actions=${actions}>
        <div class="chat-open"><${IconButton} icon="menu" label=${t("chat.history")} aria-expanded=${drawer ? "true" : "false"} onClick=${() => setDrawer(!drawer)} /></div>
        <${Talk} ...${{ chat, path, acts, busy }}>
          ${!path.length && html`<${Start} ...${{ models, usable, model, onAsk: (text) => say(text, []) }} />`}
        <//>
        <div class="chat-foot"><${Composer} key=${chat.id} models=${pair.filter(Boolean).map((name) => usable.find((one) => one.id === name) ?? { id: name })} encoder=${encoder}
          base=${settings.base} onBase=${(base) => change({ ...settings, model, base })}
          busy=${busy} onSend=${say} onStop=${() => stop(chat)} inputRef=${input} /></div>
      <//>
    </div>
    ${route.query.panel === "settings" && html`<${Settings} settings=${settings} model=${facts} onClose=${closePanel}
      onChange=${(next) => change({ ...next, model, compare: other, base: settings.base })} />`}
    ${route.query.panel === "code" && html`<${AsCode} ...${{ chat, model, onClose: closePanel }} />`}
  `;
}

/** The messages; what is written at their end stays in view unless the person has scrolled away from it. */
function Talk({ chat, path, acts, busy, children }) {
  const box = useRef();
  const follows = useRef(true);
  const onScroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = box.current;
    follows.current = scrollHeight - scrollTop - clientHeight < 80;
  };
  useLayoutEffect(() => {
    follows.current = true;
  }, [chat.id, path.length]);
  useLayoutEffect(() => {
    if (follows.current && path.length) box.current.scrollTop = box.current.scrollHeight;
  });
  return html`<div class="talk" ref=${box} onScroll=${onScroll} tabindex="0" role="log" aria-live="polite" aria-label=${t("chat.conversation")}>
    <div class=${path.some((node) => node.twin) ? "talk-inner talk-broad" : "talk-inner"}>
      ${path.map((node) => html`<${Message} key=${node.id} ...${{ chat, node, acts, busy }} />`)}
      ${children}
    </div>
  </div>`;
}

function Start({ models, usable, model, onAsk }) {
  if (models.error) return html`<${Attention} tone="bad">${t("chat.no_list")}<//>`;
  if (models.loading && !models.data) return html`<div class="waiting"><${Spinner} label=${t("word.loading")} /></div>`;
  if (!usable.length) {
    const action = html`<a class="button button-primary" href=${href("/models", { tab: "catalog" })}><${Icon} name="download" size=${17} />${t("chat.get_model")}</a>`;
    return html`<${Empty} icon="models" title=${t("chat.no_model")} action=${action}>${t("chat.no_model_hint")}<//>`;
  }
  return html`<${Empty} icon="chat" title=${t("chat.hello")} action=${html`<div class="ideas">
    ${["chat.idea_1", "chat.idea_2", "chat.idea_3"].map((key) => html`<${Button} key=${key} onClick=${() => onAsk(t(key))}>${t(key)}<//>`)}
  </div>`}>${t("chat.hello_hint", { model })}<//>`;
}

function AsCode({ chat, model, onClose }) {
  const [language, setLanguage] = useState("curl");
  const made = useMemo(() => {
    try {
      const lastAsked = branch(chat).findLast((node) => node.role === "user");
      const messages = messagesOf(chat, lastAsked?.id);
      const shown = messages.some((one) => one.role === "user") ? messages : [...messages, { role: "user", content: t("chat.idea_1") }];
      return snippets(model, shown, chat.settings);
    } catch (e) {
      return { error: e.message };
    }
  }, [chat.id, chat.head, model]);
  const names = { curl: "curl", python: "Python", js: "JavaScript", cli: t("chat.shell") };
  const tabs = Object.keys(names).filter((one) => made[one] || made.error).map((one) => ({ id: one, label: names[one] }));
  return html`<${Dialog} wide title=${t("chat.as_code")} onClose=${onClose}>
    ${made.error ? html`<${Attention} tone="bad">${made.error}<//>` : html`
      <${Tabs} tabs=${tabs} active=${language} onChange=${setLanguage} label=${t("chat.as_code")} />
      <${Code} text=${made[language]} label=${language} />`}
  <//>`;
}
