"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = ["auto", "light", "dark"], key = "quantkit-theme";
  const show = (name) => {
    if (name === "auto") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", name);
    button.textContent = "Theme: " + name;
  };
  let now = "auto";
  try { now = localStorage.getItem(key) || "auto"; } catch { /* a file may have no storage */ }
  if (!names.includes(now)) now = "auto";
  show(now);
  button.addEventListener("click", () => {
    now = names[(names.indexOf(now) + 1) % names.length];
    show(now);
    try { localStorage.setItem(key, now); } catch { /* then it lasts as long as the page */ }
  });

  const value = (cell, numeric) => {
    const raw = cell.dataset.sort;
    return raw === undefined ? null : numeric ? Number(raw) : raw;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("num");
      const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way);
      const rows = [...table.tBodies[0].rows].map((row) => [value(row.cells[column], numeric), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // nothing known: last either way
        return way === "ascending" ? compare(a, b) : compare(b, a);
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }
})();
