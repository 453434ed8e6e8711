"use strict";

const FIELDS = ["name", "block", "kind", "size", "distance", "error", "before", "after", "holdoutBefore", "holdoutAfter",
  "steps", "slowest", "status", "standing", "message"];
const CLASSES = {
  "further from rest than the error": "far", "at rest within the error": "rest", "error unknown": "unknown",
  "left where it is": "unknown",
};
// Rows that are written at a time: the browser lays out what is near the screen, whatever the number of symmetries.
const CHUNK = 200;
// With more symmetries than this, blocks are folded at first.
const UNFOLDED = 60;

const rows = JSON.parse(document.getElementById("data").textContent).map((values) => {
  const row = Object.fromEntries(FIELDS.map((field, place) => [field, values[place] === "inf" ? Infinity : values[place]]));
  row.factor = row.distance === null ? null : Math.exp(row.distance);
  row.text = [row.name, row.block, row.kind, row.status, row.message].join("\n").toLowerCase();
  return row;
});

const element = (id) => document.getElementById(id);
const table = element("symmetries"), body = table.tBodies[0];
const columns = [...table.tHead.rows[0].cells].map((cell) => ({ key: cell.dataset.key, label: cell.textContent }));
const blocks = [...new Set(rows.map((row) => row.block))];
const folded = new Set(rows.length > UNFOLDED && blocks.length > 1 ? blocks : []);
let order = null, items = [], written = 0;

// Texts of cells: a dash where nothing is known, "never" for an infinite number of steps.
const digits = (value, count = 3) => {
  if (value === null) return "–";
  if (value === Infinity) return "∞";
  const extreme = value !== 0 && (value < 0.001 || value >= 1e5);
  return extreme ? value.toExponential(Math.min(count - 1, 1)) : String(Number(value.toPrecision(count)));
};
const steps = (value) => value === null ? "–" : value === Infinity ? "never"
  : value < 1e7 ? Math.round(value).toLocaleString("en") : value.toExponential(1);
const TEXTS = {
  size: (row) => row.size.toLocaleString("en"),
  distance: (row) => digits(row.distance) + (row.error === null ? "" : " ± " + digits(row.error, 1)),
  factor: (row) => row.factor === null ? "–" : "×" + digits(row.factor),
  steps: (row) => steps(row.steps),
  slowest: (row) => steps(row.slowest),
};
const NUMBERS = ["before", "after", "holdoutBefore", "holdoutAfter"];
const text = (row, key) => TEXTS[key] ? TEXTS[key](row) : NUMBERS.includes(key) ? digits(row[key]) : row[key];

// `textContent` only: a name is never read as HTML.
function made(tag, content = "", kind = "") {
  const node = document.createElement(tag);
  node.textContent = content;
  if (kind) node.className = kind;
  return node;
}

function line(row) {
  const node = made("tr", "", row.status === "converged" ? CLASSES[row.standing] : "open");
  node.append(...columns.map(({ key, label }) => {
    const cell = made("td");
    cell.dataset.label = label;
    cell.append(made(key === "name" ? "bdi" : "span", text(row, key)));
    if (key === "status") {
      const words = row.standing + (row.message ? ". " + row.message : "");
      cell.append(made("span", words, "message"));
    }
    return cell;
  }));
  return node;
}

function heading(block, group) {
  const node = made("tr", "", "block"), cell = made("th"), button = made("button", "");
  button.append(made("bdi", block));
  button.type = "button";
  button.setAttribute("aria-expanded", String(!folded.has(block)));
  button.addEventListener("click", () => {
    if (!folded.delete(block)) folded.add(block);
    show(written);
  });
  cell.colSpan = columns.length;
  cell.scope = "rowgroup";
  const largest = group.reduce((most, row) => Math.max(most, row.distance ?? -1), -1);
  const far = group.filter((row) => CLASSES[row.standing] === "far").length;
  const parts = [group.length.toLocaleString("en") + (group.length === 1 ? " symmetry" : " symmetries")];
  if (far) parts.push(far.toLocaleString("en") + " further from rest than the error");
  if (largest >= 0) parts.push("largest distance " + digits(largest) + ", a factor " + digits(Math.exp(largest)));
  cell.append(button, made("span", " " + parts.join("; ")));
  node.append(cell);
  return node;
}

// The rows that pass both filters, in order, as a list of headings and rows.
function arranged() {
  const words = element("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const state = element("state").value;
  const passing = rows.filter((row) =>
    words.every((word) => row.text.includes(word)) && (!state || row.status === state || row.standing === state));
  if (order) {
    const value = (row) => row[order.key] ?? "";
    passing.sort((a, b) => compare(value(a), value(b), order.sign));
  }
  element("count").textContent = passing.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en");
  const grouped = element("grouped").checked;
  element("fold").disabled = element("unfold").disabled = !grouped;
  if (!grouped) return passing.map((row) => () => line(row));
  const groups = new Map();
  for (const row of passing) {
    if (!groups.has(row.block)) groups.set(row.block, []);
    groups.get(row.block).push(row);
  }
  return [...groups].flatMap(([block, members]) => [
    () => heading(block, members), ...(folded.has(block) ? [] : members.map((row) => () => line(row))),
  ]);
}

function show(least = 0) {
  items = arranged();
  written = 0;
  body.replaceChildren();
  more(Math.max(least, CHUNK));
}

function more(count = CHUNK) {
  body.append(...items.slice(written, written + count).map((item) => item()));
  written = Math.min(written + count, items.length);
  // Observed anew, because an observer reports changes only: the end may still be on the screen.
  watcher.unobserve(element("more"));
  if (written < items.length) watcher.observe(element("more"));
}

const watcher = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) more();
}, { rootMargin: "800px" });

sortable(table, (column, sign) => {
  order = { key: columns[column].key, sign };
  show();
});
element("search").addEventListener("input", () => {
  // A match in a folded block would not be seen.
  if (element("search").value) folded.clear();
  show();
});
element("state").addEventListener("change", () => show());
element("grouped").addEventListener("change", () => show());
element("fold").addEventListener("click", () => {
  blocks.forEach((block) => folded.add(block));
  show();
});
element("unfold").addEventListener("click", () => {
  folded.clear();
  show();
});
window.addEventListener("beforeprint", () => more(items.length));
show();
