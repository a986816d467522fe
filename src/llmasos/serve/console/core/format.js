/** Figures for people. */

import { language } from "./i18n.js";

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** 5 100 000 000 -> "5.1 GB" (SI units, as disks and model pages count). */
export function bytes(n) {
  if (n === null || n === undefined || Number.isNaN(n)) return "–";
  let unit = 0;
  let value = n;
  while (Math.abs(value) >= 1000 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${value.toLocaleString(language(), { maximumFractionDigits: unit && value < 100 ? 1 : 0 })} ${UNITS[unit]}`;
}

export const number = (n, digits = 0) =>
  n === null || n === undefined ? "–" : n.toLocaleString(language(), { maximumFractionDigits: digits });

export const percent = (part, digits = 0) =>
  part === null || part === undefined
    ? "–"
    : part.toLocaleString(language(), { style: "percent", maximumFractionDigits: digits });

/** Seconds as "320 ms", "4.2 s", "3 min 5 s", "2 h 10 min", "3 d 4 h". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${number(seconds, seconds < 10 ? 1 : 0)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

const STEPS = [
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
];

/** "5 minutes ago", "in 2 hours"; older than a week: the date. */
export function ago(moment) {
  if (!moment) return "–";
  const date = new Date(moment);
  const seconds = (date - Date.now()) / 1000;
  if (Math.abs(seconds) > 7 * 86400) return date.toLocaleDateString(language(), { dateStyle: "medium" });
  const words = new Intl.RelativeTimeFormat(language(), { numeric: "auto", style: "short" });
  const [unit, size] = STEPS.find(([, size]) => Math.abs(seconds) >= size) ?? ["second", 1];
  return words.format(Math.trunc(seconds / size), unit);
}

export const moment = (value) =>
  value ? new Date(value).toLocaleString(language(), { dateStyle: "medium", timeStyle: "medium" }) : "–";
export const clock = (value) => new Date(value).toLocaleTimeString(language(), { hour12: false });
