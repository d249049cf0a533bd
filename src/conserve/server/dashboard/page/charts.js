// A chart: uPlot on a canvas, its legend as text, and its newest values as a table.

import { clock, clockSeconds } from "./words.js";

const style = getComputedStyle(document.documentElement);
const colour = (name) => style.getPropertyValue(name).trim();
const stepped = uPlot.paths.stepped({ align: -1 }); // a point covers the time before it
const cursor = { sync: { key: "conserve" }, drag: { x: false, y: false }, points: { size: 6 } };
const TABLE_ROWS = 12;

/** An area or a line. value(points, i) is what it shows; `from` tells what the drawing adds below. */
function drawn(series) {
  const tone = () => colour(`--${series.tone}`);
  const common = { label: series.label, stroke: tone, points: { show: false }, spanGaps: false };
  if (series.area) return { ...common, fill: tone, width: 0, paths: stepped };
  return { ...common, width: series.width ?? 2, dash: series.dash, points: { show: series.dots ?? false, size: 4, fill: tone } };
}

export class Chart {
  /**
   * plots: [{ height, series, top(max), format, limit }], one below the other on one time axis.
   * series: [{ label, tone, area, below, read(points, i) }]; `below` names the label it is stacked on.
   */
  constructor(figure, { title, note, plots, format, speak }) {
    this.figure = figure;
    this.plots = plots;
    this.format = format;
    this.speak = speak;
    this.data = [];
    this.#build(title, note);
    new ResizeObserver(() => this.#resize()).observe(this.holder);
  }

  #build(title, note) {
    const caption = element("figcaption");
    caption.append(element("h3", title), element("span", note, "soft note"));
    this.legend = element("p", "", "legend");
    this.holder = element("div", "", "plots");
    this.holder.setAttribute("role", "img");
    this.table = element("details", "", "values");
    this.table.append(element("summary", "Values as a table"));
    this.table.querySelector("summary").setAttribute("aria-label", `${title}: values as a table`);
    this.table.addEventListener("toggle", () => this.#fillTable());
    this.figure.append(caption, this.legend, this.holder, this.table);
    this.entries = this.plots.flatMap((plot) => plot.series).map((series) => {
      const entry = element("span", "", "entry");
      const value = element("b", "–");
      const mark = element("span", "", series.area ? "swatch" : "swatch line");
      mark.style.background = `var(--${series.tone})`;
      entry.append(mark, `${series.label} `, value);
      this.legend.append(entry);
      return { series, value };
    });
    this.draw();
  }

  /** Draw anew, in the colours of the moment. */
  draw() {
    this.uplots?.forEach((one) => one.destroy());
    this.uplots = this.plots.map((plot, index) => {
      const holder = element("div");
      this.holder.append(holder);
      return new uPlot(this.#options(plot, index), [[], ...plot.series.map(() => [])], holder);
    });
    this.holder.replaceChildren(...this.uplots.map((one) => one.root));
    if (this.points) this.show(this.points, this.window);
  }

  #options(plot, index) {
    const last = index === this.plots.length - 1;
    const axis = { stroke: () => colour("--soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: () => colour("--line"), width: 1 };
    return {
      width: this.holder.clientWidth || 600,
      height: plot.height + (last ? 30 : 14),
      padding: [8, 30, last ? 0 : 8, 0], // half of the last label at the right
      legend: { show: false },
      cursor,
      scales: {
        x: { time: true, range: () => this.window ?? [0, 1] },
        y: { range: (_u, _min, max) => [0, plot.top(max ?? 0)] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: last ? 30 : 0, space: 70, values: last ? (_u, splits) => times(splits) : () => [] },
        { ...axis, grid, size: 58, space: 32, values: (_u, splits) => splits.map((v) => plot.format(v)) },
      ],
      series: [{}, ...plot.series.map(drawn)],
      hooks: { setCursor: [(u) => this.#legendAt(u.cursor.idx)], draw: plot.limit ? [(u) => limitLine(u, plot.limit)] : [] },
    };
  }

  #resize() {
    const width = this.holder.clientWidth;
    for (const one of this.uplots) if (width && one.width !== width) one.setSize({ width, height: one.height });
  }

  /** points: columns by name; window: [from, to] in Unix seconds. */
  show(points, window) {
    this.points = points;
    this.window = window;
    const xs = points.time_s;
    this.data = this.plots.map((plot) => plot.series.map((series) => xs.map((_, i) => series.read(points, i))));
    this.plots.forEach((plot, index) => {
      const values = this.data[index];
      const heights = plot.series.map((series, n) => stacked(plot.series, values, series, n));
      this.uplots[index].setData([xs, ...heights]);
    });
    this.#legendAt(this.uplots[0].cursor.idx);
    this.#fillTable();
    this.holder.setAttribute("aria-label", this.speak(points));
  }

  #legendAt(index) {
    const at = index ?? (this.points?.time_s.length ?? 0) - 1;
    const flat = this.data.flat();
    this.entries.forEach((entry, n) => {
      entry.value.textContent = this.format(flat[n]?.[at], entry.series);
    });
  }

  #fillTable() {
    if (!this.table.open || !this.points) return;
    const xs = this.points.time_s;
    const table = element("table");
    const head = element("tr");
    head.append(header("Time", "col"), ...this.entries.map((entry) => header(entry.series.label, "col")));
    const flat = this.data.flat();
    const rows = xs.map((time, i) => {
      const row = element("tr");
      row.append(header(clockSeconds(time), "row"));
      row.append(...this.entries.map((entry, n) => element("td", this.format(flat[n][i], entry.series))));
      return row;
    });
    const body = element("tbody");
    body.append(...rows.slice(-TABLE_ROWS).reverse());
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    this.table.replaceChildren(this.table.querySelector("summary"), table);
  }
}

function stacked(all, values, series, n) {
  if (!series.below) return values[n];
  const base = values[all.findIndex((other) => other.label === series.below)];
  return values[n].map((value, i) => (value === null ? null : value + (base[i] ?? 0)));
}

function limitLine(u, limit) {
  const { ctx, bbox } = u;
  const y = Math.round(u.valToPos(limit(), "y", true));
  if (!Number.isFinite(y)) return;
  ctx.save();
  ctx.strokeStyle = colour("--ink");
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.fillStyle = colour("--ink");
  ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "right";
  ctx.fillText("target", bbox.left + bbox.width - 4 * devicePixelRatio, y - 6 * devicePixelRatio);
  ctx.restore();
}

const times = (splits) => {
  const fine = splits.length > 1 && splits[1] - splits[0] < 60;
  return splits.map((time) => (fine ? clockSeconds(time) : clock(time)));
};

export function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function header(text, scope) {
  const made = element("th", text);
  made.scope = scope;
  return made;
}
