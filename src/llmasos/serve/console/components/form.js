/**
 * A form for a JSON Schema. `values` is plain JSON (see schema.js); each change is told with the whole new value.
 *
 *     <${Form} schema=${route.input} values=${values} onChange=${setValues} errors=${placed(...)} />
 */

import { bytes } from "../core/format.js";
import { html, useEffect, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { Button, IconButton, classes } from "./ui.js";
import { Draft, begin, fieldOf, key, own, variantOf } from "./schema.js";

const MAX_FILE = 24 * 2 ** 20; // bytes; base64 makes them a third more, and servers take bodies of 32 MiB

/** The fields of an object of inputs. */
export function Form({ schema, values, onChange, root = schema, errors = new Map(), prefix = "f" }) {
  const field = fieldOf(schema, root);
  if (field.kind !== "object" || !field.properties.length) return html`<p class="muted">${t("form.no_inputs")}</p>`;
  const context = { root, errors, prefix };
  return html`<div class="form-fields">
    <${Messages} ...${{ context, path: [] }} />
    <${Properties} ...${{ field, context, path: [], value: values, onChange }} />
  </div>`;
}

function Properties({ field, context, path, value, onChange }) {
  const given = value ?? {};
  const change = (name, one) => {
    const { [name]: _, ...rest } = given;
    onChange(one === undefined ? rest : { ...given, [name]: one });
  };
  return field.properties.map(
    ({ name, schema, required }) =>
      html`<${Field}
        key=${name}
        ...${{ schema, context, required, label: name, path: [...path, name], value: own(given, name) }}
        onChange=${(one) => change(name, one)}
      />`,
  );
}

const idOf = (context, path) => `${context.prefix}-${path.join("-")}`.replace(/[^\w-]/g, "_");

/** Complaints about the value at `path`. */
function Messages({ context, path }) {
  const found = context.errors.get(key(path)) ?? [];
  if (!found.length) return null;
  return html`<div class="field-error" id=${`${idOf(context, path)}-e`} role="alert">${found.join("; ")}</div>`;
}

/** Attributes of the control of a field: its id, its words, whether it is wrong. */
function control({ context, path, field, required, label }) {
  const id = idOf(context, path);
  const isWrong = context.errors.has(key(path));
  const described = [field.description && label ? `${id}-d` : "", isWrong ? `${id}-e` : ""].filter(Boolean).join(" ");
  return {
    id,
    name: path.join("."),
    "aria-describedby": described || undefined,
    "aria-invalid": isWrong ? "true" : undefined,
    "aria-required": required ? "true" : undefined,
    "aria-label": label ? undefined : path.slice(-2).join(" "),
  };
}

const GROUPS = new Set(["list", "tuple", "object", "map", "union"]);

/** One input with its label, its words and what is wrong with it. Elements of lists have no label of their own. */
export function Field(props) {
  const { schema, context, path, required, label, value, onChange } = props;
  const field = fieldOf(schema, context.root);
  const id = idOf(context, path);
  if (field.kind === "constant" && required) return null;
  const shown = value === undefined ? field.default : value;
  const inner = { ...props, field, value: shown };
  const isSet = value !== undefined && !required;
  const words = html`${label && html`<span class="field-name">${label}</span>`}
    ${label && !required && html`<span class="muted field-note">${t("form.optional")}</span>`}
    ${field.nullable && shown !== null && shown !== undefined && html`<${Small} label=${t("form.nothing")} onClick=${() => onChange(null)} />`}
    ${isSet && label && html`<${Small} label=${t("form.reset")} onClick=${() => onChange(undefined)} />`}`;
  const about = label && field.description && html`<div class="muted field-words" id=${`${id}-d`}>${field.description}</div>`;
  const body = html`<${Widget} ...${inner} /><${Messages} ...${{ context, path }} />`;
  if (field.kind === "bool" && !field.nullable) {
    return html`<div class="field field-bool">${body}${label && html`<label for=${id}>${words}</label>`}${about}</div>`;
  }
  if (GROUPS.has(field.kind)) {
    return html`<fieldset class="field field-group" id=${id} aria-describedby=${about ? `${id}-d` : undefined}>
      ${label ? html`<legend>${words}</legend>` : html`<legend class="visually-hidden">${path.slice(-2).join(" ")}</legend>`}
      ${about}${body}
    </fieldset>`;
  }
  return html`<div class="field">${label ? html`<label for=${id}>${words}</label>` : words}${about}${body}</div>`;
}

/** A button in a label: it does not focus the label's control. */
function Small({ label, onClick }) {
  const click = (event) => {
    event.preventDefault();
    onClick();
  };
  return html`<${Button} kind="quiet" small onClick=${click}>${label}<//>`;
}

const MAX_DEPTH = 16; // steps of a path; deeper values are written as JSON
const NESTED = new Set(["tuple", "object", "union", "any", "list", "map"]);

function Widget(props) {
  const { field, value, onChange, context, path, required } = props;
  const isNested = NESTED.has(field.kind);
  // What nobody has begun stays closed: a type may hold itself, and a default counts as long as nothing is set.
  const isClosed = value === null ? field.nullable : value === undefined && (field.nullable || !required) && ["object", "union", "tuple"].includes(field.kind);
  if (isNested && isClosed) {
    const set = () => onChange(begin(notNull(field), context.root) ?? {});
    return html`<div class="row">${value === null && html`<code class="muted">null</code>`}<${Small} label=${t("form.set")} onClick=${set} /></div>`;
  }
  const Kind = path.length > MAX_DEPTH && isNested ? JsonInput : WIDGETS[field.kind];
  return html`<${Kind} ...${props} ...${{ control: control(props) }} />`;
}

/** The schema of what is not null, without the default that may be. */
function notNull(field) {
  const { default: _, ...schema } = field.schema;
  return field.kind === "union" ? field.variants[0].schema : schema;
}

function Text({ field, value, onChange, control: attributes }) {
  const text = value === undefined || value === null ? "" : String(value);
  const { maxLength, format } = field.schema;
  const common = { ...attributes, value: text, onInput: (event) => onChange(event.target.value), spellcheck: field.isLong };
  if (field.nullable) common.placeholder = t("form.null");
  if (!field.isLong) {
    const type = { email: "email", uri: "url", date: "date", time: "time", password: "password" }[format] ?? "text";
    return html`<input class="input" type=${type} autocomplete="off" ...${common} />`;
  }
  const rows = Math.min(16, text.split("\n").reduce((sum, line) => sum + 1 + Math.floor(line.length / 90), 0));
  return html`<textarea class="input" rows=${Math.max(1, rows)} ...${common}></textarea>
    ${maxLength && text.length > maxLength * 0.8 ? html`<div class="muted field-note">${[...text].length} / ${maxLength}</div>` : null}`;
}

/** A text that stands for a value, for as long as it does: `1.` is 1 and stays `1.` while it is typed. */
function useText(value, parse, show) {
  const [typed, setTyped] = useState(null);
  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
  const text = typed !== null && same(parse(typed), value) ? typed : value instanceof Draft ? value.text : show(value);
  return [text, setTyped];
}

function parseNumber(text) {
  const trimmed = text.trim();
  if (!trimmed) return undefined;
  const number = Number(trimmed);
  if (!Number.isFinite(number) || !/^[-+\d.eE]+$/.test(trimmed)) return new Draft(text);
  return Number.isInteger(number) && !Number.isSafeInteger(number) ? trimmed : number; // digits that a number would lose
}

function NumberInput({ field, value, onChange, control: attributes }) {
  const [text, setText] = useText(value ?? undefined, parseNumber, (one) => (one === undefined ? "" : String(one)));
  const type = (event) => {
    setText(event.target.value);
    const found = parseNumber(event.target.value);
    onChange(found === undefined && field.nullable ? null : found);
  };
  const step = field.step ?? "any";
  const limits = [field.min, field.max].map((one) => (Math.abs(one) < 1e15 ? one : ""));
  const range = limits.some((one) => one !== "") ? `${limits[0]} … ${limits[1]}` : "";
  const box = html`<input type="text" inputmode=${field.isInteger ? "numeric" : "decimal"} autocomplete="off" class="input number"
    placeholder=${field.nullable ? t("form.null") : undefined} ...${attributes} value=${text} onInput=${type} />`;
  if (!field.hasSlider) return html`<div class="row">${box}${range && html`<span class="muted field-note">${range}</span>`}</div>`;
  const at = typeof value === "number" ? value : field.min;
  const slideStep = step === "any" ? (field.max - field.min) / 100 : step;
  const slide = (event) => onChange(Number(event.target.value));
  return html`<div class="row">
    <input class="slider" type="range" min=${field.min} max=${field.max} step=${slideStep} value=${at} onInput=${slide}
      aria-label=${`${attributes.name} ${range}`} />
    ${box}<span class="muted field-note">${range}</span>
  </div>`;
}

function Bool({ field, value, onChange, control: attributes }) {
  if (field.nullable) return html`<${Select} ...${{ field: { ...field, options: [true, false] }, value, onChange, control: attributes }} />`;
  return html`<input type="checkbox" ...${attributes} checked=${value === true} onChange=${(e) => onChange(e.target.checked)} />`;
}

function Select({ field, value, onChange, control: attributes }) {
  const options = field.options.filter((one) => one !== null);
  const choose = (event) => {
    const chosen = event.target.value;
    onChange(chosen === "" ? (field.nullable ? null : undefined) : options[Number(chosen)]);
  };
  const at = options.findIndex((one) => one === value);
  const none = field.nullable ? t("form.null") : t("form.choose");
  return html`<select class="input select" ...${attributes} onChange=${choose}>
    ${(field.nullable || at < 0) && html`<option value="" selected=${at < 0}>${none}</option>`}
    ${options.map((one, i) => html`<option key=${i} value=${i} selected=${i === at}>${String(one)}</option>`)}
  </select>`;
}

function List({ field, value, onChange, context, path }) {
  const items = Array.isArray(value) ? value : [];
  const root = useRef(null);
  const [toFocus, setToFocus] = useState(-1);
  useEffect(() => {
    if (toFocus < 0) return;
    const rows = root.current?.querySelectorAll(":scope > .list-row");
    rows?.[Math.min(toFocus, rows.length - 1)]?.querySelector("input, textarea, select, button")?.focus();
    setToFocus(-1);
  }, [toFocus]);
  const replace = (i, one) => onChange(items.map((old, n) => (n === i ? one : old)));
  const remove = (i) => {
    onChange(items.filter((_, n) => n !== i));
    setToFocus(items.length > 1 ? i : -1);
  };
  const move = (i, by) => {
    const moved = [...items];
    [moved[i], moved[i + by]] = [moved[i + by], moved[i]];
    onChange(moved);
  };
  const add = () => {
    const kind = fieldOf(field.items, context.root).kind;
    onChange([...items, begin(field.items, context.root) ?? (kind === "text" ? "" : null)]);
    setToFocus(items.length);
  };
  const small = (icon, action, disabled) =>
    html`<${IconButton} small icon=${icon} label=${`${t(`form.${icon}`)} ${path.at(-1)}`} disabled=${disabled} onClick=${action} />`;
  return html`<div class="list" ref=${root}>
    ${items.map(
      (one, i) => html`<div class="list-row" key=${i}>
        <span class="muted list-number" aria-hidden="true">${i + 1}</span>
        <div class="list-item">
          <${Field} ...${{ schema: field.items, context, required: true, path: [...path, i] }} value=${one ?? undefined}
            onChange=${(changed) => replace(i, changed ?? null)} />
        </div>
        <span class="list-buttons">
          ${small("up", () => move(i, -1), i === 0)}${small("down", () => move(i, 1), i === items.length - 1)}
          ${small("close", () => remove(i), items.length <= field.min)}
        </span>
      </div>`,
    )}
    <${Button} small icon="plus" onClick=${add} disabled=${items.length >= field.max}>${t("form.add")}<//>
  </div>`;
}

function Tuple({ field, value, onChange, context, path }) {
  const items = field.items.map((_, i) => value?.[i]);
  const replace = (i, one) => onChange(items.map((old, n) => (n === i ? one : old) ?? null));
  return field.items.map(
    (schema, i) =>
      html`<${Field} key=${i} ...${{ schema, context, required: true, path: [...path, i] }} value=${items[i] ?? undefined}
        onChange=${(one) => replace(i, one)} />`,
  );
}

function ObjectFields(props) {
  return html`<${Properties} ...${props} />`;
}

function MapRows({ field, value, onChange, context, path }) {
  const entries = Object.entries(value ?? {});
  const put = (changed) => onChange(Object.fromEntries(changed));
  const rename = (i, name) => {
    if (!entries.some(([other], n) => other === name && n !== i)) put(entries.map((one, n) => (n === i ? [name, one[1]] : one)));
  };
  const add = () => {
    let n = entries.length + 1;
    while (`key${n}` in (value ?? {})) n++;
    put([...entries, [`key${n}`, begin(field.items, context.root) ?? null]]);
  };
  return html`<div class="list">
    ${entries.map(
      ([name, one], i) => html`<div class="list-row" key=${i}>
        <input class="input map-key" value=${name} aria-label=${t("form.key")} onChange=${(e) => rename(i, e.target.value)} />
        <div class="list-item">
          <${Field} ...${{ schema: field.items, context, required: true, path: [...path, name] }} value=${one ?? undefined}
            onChange=${(changed) => put(entries.map((old, n) => (n === i ? [name, changed ?? null] : old)))} />
        </div>
        <${IconButton} small icon="close" label=${t("form.close")} onClick=${() => put(entries.filter((_, n) => n !== i))} />
      </div>`,
    )}
    <${Button} small icon="plus" onClick=${add}>${t("form.add")}<//>
  </div>`;
}

function Union({ field, value, onChange, context, path, control: attributes }) {
  const [chosen, setChosen] = useState(null);
  const at = chosen ?? variantOf(field, value, context.root);
  const choose = (event) => {
    const next = Number(event.target.value);
    setChosen(next);
    onChange(begin(field.variants[next].schema, context.root));
  };
  const { schema } = field.variants[at];
  const inner = fieldOf(schema, context.root);
  return html`<select class="input select union-choice" aria-label=${t("form.kind")} onChange=${choose}>
      ${field.variants.map(({ label }, i) => html`<option key=${i} value=${i} selected=${i === at}>${label}</option>`)}
    </select>
    <${Widget} key=${at} ...${{ schema, field: inner, context, path, value, onChange, required: true, control: attributes }} />`;
}

function parseJson(text) {
  if (!text.trim()) return undefined;
  try {
    return JSON.parse(text);
  } catch {
    return new Draft(text);
  }
}

/** Any JSON value, as its text. */
export function JsonInput({ value, onChange, control: attributes }) {
  const [text, setText] = useText(value, parseJson, (one) => (one === undefined ? "" : JSON.stringify(one, null, 2)));
  const type = (event) => {
    setText(event.target.value);
    onChange(parseJson(event.target.value));
  };
  const rows = Math.min(20, Math.max(2, text.split("\n").length));
  return html`<textarea class="input mono" rows=${rows} spellcheck="false" placeholder="JSON" ...${attributes} value=${text} onInput=${type}></textarea>`;
}

function Constant({ field }) {
  return html`<code>${JSON.stringify(field.value)}</code>`;
}

const WIDGETS = {
  text: Text,
  number: NumberInput,
  bool: Bool,
  select: Select,
  list: List,
  tuple: Tuple,
  object: ObjectFields,
  map: MapRows,
  union: Union,
  file: FileInput,
  any: JsonInput,
  constant: Constant,
};

/** A file as base64 (or as a data: URL, where the schema is marked so). */
function FileInput({ field, value, onChange, control: attributes }) {
  const [about, setAbout] = useState("");
  const [isOver, setOver] = useState(false);
  const take = async (file) => {
    if (!file) return;
    const limit = Math.min(MAX_FILE, field.maxBytes ?? Infinity);
    if (file.size > limit) return setAbout(t("form.too_big", { size: bytes(file.size), limit: bytes(limit) }));
    const url = await dataUrl(file);
    setAbout(`${file.name} · ${bytes(file.size)}`);
    onChange(field.isUrl ? url : url.slice(url.indexOf(",") + 1));
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer.files[0]);
  };
  const over = (is) => (event) => {
    event.preventDefault();
    setOver(is);
  };
  return html`<div class=${classes("file-drop", isOver && "over")} onDrop=${drop} onDragOver=${over(true)} onDragLeave=${over(false)}>
    <input type="file" accept=${field.accept} ...${attributes} onChange=${(event) => take(event.target.files[0])} />
    ${about && html`<span class="muted field-note">${about}</span>`}
    ${typeof value === "string" && value.startsWith("data:image/") && html`<img class="thumb" src=${value} alt="" />`}
    ${typeof value === "string" && value.startsWith("data:audio/") && html`<audio controls src=${value}></audio>`}
  </div>`;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    // Its name stands in the URL, as llmasos.client.dataurl reads it.
    reader.onload = () => resolve(reader.result.replace(/;base64,/, `;name=${encodeURIComponent(file.name)};base64,`));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
