/** What the machine did in the last minutes: asked for while the console is open, on whatever page. */

import { client } from "../../core/api.js";
import { signal } from "../../core/store.js";

const EVERY = 2000;
const KEPT = 300;

/** {time, cpu, devices: {name: used}, disk, tokens}, the latest last. */
export const samples = signal([]);
/** The latest answer, or the error that came instead. */
export const system = signal({ data: undefined, error: null });

let timer;
let watchers = 0;
let before;

async function look() {
  try {
    const { native } = client();
    const [data, status] = await Promise.all([native.system(), native.status()]);
    system.value = { data, status, error: null };
    samples.value = [...samples.value, sample(data, status)].slice(-KEPT);
  } catch (error) {
    system.value = { ...system.value, error };
  }
}

function sample(data, status) {
  const time = Date.now() / 1000;
  const generated = status.reduce((sum, one) => sum + one.num_generated_tokens, 0);
  const speed = before && generated >= before.generated ? (generated - before.generated) / (time - before.time) : 0;
  before = { time, generated };
  const used = (one) => (one.memory_free === null ? null : one.memory_total - one.memory_free);
  return { time, cpu: data.cpu_percent, speed, disk: data.disk_free, devices: Object.fromEntries(data.devices.map((one) => [one.name, used(one)])) };
}

function next() {
  timer = setTimeout(async () => {
    if (!document.hidden) await look();
    if (watchers) next();
  }, samples.value.length < 2 ? 700 : EVERY);
}

/** Begins to ask; returns what ends that. */
export function watchSystem() {
  watchers += 1;
  if (watchers === 1) {
    look();
    next();
  }
  return () => {
    watchers -= 1;
    if (!watchers) clearTimeout(timer);
  };
}

export const reload = look;
