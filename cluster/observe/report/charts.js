"use strict";
// Numbers, texts and charts. page.js follows, in one script.
// Everything from the run reaches the page through text nodes; no string becomes markup here.

const report = JSON.parse(document.getElementById("data").textContent);
const { run, completions } = report;
const byId = (id) => document.getElementById(id);
const SMOOTHED = 10; // points of the running mean, as on the console
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4"];

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// ---- numbers and texts

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(1);
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString("en-US", { maximumFractionDigits: digits });
}
const inUnit = (value, unit) => {
  if (value === null || value === undefined) return "–";
  return unit === "%" ? `${(100 * value).toFixed(0)}%` : `${number(value)} ${unit}`.trim();
};
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// What has no picture of its own, or moves the letters around it, is shown by name: control and
// format characters (bidirectional marks, zero width), lone surrogates. Not tab and line feed.
const INVISIBLE = /(?![\t\n])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

function literal(text) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    const code = match[0].codePointAt(0);
    const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    parts.push(text.slice(from, match.index));
    const shown = code < 0x20 ? String.fromCodePoint(0x2400 + code) : name;
    parts.push(h("span", { class: "control", title: name }, shown));
    from = match.index + match[0].length;
  }
  return [...parts, text.slice(from)];
}
// A text is a string, or [beginning, number of characters left out, end].
function whole(text) {
  if (typeof text === "string") return text === "" ? [h("span", { class: "hint" }, "(empty)")] : literal(text);
  const [head, count, tail] = text;
  const note = `… ${count.toLocaleString("en-US")} characters left out …`;
  return [...literal(head), h("span", { class: "left-out" }, note), ...literal(tail)];
}
const beginning = (text) => (typeof text === "string" ? text : text[0]);
const textBox = (text) => h("pre", { class: "text", tabindex: "0", dir: "auto" }, ...whole(text));
const inOneLine = (text) => literal(beginning(text).slice(0, 200).replace(/\s+/g, " "));

// ---- charts

const steps = report.curves.steps;
const series = new Map(report.curves.series.map((one) => [one.key, one]));
const drawn = []; // every chart that is on the page

function runningMean(values) {
  return values.map((value, i) => {
    const recent = values.slice(Math.max(0, i - SMOOTHED + 1), i + 1).filter((v) => v !== null);
    return value === null || !recent.length ? null : recent.reduce((a, b) => a + b, 0) / recent.length;
  });
}

// A round distance that fits into the range about `count` times.
function tickSize(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough * 0.999);
}
function ticks(low, high, size) {
  const found = [];
  const last = Math.floor(high / size + 1e-9);
  for (let i = Math.ceil(low / size - 1e-9); i <= last; i += 1) found.push(i === 0 ? 0 : i * size);
  return found;
}

// The lines of a chart as {label, values, low, high}; several lie on top of each other.
function linesOf(chart) {
  const lines = chart.keys
    .filter((key) => series.has(key))
    .map((key) => {
      const { mean, low, high } = series.get(key);
      return { label: key.split("/").pop(), values: mean, low, high, top: mean, bottom: null };
    });
  if (chart.keys.length > 1) {
    let below = steps.map(() => 0);
    for (const line of lines) {
      line.bottom = below;
      line.top = line.values.map((value, i) => below[i] + (value ?? 0));
      below = line.top;
    }
  }
  return lines;
}

// 0 is always inside, so that heights can be compared.
function rangeOf(chart, lines) {
  if (chart.unit === "%") return [0, 1];
  let [low, high] = [0, 0];
  for (const line of lines) {
    for (const value of [...line.top, ...line.low, ...line.high]) {
      low = Math.min(low, value ?? 0);
      high = Math.max(high, value ?? 0);
    }
  }
  if (low === high) high = 1;
  const margin = 0.04 * (high - low);
  return [low && low - margin, high && high + margin];
}

