// The page: sliders choose a place in the grid, and everything else shows what was found there.

import { burstName, gpuName, levelMeaning, levelName, milliseconds, modelName, number, percent, times } from "./words.js";
import { along, figuresOf, ratio } from "./figures.js";
import { drawChart } from "./chart.js";

const grid = JSON.parse(document.getElementById("grid").textContent);
const find = (id) => document.getElementById(id);
const SLIDERS = { load: grid.loads, burst: grid.bursts, slowdown: grid.slowdowns };
const WORK = Object.keys(grid.work);
const DAY_S = 86_400;
const ROWS = [
  ["ttft_p50_s", "First token, median"],
  ["ttft_p99_s", "First token, P99"],
  ["tbt_p50_s", "Between tokens, median"],
  ["tbt_p99_s", "Between tokens, P99"],
];

const DEFAULT = Math.max(0, grid.slowdowns.indexOf(grid.levels.balanced));
const choice = { machine: 0, work: WORK[0], load: 1, burst: 0, slowdown: DEFAULT, replicas: 8 };

function fillOptions() {
  const options = unique(grid.machines.map(gpuName)).map((name) => option(name, name));
  find("gpu").replaceChildren(...options);
  find("work").replaceChildren(...WORK.map(workChoice));
  for (const [name, stops] of Object.entries(SLIDERS)) {
    find(name).max = stops.length - 1;
    find(`${name}-field`).hidden = stops.length < 2;
  }
}

function workChoice(name) {
  const { prompt_tokens: prompt, answer_tokens: answer } = grid.work[name];
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "work", value: name });
  const text = document.createElement("span");
  const size = document.createElement("small");
  size.textContent = `${number(prompt)} tokens in, ${number(answer)} out`;
  text.append(name[0].toUpperCase() + name.slice(1), size);
  label.append(input, text);
  return label;
}

function fillModels() {
  const there = grid.machines.filter((machine) => gpuName(machine) === find("gpu").value);
  find("model").replaceChildren(...there.map((machine) => option(grid.machines.indexOf(machine), modelName(machine))));
}

/** What the fields hold, taken into the choice. */
function read() {
  choice.machine = Number(find("model").value);
  for (const name of Object.keys(SLIDERS)) choice[name] = Number(find(name).value);
  choice.replicas = Number(find("replicas").value);
  choice.work = document.querySelector("input[name=work]:checked").value;
}

/** The choice, put into the fields. */
function write() {
  find("gpu").value = gpuName(grid.machines[choice.machine]);
  fillModels();
  find("model").value = String(choice.machine);
  for (const name of Object.keys(SLIDERS)) find(name).value = String(choice[name]);
  find("replicas").value = String(choice.replicas);
  document.querySelector(`input[name=work][value=${choice.work}]`).checked = true;
}

function show() {
  const found = figuresOf(grid, choice);
  showFields(found);
  showHarvest(found);
  showChat(found);
  showSettings(found);
  showLoads();
  history.replaceState(null, "", `#${new URLSearchParams(choice)}`);
}

function showFields(found) {
  const slowdown = grid.slowdowns[choice.slowdown];
  const share = percent(grid.loads[choice.load]);
  say("load", `${number(found.chatsPerSecond)} chats a second on each replica`, `${share} of what it answers at most`);
  say("burst", `They come ${burstName(grid.bursts[choice.burst])}`);
  say("slowdown", levelName(slowdown, grid.levels), levelMeaning(slowdown));
  say("replicas", `${choice.replicas} ${choice.replicas === 1 ? "replica" : "replicas"}`, `${found.gpus} GPUs`);
}

function say(name, text, more = "") {
  find(`${name}-value`).textContent = text;
  const note = find(`${name}-note`);
  if (note) note.textContent = more;
  // What a screen reader says of the slider's place.
  find(name).setAttribute("aria-valuetext", more ? `${text}, ${more}` : text);
}

function showHarvest(found) {
  const { offline_tps: tokens, offline_rps: requests } = found.beside;
  find("tokens").textContent = number(tokens);
  find("requests").textContent = number(requests);
  find("share").textContent = percent(found.shareOfBound);
  find("day").textContent = millions(tokens * choice.replicas * DAY_S);
  find("saved").textContent = number(found.gpusSaved);
  showBrief(found);
  find("saved-note").textContent = `GPUs that a batch cluster of its own would need for the same work, beside your ${found.gpus}`;
}

