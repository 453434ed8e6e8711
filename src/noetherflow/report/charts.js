"use strict";

const SVG = "http://www.w3.org/2000/svg";
// Height of a chart and its margins, in pixels.
const HEIGHT = 260, LEFT = 64, RIGHT = 12, TOP = 12, BOTTOM = 30;
// Curves of different colours in watch.css.
const COLOURS = 7;
// A band extends the axis by at most this factor beyond the curve.
const BEYOND = 10;

const charts = JSON.parse(document.getElementById("data").textContent);
const number = (value) => value === "inf" ? Infinity : value === "-inf" ? -Infinity : value;
for (const { series } of charts.flatMap((chart) => chart.choices)) {
  for (const curve of series) {
    for (const key of ["low", "high"]) if (curve[key]) curve[key] = curve[key].map(number);
  }
}

// `textContent` only: a name is never read as HTML.
function made(tag, content = "", kind = "") {
  const node = document.createElement(tag);
  node.textContent = content;
  if (kind) node.className = kind;
  return node;
}

function drawn(tag, attributes, content = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = content;
  return node;
}

// Smallest and largest value that an axis must show.
function range(series, log) {
  const fits = (value) => value !== null && Number.isFinite(value) && (!log || value > 0);
  const ends = (columns) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of columns.flat()) if (fits(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    return [low, high];
  };
  const [low, high] = ends(series.map((curve) => curve.y));
  const [least, most] = ends(series.flatMap((curve) => curve.low ? [curve.low, curve.high] : []));
  if (low > high) return least > most ? [1, 1] : [least, most];
  if (least > most) return [low, high];
  return log ? [Math.min(low, Math.max(least, low / BEYOND)), Math.max(high, Math.min(most, high * BEYOND))]
    : [Math.min(low, least), Math.max(high, most)];
}

// Stretches of places without a gap.
function stretches(count, known) {
  const all = [];
  for (let k = 0, before = false; k < count; k += 1) {
    const now = known(k);
    if (now && !before) all.push([]);
    if (now) all[all.length - 1].push(k);
    before = now;
  }
  return all;
}

function curveOf(curve, x, y, log) {
  const group = drawn("g", {}), { x: steps, y: values, low, high } = curve;
  const point = (k, value) => x.at(steps[k]).toFixed(2) + "," + y.at(value).toFixed(2);
  if (low) {
    // Beyond the axis, a band ends at the edge of the chart; an end that is unbounded, too.
    const [floor, top] = [log ? 10 ** y.low : y.low, log ? 10 ** y.high : y.high];
    const inside = (value, missing) => value === null ? missing : Math.min(Math.max(value, floor), top);
    for (const part of stretches(steps.length, (k) => low[k] !== null || high[k] !== null)) {
      const upper = part.map((k) => point(k, inside(high[k], top)));
      const lower = part.map((k) => point(k, inside(low[k], floor))).reverse();
      group.append(drawn("path", { class: "band", d: "M" + [...upper, ...lower].join("L") + "Z" }));
    }
  }
  for (const part of stretches(steps.length, (k) => values[k] !== null && (!log || values[k] > 0))) {
    const [first] = part;
    group.append(part.length > 1 ? drawn("path", { class: "curve", d: "M" + part.map((k) => point(k, values[k])).join("L") })
      : drawn("circle", { class: "dot", r: 2.5, cx: x.at(steps[first]).toFixed(2), cy: y.at(values[first]).toFixed(2) }));
  }
  return group;
}

