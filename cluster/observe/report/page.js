"use strict";
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

// ---- completions

const chosen = { step: completions.steps.length - 1, group: 0 };

function mark(view) {
  const shown = completions.steps[chosen.step];
  const inside = shown && shown.step >= steps[0] && shown.step <= steps[steps.length - 1];
  view.here.setAttribute("visibility", inside ? "visible" : "hidden");
  if (inside) for (const name of ["x1", "x2"]) view.here.setAttribute(name, view.x(shown.step));
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const meanReward = (group) => mean(group.completions.map((one) => one.reward).filter((v) => v !== null));

function ordered(items) {
  const way = { sampled: 0, best: -1, worst: 1 }[byId("order").value];
  // No reward comes last either way.
  const rank = (one) => (one.reward === null ? Infinity : way * one.reward);
  return way ? [...items].sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b))) : items;
}

function advantageBar(completion, largest) {
  const fillBar = h("i");
  const share = largest ? (50 * Math.abs(completion.advantage ?? 0)) / largest : 0;
  fillBar.style.width = `${share}%`;
  fillBar.style[completion.advantage < 0 ? "right" : "left"] = "50%";
  fillBar.style.background = `var(${completion.advantage < 0 ? "--minus" : "--plus"})`;
  return h("div", { class: "bar", "aria-hidden": "true" }, fillBar);
}

function completionCard(completion, group) {
  const largest = Math.max(...group.completions.map((one) => Math.abs(one.advantage ?? 0)));
  let advantage = "advantage –";
  if (completion.advantage !== null) advantage = `advantage ${signed(completion.advantage)}`;
  else if (completion.untrained) advantage = `not trained: ${completion.untrained}`;
  const functions = h("dl", { class: "functions" });
  group.functions.forEach((name, i) => {
    functions.append(h("dt", {}, ...literal(name)), h("dd", {}, number(completion.values[i])));
  });
  const [from, to] = [completion.versions[0], completion.versions[completion.versions.length - 1]];
  const facts = h("div", { class: "facts" }, `${completion.tokens.toLocaleString("en-US")} tokens`);
  if (completion.truncated) facts.append(" · ", h("span", { class: "truncated" }, "truncated"));
  if (from !== undefined) facts.append(` · weights ${from === to ? from : `${from} to ${to}`}`);
  return h("article", { class: completion.untrained ? "completion untrained" : "completion" },
    h("div", { class: "scores" },
      h("span", {}, "reward ", h("b", {}, number(completion.reward))), h("span", {}, advantage)),
    advantageBar(completion, largest), functions, textBox(completion.text),
    ...completion.errors.map((error) => h("div", { class: "error" }, ...whole(error))), facts);
}

function promptCard(group) {
  const messages = completions.prompts[group.prompt].map((message) =>
    h("div", { class: "message" },
      message.role ? h("div", { class: "role" }, ...literal(message.role)) : "", textBox(message.content)));
  const size = `prompt, ${group.prompt_tokens.toLocaleString("en-US")} tokens`;
  return h("div", { class: "prompt" }, h("div", { class: "hint" }, size), ...messages);
}
const lastMessage = (prompt) => completions.prompts[prompt].at(-1)?.content ?? "";

function showStep() {
  const view = completions.steps[chosen.step];
  byId("step").value = chosen.step;
  byId("step").setAttribute("aria-valuetext", `step ${view.step}`);
  byId("step-name").textContent = `step ${view.step.toLocaleString("en-US")}`;
  byId("step-name").append(h("span", { class: "hint" }, ` · ${chosen.step + 1}/${completions.steps.length} shown`));
  byId("previous").disabled = chosen.step === 0;
  byId("next").disabled = chosen.step === completions.steps.length - 1;
  chosen.group = Math.min(chosen.group, Math.max(0, view.groups.length - 1));
  byId("group-tabs").replaceChildren(
    ...view.groups.map((place, i) => {
      const group = completions.groups[place];
      const tab = h("button", { type: "button", "aria-pressed": String(i === chosen.group) },
        h("span", {}, ...inOneLine(lastMessage(group.prompt))),
        h("span", { class: "hint" }, `mean reward ${number(meanReward(group))}`));
      tab.addEventListener("click", () => {
        chosen.group = i;
        showStep();
      });
      return tab;
    }),
    h("span", { class: "hint" }, `${view.groups.length} of ${view.of} groups of this step`));
  const group = completions.groups[view.groups[chosen.group]];
  byId("group").replaceChildren();
  if (group) {
    byId("group").append(promptCard(group),
      h("div", { class: "completions" }, ...ordered(group.completions).map((one) => completionCard(one, group))));
  }
  drawn.filter((chart) => chart.x).forEach(mark);
}

