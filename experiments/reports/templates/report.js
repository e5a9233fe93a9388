"use strict";
// Tables sort by a click on a heading; figures say the value nearest to the pointer. Without this script the
// page shows all the same, with the browser's own tooltips.
document.documentElement.classList.add("live");
const tip = document.getElementById("tip");

function compare(a, b) {
  // Empty cells come last in both directions: see sortable.
  const [x, y] = [Number(a.dataset.value), Number(b.dataset.value)];
  return Number.isNaN(x) || Number.isNaN(y)
    ? a.textContent.localeCompare(b.textContent, "en", {numeric: true})
    : x - y;
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.best === "max" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.ariaSort === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const empty = (cell) => head.classList.contains("n") && !("value" in cell.dataset);
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.ariaSort = order;
      const rows = [...body.rows].sort((one, two) => {
        const [a, b] = [one.cells[column], two.cells[column]];
        return empty(a) - empty(b) || (empty(a) ? 0 : sign * compare(a, b));
      });
      body.append(...rows);
    });
  });
}

function readable(figure) {
  const plot = figure.querySelector(".plot");
  const targets = [...plot.querySelectorAll(".targets circle")];
  const keys = [...figure.querySelectorAll(".keys button")];
  let single = null, shown = null;

  const middle = (target) => {
    const box = target.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const offered = () => targets.filter((t) => single === null || t.dataset.series === single);

  function hide() {
    shown?.classList.remove("on");
    shown = null;
    tip.hidden = true;
  }
  function show(target) {
    hide();
    shown = target;
    target.classList.add("on");
    tip.textContent = target.querySelector("title").textContent;
    tip.hidden = false;
    const [x, y] = middle(target);
    const width = document.documentElement.clientWidth;
    const left = Math.max(4, Math.min(x - tip.offsetWidth / 2, width - tip.offsetWidth - 4));
    const above = y - tip.offsetHeight - 12;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : y + 12) + scrollY}px`;
  }
  function nearest(event) {
    let best = null, least = 40;
    for (const target of offered()) {
      const [x, y] = middle(target);
      const distance = Math.hypot(x - event.clientX, y - event.clientY);
      if (distance < least) [best, least] = [target, distance];
    }
    if (best) show(best);
    else hide();
  }
  function only(series) {
    single = series === single ? null : series;
    hide();
    plot.classList.toggle("single", single !== null);
    for (const each of plot.querySelectorAll("g[data-series]")) each.classList.toggle("on", each.dataset.series === single);
    for (const key of keys) key.ariaPressed = String(key.dataset.series === single);
  }

  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    const list = offered();
    if (event.key === "Escape") hide();
    if (!step || !list.length) return;
    event.preventDefault();
    const next = shown ? list.indexOf(shown) + step : Math.min(step, 0);
    show(list.at(next % list.length));
  });
  for (const key of keys) key.addEventListener("click", () => only(key.dataset.series));
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("figure").forEach(readable);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
