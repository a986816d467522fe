/** Permissions, limits and what is enforced, in words. */

import { bytes, duration, number } from "../../core/format.js";
import { t } from "../../core/i18n.js";

/** The index that comes with LLMasOS. */
export const BUNDLED = "bundled";
export const place = (index) => (index === BUNDLED ? t("apps.bundled") : index);

/** {text, icon, isWide}: one permission as a sentence; `isWide`: it reaches beyond the application. */
export function grantWords({ kind, value }) {
  const own = { "fs.read": { $data: "read_data", $inputs: "read_inputs" }, "fs.write": { $data: "write_data" } }[kind]?.[value];
  if (own) return { text: t(`apps.grant_${own}`), icon: "file", isWide: false };
  const any = kind === "net" && /^\*(:\d+)?$/.test(value);
  const [icon, isWide] = {
    net: ["globe", any],
    "fs.read": ["file", true],
    "fs.write": ["edit", true],
    env: ["key", true],
    exec: ["code", true],
    gpu: ["system", false],
    models: ["models", false],
    knowledge: ["book", false],
  }[kind] ?? ["info", true];
  const known = ["net", "fs.read", "fs.write", "env", "exec", "gpu", "models", "knowledge"].includes(kind);
  const name = any ? "net_any" : kind.replace(".", "_");
  return { text: known ? t(`apps.grant_${name}`, { value }) : `${kind} ${value}`, icon, isWide };
}

const same = (a, b) => a.kind === b.kind && a.value === b.value;
/** Permissions of `asked` that `all` has and whether each is new: [{grant, isNew}], the new ones first. */
export function marked(all, asked) {
  const found = all.map((grant) => ({ grant, isNew: asked.some((one) => same(one, grant)) }));
  return [...found.filter((one) => one.isNew), ...found.filter((one) => !one.isNew)];
}

const SAID = [
  "files_read", "files_write", "network", "network_hosts", "programs", "gpu", "memory", "cores", "processes", "disk",
  "signals", "kernel_calls", "environment", "survivors", "unix_sockets", "process_memory",
];
export const promise = (what) => (SAID.includes(what) ? t(`apps.holds_${what}`) : what.replaceAll("_", " "));

/** A model's name, or what one must have, in words. */
export function need(wanted) {
  if (typeof wanted === "string") return wanted;
  const { min_context: context, capabilities = [], max_size: size } = wanted ?? {};
  const parts = [context && t("apps.need_context", { n: context }), ...capabilities, size && `≤ ${typeof size === "number" ? bytes(size) : size}`];
  return parts.filter(Boolean).join(" · ") || t("apps.need_any");
}

/** [[label, value]] of what it may take. */
export function limitWords(limits) {
  const shown = {
    memory: bytes,
    disk: bytes,
    file_size: bytes,
    cores: number,
    cpu: number,
    processes: number,
    concurrency: number,
    timeout: (value) => (typeof value === "number" ? duration(value) : value),
  };
  return Object.entries(limits ?? {})
    .filter(([name, value]) => shown[name] && value !== null && value !== undefined)
    .map(([name, value]) => [t(`apps.limit_${name}`), typeof value === "string" ? value : shown[name](value)]);
}

export const STATES = { running: "ok", starting: "accent", idle: undefined, waiting: "warn", stopped: undefined, damaged: "bad" };
