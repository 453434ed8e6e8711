"use strict";

// Axes of a chart: positions of values, and the numbers at the grid.

// Text of a number with a few significant digits.
function digits(value, count = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "unbounded" : "–∞";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(count - 1)
    : Number(value.toPrecision(count)).toLocaleString("en", { maximumSignificantDigits: Math.max(count, 1) });
}

// The smallest of 1, 2, 5 times a power of ten that is at least a number.
function roundStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9)) * power;
}

// An axis from `low` to `high` that is drawn from pixel `from` to pixel `to`.
function axis(low, high, from, to, log) {
  const value = log ? Math.log10 : Number;
  let [a, b] = [value(low), value(high)];
  // A curve that is constant lies in the middle. The least width is what doubles can distinguish.
  if (!(b - a > 1e-12 * Math.max(Math.abs(a), Math.abs(b)))) {
    const margin = log ? 0.3 : Math.abs(a) * 0.1 || 1;
    [a, b] = [a - margin, b + margin];
  }
  const at = (x) => from + (to - from) * (value(x) - a) / (b - a);
  return { at, ticks: log ? decades(a, b) : linear(a, b, Math.abs(to - from) / 60), low: a, high: b };
}

function linear(a, b, count) {
  const step = roundStep((b - a) / Math.max(Math.floor(count), 2)), ticks = [];
  // Sums of steps would carry their rounding errors along. A zero is added because -0 would be shown with its sign.
  for (let k = Math.ceil(a / step - 1e-9); k <= b / step + 1e-9; k += 1) ticks.push(k * step + 0);
  return ticks;
}

// Powers of ten; with few of them in the range, also 2 and 5 times these.
function decades(a, b) {
  const every = Math.max(Math.ceil((b - a) / 6), 1), ticks = [];
  for (let k = Math.floor(a / every) * every; k <= b; k += every) {
    for (const factor of b - a < 2 ? [1, 2, 5] : [1]) {
      const x = Math.log10(factor) + k;
      if (x >= a - 1e-9 && x <= b + 1e-9) ticks.push(factor * 10 ** k);
    }
  }
  return ticks.length > 1 ? ticks : [...new Set([...ticks, 10 ** a, 10 ** b])].sort((x, y) => x - y);
}
