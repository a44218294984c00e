"use strict";
document.documentElement.classList.add("scripted");

/* A click on a column's title sorts the table by it; the next click reverses the order. */
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  titles.forEach((title, column) => {
    const button = title.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const now = title.getAttribute("aria-sort");
      const next = now ? (now === "ascending" ? "descending" : "ascending") : button.dataset.first;
      for (const each of titles) each.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", next);
      const way = next === "ascending" ? 1 : -1;
      const value = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.sort ?? cell.textContent.trim();
        return title.classList.contains("number") ? Number(text.replaceAll(",", "")) : text;
      };
      const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      body.append(...[...body.rows].sort((a, b) => way * compare(value(a), value(b))));
    });
  });
}

for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}
