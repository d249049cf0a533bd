// Numbers and moments as people read them. No value is shown as "–", never as 0.

const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clockFormat = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const secondsFormat = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const dayFormat = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

const isNone = (value) => value === null || value === undefined || Number.isNaN(value);

export const number = (value) => (isNone(value) ? NONE : whole.format(value));
export const compact = (value) => (isNone(value) ? NONE : value < 10000 ? whole.format(value) : short.format(value));
export const percent = (value) => (isNone(value) ? NONE : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);
export const plural = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Seconds as "340 ms" or "1.24 s". */
export function duration(seconds) {
  if (isNone(seconds)) return NONE;
  if (seconds === 0) return "0 ms";
  if (seconds < 0.9995) return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** Seconds as "2 h 5 min", two units at most. */
export function span(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let rest = Math.max(0, Math.round(seconds));
  const first = units.findIndex(([, size]) => rest >= size);
  if (first < 0) return "0 s";
  const parts = [];
  for (const [name, size] of units.slice(first, first + 2)) {
    const count = Math.floor(rest / size);
    rest -= count * size;
    if (count) parts.push(`${count} ${name}`);
  }
  return parts.join(" ");
}

export const clock = (time_s) => clockFormat.format(new Date(1000 * time_s));
export const clockSeconds = (time_s) => secondsFormat.format(new Date(1000 * time_s));

/** A moment as "14:05", with its day when that is not today. */
export function moment(time_s) {
  if (isNone(time_s)) return NONE;
  const date = new Date(1000 * time_s);
  return date.toDateString() === new Date().toDateString() ? clock(time_s) : dayFormat.format(date);
}

/** "in 2 h" or "5 min ago". */
export function fromNow(time_s, now_s) {
  const ahead = time_s - now_s;
  return ahead >= 0 ? `in ${span(ahead)}` : `${span(-ahead)} ago`;
}
