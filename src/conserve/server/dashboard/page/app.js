// The page: takes what the feed says and puts it into words, bars and charts.
// What the feed says is in messages.py. Its records go by the same names in all files here (facts,
// chat, batch, ...), so that a test can hold every field that is named against them.

import { showBatches } from "./batches.js";
import { element } from "./charts.js";
import { charts } from "./figures.js";
import { follow, key } from "./feed.js";
import { clock, clockSeconds, compact, duration, number, percent, plural, span } from "./words.js";

const at = (id) => document.getElementById(id);
const FINE_S = 600; // beyond it the charts show ten seconds a point
const STALE_S = 5;
const KEPT = { fine: 600, coarse: 720 };
const STATES = { ready: "Ready", serving: "Serving", idle: "Idle", draining: "Draining", down: "Engine stopped", blind: "No figures", lost: "Connection lost", connecting: "Connecting" };

const page = { facts: { ttft_target_s: 1, tbt_target_s: 0.2 }, columns: [], range_s: 120, heard_s: 0, verdict: "" };
const drawings = charts(() => page.facts);

const on = {
  event(name, data) {
    ({ hello, tick, events, batches: showBatches, bye })[name]?.(data);
  },
  open: () => { page.heard_s = now(); link("open"); },
  lost(retry_s) {
    const last = page.summary ? ` Last figures from ${clockSeconds(page.summary.time_s)}.` : " It may still be starting.";
    link("lost", `${page.leaving ?? "The server does not answer."}${last} Trying again in ${span(retry_s)}.`);
  },
  unreadable: () => link("lost", "This page and the server are of different versions. Load the page again."),
  key: askForKey,
};

function now() {
  return Date.now() / 1000;
}

function link(state, text = "") {
  document.body.dataset.link = state;
  if (state !== "open") say(at("state"), STATES[state], state);
  banner(text);
}

function banner(text) {
  // The count-down alone is no news to who listens.
  if (at("banner").textContent !== text) at("banner").textContent = text;
  at("banner").hidden = !text;
}

function say(node, text, state) {
  node.dataset.state = state;
  if (node.textContent !== text) node.textContent = text;
}

const put = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };

function hello({ facts, columns, fine, coarse }) {
  page.facts = facts;
  page.columns = columns;
  page.points = { fine: byColumn(fine), coarse: byColumn(coarse) };
  page.leaving = undefined;
  put("model", facts.model);
  put("version", `ConServe on vLLM ${facts.version}`);
  at("forget").hidden = !facts.needs_key;
  document.title = `${facts.model} · ConServe`;
  const { num_processes: processes, num_engines: engines } = facts;
  const parts = ["Figures are the engine's own, of all requests to this server; percentiles are read from histograms, between their bounds."];
  if (engines > 1) parts.push(`They add up ${engines} engines.`);
  if (processes > 1) parts.push(`They cover all ${processes} API processes; the charts begin where the process that answered you began to watch.`);
  put("covers", parts.join(" "));
}

function tick({ summary, fine, coarse }) {
  add("fine", fine);
  add("coarse", coarse);
  if (!summary) return;
  page.summary = summary;
  page.heard_s = now();
  glance(summary);
  draw();
}

/** Columns by name, as a chart wants them. */
function byColumn(rows) {
  return Object.fromEntries(page.columns.map((name, i) => [name, rows.map((row) => row[i])]));
}

function add(ring, rows) {
  const points = page.points[ring];
  for (const [name, values] of Object.entries(byColumn(rows))) points[name].push(...values);
  const extra = points.time_s.length - KEPT[ring];
  if (extra > 0) page.columns.forEach((name) => points[name].splice(0, extra));
}

function glance(summary) {
  const { server, chat, harvest, standing, starving, requests, memory, yields } = summary;
  say(at("state"), STATES[server.state], server.state);
  at("state").title = `${server.text} Up ${span(server.uptime_s)}.`;
  banner(["draining", "down", "blind"].includes(server.state) ? server.text : starving.text);
  showChat(chat);
  put("harvest-rate", compact(harvest.offline_tps));
  put("harvest-detail", harvestWords(harvest, requests));
  put("harvest-total", `${compact(harvest.offline_tokens)} tokens`);
  put("harvest-running", number(requests.offline.running));
  put("harvest-waiting", number(requests.offline.waiting));
  at("longest-wait").dataset.state = starving.text ? "late" : "";
  put("longest-wait", wait(starving.request_wait_s));
  at("batch-wait").hidden = starving.batch_wait_s === null;
  put("longest-batch-wait", wait(starving.batch_wait_s));
  at("standing").hidden = !standing.text;
  put("standing-text", standing.text);
  showMemory(memory);
  put("stopped-steps", number(yields.stopped_steps));
  put("stop-mean", duration(yields.stop_response_mean_s));
  put("displaced-requests", number(yields.displaced_requests));
  at("restored").hidden = yields.restored_tokens === null;
  put("restored-tokens", compact(yields.restored_tokens));
  put("recomputed-tokens", compact(harvest.recomputed_tokens));
}

/** Under a second nobody waits. */
const wait = (seconds) => (seconds === null ? "–" : seconds < 1 ? "none" : span(seconds));

