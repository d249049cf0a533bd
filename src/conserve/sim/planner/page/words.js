// Figures as words.

const GPUS = { h100: "H100", h200: "H200", "a100-80": "A100 80 GB", "a100-40": "A100 40 GB", l40s: "L40S" };
const MODELS = {
  "llama-2-7b": "Llama-2-7B",
  "llama-3.1-8b": "Llama-3.1-8B",
  "llama-3.1-70b": "Llama-3.1-70B",
  "qwen-2.5-14b": "Qwen-2.5-14B",
};

export function gpuName(machine) {
  const name = GPUS[machine.gpu] ?? machine.gpu;
  return machine.num_gpus > 1 ? `${machine.num_gpus} x ${name}` : name;
}

export function modelName(machine) {
  return MODELS[machine.model] ?? machine.model;
}

/** Three digits: 16,700; 5.12; 0.25. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  return Number(value.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 2 });
}

export function milliseconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds >= 10 ? `${number(seconds)} s` : `${number(seconds * 1000)} ms`;
}

export function percent(share) {
  if (share === null || share === undefined) return "–";
  // A hundred means all: what is nearly all is not rounded to it.
  const digits = share > 0.995 && share < 1 ? 1 : 0;
  return `${(Math.floor(share * 1000) / 10).toFixed(digits)} %`;
}

export function times(ratio) {
  return ratio === null ? "–" : `${ratio.toFixed(ratio < 10 ? 2 : 1)}x`;
}

/** A bound on chat's slowdown as `--chat-slowdown` takes it, by its name where it is one of the named levels. */
export function levelName(slowdown, levels) {
  return Object.keys(levels).find((name) => levels[name] === slowdown) ?? `${slowdown}`;
}

export function levelMeaning(slowdown) {
  if (slowdown === 0) return "as slow as the targets allow";
  return `a step with chats may take ${slowdown} times as long as without offline work`;
}

export function burstName(cv) {
  return cv <= 1 ? "one by one, by chance" : cv < 3 ? "in small bursts" : "in bursts";
}