/** The same in a line: for narrow screens, and for who hears the page. */
function showBrief({ beside, alone, gpusSaved }) {
  const slower = times(ratio(beside.tbt_p50_s, alone.tbt_p50_s));
  const text = `${number(beside.offline_tps)} tokens/s, chat ${slower}, saves ${number(gpusSaved)} GPUs`;
  find("brief").textContent = text;
  find("spoken").textContent = text;
}

function millions(tokens) {
  return tokens >= 1e9 ? `${number(tokens / 1e9)} billion` : `${number(tokens / 1e6)} million`;
}

function showChat({ alone, beside, machine }) {
  const rows = ROWS.map(([name, title]) => {
    const row = document.createElement("tr");
    const head = cell("th", title);
    head.scope = "row";
    row.append(head, cell("td", milliseconds(alone[name])), cell("td", milliseconds(beside[name])), cell("td", times(ratio(beside[name], alone[name]))));
    return row;
  });
  find("chat-rows").replaceChildren(...rows);
  find("slower").textContent = times(ratio(beside.tbt_p50_s, alone.tbt_p50_s));
  const within = `${percent(beside.slo_attainment)} of chats within ${milliseconds(machine.ttft_target_s)} to the first token and ${milliseconds(machine.tbt_target_s)} between tokens`;
  find("within").textContent = `${within}; alone ${percent(alone.slo_attainment)}.`;
}

function showSettings(found) {
  const points = along(grid, choice, "slowdown", grid.slowdowns).map((at, index) => ({
    x: ratio(at.beside.tbt_p50_s, at.alone.tbt_p50_s) ?? 1,
    y: at.beside.offline_tps,
    label: levelName(grid.slowdowns[index], grid.levels),
    chosen: index === choice.slowdown,
    choose: () => choose("slowdown", index),
  }));
  const here = points[choice.slowdown];
  drawChart(find("settings-chart"), {
    points,
    x: { title: "gap between tokens, times alone's", format: (value) => `${number(value)}x`, from: 1 },
    y: { title: "offline tokens a second", format: number },
    bound: { y: found.firstCome.offline_tps, label: "first come, first served" },
    spoken: `Offline tokens a second over how much slower chat is, for each setting. At ${here.label}: ${number(here.y)} tokens a second, chat ${times(here.x)} of alone.`,
  });
}

function showLoads() {
  const points = along(grid, choice, "load", grid.loads).map((at, index) => ({
    x: at.chatsPerSecond,
    y: at.beside.offline_tps,
    label: percent(grid.loads[index]),
    chosen: index === choice.load,
    choose: () => choose("load", index),
  }));
  const here = points[choice.load];
  drawChart(find("loads-chart"), {
    points,
    x: { title: "chats a second on each replica", format: number, from: 0 },
    y: { title: "offline tokens a second", format: number },
    spoken: `Offline tokens a second over chats a second. At ${number(here.x)} chats a second: ${number(here.y)} tokens a second.`,
  });
}

function choose(name, index) {
  choice[name] = index;
  write();
  show();
}

/** A link's choice, as far as this grid has it. */
function takeLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  const counts = { machine: grid.machines.length, replicas: Number(find("replicas").max) + 1 };
  for (const [name, stops] of Object.entries(SLIDERS)) counts[name] = stops.length;
  for (const [name, count] of Object.entries(counts)) {
    const value = Number(given.get(name) ?? NaN);
    if (Number.isInteger(value) && value >= (name === "replicas" ? 1 : 0) && value < count) choice[name] = value;
  }
  if (WORK.includes(given.get("work"))) choice.work = given.get("work");
}

function option(value, text) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

function cell(kind, text) {
  return Object.assign(document.createElement(kind), { textContent: text });
}

function unique(values) {
  return [...new Set(values)];
}

function about() {
  const { prompt_tokens: prompt, answer_tokens: answer } = grid.chats;
  find("chats").textContent = `${number(prompt)} tokens in and ${number(answer)} out`;
  find("seconds").textContent = number(grid.seconds);
  find("made-by").textContent = grid.made_by;
}

fillOptions();
takeLink();
write();
about();
find("fields").addEventListener("input", (event) => {
  if (event.target.id === "gpu") fillModels();
  read();
  show();
});
new ResizeObserver(show).observe(find("settings-chart"));
show();