function harvestWords(harvest, requests) {
  const { running, waiting } = requests.offline;
  if (harvest.offline_share) return `${percent(harvest.offline_share)} of all tokens the engine computed in the last ten seconds.`;
  if (running + waiting) return "Offline work waits: chat needs everything.";
  return "No offline work has been sent. The idle time goes to waste.";
}

function showChat(chat) {
  const verdict = at("chat-verdict");
  verdict.dataset.state = chat.state;
  if (verdict.querySelector(".text").textContent !== chat.text) verdict.querySelector(".text").textContent = chat.text;
  put("chat-detail", chat.detail);
  if (page.verdict && page.verdict !== chat.text) put("spoken", `${chat.text}.`);
  page.verdict = chat.text;
  meter("ttft-meter", chat.ttft_p50_s, chat.ttft_p99_s, chat.ttft_within, page.facts.ttft_target_s, page.facts.ttft_target_reason);
  meter("tbt-meter", chat.tbt_p50_s, chat.tbt_p99_s, chat.tbt_within, page.facts.tbt_target_s, page.facts.tbt_target_reason);
}

function meter(id, p50, p99, within, target, reason) {
  const full = 1.25 * Math.max(target, p99 ?? 0);
  const place = (value) => `${(100 * (value ?? 0)) / full}%`;
  const one = at(id);
  const kept = within === null || within === 1 ? "" : ` · ${(100 * within).toFixed(1)} % within`;
  const text = p99 === null ? `target ${duration(target)}` : `P99 ${duration(p99)} · P50 ${duration(p50)} · target ${duration(target)}${kept}`;
  if (one.querySelector(".figures").textContent !== text) one.querySelector(".figures").textContent = text;
  put(`${id}-reason`, reason ? `Target ${reason}.` : "");
  one.dataset.late = String((p99 ?? 0) > target);
  one.querySelector(".bar").style.width = place(p99);
  one.querySelector(".median").style.left = place(p50);
  one.querySelector(".median").hidden = p50 === null;
  one.querySelector(".target").style.left = place(target);
}

function showMemory(memory) {
  const { online_blocks: online, offline_blocks: offline, free_blocks: free } = memory;
  const total = online + offline + free;
  const share = (blocks) => (total ? blocks / total : null);
  put("memory-used", percent(share(online + offline)));
  for (const [name, blocks] of Object.entries({ online, offline, free })) put(`memory-${name}`, percent(share(blocks)));
  for (const [name, blocks] of Object.entries({ online, offline })) at("memory-bar").querySelector(`.${name}`).style.width = `${100 * (share(blocks) ?? 0)}%`;
  at("memory-bar").setAttribute("aria-label", `Online ${percent(share(online))}, offline ${percent(share(offline))}, free ${percent(share(free))} of ${plural(total, "block")}`);
  put("memory-history", percent(share(memory.history_blocks)));
  put("memory-found", percent(memory.found_ratio));
  at("checkpointed").hidden = memory.checkpoint_used_ratio === null;
  put("memory-checkpointed", percent(memory.checkpoint_used_ratio));
}

function draw() {
  const points = page.points[page.range_s > FINE_S ? "coarse" : "fine"];
  const until = page.summary.time_s;
  const from = until - page.range_s;
  const first = points.time_s.findIndex((time) => time > from);
  const seen = {};
  for (const name of page.columns) seen[name] = first < 0 ? [] : points[name].slice(Math.max(0, first - 1));
  for (const drawing of drawings) drawing.show(seen, [from, until]);
}

function events({ events: newest }) {
  const items = newest.map((happened) => {
    const item = element("li");
    item.dataset.kind = happened.kind;
    const time = element("time", clockSeconds(happened.time_s));
    time.dateTime = new Date(1000 * happened.time_s).toISOString();
    item.append(time, element("span", happened.text));
    return item;
  });
  at("events").replaceChildren(...items);
}

function bye({ text }) {
  page.leaving = text;
}

function askForKey(wasWrong) {
  const dialog = at("key-dialog");
  at("key-error").textContent = wasWrong ? "The server does not know that key." : "";
  link("connecting");
  dialog.showModal();
  at("key").value = "";
  at("key").focus();
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const given = at("key").value.trim();
      // No header can carry another, and a letter without width is easily copied along.
      if (!/^[ -~]+$/.test(given)) return put("key-error", "A key has ASCII letters only; this one has others.");
      key.set(given);
      dialog.close();
      resolve();
    };
  });
}

at("forget").addEventListener("click", () => { key.forget(); location.reload(); });
at("ranges").addEventListener("click", (event) => {
  const chosen = event.target.closest("button");
  if (!chosen) return;
  page.range_s = Number(chosen.dataset.seconds);
  for (const button of at("ranges").children) button.setAttribute("aria-pressed", String(button === chosen));
  if (page.summary) draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawings.forEach((drawing) => drawing.draw()));
setInterval(() => {
  const silent = document.body.dataset.link === "open" && page.summary && now() - page.heard_s > STALE_S;
  document.body.classList.toggle("stale", Boolean(silent));
  if (silent) banner(`No figures for ${span(now() - page.heard_s)}: the server is busy or the network slow. These are from ${clock(page.summary.time_s)}.`);
}, 1000);
follow("dashboard/feed", on);
