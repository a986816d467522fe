/** What is said of requests, jobs and lines of the log. No page. */

export const isActive = (job) => job.state === "queued" || job.state === "running";

/** Whether a request only looks on: this page's own, and the likes of it. */
export const isLooking = (request) => /^GET \/(llmasos|console|v1\/models|healthz|readyz|metrics)\b/.test(request.route);

export const TONES = {
  running: "accent",
  queued: undefined,
  waiting: undefined,
  paused: "warn",
  done: "ok",
  failed: "bad",
  cancelled: undefined,
  stopped: "warn",
  requires_action: "warn",
};

const HOUR = 3600_000;

/** What wants somebody's decision: [{what, ...}]: failed and paused jobs, agents that wait, errors of the last hour. */
export function wanting({ jobs, runs, faults }, now = Date.now()) {
  const recent = (moment) => now - new Date(moment) < HOUR;
  return [
    ...(runs ?? []).filter((run) => run.state === "requires_action").map((run) => ({ what: "approval", run })),
    ...(jobs ?? []).filter((job) => job.state === "failed" && recent(job.updated)).map((job) => ({ what: "failed", job })),
    ...(jobs ?? []).filter((job) => job.state === "paused").map((job) => ({ what: "paused", job })),
    ...latest((faults ?? []).filter((line) => recent(line.time))).map((line) => ({ what: "error", line })),
  ];
}

const latest = (lines) => lines.slice(-1);

const LEVELS = ["debug", "info", "warning", "error", "critical"];

/** Lines of at least `level` that have every word of `text` in them. */
export function filtered(lines, level, text) {
  const least = LEVELS.indexOf(level);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return lines.filter((line) => {
    if (LEVELS.indexOf(line.level.toLowerCase()) < least) return false;
    const all = `${line.logger} ${line.message} ${line.request_id ?? ""} ${JSON.stringify(line.fields ?? {})}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
}

/** The steps of an agent's run on a line of time: [{number, left, width, calls: [{left, width}]}], shares of the whole. */
export function timeline(run) {
  const end = Math.max(run.seconds, ...run.steps.map((step) => step.started + step.seconds), 0.001);
  const span = ({ started, seconds }) => ({ left: started / end, width: Math.max(seconds / end, 0.004) });
  return run.steps.map((step) => ({ ...span(step), number: step.number, kind: step.kind, calls: step.calls.map((call) => ({ ...span(call), name: call.name })) }));
}

/** The losses of a training job by step: {steps, train, valid, last}; a step that was done again counts as it was then. */
export function curveOf(events) {
  const points = new Map();
  let last = null;
  for (const { type, data } of events) {
    if (type !== "metrics" || !Number.isFinite(data?.step)) continue;
    points.set(data.step, { ...points.get(data.step), ...data });
    if (data.total_steps !== undefined) last = { ...last, ...data };
    else if (last) last = { ...last, valid_loss: data.valid_loss };
  }
  const steps = [...points.keys()].sort((a, b) => a - b);
  const values = (name) => steps.map((step) => points.get(step)[name] ?? null);
  return { steps, train: values("train_loss"), valid: values("valid_loss"), last };
}
