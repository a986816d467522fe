/** The console's building blocks. */

import { errorText } from "../core/api.js";
import { cloneElement } from "../vendor/preact.js";
import { html, useEffect, useId, useRef, useState } from "../core/html.js";
import { t } from "../core/i18n.js";
import { percent } from "../core/format.js";
import { Icon } from "./icon.js";

export { Icon };

export const classes = (...names) => names.filter(Boolean).join(" ");

/** A page's frame. `wide`: the page divides its whole height itself. */
export function Page({ title, subtitle, actions, wide, children }) {
  useEffect(() => {
    document.title = `${title} · LLMasOS`;
  }, [title]);
  return html`
    <div class=${classes("page", wide && "page-wide")}>
      <header class="page-head">
        <h1 tabindex="-1">${title}</h1>
        ${subtitle && html`<div class="muted grow page-sub">${subtitle}</div>`}
        ${actions && html`<div class="row page-actions">${actions}</div>`}
      </header>
      ${children}
    </div>
  `;
}

export function Button({ kind, icon, busy, small, children, disabled, class: extra, type = "button", ...rest }) {
  const name = classes("button", kind && `button-${kind}`, small && "button-small", extra);
  return html`
    <button type=${type} class=${name} disabled=${disabled || busy} aria-busy=${busy ? "true" : undefined} ...${rest}>
      ${busy ? html`<${Spinner} />` : icon && html`<${Icon} name=${icon} size=${small ? 15 : 17} />`}${children}
    </button>
  `;
}

export function IconButton({ icon, label, small, kind = "quiet", class: extra, buttonRef, ...rest }) {
  const name = classes("button icon-button", `button-${kind}`, small && "button-small", extra);
  return html`
    <button type="button" class=${name} aria-label=${label} title=${label} ref=${buttonRef} ...${rest}>
      <${Icon} name=${icon} size=${small ? 15 : 18} />
    </button>
  `;
}

/** A label, a control (the only child), and what to know about it. */
export function Field({ label, hint, error, children, inline }) {
  const id = useId();
  const about = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ") || undefined;
  const control = Array.isArray(children) ? children.find((one) => one?.type) : children;
  return html`
    <div class=${classes("field", inline && "field-inline")}>
      <label for=${id}>${label}</label>
      ${cloneElement(control, { id, "aria-describedby": about, "aria-invalid": error ? "true" : undefined })}
      ${hint && html`<div class="hint" id=${`${id}-hint`}>${hint}</div>`}
      ${error && html`<div class="field-error" id=${`${id}-error`}>${error}</div>`}
    </div>
  `;
}

const typed = (onChange) => (event) => onChange?.(event.currentTarget.value);

export const Input = ({ value, onChange, type = "text", class: extra, inputRef, ...rest }) => html`
  <input
    type=${type}
    class=${classes("input", extra)}
    value=${value ?? ""}
    onInput=${typed(onChange)}
    ref=${inputRef}
    autocomplete="off"
    ...${rest}
  />
`;

/** Grows with its text up to `maxRows`. */
export function TextArea({ value, onChange, rows = 3, maxRows = 16, class: extra, inputRef, ...rest }) {
  const own = useRef();
  const ref = inputRef ?? own;
  useEffect(() => {
    const area = ref.current;
    const line = parseFloat(getComputedStyle(area).lineHeight) || 20;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, line * maxRows + 18)}px`;
  }, [value, maxRows]);
  const name = classes("input", extra);
  return html`<textarea class=${name} rows=${rows} value=${value ?? ""} onInput=${typed(onChange)} ref=${ref} ...${rest} />`;
}

/** `options`: values, or {value, label}. */
export const Select = ({ value, onChange, options, class: extra, ...rest }) => html`
  <select class=${classes("input select", extra)} value=${value ?? ""} onChange=${typed(onChange)} ...${rest}>
    ${options.map((one) => {
      const { value: own, label, disabled } = typeof one === "object" ? one : { value: one };
      return html`<option value=${own} disabled=${disabled} selected=${own === (value ?? "")}>${label ?? own}</option>`;
    })}
  </select>
`;

export const Check = ({ label, value, onChange, hint, ...rest }) => html`
  <label class="check">
    <input type="checkbox" checked=${Boolean(value)} onChange=${(e) => onChange?.(e.currentTarget.checked)} ...${rest} />
    <span>${label}${hint && html`<span class="hint">${hint}</span>`}</span>
  </label>
`;

export const Slider = ({ value, onChange, min = 0, max = 1, step = 0.01, ...rest }) => html`
  <input
    type="range"
    class="slider"
    value=${value}
    min=${min}
    max=${max}
    step=${step}
    onInput=${(event) => onChange?.(Number(event.currentTarget.value))}
    ...${rest}
  />
`;

/** A list of views; arrows move between them. The view itself is the caller's. */
export function Tabs({ tabs, active, onChange, label }) {
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = tabs.findIndex((tab) => tab.id === active);
    const next = tabs[(at + step + tabs.length) % tabs.length];
    onChange(next.id);
    event.currentTarget.querySelector(`[data-tab="${CSS.escape(next.id)}"]`)?.focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
      ${tabs.map(
        ({ id, label: text, count }) => html`
          <button
            type="button"
            role="tab"
            key=${id}
            data-tab=${id}
            aria-selected=${id === active ? "true" : "false"}
            tabindex=${id === active ? 0 : -1}
            onClick=${() => onChange(id)}
          >
            ${text}${count !== undefined && count !== null && html`<span class="count">${count}</span>`}
          </button>
        `,
      )}
    </div>
  `;
}

