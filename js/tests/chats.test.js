/** Conversations that two tabs go on with at once. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { absorb, noted } from "../../src/llmasos/serve/console/pages/chat/merge.js";

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
