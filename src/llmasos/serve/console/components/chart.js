/** Lines over time, by uPlot, which is loaded when the first one is drawn. */

import { html, useEffect, useRef, useState } from "../core/html.js";
import { clock, number } from "../core/format.js";

let library;
const load = () => {
  library ??= import("../vendor/uplot.js").then((module) => {
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("vendor/uplot.css", document.baseURI).href }));
    return module.default;
  });
  return library;
};

/** Steps of the axis of time. */
const SECONDS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600];
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000];
/** Values that are drawn as points, as no line may go through them. */
const FEW = 20;
const COLOURS = ["--accent", "--ok", "--warn", "--bad"];

/** A scale from the lowest to the highest value with a little room; of one value too, and of none. */
export function around(low, high) {
  if (low === null || high === null) return [0, 1];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/** A colour of the theme as a canvas takes it. */
function colour(box, name) {
  const probe = Object.assign(document.createElement("i"), { hidden: true });
  probe.style.color = `var(${name})`;
  box.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** `times`: seconds since 1970, or with `steps` numbers of steps; `lines`: [{label, values}], null where there is none; `max`:
 * the top of the scale; `fitted`: it begins at the lowest value instead of 0; `format(value)`. */
export function Chart({ times, lines, max, format, label, height = 120, steps = false, fitted = false }) {
  const box = useRef();
  const plot = useRef();
  const [uPlot, setLibrary] = useState(null);
  const theme = document.documentElement.dataset.theme;
  useEffect(() => void load().then((made) => setLibrary(() => made)), []);
  useEffect(() => {
    const host = box.current;
    if (!uPlot || !host) return undefined;
    const [muted, line] = [colour(host, "--muted"), colour(host, "--line")];
    const axis = { stroke: muted, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const options = {
      width: host.clientWidth || 300,
      height,
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: !steps }, y: { range: fitted ? (_, low, high) => around(low, high) : (_, low, high) => [0, max ?? Math.max(high * 1.1, 1)] } },
      axes: [
        steps
          ? { ...axis, space: 70, size: 26, incrs: STEPS, values: (_, ticks) => ticks.map((one) => number(one)) }
          : { ...axis, space: 70, size: 26, incrs: SECONDS, values: (_, ticks) => ticks.map((one) => clock(one * 1000).slice(0, 8)) },
        { ...axis, size: 58, space: 34, values: (_, ticks) => ticks.map(format) },
      ],
      series: [{}, ...lines.map(({ values }, i) => {
        const stroke = colour(host, COLOURS[i % COLOURS.length]);
        return { stroke, width: 1.6, spanGaps: true, fill: fitted ? undefined : stroke.replace(/^rgb\((.*)\)$/, "rgba($1, 0.1)"), points: { show: fitted && values.filter((one) => one !== null).length < FEW } };
      })],
    };
    plot.current = new uPlot(options, [times, ...lines.map((one) => one.values)], host);
    const watch = new ResizeObserver(() => plot.current?.setSize({ width: host.clientWidth, height }));
    watch.observe(host);
    return () => {
      watch.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [uPlot, lines.length, theme, max]);
  useEffect(() => plot.current?.setData([times, ...lines.map((one) => one.values)]), [times, uPlot]);
  const last = lines.map((one) => `${one.label} ${format(one.values.findLast((value) => value !== null) ?? 0)}`).join(", ");
  return html`<div class="chart" role="img" aria-label=${`${label}: ${last}`} ref=${box} style=${{ height: `${height}px` }} />`;
}
