// A line of a few points, one of which is where the sliders stand. Drawn as SVG, without a library.

const SPACE = "http://www.w3.org/2000/svg";
const MARGIN = { left: 62, right: 22, top: 26, bottom: 44 };
const HEIGHT = 270;

/**
 * points: [{ x, y, label, chosen, choose() }] by rising x; bound: { y, label } or nothing.
 * x and y: { title, format(value), from }.
 */
export function drawChart(holder, { points, x, y, bound, spoken }) {
  const width = Math.max(holder.clientWidth, 260);
  const xs = scale([x.from, ...points.map((p) => p.x)], MARGIN.left, width - MARGIN.right);
  const tops = [0, ...points.map((p) => p.y), ...(bound ? [bound.y] : [])];
  const ys = scale(tops, HEIGHT - MARGIN.bottom, MARGIN.top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": spoken });
  for (const value of ys.ticks) {
    svg.append(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: ys(value), y2: ys(value) }));
    svg.append(words(y.format(value), { x: MARGIN.left - 8, y: ys(value) + 4, class: "tick end" }));
  }
  for (const value of xs.ticks) {
    svg.append(words(x.format(value), { x: xs(value), y: HEIGHT - MARGIN.bottom + 18, class: "tick middle" }));
  }
  svg.append(words(x.title, { x: width - MARGIN.right, y: HEIGHT - 6, class: "title end" }));
  svg.append(words(y.title, { x: 0, y: 12, class: "title" }));
  if (bound) {
    svg.append(shape("line", { class: "bound", x1: MARGIN.left, x2: width - MARGIN.right, y1: ys(bound.y), y2: ys(bound.y) }));
    svg.append(words(bound.label, { x: width - MARGIN.right, y: ys(bound.y) - 6, class: "tick end" }));
  }
  const path = points.map((p, index) => `${index ? "L" : "M"}${xs(p.x)},${ys(p.y)}`).join("");
  svg.append(shape("path", { class: "line", d: path }));
  const placed = points.map((point) => ({ point, cx: xs(point.x), cy: ys(point.y) }));
  for (const { point, cx, cy } of placed) svg.append(dot(point, cx, cy));
  for (const { point, cx, cy } of readable(placed)) {
    const kind = point.chosen ? "label middle chosen" : "label middle";
    svg.append(words(point.label, { x: cx, y: labelY(point, cy), class: kind }));
  }
  holder.replaceChildren(svg);
}

function dot(point, cx, cy) {
  const kind = point.chosen ? "dot chosen" : "dot";
  const mark = shape("circle", { class: kind, cx, cy, r: point.chosen ? 8 : 5 });
  mark.addEventListener("click", point.choose);
  return mark;
}

/** Below its point; that of the chosen one stands out above. */
function labelY(point, cy) {
  return point.chosen ? cy - 15 : cy + 21;
}

/** Those whose labels do not lie on one another; that of the chosen point is always among them. */
function readable(placed) {
  const kept = [];
  for (const one of [...placed].sort((a, b) => b.point.chosen - a.point.chosen)) {
    const wide = (other) => 4 * (one.point.label.length + other.point.label.length) + 6;
    const clear = (other) => Math.abs(one.cx - other.cx) > wide(other) || Math.abs(labelY(one.point, one.cy) - labelY(other.point, other.cy)) > 15;
    if (kept.every(clear)) kept.push(one);
  }
  return kept;
}

/** value -> pixels, with the ticks that lie in its range. */
function scale(values, from, to) {
  const least = Math.min(...values);
  const step = niceStep((Math.max(...values) - least) / 4 || 1);
  const low = Math.floor(least / step) * step;
  const high = Math.max(Math.ceil(Math.max(...values) / step), Math.round(low / step) + 1) * step;
  const place = (value) => from + ((value - low) / (high - low)) * (to - from);
  const count = Math.round((high - low) / step);
  place.ticks = Array.from({ length: count + 1 }, (_, index) => low + index * step);
  return place;
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 2.5, 5, 10].find((step) => step * power >= rough * 0.999);
}

function shape(name, attributes) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function words(text, attributes) {
  const made = shape("text", attributes);
  made.textContent = text;
  return made;
}
