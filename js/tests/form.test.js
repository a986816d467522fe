/** The logic of the console's forms: schemas, values, complaints, snippets. No page. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import * as schemas from "../../src/llmasos/serve/console/components/schema.js";
import * as snippets from "../../src/llmasos/serve/console/components/snippets.js";

const { Draft, begin, check, complete, fieldOf, key, placed, sample, variantOf } = schemas;
const document = JSON.parse(readFileSync(new URL("../../tests/apps/six_routes.json", import.meta.url), "utf8"));
const route = (name) => document.routes.find((one) => one.name === name);
const kindOf = (schema) => fieldOf(schema, schema).kind;

const POINT = { type: "object", title: "Point", properties: { x: { type: "number" }, y: { type: "number", default: 0 } }, required: ["x"] };
const NAMED = { type: "object", title: "Named", properties: { kind: { const: "named" }, name: { type: "string" } }, required: ["kind", "name"] };

test("every shape of a schema has its kind of field", () => {
  const kinds = {
    text: { type: "string" },
    number: { type: "integer", minimum: 0 },
    bool: { type: "boolean" },
    select: { enum: ["a", "b"] },
    constant: { const: 1 },
    list: { type: "array", items: { type: "string" } },
    tuple: { type: "array", prefixItems: [{ type: "string" }] },
    object: POINT,
    map: { type: "object", additionalProperties: { type: "integer" } },
    union: { anyOf: [{ type: "string" }, { type: "integer" }] },
    file: { type: "string", contentEncoding: "base64", contentMediaType: "image/*" },
    any: {},
  };
  for (const [kind, schema] of Object.entries(kinds)) assert.equal(kindOf(schema), kind);
  assert.equal(kindOf(true), "any");
  assert.equal(kindOf({ type: "object" }), "any");
  assert.equal(kindOf({ anyOf: [{ const: "a" }, { const: "b" }, { enum: ["c"] }] }), "select");
  assert.equal(kindOf({ type: ["string", "integer"] }), "union");
});

test("what may be null is its other type, with the words of the whole", () => {
  const field = fieldOf({ anyOf: [{ type: "integer", maximum: 5 }, { type: "null" }], default: null, title: "N", description: "d" });
  assert.deepEqual([field.kind, field.nullable, field.max, field.default, field.title, field.description], ["number", true, 5, null, "N", "d"]);
  assert.equal(fieldOf({ enum: ["a", null] }).nullable, true);
});

test("references are followed, with what stands beside them, and rings end", () => {
  const root = { $defs: { P: POINT, "a/b": { type: "boolean" }, R: { $ref: "#/$defs/R" } } };
  const field = fieldOf({ $ref: "#/$defs/P", default: { x: 1 }, description: "here" }, root);
  assert.deepEqual([field.kind, field.default, field.description], ["object", { x: 1 }, "here"]);
  assert.equal(fieldOf({ $ref: "#/$defs/a~1b" }, root).kind, "bool");
  assert.equal(fieldOf({ allOf: [{ $ref: "#/$defs/P" }] }, root).kind, "object");
  assert.equal(fieldOf({ $ref: "#/$defs/R" }, root).kind, "any");
  assert.equal(fieldOf({ $ref: "#/$defs/gone" }, root).kind, "any");
});

test("sliders are for few steps between two limits", () => {
  assert.equal(fieldOf({ type: "integer", minimum: 1, exclusiveMaximum: 501 }).hasSlider, true);
  assert.equal(fieldOf({ type: "integer", minimum: 1, exclusiveMaximum: 501 }).max, 500);
  assert.equal(fieldOf({ type: "integer", minimum: 0, maximum: 1e9 }).hasSlider, false);
  assert.equal(fieldOf({ type: "number", minimum: 0, maximum: 1 }).hasSlider, true);
  assert.equal(fieldOf({ type: "integer", minimum: 0 }).hasSlider, false);
});

test("names that every object has are inputs like others", () => {
  const text = { type: "string" };
  const properties = JSON.parse(`{"constructor": ${JSON.stringify(text)}, "__proto__": ${JSON.stringify(text)}, "toString": ${JSON.stringify(text)}}`);
  const schema = { type: "object", properties, required: ["__proto__"] };
  assert.deepEqual(check(schema, complete(schema, {}, schema), schema).map(({ path }) => path), [["__proto__"]]);
  const values = JSON.parse('{"__proto__": "p", "toString": "t"}');
  assert.equal(JSON.stringify(complete(schema, values, schema)), JSON.stringify(values));
});

test("what was not touched is not sent, but switches, constants and lists that are required", () => {
  const schema = {
    type: "object",
    properties: {
      a: { type: "string" },
      on: { type: "boolean" },
      off: { type: "boolean", default: true },
      kind: { const: "k" },
      points: { type: "array", items: POINT },
      n: { anyOf: [{ type: "integer" }, { type: "null" }] },
    },
    required: ["a", "on", "kind", "points", "n"],
  };
  assert.deepEqual(complete(schema, {}, schema), { on: false, kind: "k", points: [], n: null });
  assert.deepEqual(complete(schema, { a: "", points: [{}], off: false }, schema), { a: "", on: false, kind: "k", points: [{}], n: null, off: false });
  assert.deepEqual(check(schema, complete(schema, { a: "" }, schema), schema), []);
});

test("the calls of the six routes are valid, and are sent as they are", () => {
  const calls = [["add", { a: 1, b: 40 }], ["box", { points: [{ x: 1, y: 2 }, { x: 3 }] }], ["forget", { names: ["b"], really: true }]];
  for (const [name, values] of calls) {
    const { input } = route(name);
    assert.deepEqual(check(input, values, input), []);
    assert.deepEqual(complete(input, values, input), values);
  }
});

test("wrong values are named at their place", () => {
  const { input } = route("box");
  const wrong = (schema, value) => check(schema, value, schema).map(({ path, problem }) => [path, problem]);
  assert.deepEqual(wrong(input, { points: [{ x: 1 }, {}], scale: new Draft("1x") }), [[["points", 1, "x"], "required"], [["scale"], "number"]]);
  assert.deepEqual(wrong(route("add").input, { a: 1.5, b: 101 }), [[["a"], "whole"], [["b"], "max"]]);
  assert.deepEqual(wrong(route("add").input, {}), [[["a"], "required"]]);
  assert.deepEqual(wrong({ type: "string", minLength: 2 }, "😀"), [[[], "short"]]);
  assert.deepEqual(wrong({ type: "array", items: {}, minItems: 1 }, []), [[[], "few"]]);
  assert.deepEqual(wrong({ type: "string" }, null), [[[], "required"]]);
  assert.deepEqual(wrong({}, null), []);
});

test("the variant of a union is the one that a value fits best", () => {
  const at = (variants, value) => variantOf(fieldOf({ anyOf: variants }), value);
  assert.equal(at([{ type: "string" }, { type: "integer" }], 3), 1);
  assert.equal(at([POINT, NAMED], { kind: "named" }), 1);
  assert.equal(at([{ type: "string" }, { type: "array", items: { type: "integer" } }], []), 1);
  assert.equal(at([{ type: "array", items: { type: "string" } }, { type: "array", items: { type: "integer" } }], [1]), 1);
  assert.equal(at([{ type: "number" }, { type: "integer" }], 2), 1);
  assert.equal(at([POINT, NAMED], undefined), 0);
});

test("a server's complaints come beside their fields, whatever pydantic puts between", () => {
  const schema = { type: "object", properties: { a: { type: "integer" }, who: { anyOf: [POINT, { type: "array", items: POINT }] } } };
  const details = [
    { loc: ["body", "a"], msg: "bad a" },
    { loc: ["body", "a"], msg: "bad a" },
    { loc: ["body", "who", "list[Point]", 0, "x"], msg: "bad x" },
    { loc: ["query", "other"], msg: "No such input" },
    { loc: ["body"], msg: "all" },
  ];
  const found = placed(details, schema, { who: [{ x: "1" }] }, schema);
  assert.deepEqual([...found], [
    [key(["a"]), ["bad a"]],
    [key(["who", 0, "x"]), ["bad x"]],
    [key([]), ["No such input", "all"]],
  ]);
  assert.equal(placed("text", schema, {}, schema).size, 0);
});

test("bodies begin with what is required, and recursion ends", () => {
  const tree = { $defs: { T: { type: "object", properties: { name: { type: "string" }, inner: { type: "array", items: { $ref: "#/$defs/T" } } }, required: ["name", "inner"] } }, $ref: "#/$defs/T" };
  assert.deepEqual(sample({ ...POINT, required: ["x", "y"] }, {}), { x: 0, y: 0 });
  assert.equal(sample(tree, tree).inner[0].inner[0].name, "");
  assert.deepEqual(sample({ type: "object", examples: [{ a: 1 }], properties: {} }), { a: 1 });
  assert.deepEqual(begin({ type: "array", items: POINT, minItems: 2 }), [{}, {}]);
});

test("snippets quote what shells, Python and the command line would read", () => {
  assert.equal(snippets.shell("it's"), `'it'\\''s'`);
  assert.equal(snippets.python({ a: [true, null, "é\n"] }), '{"a": [True, None, "é\\n"]}');
  const call = { base: "http://h/apps/a", name: "a", route: route("forget"), inputs: { names: ["@x", "y z"], really: false } };
  assert.equal(snippets.callSnippets(call).cli, "llmasos app run a forget --names=@@x '--names=y z' --really=false");
  const note = snippets.requestOf("http://h/", route("note"), { name: "a/b", q: ["1", "2"] });
  assert.deepEqual(note, { url: "http://h/notes/a%2Fb?q=1&q=2", method: "GET" });
});