function choose(place) {
  chosen.step = Math.min(Math.max(0, place), completions.steps.length - 1);
  showStep();
}

function chooseNear(step) {
  const distance = (view) => Math.abs(view.step - step);
  if (!completions.steps.length) return;
  choose(completions.steps.reduce((best, view, i, all) => (distance(view) < distance(all[best]) ? i : best), 0));
}

function showVisits() {
  const places = completions.recurring[Number(byId("prompt").value)];
  const groups = places.map((place) => completions.groups[place]);
  byId("visits").replaceChildren(
    ...groups.map((group) =>
      h("div", { class: "visit" },
        h("h3", {}, `step ${group.step.toLocaleString("en-US")} · mean reward ${number(meanReward(group))}`),
        ...ordered(group.completions).map((one) => completionCard(one, group)))));
  byId("visit-prompt")?.remove();
  const card = promptCard(groups[0]);
  card.id = "visit-prompt";
  byId("visits").before(card);
}

// ---- the page

function addHeader() {
  byId("name").append(...literal(run.name));
  const about = [run.model, run.task && `task ${run.task}`, run.preset && `algorithm ${run.preset}`, run.folder];
  byId("about").append(...literal(about.filter(Boolean).join(" · ")));
  const total = run.steps_total;
  const finished = total !== null && run.steps_done >= total;
  const done = total ? Math.min(1, run.steps_done / total) : 0;
  byId("progress").firstElementChild.style.width = `${100 * done}%`;
  byId("progress").hidden = total === null;
  const counted = run.steps_done.toLocaleString("en-US");
  const facts = [
    total === null ? `${counted} steps done` : `${counted} of ${total.toLocaleString("en-US")} steps done`,
    finished ? "finished" : "running or stopped",
    run.checkpoint === null ? "no checkpoint" : `last checkpoint after ${run.checkpoint.toLocaleString("en-US")} steps`,
    `${duration(run.seconds)} in steps`,
    `metrics last written ${run.written}`,
    `page made ${run.made}`,
  ];
  byId("status").textContent = facts.join(" · ");
}

function addTiles() {
  for (const tile of report.tiles) {
    byId("tiles").append(
      h("div", { class: "tile" }, h("span", {}, tile.label), h("b", {}, tile.value), h("span", {}, tile.detail)));
  }
}

function addCompletions() {
  if (!completions.steps.length) {
    byId("completions").replaceChildren(h("h2", {}, "Completions"), h("p", { class: "quiet" }, "None were recorded."));
    return;
  }
  byId("step").max = completions.steps.length - 1;
  byId("step").addEventListener("input", () => choose(Number(byId("step").value)));
  byId("previous").addEventListener("click", () => choose(chosen.step - 1));
  byId("next").addEventListener("click", () => choose(chosen.step + 1));
  byId("order").addEventListener("change", () => {
    showStep();
    if (completions.recurring.length) showVisits();
  });
  showStep();
}

function addRecurring() {
  if (!completions.recurring.length) {
    byId("prompt-choice").remove();
    byId("visits").replaceWith(h("p", { class: "quiet" }, "No prompt came at more than one step so far."));
    return;
  }
  completions.recurring.forEach((places, i) => {
    const name = h("option", { value: i }, ...inOneLine(lastMessage(completions.groups[places[0]].prompt)));
    byId("prompt").append(name);
  });
  byId("prompt").addEventListener("change", showVisits);
  showVisits();
}

addHeader();
addTiles();
if (steps.length) addCharts();
else byId("charts").append(h("p", { class: "quiet" }, "No step is finished yet."));
addCompletions();
addRecurring();
byId("notes").append(
  h("li", {}, "Steps count from 0, as in metrics.jsonl. The dashed line marks the step whose completions are shown; a click into a chart moves it."),
  ...report.notes.map((note) => h("li", {}, ...literal(note))));
