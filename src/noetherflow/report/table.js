"use strict";

// A table with a button in each heading: a click sorts in ascending order, a second click in descending order.
function sortable(table, sort) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((cell) => cell.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(column, descending ? -1 : 1);
    });
  });
}

// Numbers by size in the direction `sign`, then, in either direction, texts: a number that is missing stays at the end.
const collator = new Intl.Collator("en", { numeric: true });
function compare(a, b, sign) {
  const [x, y] = [typeof a === "number", typeof b === "number"];
  if (x !== y) return x ? -1 : 1;
  return sign * (x ? (a < b ? -1 : Number(a > b)) : collator.compare(a, b));
}

// Tables whose rows are in the page: a row is sorted by `data-sort` of its cell, or by the text of the cell.
for (const table of document.querySelectorAll("table.sortable")) {
  const [body] = table.tBodies;
  sortable(table, (column, sign) => {
    const value = (row) => {
      const text = row.cells[column].dataset.sort ?? row.cells[column].textContent;
      return Number.isNaN(Number(text)) ? text : Number(text);
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
  });
}
