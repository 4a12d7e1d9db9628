// What the page shows besides its charts. This follows charts.js, in one script.

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
