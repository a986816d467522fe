/**
 * Conversations, kept in the browser (IndexedDB). One is a tree: {id, title, created, updated, settings, nodes: {id: node},
 * head: the last node of the branch that is shown}. A node is {id, parent, role, content, …}; nodes with one parent are
 * branches. The answer of a second model to the same question is in its node's `twin`.
 */

import { signal } from "../../core/store.js";
import { absorb, noted } from "./merge.js";
import { giveUp, isRunning, watcher } from "./watch.js";

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((text, n) => text + n.toString(36), "");

export const emptyChat = (settings = {}) => {
  const now = new Date().toISOString();
  return { id: newId(), title: "", created: now, updated: now, settings, nodes: {}, head: null };
};

/** From the first message to the head. */
export function branch(chat, head = chat.head) {
  const path = [];
  for (let node = chat.nodes[head]; node; node = chat.nodes[node.parent]) path.unshift(node);
  return path;
}

/** The nodes that could stand where this one does, the oldest first. */
export const siblings = (chat, node) =>
  Object.values(chat.nodes)
    .filter((one) => one.parent === node.parent)
    .sort((a, b) => a.at - b.at);

/** The end of the branch through `id` that was written to last. */
export function leafOf(chat, id) {
  for (;;) {
    const children = Object.values(chat.nodes).filter((one) => one.parent === id);
    if (!children.length) return id;
    id = children.reduce((a, b) => (b.at > a.at ? b : a)).id;
  }
}

/** What the list and the search show: all that was said, in lower case. */
export const wordsOf = (chat) =>
  [chat.title, ...Object.values(chat.nodes).flatMap((node) => [node.content, node.twin?.content])].join("\n").toLowerCase();

// ------------------------------------------------------------------------------------------------------------- keeping

const STORE = "chats";
let opening;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("llmasos", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** What is kept, in a transaction of its own. Nothing else may be awaited while it is used. */
const open = async (mode) => (await database()).transaction(STORE, mode).objectStore(STORE);

/** All conversations, the latest first; null until they are read. */
export const chats = signal(null);
/** Whether the browser keeps them; private windows may not. */
export const isKept = signal(true);

const sorted = (list) => list.sort((a, b) => (a.updated < b.updated ? 1 : -1));

/** What ends the answers that are being written here, by conversation. */
export const live = signal({});
/** {title} of a conversation that another tab has gone on with in another way, when that is found. */
export const parted = signal(null);

let isRead = false;
/** What was kept of each when it was last read or written here. */
const bases = new Map();
/** Those that were deleted: an answer that still comes does not bring them back. */
const deleted = new Set();

const tabs = globalThis.BroadcastChannel && new BroadcastChannel("llmasos.chats");
const watching = watcher({
  post: tabs && ((told) => tabs.postMessage(told)),
  writes: (id) => id in live.value,
  runs: (id) => Object.values(find(id)?.nodes ?? {}).some(isRunning),
  left: (id) => {
    giveUp(find(id));
    show(find(id));
  },
});

if (tabs) {
  tabs.onmessage = ({ data }) => {
    watching.hear(data);
    if (data.removed) erase(data.removed);
    else if (data.saved && isRead) reread(data.saved);
  };
}

export async function readChats() {
  if (isRead) return;
  isRead = true;
  let found = [];
  try {
    found = (await done((await open("readonly")).getAll())).filter(isChat);
  } catch {
    isKept.value = false;
  }
  const begun = chats.value ?? []; // while they were read
  const more = found.filter((one) => !find(one.id));
  for (const one of more) bases.set(one.id, noted(one));
  chats.value = sorted([...begun, ...more]);
  for (const one of more) watching.look(one.id);
}

/** Shows a conversation as it is now, without keeping it. */
export function show(chat) {
  if (deleted.has(chat.id)) return;
  chats.value = sorted([chat, ...(chats.value ?? []).filter((one) => one.id !== chat.id)]);
  watching.look(chat.id);
}

/** What a page that was closed left unfinished. */
export function mend(chat) {
  if (!live.value[chat.id]) giveUp(chat);
}

/** Takes in what another tab has kept. */
function take(chat, kept) {
  if (kept && isChat(kept) && absorb(chat, kept, bases.get(chat.id), { isWritten: chat.id in live.value, newId })) parted.value = { title: chat.title };
}

/** Shows and keeps a conversation as it is now, with what other tabs have kept of it. `touch`: it moves to the top. */
export async function save(chat, { touch = true } = {}) {
  if (deleted.has(chat.id)) return;
  if (touch) chat.updated = new Date().toISOString();
  show(chat);
  try {
    const store = await open("readwrite");
    take(chat, await done(store.get(chat.id)));
    if (deleted.has(chat.id)) return;
    const putting = done(store.put(chat));
    const now = noted(chat); // as it was put: an answer may be coming
    await putting;
    bases.set(chat.id, now);
    tabs?.postMessage({ saved: chat.id });
    show(chat);
  } catch {
    isKept.value = false;
  }
}

async function reread(id) {
  const kept = await open("readonly").then((store) => done(store.get(id))).catch(() => null);
  if (!kept || !isChat(kept) || deleted.has(id)) return;
  const chat = find(id) ?? kept;
  if (chat !== kept) take(chat, kept);
  bases.set(id, noted(kept));
  show(chat);
}

export async function remove(ids) {
  await erase(ids);
  tabs?.postMessage({ removed: ids });
}

async function erase(ids) {
  for (const id of ids) {
    deleted.add(id);
    live.value[id]?.forEach((one) => one.abort());
  }
  chats.value = (chats.value ?? []).filter((one) => !ids.includes(one.id));
  for (const id of ids) await open("readwrite").then((store) => done(store.delete(id))).catch(() => {});
}

export const find = (id) => (chats.value ?? []).find((one) => one.id === id);

// -------------------------------------------------------------------------------------------------- files of many chats

export const exported = (list) => new Blob([JSON.stringify({ format: "llmasos.chats", version: 1, chats: list }, null, 1)], { type: "application/json" });

const isText = (value) => typeof value === "string";
const isNode = (node, id) => node?.id === id && ["user", "assistant"].includes(node.role) && isText(node.content) && (node.parent === null || isText(node.parent));

/** Whether it is a conversation that can be shown: its nodes are a tree. */
export function isChat(one) {
  if (!isText(one?.id) || !one.nodes || typeof one.nodes !== "object" || typeof (one.settings ?? {}) !== "object") return false;
  const ids = Object.keys(one.nodes);
  if (!ids.every((id) => isNode(one.nodes[id], id)) || !isText(one.title ?? "") || (one.head && !one.nodes[one.head])) return false;
  return ids.every((id) => {
    let steps = 0;
    for (let node = one.nodes[id]; node; node = one.nodes[node.parent]) if (++steps > ids.length) return false; // a ring
    return true;
  });
}

/** Reads what `exported` wrote; returns how many conversations it held that are not here already. Throws for other files. */
export async function imported(text) {
  const body = JSON.parse(text);
  if (body?.format !== "llmasos.chats" || !body.chats?.every?.(isChat)) throw new Error("format");
  let count = 0;
  for (const chat of body.chats) {
    const made = { ...emptyChat(), ...chat };
    const here = find(made.id);
    if (here && JSON.stringify(here.nodes) === JSON.stringify(made.nodes)) continue;
    deleted.delete(made.id);
    await save(here ? { ...made, id: newId() } : made, { touch: false });
    count += 1;
  }
  return count;
}