function picture(svg, choice, log) {
  const width = Math.max(svg.clientWidth, 200), series = choice.series;
  const steps = series.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]);
  const x = axis(Math.min(...steps), Math.max(...steps), LEFT, width - RIGHT, false);
  const y = axis(...range(series, log), HEIGHT - BOTTOM, TOP, log);
  svg.replaceChildren();
  svg.setAttribute("height", HEIGHT);
  for (const tick of y.ticks) {
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.at(tick), y2: y.at(tick) }));
    svg.append(drawn("text", { class: "y", x: LEFT - 6, y: y.at(tick) + 4, "text-anchor": "end" }, digits(tick, 3)));
  }
  for (const tick of x.ticks.filter(Number.isInteger)) {
    svg.append(drawn("line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }));
    const anchor = x.at(tick) > width - 40 ? "end" : "middle";
    svg.append(drawn("text", { class: "x", x: x.at(tick), y: HEIGHT - 8, "text-anchor": anchor }, tick.toLocaleString("en")));
  }
  series.forEach((curve, index) => {
    const group = curveOf(curve, x, y, log);
    group.setAttribute("class", "s" + index % COLOURS);
    svg.append(group);
  });
  const pointer = drawn("line", { class: "pointer", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(pointer);
  return { x, pointer };
}

// The place of the step that is nearest to a position, in steps in ascending order.
function nearest(steps, at, position) {
  let [low, high] = [0, steps.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (at(steps[middle]) <= position) low = middle; else high = middle;
  }
  return Math.abs(at(steps[high]) - position) < Math.abs(at(steps[low]) - position) ? high : low;
}

// Value and interval of a curve at a place.
function reading(curve, place) {
  const text = digits(curve.y[place]);
  if (!curve.low || (curve.low[place] === null && curve.high[place] === null)) return text;
  return text + " (" + digits(curve.low[place]) + " to " + digits(curve.high[place]) + ")";
}

function section(chart) {
  const node = made("section"), figure = made("div", "", "chart"), svg = drawn("svg", { role: "img", tabindex: 0 });
  const keys = made("ul", "", "keys"), at = made("p", "", "at"), note = made("p", "", "note"), select = made("select");
  svg.setAttribute("aria-label", chart.title);
  select.append(...chart.choices.map((choice) => made("option", choice.label)));
  const heading = made("h2");
  heading.append(made("bdi", chart.title));
  const label = made("label", "show ");
  label.append(select);
  figure.append(svg);
  node.append(heading, made("p", chart.text, "note"));
  if (chart.choices.length > 1) node.append(label);
  node.append(figure, keys, at, note);
  let choice, shown, outputs, position = null;

  function read() {
    // Steps of the curves differ; the step that is said is that of the nearest point of any curve.
    const places = choice.series.map((curve) => nearest(curve.x, shown.x.at, position));
    const steps = places.map((place, index) => choice.series[index].x[place]);
    const step = steps.reduce((best, other) =>
      Math.abs(shown.x.at(other) - position) < Math.abs(shown.x.at(best) - position) ? other : best);
    at.textContent = "step " + step.toLocaleString("en");
    outputs.forEach((output, index) => {
      output.textContent = steps[index] === step ? reading(choice.series[index], places[index]) : "–";
    });
    shown.pointer.setAttribute("x1", shown.x.at(step));
    shown.pointer.setAttribute("x2", shown.x.at(step));
    shown.pointer.setAttribute("visibility", "visible");
    return step;
  }

  function draw() {
    choice = chart.choices[select.selectedIndex < 0 ? 0 : select.selectedIndex];
    note.textContent = choice.note;
    shown = picture(svg, choice, chart.log);
    at.textContent = "steps";
    position = null;
    outputs = choice.series.map(() => made("output"));
    keys.replaceChildren(...choice.series.map((curve, index) => {
      const key = made("li", "", "s" + index % COLOURS), line = drawn("svg", { "aria-hidden": "true" });
      line.append(drawn("line", { class: "curve", x1: 0, x2: 28, y1: 5, y2: 5 }));
      key.append(line, made("bdi", curve.label), outputs[index]);
      return key;
    }));
  }

  function leave() {
    position = null;
    at.textContent = "steps";
    outputs.forEach((output) => { output.textContent = ""; });
    shown.pointer.setAttribute("visibility", "hidden");
  }

  svg.addEventListener("pointermove", (event) => {
    position = event.clientX - svg.getBoundingClientRect().left;
    read();
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const sign = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!sign) return;
    event.preventDefault();
    const steps = [...new Set(choice.series.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    const place = position === null ? (sign > 0 ? 0 : steps.length - 1) : nearest(steps, shown.x.at, position) + sign;
    position = shown.x.at(steps[Math.min(Math.max(place, 0), steps.length - 1)]);
    read();
  });
  select.addEventListener("change", draw);
  return { node, draw };
}

const sections = charts.map(section);
document.getElementById("charts").append(...sections.map(({ node }) => node));
// A chart is drawn in pixels of its width, so that letters keep their size.
let width = 0;
new ResizeObserver(() => {
  const now = document.getElementById("charts").clientWidth;
  if (now === width) return;
  width = now;
  sections.forEach(({ draw }) => draw());
}).observe(document.getElementById("charts"));
