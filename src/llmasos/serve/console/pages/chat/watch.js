/**
 * Answers whose page is gone. A page that writes one says so whenever another asks; one that was closed, or fell over, does
 * not. An answer that was given up too soon (its page was busy) comes back when it is whole: see `absorb`.
 */

export const isRunning = (node) => [node, node.twin].some((one) => one?.state === "running");

/** Marks what nobody writes any more. */
export function giveUp(chat) {
  for (const node of Object.values(chat.nodes)) {
    for (const one of [node, node.twin]) if (one?.state === "running") Object.assign(one, { state: "stopped", left: true });
  }
}

const WAIT_MS = 1000;
const MOST_SILENT = 2;

/**
 * `post` sends to the other pages, undefined where they can't be reached; `writes(id)`: answers of this conversation come
 * here; `runs(id)`: one that is shown here has an unfinished answer; `left(id)` is called when no page writes it.
 */
export function watcher({ post, writes, runs, left, later = setTimeout }) {
  /** By conversation, how many questions in a row nobody has answered. */
  const asked = new Map();

  function ask(id) {
    asked.set(id, asked.get(id) + 1);
    post({ asks: id });
    later(() => {
      const silent = asked.get(id);
      if (writes(id) || !runs(id)) asked.delete(id);
      else if (silent < MOST_SILENT) ask(id);
      else {
        asked.delete(id);
        left(id);
      }
    }, WAIT_MS);
  }

  return {
    /** Asks until the answers of this conversation are whole, or left. */
    look(id) {
      if (asked.has(id) || writes(id) || !runs(id)) return;
      if (!post) return left(id);
      asked.set(id, 0);
      ask(id);
    },
    hear({ asks, writing }) {
      if (asks && writes(asks)) post({ writing: asks });
      if (asked.has(writing)) asked.set(writing, 0);
    },
  };
}
