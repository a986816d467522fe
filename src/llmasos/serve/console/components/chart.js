/** Lines over time, by uPlot, which is loaded when the first one is drawn. */

import { html, useEffect, useRef, useState } from "../core/html.js";
import { clock } from "../core/format.js";

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
const COLOURS = ["--accent", "--ok", "--warn", "--bad"];

/** A colour of the theme as a canvas takes it. */
function colour(box, name) {
  const probe = Object.assign(document.createElement("i"), { hidden: true });
  probe.style.color = `var(${name})`;
  box.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** `times`: seconds since 1970; `lines`: [{label, values}]; `max`: the top of the scale; `format(value)`. */
export function Chart({ times, lines, max, format, label, height = 120 }) {
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
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, max ?? Math.max(high * 1.1, 1)] } },
      axes: [
        { ...axis, space: 70, size: 26, incrs: SECONDS, values: (_, ticks) => ticks.map((one) => clock(one * 1000).slice(0, 8)) },
        { ...axis, size: 58, space: 34, values: (_, ticks) => ticks.map(format) },
      ],
      series: [{}, ...lines.map((_, i) => {
        const stroke = colour(host, COLOURS[i % COLOURS.length]);
        return { stroke, width: 1.6, fill: stroke.replace(/^rgb\((.*)\)$/, "rgba($1, 0.1)"), points: { show: false } };
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
  const last = lines.map((one) => `${one.label} ${format(one.values.at(-1) ?? 0)}`).join(", ");
  return html`<div class="chart" role="img" aria-label=${`${label}: ${last}`} ref=${box} style=${{ height: `${height}px` }} />`;
}
