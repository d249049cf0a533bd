// What the charts show of a point. `facts` are the server's own: its targets, above all.

import { Chart } from "./charts.js";
import { compact, duration, number, percent } from "./words.js";

const roomy = (max, least) => Math.max(least, 1.08 * max);
const column = (name) => (points, i) => points[name][i];
const newest = (points, name) => points[name].at(-1);

function latency(figure, title, [p50, p99], target) {
  const series = [
    { label: "P99", tone: "online", dots: true, read: column(p99) },
    { label: "P50", tone: "online-soft", width: 1.5, dash: [4, 3], dots: true, read: column(p50) },
  ];
  return new Chart(figure, {
    title,
    note: "online requests, over ten seconds each",
    format: duration,
    plots: [{ height: 170, series, format: duration, limit: target, top: (max) => roomy(max, 1.25 * target()) }],
    speak: (points) =>
      `${title} of online requests: P99 ${duration(newest(points, p99))}, ` +
      `P50 ${duration(newest(points, p50))}, target ${duration(target())}.`,
  });
}

function tokens(figure) {
  const online = { label: "online", tone: "online", area: true, read: column("online_tps") };
  const offline = { label: "offline", tone: "offline", area: true, below: "online", read: column("offline_tps") };
  const arrivals = { label: "chat arrivals/s", tone: "online", area: true, read: column("online_rps") };
  return new Chart(figure, {
    title: "Tokens a second",
    note: "computed, prompts and output; below, chat requests as they arrive",
    format: (value, series) => (series === arrivals ? (value ?? 0).toFixed(value && value < 10 ? 1 : 0) : compact(value)),
    plots: [
      // What is drawn first lies below: the sum of both, then the online part of it.
      { height: 220, series: [offline, online], format: compact, top: (max) => roomy(max, 10) },
      { height: 54, series: [arrivals], format: number, top: (max) => roomy(max, 2) },
    ],
    speak: (points) =>
      `Tokens computed a second: online ${number(newest(points, "online_tps"))}, ` +
      `offline ${number(newest(points, "offline_tps"))}. Chat requests a second: ${newest(points, "online_rps") ?? "none"}.`,
  });
}

function share(name) {
  return (points, i) => {
    const used = points[name][i];
    if (used === null) return null;
    return used / (points.kv_online_blocks[i] + points.kv_offline_blocks[i] + points.kv_free_blocks[i] || 1);
  };
}

function memory(figure) {
  const online = { label: "online", tone: "online", area: true, read: share("kv_online_blocks") };
  const offline = { label: "offline", tone: "offline", area: true, below: "online", read: share("kv_offline_blocks") };
  return new Chart(figure, {
    title: "KV memory in use",
    note: "share of all blocks",
    format: percent,
    plots: [{ height: 140, series: [offline, online], format: percent, top: () => 1 }],
    speak: (points) => {
      const last = points.time_s.length - 1;
      return `KV memory in use: online ${percent(last < 0 ? null : online.read(points, last))}, offline ${percent(last < 0 ? null : offline.read(points, last))}.`;
    },
  });
}

function error(figure) {
  const series = [{ label: "error", tone: "soft", read: column("latency_model_error") }];
  return new Chart(figure, {
    title: "Latency model",
    note: "mean error of the predicted step time, recent steps",
    format: percent,
    plots: [{ height: 140, series, format: percent, top: (max) => roomy(max, 0.1) }],
    speak: (points) => `Mean error of the latency model: ${percent(newest(points, "latency_model_error"))}.`,
  });
}

export function charts(facts) {
  const at = (id) => document.getElementById(id);
  return [
    tokens(at("tokens")),
    latency(at("ttft"), "Time to first token", ["ttft_p50_s", "ttft_p99_s"], () => facts().ttft_target_s),
    latency(at("tbt"), "Time between tokens", ["tbt_p50_s", "tbt_p99_s"], () => facts().tbt_target_s),
    memory(at("memory")),
    error(at("error")),
  ];
}
