/** One conversation out of two copies of it that tabs have gone on with. Nothing is lost: what differs becomes branches. */

import { isRunning } from "./watch.js";

/** An answer that a page is writing, or that went with its page (`left`): every other copy of it is better. */
const isUnfinished = (node) => isRunning(node) || [node, node.twin].some((one) => one?.left);

/** What `absorb` compares with later: the conversation as it is kept now. */
export const noted = ({ title, settings, nodes }) => ({
  title,
  settings: JSON.stringify(settings),
  nodes: Object.fromEntries(Object.values(nodes).map((node) => [node.id, JSON.stringify(node)])),
});

function above(nodes, head) {
  const ids = new Set();
  for (let node = nodes[head]; node; node = nodes[node.parent]) ids.add(node.id);
  return ids;
}

/**
 * Takes into `chat` what `kept`, the other tab's copy, has more. `base`: both as `noted` when they were the same; `isWritten`:
 * an answer comes here; `newId` names what becomes a branch. Returns whether the tabs went different ways.
 */
export function absorb(chat, kept, base, { isWritten, newId }) {
  const added = [];
  for (const theirs of Object.values(kept.nodes)) {
    const mine = chat.nodes[theirs.id];
    if (!mine) {
      chat.nodes[theirs.id] = theirs;
      added.push(theirs);
      continue;
    }
    const [before, ours, other] = [base?.nodes[theirs.id], JSON.stringify(mine), JSON.stringify(theirs)];
    if (ours === other || other === before || isUnfinished(theirs)) continue;
    const isOwn = isWritten && isRunning(mine);
    if (ours === before || (isUnfinished(mine) && !isOwn)) {
      chat.nodes[theirs.id] = theirs;
    } else {
      const copy = { ...theirs, id: newId() };
      chat.nodes[copy.id] = copy;
      added.push(copy);
    }
  }
  if (chat.title === base?.title) chat.title = kept.title;
  if (JSON.stringify(chat.settings) === base?.settings) chat.settings = kept.settings;
  if (kept.updated > chat.updated) chat.updated = kept.updated;
  if (!isWritten && (chat.head === null || above(chat.nodes, kept.head).has(chat.head))) chat.head = kept.head;
  const shown = above(chat.nodes, chat.head);
  return added.some((node) => !shown.has(node.id) && (node.parent === null || shown.has(node.parent)));
}
