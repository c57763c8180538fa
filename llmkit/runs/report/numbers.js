"use strict";

// ---------------------------------------------------------------- numbers and elements

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null)); // text stays text: nothing is parsed as HTML
  return node;
}

// A name as children of an element: a line may end between its words, after `_`, `/`, `-`, `.`, `=` and `,`.
function breakable(name) {
  return name.split(/(?<=[_/\-.=,])/).flatMap((word, i) => (i ? [el("wbr"), word] : [word]));
}

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

const UNITS = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "k"],
];

function quantity(number) {
  for (const [size, unit] of UNITS) {
    if (Math.abs(number) >= size) return +(number / size).toPrecision(4) + unit;
  }
  return String(+number.toPrecision(4));
}

function duration(seconds) {
  if (seconds < 60) return `${+seconds.toFixed(1)} s`;
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60), Math.floor(seconds % 60)];
  if (h) return m ? `${h} h ${m} min` : `${h} h`;
  return s ? `${m} min ${s} s` : `${m} min`;
}

function decimal(value, digits = 5) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return quantity(value);
  if (size >= 1e3) return value.toLocaleString("en-US", { maximumSignificantDigits: digits });
  if (size < 1e-3) return value.toExponential(digits - 3).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(digits));
}

const percent = (value) => `${+(100 * value).toPrecision(4)}%`;
const AXES = {
  tokens: { label: "tokens", format: quantity },
  seconds: { label: "time", format: duration },
  step: { label: "step", format: (step) => step.toLocaleString("en-US") },
};

// ---------------------------------------------------------------- ticks

function linearTicks(low, high, count, whole = false) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(
    [1, 2, whole ? 5 : 2.5, 5, 10].find((factor) => factor * power >= rough) * power,
    whole ? 1 : 0,
  );
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

const CLOCK = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

function timeTicks(low, high, count) {
  const rough = (high - low) / count;
  if (rough < 1 || rough > 86400) return linearTicks(low, high, count);
  const step = CLOCK.find((seconds) => seconds >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) ticks.push(at);
  return ticks;
}

function logTicks(low, high, count) {
  for (const factors of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const factor of factors) ticks.push(+(factor * 10 ** power).toPrecision(3));
    }
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length < 3) break; // less than the factors can tell apart
    if (inside.length <= count + 3) return inside;
  }
  if (high / low < 30) return linearTicks(low, high, count).filter((tick) => tick > 0);
  const [first, last] = [Math.ceil(Math.log10(low)), Math.floor(Math.log10(high))];
  const every = Math.ceil((last - first + 1) / count);
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i)).filter((_, i) => i % every === 0);
}

// The index of the number in ascending `xs` that is nearest to `x`.
function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return x - xs[low] <= xs[high] - x ? low : high;
}

function limits(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}
