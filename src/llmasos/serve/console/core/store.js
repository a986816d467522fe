/** Values that components watch, some of them kept by the browser. */

import { useEffect, useState } from "./html.js";

class Signal {
  #value;
  #watchers = new Set();

  constructor(value) {
    this.#value = value;
  }

  get value() {
    return this.#value;
  }

  set value(value) {
    if (Object.is(value, this.#value)) return;
    this.#value = value;
    for (const watcher of [...this.#watchers]) watcher(value);
  }

  /** Calls `watcher` at each change; returns what ends that. */
  watch(watcher) {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }
}

export const signal = (value) => new Signal(value);

/** The value, with the component drawn again when it changes. */
export function useSignal(source) {
  const [, draw] = useState(0);
  useEffect(() => {
    const seen = source.value;
    const end = source.watch(() => draw((n) => n + 1));
    if (!Object.is(seen, source.value)) draw((n) => n + 1);
    return end;
  }, [source]);
  return source.value;
}

const PREFIX = "llmasos.";

/** A signal of JSON that the browser keeps; private windows that keep nothing start from `initial` each time. */
export function stored(name, initial, storage = globalThis.localStorage) {
  let value = initial;
  try {
    const text = storage.getItem(PREFIX + name);
    if (text !== null) value = JSON.parse(text);
  } catch {
    // what is kept there is not ours, or nothing may be kept
  }
  const made = signal(value);
  made.watch((next) => {
    try {
      if (next === null || next === undefined) storage.removeItem(PREFIX + name);
      else storage.setItem(PREFIX + name, JSON.stringify(next));
    } catch {
      // full or forbidden: it holds as long as the page does
    }
  });
  return made;
}
