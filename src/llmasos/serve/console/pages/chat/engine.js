/** Conversations that go on, also while another page is shown. */

import { toast } from "../../components/toast.js";
import { errorText } from "../../core/api.js";
import { t } from "../../core/i18n.js";
import { answerTo, cancelRun, decide, emptyAnswer, passagesFor } from "./answer.js";
import { leafOf, live, mend, newId, parted, save, show } from "./store.js";

parted.watch(({ title }) => toast(t("chat.parted", { title: title || t("chat.untitled") }), { tone: "warn" }));

export const stop = (chat) => live.value[chat.id]?.forEach((one) => one.abort());

/** Several at once, where two models wait for what becomes of their calls. */
async function during(chat, work) {
  const controller = new AbortController();
  live.value = { ...live.value, [chat.id]: [...(live.value[chat.id] ?? []), controller] };
  try {
    await work(controller.signal, () => show(chat));
  } finally {
    const { [chat.id]: here, ...others } = live.value;
    const left = here.filter((one) => one !== controller);
    live.value = left.length ? { ...others, [chat.id]: left } : others;
    await save(chat);
  }
}

function add(chat, parent, fields) {
  const node = { id: newId(), parent, at: Date.now(), ...fields };
  chat.nodes[node.id] = node;
  chat.head = node.id;
  return node;
}

const titleOf = (text) => text.split("\n")[0].slice(0, 80);

/** Says `content` after node `parent` and has it answered by the chosen models. */
export async function send(chat, parent, content, attachments, models) {
  mend(chat);
  chat.title ||= titleOf(content || attachments[0]?.name || "");
  const node = add(chat, parent, { role: "user", content, ...(attachments.length ? { attachments } : {}) });
  await answer(chat, node, models);
}

/** Another answer to the message `asked`. */
export async function answer(chat, asked, [model, other]) {
  const node = add(chat, asked.id, { role: "assistant", ...emptyAnswer(model) });
  if (other) node.twin = emptyAnswer(other);
  await during(chat, async (signal, onChange) => {
    await save(chat);
    const { base } = chat.settings;
    if (base && asked.content.trim()) {
      try {
        asked.passages ??= await passagesFor(base, asked.content, signal);
      } catch (e) {
        Object.assign(node, { state: signal.aborted ? "stopped" : "failed", error: errorText(e), twin: undefined });
        return;
      }
      node.sources = asked.passages;
    }
    const first = answerTo(chat, asked.id, node, { signal, onChange });
    const second = node.twin && answerTo(chat, asked.id, node.twin, { second: true, signal, onChange });
    await Promise.all([first, second]);
  });
}

export async function edit(chat, node, content, models) {
  await send(chat, node.parent, content, node.attachments ?? [], models);
}

export async function showBranch(chat, id) {
  chat.head = leafOf(chat, id);
  await save(chat, { touch: false });
}

/** Of two answers the one that the conversation goes on with. */
export async function keep(chat, node, side) {
  const { twin, ...first } = node;
  const { id, parent, at, role, sources } = node;
  chat.nodes[node.id] = { ...(side ? twin : first), id, parent, at, role, sources };
  await save(chat);
}

export const goOn = (chat, answer, decisions) =>
  during(chat, async (signal, onChange) => {
    await decide(answer, decisions, { signal, onChange });
    if (signal.aborted) await cancelRun(answer);
  });