/** `columns`: {key, label, render(row), align, width, narrow: false hides it on small screens}. */
export function Table({ columns, rows, empty, label, rowKey = (row, at) => row.id ?? row.name ?? at, onRow }) {
  if (!rows?.length && empty) return empty;
  const kind = (column) => classes(column.align === "end" && "end", column.narrow === false && "not-narrow");
  return html`
    <div class="scroll-x" tabindex="0" role="region" aria-label=${label}>
      <table>
        <thead>
          <tr>
            ${columns.map((column) => html`<th key=${column.key} scope="col" class=${kind(column)} style=${{ width: column.width }}>
                ${column.label || html`<span class="visually-hidden">${t("word.actions")}</span>`}
              </th>`)}
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (row, at) => html`
              <tr key=${rowKey(row, at)} class=${onRow && "clickable"} onClick=${onRow && (() => onRow(row))}>
                ${columns.map((column) => html`<td key=${column.key} class=${kind(column)}>
                    ${column.render ? column.render(row) : row[column.key]}
                  </td>`)}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
  `;
}

export const Badge = ({ tone, children, title }) =>
  html`<span class=${classes("badge", tone && `badge-${tone}`)} title=${title}>${children}</span>`;

/** `value` from 0 to 1; null: nobody knows. */
export function Progress({ value, label, tone }) {
  const known = value !== null && value !== undefined;
  const now = known ? Math.round(Math.min(1, Math.max(0, value)) * 100) : undefined;
  return html`
    <div
      class=${classes("progress", !known && "progress-unknown", tone && `progress-${tone}`)}
      role="progressbar"
      aria-label=${label ?? t("word.progress")}
      aria-valuemin="0"
      aria-valuemax="100"
      aria-valuenow=${now}
      aria-valuetext=${known ? percent(value) : undefined}
    >
      <div style=${{ width: known ? `${now}%` : undefined }} />
    </div>
  `;
}

export const Spinner = ({ label }) =>
  html`<span class="spinner" role=${label ? "status" : undefined} aria-hidden=${label ? undefined : "true"}>
    ${label && html`<span class="visually-hidden">${label}</span>`}
  </span>`;

export const Empty = ({ icon = "info", title, children, action }) => html`
  <div class="empty">
    <div class="empty-icon"><${Icon} name=${icon} size=${26} /></div>
    <div class="empty-title">${title}</div>
    ${children && html`<div class="muted">${children}</div>`} ${action}
  </div>
`;

/** One line that needs a decision. */
export const Attention = ({ tone = "warn", children, action }) => html`
  <div class=${classes("attention", `attention-${tone}`)} role=${tone === "bad" ? "alert" : "status"}>
    <${Icon} name=${tone === "accent" ? "info" : "warn"} size=${17} />
    <div class="grow">${children}</div>
    ${action}
  </div>
`;

export const Calm = ({ children }) => html`
  <p class="calm"><${Icon} name="check" size=${16} /> ${children ?? t("word.calm")}</p>
`;

export const Failure = ({ error, retry }) => html`
  <${Attention} tone="bad" action=${retry && html`<${Button} small icon="retry" onClick=${retry}>${t("word.retry")}<//>`}>
    ${errorText(error)}
  <//>
`;

/** What `useLoad` and `usePoll` give: its failure, its waiting, else `children(data)`. */
export function Loaded({ state, children }) {
  if (state.data !== undefined) return html`${state.error && html`<${Failure} error=${state.error} retry=${state.reload} />`}${children(state.data)}`;
  if (state.error) return html`<${Failure} error=${state.error} retry=${state.reload} />`;
  return html`<div class="waiting"><${Spinner} label=${t("word.loading")} /></div>`;
}

export function Details({ summary, open = false, children, onToggle }) {
  const [isOpen, setOpen] = useState(open);
  const toggle = (event) => {
    setOpen(event.currentTarget.open);
    onToggle?.(event.currentTarget.open);
  };
  return html`
    <details class="details" open=${isOpen} onToggle=${toggle}>
      <summary>${summary}</summary>
      ${isOpen && html`<div class="details-body">${children}</div>`}
    </details>
  `;
}

export const Card = ({ title, actions, children, class: extra }) => html`
  <section class=${classes("card", extra)}>
    ${(title || actions) &&
    html`<header class="row">
      <h2 class="grow">${title}</h2>
      ${actions}
    </header>`}
    ${children}
  </section>
`;

export const KeyValues = ({ pairs }) => html`
  <dl class="pairs">
    ${pairs
      .filter((pair) => pair && pair[1] !== null && pair[1] !== undefined && pair[1] !== "")
      .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>
`;
