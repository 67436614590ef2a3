// Tables are sorted by their headings, and filtered by what is typed: the page works without it.
"use strict";

function sortTable(table, index, kind, order) {
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[index].dataset.value ?? row.cells[index].textContent;
  const compare = (a, b) => {
    const x = value(a), y = value(b);
    if (kind === "text") return sign * x.localeCompare(y, undefined, { numeric: true });
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stands last
    return sign * (Number(x) - Number(y));
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
  [...table.tHead.rows[0].cells].forEach((cell, at) => {
    if (cell.hasAttribute("aria-sort")) cell.setAttribute("aria-sort", at === index ? order : "none");
  });
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const cell = button.closest("th");
    const kind = button.dataset.kind;
    const first = kind === "text" ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    sortTable(button.closest("table"), cell.cellIndex, kind, cell.getAttribute("aria-sort") === first ? other : first);
  });
}

for (const input of document.querySelectorAll("input[data-filters]")) {
  const table = document.getElementById(input.dataset.filters);
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}
