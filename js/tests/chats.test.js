/** Conversations that two tabs go on with at once. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { absorb, noted } from "../../src/llmasos/serve/console/pages/chat/merge.js";

import { giveUp, isRunning, watcher } from "../../src/llmasos/serve/console/pages/chat/watch.js";

const answer = (id, parent, content, more = {}) => ({ id, parent, role: "assistant", content, state: "done", ...more });
const asked = (id, parent, content) => ({ id, parent, role: "user", content });
const chatOf = (...nodes) => ({ id: "c", title: "T", created: "1", updated: "1", settings: {}, nodes: Object.fromEntries(nodes.map((node) => [node.id, node])), head: nodes.at(-1)?.id ?? null });
const START = chatOf(asked("q", null, "One"), answer("a", "q", "One!"));
const copy = () => structuredClone(START);
const with_ = (chat, ...nodes) => (nodes.forEach((node) => ((chat.nodes[node.id] = node), (chat.head = node.id))), chat);
const merged = (mine, theirs, { base = START, isWritten = false } = {}) => absorb(mine, theirs, noted(base), { isWritten, newId: () => "new" });

test("what another tab went on with is taken and shown where nothing else was said here", () => {
  const mine = copy();
  assert.equal(merged(mine, with_(copy(), asked("q2", "a", "Two"), answer("a2", "q2", "Two!"))), false);
  assert.deepEqual([mine.head, Object.keys(mine.nodes)], ["a2", ["q", "a", "q2", "a2"]]);
});

test("two that went on from the same place are branches, and that is told", () => {
  const mine = with_(copy(), asked("q2", "a", "Two"));
  const theirs = with_(copy(), asked("q3", "a", "Three"), answer("a3", "q3", "Three!"));
  for (const isWritten of [true, false]) {
    const here = structuredClone(mine);
    assert.equal(merged(here, theirs, { isWritten }), true);
    assert.deepEqual([here.head, Object.keys(here.nodes).sort()], ["q2", ["a", "a3", "q", "q2", "q3"]]);
    assert.equal(merged(here, theirs, { isWritten, base: theirs }), false, "once");
  }
});

test("an old copy takes nothing back", () => {
  const mine = with_(copy(), asked("q2", "a", "Two"));
  mine.title = "Named";
  assert.equal(merged(mine, copy()), false);
  assert.deepEqual([mine.head, mine.title], ["q2", "Named"]);
  assert.equal(merged(mine, { ...copy(), title: "Other", settings: { top_p: 1 } }), false);
  assert.deepEqual([mine.title, mine.settings], ["Named", { top_p: 1 }], "who changed something wins, field by field");
});

test("of an answer that one tab writes, the others' copies do not count", () => {
  const begun = with_(copy(), answer("b", "q", "Wh", { state: "running" }));
  const left = with_(copy(), answer("b", "q", "Wh", { state: "stopped", left: true }));
  const whole = with_(copy(), answer("b", "q", "Whole"));
  const writing = structuredClone(begun);
  writing.nodes.b.content = "Who";
  for (const theirs of [begun, left]) {
    assert.equal(merged(writing, structuredClone(theirs), { base: begun, isWritten: true }), false);
    assert.equal(writing.nodes.b.content, "Who");
  }
  for (const [mine, isWritten] of [[begun, false], [left, false], [begun, true], [left, true]]) {
    const here = structuredClone(mine);
    assert.equal(merged(here, structuredClone(whole), { base: begun, isWritten }), false);
    assert.deepEqual([here.nodes.b.content, Object.keys(here.nodes).length], ["Whole", 3]);
  }
});

test("one answer that both changed is there twice", () => {
  const mine = copy();
  const theirs = copy();
  mine.nodes.a.content = "Mine";
  theirs.nodes.a.content = "Theirs";
  assert.equal(merged(mine, theirs), true);
  assert.deepEqual([mine.nodes.a.content, mine.nodes.new], ["Mine", { ...theirs.nodes.a, id: "new" }]);
});

test("a first message in both is kept in both", () => {
  const mine = chatOf(asked("x", null, "X"));
  assert.equal(absorb(mine, chatOf(asked("y", null, "Y")), undefined, { isWritten: false, newId: () => "new" }), true);
  assert.deepEqual([mine.head, Object.keys(mine.nodes)], ["x", ["x", "y"]]);
});

/** Pages that hear of each other, and a clock that is wound by hand. */
function pages() {
  const open = [];
  const due = [];
  const page = (writes = []) => {
    const own = { writes: new Set(writes), runs: new Set(["c"]), left: [] };
    const left = (id) => (own.left.push(id), own.runs.delete(id));
    own.watch = watcher({
      post: (told) => open.filter((other) => other !== own).forEach((other) => other.watch.hear(told)),
      writes: (id) => own.writes.has(id),
      runs: (id) => own.runs.has(id),
      left,
      later: (act) => due.push(act),
    });
    open.push(own);
    return own;
  };
  const close = (own) => open.splice(open.indexOf(own), 1);
  const tick = () => due.splice(0).forEach((act) => act());
  return { page, close, tick, due };
}

test("an answer is left when the page that writes it is gone, and not before", () => {
  const { page, close, tick, due } = pages();
  const [writer, other] = [page(["c"]), page()];
  other.watch.look("c");
  other.watch.look("c");
  assert.equal(due.length, 1, "asked once at a time");
  for (let n = 0; n < 9; n++) tick();
  assert.deepEqual(other.left, []);
  close(writer);
  for (let n = 0; n < 3; n++) tick();
  assert.deepEqual([other.left, due.length], [["c"], 0]);
  writer.watch.look("c");
  assert.equal(due.length, 0, "who writes asks nobody");
});

test("an answer that ends is no longer asked about, nor one that is written here meanwhile", () => {
  const { page, tick, due } = pages();
  const [, whole, taken] = [page(["c"]), page(), page()];
  whole.watch.look("c");
  taken.watch.look("c");
  whole.runs.delete("c");
  taken.writes.add("c");
  tick();
  assert.deepEqual([whole.left, taken.left, due.length], [[], [], 0]);
});

test("where pages can not reach each other an unfinished answer is left at once", () => {
  const left = [];
  watcher({ post: undefined, writes: () => false, runs: () => true, left: (id) => left.push(id) }).look("c");
  assert.deepEqual(left, ["c"]);
});

test("what was given up is stopped in every branch, and gives way to the whole answer", () => {
  const chat = with_(copy(), answer("b", "q", "Wh", { state: "running", twin: { content: "", state: "running" } }), asked("q2", "a", "Two"));
  giveUp(chat);
  assert.deepEqual([chat.nodes.b.state, chat.nodes.b.twin.state, isRunning(chat.nodes.b)], ["stopped", "stopped", false]);
  const whole = with_(copy(), answer("b", "q", "Whole"));
  merged(chat, whole);
  assert.deepEqual([chat.nodes.b.content, chat.nodes.b.state], ["Whole", "done"]);
});