function addChart(chart, into) {
  const lines = linesOf(chart);
  const [low, high] = rangeOf(chart, lines);
  const readout = h("span", { class: "readout" });
  const svg = s("svg", { role: "img", "data-chart": chart.title });
  svg.setAttribute("aria-label", `${chart.title} over ${steps.length} points`);
  const legend = h("div", { class: "legend" });
  if (lines.length > 1) {
    lines.forEach((line, i) => {
      const swatch = h("span", { class: "swatch" });
      swatch.style.background = `var(${COLOURS[i % COLOURS.length]})`;
      legend.append(h("span", {}, swatch, line.label));
    });
  }
  const smooth = chart.keys.length === 1 && steps.length > 2 * SMOOTHED;
  const hint = [chart.unit === "%" ? "" : chart.unit, chart.hint].filter(Boolean).join(" · ");
  const card = h("article", { class: chart.wide ? "chart wide" : "chart" },
    h("header", {}, h("h3", {}, ...literal(chart.title)), readout),
    h("p", { class: "hint" }, hint), legend, svg);
  into.append(card);

  const view = { svg, x: null, here: null, height: chart.wide ? 220 : 140 };
  view.draw = () => {
    const width = svg.clientWidth;
    if (!width) return; // inside a closed <details>
    const box = { left: 46, right: width - 8, top: 8, bottom: view.height - 20 };
    const first = steps[0];
    const span = Math.max(1, steps[steps.length - 1] - first);
    view.x = (step) => box.left + ((box.right - box.left) * (step - first)) / span;
    const y = (v) => box.bottom - ((box.bottom - box.top) * (v - low)) / (high - low);
    svg.setAttribute("viewBox", `0 0 ${width} ${view.height}`);
    svg.setAttribute("height", view.height);
    svg.replaceChildren();
    for (const tick of ticks(low, high, tickSize(low, high, chart.wide ? 5 : 3))) {
      const label = chart.unit === "%" ? `${Math.round(100 * tick)}%` : number(tick);
      svg.append(s("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
      svg.append(s("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, label));
    }
    const apart = Math.ceil(tickSize(first, first + span, Math.max(2, Math.floor(width / 110))));
    for (const tick of ticks(first, first + span, apart)) {
      svg.append(s("text", { x: view.x(tick), y: view.height - 4, "text-anchor": "middle" },
        tick.toLocaleString("en-US")));
    }
    lines.forEach((line, i) => drawLine(svg, line, `var(${COLOURS[i % COLOURS.length]})`, view.x, y, smooth));
    view.here = s("line", { class: "here", y1: box.top, y2: box.bottom });
    view.hover = s("line", { class: "hover", y1: box.top, y2: box.bottom, visibility: "hidden" });
    svg.append(view.here, view.hover);
    mark(view);
  };
  const show = (i) => {
    const values = lines.map((line) =>
      (lines.length > 1 ? `${line.label} ` : "") + inUnit(line.values[i], lines.length > 1 ? "" : chart.unit));
    readout.replaceChildren(`step ${steps[i].toLocaleString("en-US")}: ${values.join(" · ")}`);
  };
  const nearest = (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    steps.forEach((step, i) => {
      if (Math.abs(view.x(step) - at) < Math.abs(view.x(steps[best]) - at)) best = i;
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    show(i);
    for (const name of ["x1", "x2"]) view.hover.setAttribute(name, view.x(steps[i]));
    view.hover.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => {
    show(steps.length - 1);
    view.hover.setAttribute("visibility", "hidden");
  });
  svg.addEventListener("click", (event) => chooseNear(steps[nearest(event)]));
  show(steps.length - 1);
  drawn.push(view);
  new ResizeObserver(view.draw).observe(card);
}

// Pieces without gaps, as lists of point numbers.
function pieces(values) {
  const found = [[]];
  values.forEach((value, i) => {
    if (value !== null) found[found.length - 1].push(i);
    else if (found[found.length - 1].length) found.push([]);
  });
  return found.filter((piece) => piece.length);
}

function drawLine(svg, line, colour, x, y, smooth) {
  const at = (values) => (i) => `${x(steps[i]).toFixed(1)},${y(values[i]).toFixed(1)}`;
  const area = (name, top, bottom) => {
    for (const piece of pieces(top)) {
      const points = [...piece.map(at(top)), ...piece.reverse().map(at(bottom))].join(" ");
      const node = s("polygon", { class: name, points });
      node.style.fill = colour;
      svg.append(node);
    }
  };
  const curve = (name, values) => {
    for (const piece of pieces(values)) {
      const node = s("polyline", { class: name, points: piece.map(at(values)).join(" ") });
      node.style.stroke = colour;
      svg.append(node);
      if (piece.length > 1) continue;
      const dot = s("circle", { cx: x(steps[piece[0]]), cy: y(values[piece[0]]), r: 2.5 });
      dot.style.fill = colour;
      svg.append(dot);
    }
  };
  if (line.bottom) {
    area("area", line.top, line.bottom);
    if (steps.length === 1) curve("raw", line.top);
    return;
  }
  if (line.low.length) area("band", line.high, line.low);
  curve(smooth ? "raw faint" : "raw", line.values);
  if (smooth) curve("smooth", runningMean(line.values));
}

function addCharts() {
  const sections = new Map();
  for (const chart of report.charts) {
    if (!sections.has(chart.section)) {
      const grid = h("div", { class: "grid" });
      const rare = chart.section === "Other metrics";
      const heading = h(rare ? "summary" : "h2", {}, chart.section);
      const part = h(rare ? "details" : "section", {}, heading, grid);
      if (!sections.size && steps.length > 2 * SMOOTHED) {
        grid.before(h("p", { class: "hint legend-note" }, `Thin: each point. Bold: mean of the last ${SMOOTHED} points.`));
      }
      byId("charts").append(part);
      sections.set(chart.section, grid);
    }
    addChart(chart, sections.get(chart.section));
  }
}
