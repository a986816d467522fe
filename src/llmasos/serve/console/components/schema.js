/**
 * What a form needs to know of a JSON Schema (2020-12, as pydantic writes it), without any page: the kinds of fields, the
 * values that they begin with, what is wrong with a value, where a server's complaint belongs.
 *
 * A form's values are plain JSON; what was never touched is absent, so that the function's own default counts.
 */

/** What somebody typed that is no value yet: `12x` where a number belongs. */
export class Draft {
  constructor(text) {
    this.text = text;
  }
  toJSON() {
    return this.text;
  }
}

const SCALARS = { string: "text", integer: "number", number: "number", boolean: "bool", null: "constant" };
const ANNOTATIONS = ["title", "description", "default", "examples", "deprecated"];

/** The schema itself instead of a reference to it; what stands beside the reference stays. */
export function resolve(schema, root) {
  let found = schema === true || schema === undefined ? {} : schema;
  for (let depth = 0; depth < 32; depth++) {
    const only = found.allOf?.length === 1 ? found.allOf[0] : undefined;
    if (!found.$ref && !only) return found;
    const { $ref, allOf, ...beside } = found;
    found = { ...(only ?? pointed($ref, root)), ...beside };
  }
  return {};
}

function pointed(reference, root) {
  const steps = reference.replace(/^#\/?/, "").split("/").filter(Boolean);
  return steps.reduce((at, step) => at?.[step.replace(/~1/g, "/").replace(/~0/g, "~")], root) ?? {};
}

/**
 * The field for a schema: `kind` is text, number, bool, select, list, tuple, object, map, union, file, constant or any;
 * `nullable`: null is a value too. The rest depends on the kind.
 */
export function fieldOf(schema, root) {
  const whole = resolve(schema, root);
  const members = whole.anyOf ?? whole.oneOf;
  if (members) return ofMembers(whole, members, root);
  if (Array.isArray(whole.type)) {
    return ofMembers(whole, whole.type.map((type) => ({ ...without(whole, ANNOTATIONS), type })), root);
  }
  return { ...base(whole), ...ofPlain(whole) };
}

function base(schema) {
  const { title, description } = schema;
  return { schema, title, description, default: schema.default, nullable: schema.type === "null" };
}

function ofMembers(whole, members, root) {
  const found = members.map((member) => resolve(member, root));
  const rest = members.filter((_, i) => found[i].type !== "null" && found[i].const !== null);
  const beside = Object.fromEntries(ANNOTATIONS.filter((name) => name in whole).map((name) => [name, whole[name]]));
  const nullable = rest.length < members.length;
  if (rest.length === 1) {
    const one = fieldOf(rest[0], root);
    return { ...one, ...base({ ...one.schema, ...beside }), schema: one.schema, nullable: nullable || one.nullable };
  }
  const options = found.flatMap((one) => one.enum ?? ("const" in one ? [one.const] : [undefined]));
  if (!options.includes(undefined)) return { ...base(whole), kind: "select", options, nullable };
  return { ...base(whole), kind: "union", nullable, variants: rest.map((member) => variant(member, root)) };
}

function variant(member, root) {
  const schema = resolve(member, root);
  const field = fieldOf(member, root);
  return { schema: member, label: schema.title ?? schema.type ?? field.kind, field };
}

function ofPlain(schema) {
  const file = fileOf(schema);
  if (file) return { kind: "file", ...file };
  if ("const" in schema) return { kind: "constant", value: schema.const, nullable: schema.const === null };
  if (schema.enum) return { kind: "select", options: schema.enum, nullable: schema.enum.includes(null) };
  if (schema.type === "array") {
    if (schema.prefixItems) return { kind: "tuple", items: schema.prefixItems };
    return { kind: "list", items: schema.items ?? {}, min: schema.minItems ?? 0, max: schema.maxItems ?? Infinity };
  }
  if (schema.type === "object") return ofObject(schema);
  if (schema.type === "string") return { kind: "text", isLong: isLong(schema) };
  if (schema.type === "integer" || schema.type === "number") return ofNumber(schema);
  return { kind: SCALARS[schema.type] ?? "any", ...(schema.type === "null" ? { value: null } : {}) };
}

function ofObject(schema) {
  if (!schema.properties) {
    return schema.additionalProperties ? { kind: "map", items: schema.additionalProperties } : { kind: "any" };
  }
  const required = new Set(schema.required);
  const properties = Object.entries(schema.properties).map(([name, one]) => ({
    name,
    schema: one,
    required: required.has(name),
  }));
  return { kind: "object", properties };
}

function ofNumber(schema) {
  const isInteger = schema.type === "integer";
  const step = schema.multipleOf ?? (isInteger ? 1 : undefined);
  const beyond = (limit, sign) => (limit === undefined ? undefined : isInteger ? limit + sign : limit);
  const min = schema.minimum ?? beyond(schema.exclusiveMinimum, 1);
  const max = schema.maximum ?? beyond(schema.exclusiveMaximum, -1);
  // A slider of ten thousand steps can't be set to one of them by hand.
  const hasSlider = min !== undefined && max !== undefined && max > min && (max - min) / (step ?? 1) <= 1000;
  return { kind: "number", isInteger, min, max, step, hasSlider };
}

/** Names and limits tell where several lines are likely; every text field takes them all the same. */
function isLong(schema) {
  if (schema.format || schema.pattern) return false;
  return !(schema.maxLength <= 120);
}

/** {accept} for what a file is chosen for: the mark of llmasos.apps.files, else JSON Schema's own `contentEncoding`. */
function fileOf(schema) {
  const encoded = schema.contentEncoding === "base64" || schema.format === "binary" || schema.format === "base64";
  const mark = schema["x-llmasos-media"];
  if (!mark && !encoded) return undefined;
  return { accept: mark ?? schema.contentMediaType ?? "*/*", isUrl: Boolean(mark), maxBytes: schema["x-llmasos-max-bytes"] };
}

function without(object, names) {
  return Object.fromEntries(Object.entries(object).filter(([name]) => !names.includes(name)));
}

/** What a value that somebody adds begins as; undefined: nothing can be said. */
export function begin(schema, root) {
  const field = fieldOf(schema, root);
  if (field.default !== undefined) return structuredClone(field.default);
  const none = { list: [], object: {}, map: {}, bool: false, tuple: [] };
  if (field.kind === "constant") return field.value;
  if (field.kind === "union") return begin(field.variants[0].schema, root);
  if (field.kind === "list") return Array.from({ length: field.min }, () => begin(field.items, root));
  return structuredClone(none[field.kind]);
}

/** What is sent: constants and switches that nobody had to touch are filled in, absent properties are left out. */
export function complete(schema, value, root) {
  const field = fieldOf(schema, root);
  if (value === undefined || value === null || value instanceof Draft) return value;
  if (field.kind === "union") {
    const at = variantOf(field, value, root);
    return complete(field.variants[at].schema, value, root);
  }
  if (field.kind === "list") return listOf(value).map((one) => complete(field.items, one, root));
  if (field.kind === "tuple") return field.items.map((one, i) => complete(one, value[i], root) ?? null);
  if (field.kind !== "object") return value;
  const found = new Map(Object.entries(value));
  for (const { name, schema: one, required } of field.properties) {
    const given = own(value, name);
    const sent = given === undefined && required ? silent(one, root) : given;
    if (sent === undefined) found.delete(name);
    else found.set(name, complete(one, sent, root));
  }
  return Object.fromEntries(found);
}

/** What an object itself has under a name: inputs may be called `constructor`. */
export const own = (object, name) => (object && Object.hasOwn(object, name) ? object[name] : undefined);

const listOf = (value) => (Array.isArray(value) ? value : []);

/** The value of what shows one without being touched: a switch that is off, an empty list, a constant. */
function silent(schema, root) {
  const { kind, nullable } = fieldOf(schema, root);
  if (nullable && kind !== "constant") return null;
  return ["bool", "constant", "list", "object", "map"].includes(kind) ? begin(schema, root) : undefined;
}

/** Which variant of a union a value is of: the first that fits best. */
export function variantOf(field, value, root) {
  const scores = field.variants.map(({ schema }) => (value === undefined ? 0 : fit(schema, value, root)));
  return Math.max(0, scores.indexOf(Math.max(...scores)));
}

/** 0: another type; more: the more it fits. */
function fit(schema, value, root, depth = 6) {
  const field = fieldOf(schema, root);
  if (!depth) return 1;
  if (value === null) return field.nullable ? 3 : 0;
  const is = typeof value;
  if (value instanceof Draft) return field.kind === "any" ? 2 : field.kind === "number" ? 1 : 0;
  if (field.kind === "text" || field.kind === "file") return is === "string" ? 2 : 0;
  if (field.kind === "number") return is !== "number" ? 0 : field.isInteger === Number.isInteger(value) ? 3 : 1;
  if (field.kind === "bool") return is === "boolean" ? 2 : 0;
  if (field.kind === "select") return field.options.includes(value) ? 3 : 0;
  if (field.kind === "constant") return field.value === value ? 4 : 0;
  if (field.kind === "list") {
    if (!Array.isArray(value)) return 0;
    return 1 + Math.min(2, ...value.map((one) => fit(field.items, one, root, depth - 1)));
  }
  if (field.kind === "tuple") return Array.isArray(value) ? 1 : 0;
  if (field.kind === "map") return is === "object" && !Array.isArray(value) ? 1 : 0;
  if (field.kind === "union") return Math.max(...field.variants.map((one) => fit(one.schema, value, root, depth - 1)));
  if (field.kind !== "object") return 0.5;
  if (is !== "object" || Array.isArray(value)) return 0;
  const names = new Map(field.properties.map((one) => [one.name, one.schema]));
  const scores = Object.entries(value).map(([name, one]) => {
    return names.has(name) ? fit(names.get(name), one, root, depth - 1) : 0;
  });
  return 1 + scores.reduce((sum, score) => sum + score, 0) / (names.size || 1);
}

/**
 * What is wrong with a value, as far as a form can say it: [{path: [...], problem, ...}], `problem` a word of the tables of
 * strings. The server has the last word.
 */
export function check(schema, value, root, path = []) {
  const field = fieldOf(schema, root);
  const wrong = (problem, more = {}) => [{ path, problem, ...more }];
  if (value instanceof Draft) return wrong(field.kind === "number" ? "number" : "json");
  if (value === undefined) return wrong("required");
  if (value === null) return field.nullable || field.kind === "any" ? [] : wrong("required");
  const { schema: limits } = field;
  if (field.kind === "number" && typeof value === "number") {
    if (field.isInteger && !Number.isInteger(value)) return wrong("whole");
    if (value < limits.minimum || value <= limits.exclusiveMinimum) return wrong("min", { limit: field.min });
    if (value > limits.maximum || value >= limits.exclusiveMaximum) return wrong("max", { limit: field.max });
  }
  if (field.kind === "text" && typeof value === "string") {
    const length = [...value].length;
    if (length < limits.minLength) return wrong("short", { limit: limits.minLength });
    if (length > limits.maxLength) return wrong("long", { limit: limits.maxLength });
  }
  if (field.kind === "list") {
    const items = listOf(value);
    if (items.length < field.min) return wrong("few", { limit: field.min });
    if (items.length > field.max) return wrong("many", { limit: field.max });
    return items.flatMap((one, i) => check(field.items, one, root, [...path, i]));
  }
  if (field.kind === "tuple") return field.items.flatMap((one, i) => check(one, value[i] ?? undefined, root, [...path, i]));
  if (field.kind === "map") return Object.entries(value).flatMap(([k, one]) => check(field.items, one, root, [...path, k]));
  if (field.kind === "union") return check(field.variants[variantOf(field, value, root)].schema, value, root, path);
  if (field.kind !== "object") return [];
  return field.properties.flatMap(({ name, schema: one, required }) => {
    return required || own(value, name) !== undefined ? check(one, own(value, name), root, [...path, name]) : [];
  });
}

export const key = (path) => JSON.stringify(path);

/**
 * Messages beside fields: a Map from key(path) to texts. `details`: `detail` of a problem of wrong input, whose `loc` begins
 * with the place (body, query, path) and may name variants of unions, which no field has.
 */
export function placed(details, schema, values, root) {
  const found = new Map();
  for (const { loc = [], msg } of Array.isArray(details) ? details : []) {
    const path = [];
    let [field, value] = [fieldOf(schema, root), values];
    for (const step of loc.slice(1)) {
      const inner = stepInto(field, value, step, root);
      if (!inner) continue;
      [field, value] = [inner.field, inner.value];
      path.push(step);
    }
    const known = found.get(key(path)) ?? [];
    if (!known.includes(msg)) found.set(key(path), [...known, msg]);
  }
  return found;
}

function stepInto(field, value, step, root) {
  const inner = (schema) => ({ field: fieldOf(schema, root), value: own(value, step) });
  if (field.kind === "union") return stepInto(field.variants[variantOf(field, value, root)].field, value, step, root);
  if (typeof step === "number") {
    if (field.kind === "list") return inner(field.items);
    return field.kind === "tuple" && field.items[step] ? inner(field.items[step]) : undefined;
  }
  const property = field.kind === "object" && field.properties.find(({ name }) => name === step);
  if (property) return inner(property.schema);
  return field.kind === "map" && own(value, step) !== undefined ? inner(field.items) : undefined;
}

/** A value of a schema, for a body to begin with: what is required, with what can be said of it. */
export function sample(schema, root, depth = 5) {
  const whole = resolve(schema, root);
  const shown = whole.examples?.[0] ?? whole.example ?? whole.default;
  if (shown !== undefined && shown !== null) return structuredClone(shown);
  const field = fieldOf(schema, root);
  if (!depth) return { list: [], object: {}, map: {}, text: "" }[field.kind] ?? null;
  const of = (one) => sample(one, root, depth - 1);
  switch (field.kind) {
    case "text":
      return "";
    case "number":
      return field.min ?? 0;
    case "bool":
      return false;
    case "select":
      return field.options[0];
    case "constant":
      return field.value;
    case "list":
      return [of(field.items)];
    case "tuple":
      return field.items.map(of);
    case "union":
      return of(field.variants[0].schema);
    case "object":
      return Object.fromEntries(field.properties.filter((p) => p.required).map((p) => [p.name, of(p.schema)]));
    case "map":
      return {};
    default:
      return null;
  }
}
