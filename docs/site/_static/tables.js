// Tables that sort by a click or the Enter key on a heading, and filter by words and by choices.
const number = text => { const found = text.match(/^[+−-]?\d[\d.,]*/); return found ? Number(found[0].replace("−", "-").replace(",", "")) : NaN; };

function order(a, b) {
  const [x, y] = [number(a), number(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
  return a.localeCompare(b);
}

function sortBy(table, column, heading) {
  const rising = heading.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  const text = row => row.cells[column].textContent.trim();
  rows.sort((a, b) => (rising ? 1 : -1) * order(text(a), text(b)));
  table.tBodies[0].append(...rows);
}

function filter(box) {
  const words = box.querySelector("[data-find]").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...box.querySelectorAll("select")].filter(o => o.value);
  const rows = [...box.querySelector("table").tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(o => text.includes(o)) || !chosen.every(o => row.cells[o.dataset.column].textContent.trim() === o.value);
  }
  box.querySelector("output").textContent = `${rows.filter(o => !o.hidden).length} of ${rows.length}`;
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      button.addEventListener("click", () => sortBy(table, column, heading));
      heading.replaceChildren(button);
      heading.scope = "col";
    });
  }
  // On a phone a row with a verdict becomes a block: each cell then names its column.
  for (const table of document.querySelectorAll("table:has(.verdict)")) {
    const heads = [...table.tHead.rows[0].cells].map(o => o.textContent.trim());
    for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, k) => { cell.dataset.label = heads[k]; });
  }
  for (const box of document.querySelectorAll(".filtered")) {
    box.addEventListener("input", () => filter(box));
    filter(box);
  }
});
