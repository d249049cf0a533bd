// The table of batches. Texts of batches are other people's: they become text nodes, nothing else.

import { element } from "./charts.js";
import { authorization } from "./feed.js";
import { fromNow, moment, number, percent, span } from "./words.js";

const DEADLINES = { unknown: "", on_track: "on track", at_risk: "at risk", will_miss: "will miss", met: "met", missed: "missed" };
const ENDED_SHOWN = 5;

const at = (id) => document.getElementById(id);
const rows = new Map();
let batches;
let showAll = false;

export function showBatches(newest) {
  batches = newest;
  at("batches").hidden = false;
  const live = batches.data.filter((batch) => !batch.is_ended);
  const ended = batches.data.filter((batch) => batch.is_ended);
  const shown = [...live, ...(showAll ? ended : ended.slice(0, ENDED_SHOWN))];
  at("batch-table").hidden = !shown.length;
  note(shown.length);
  const hidden = ended.length - ENDED_SHOWN;
  at("more-batches").hidden = hidden <= 0;
  at("more-batches").textContent = showAll ? "Show fewer" : `Show ${hidden} more that have ended`;
  keep(shown);
}

function note(count) {
  const text = batches.error ?? (count ? (batches.has_more ? "The newest 50 of this key." : "") : "No batches of this key.");
  at("batches-note").textContent = text;
  at("batches-note").hidden = !text;
}

/** Rows stay the same elements, in the order given, so that focus and selection stay too. */
function keep(shown) {
  const body = at("batch-table").tBodies[0];
  const ids = new Set(shown.map((batch) => batch.id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    row.remove();
    rows.delete(id);
  }
  shown.forEach((batch, index) => {
    const row = rows.get(batch.id) ?? newRow(batch.id);
    rows.set(batch.id, row);
    fill(row, batch);
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
  });
}

function newRow(id) {
  const row = element("tr");
  const cell = (label, name = "td") => {
    const made = element(name);
    made.dataset.label = label;
    row.append(made);
    return made;
  };
  const name = cell("Batch", "th");
  name.scope = "row";
  name.append(element("span", "", "name"), element("small", id, "soft"));
  cell("Status").append(element("span", "", "chip"), element("small", "", "bad reason"));
  const bar = element("progress");
  bar.max = 1;
  cell("Progress").append(bar, element("small", "", "soft counts"));
  cell("Due").append(element("span", "", "due"), element("small", "", "deadline"));
  cell("Expected end").append(element("span", "", "end"), element("small", "", "soft speed"));
  const button = element("button", "Cancel", "quiet");
  button.type = "button";
  cell("").append(button);
  return row;
}

function fill(row, batch) {
  const part = (selector) => row.querySelector(selector);
  const say = (selector, text) => {
    if (part(selector).textContent !== text) part(selector).textContent = text;
  };
  const now_s = Date.now() / 1000;
  const counts = batch.request_counts;
  const title = batch.name ?? batch.endpoint;
  say(".name", title);
  const state = batch.is_paused ? "paused" : batch.status;
  say(".chip", state.replace("_", " "));
  part(".chip").dataset.state = state;
  say(".reason", batch.error ?? "");
  part("progress").value = batch.progress;
  part("progress").setAttribute("aria-label", `Progress of ${title}`);
  const failed = counts.failed ? `, ${number(counts.failed)} failed` : "";
  say(".counts", `${percent(batch.progress)} · ${number(counts.completed)} of ${number(counts.total)}${failed}`);
  const due = batch.deadline ?? batch.expires_at;
  say(".due", batch.is_ended || !due ? "" : fromNow(due, now_s));
  say(".deadline", DEADLINES[batch.deadline_state] ?? "");
  part(".deadline").dataset.state = batch.deadline_state;
  const end = batch.estimated_finish_at;
  say(".end", end ? (end > now_s ? `${moment(end)}` : "soon") : batch.is_ended ? "" : "not known yet");
  say(".speed", end > now_s ? `in ${span(end - now_s)}` : "");
  const button = part("button");
  button.hidden = !batch.is_cancellable;
  button.setAttribute("aria-label", `Cancel ${title} ${batch.id}`);
  button.onclick = () => askToCancel(batch, title);
}

function askToCancel(batch, title) {
  const dialog = at("cancel-dialog");
  at("cancel-name").textContent = `${title} (${batch.id})`;
  at("cancel-error").textContent = "";
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    const error = await cancel(batch.id);
    if (error) at("cancel-error").textContent = error;
    else dialog.close();
  };
  at("cancel-no").onclick = () => dialog.close();
  dialog.showModal();
  at("cancel-no").focus();
}

/** What went wrong, in words, or nothing. */
async function cancel(id) {
  try {
    const response = await fetch(`v1/batches/${encodeURIComponent(id)}/cancel`, { method: "POST", headers: authorization() });
    if (response.ok) return "";
    const body = await response.json().catch(() => ({}));
    return body.error?.message ?? `The server answered ${response.status}.`;
  } catch {
    return "The server does not answer.";
  }
}

at("more-batches").addEventListener("click", () => {
  showAll = !showAll;
  showBatches(batches);
});
