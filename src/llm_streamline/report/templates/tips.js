// Shows the number under the pointer: marks carry data-tip, the heat map its values (ten-thousandths of a cosine).
(function () {
  "use strict";
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18) + "px";
  }

  function hide() {
    tip.hidden = true;
    document.querySelectorAll(".cursor").forEach((c) => c.setAttribute("visibility", "hidden"));
  }

  function cellAt(map, event) {
    const place = map.getScreenCTM();
    if (!place) return null;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(place.inverse());
    const [left, top, side] = map.dataset.box.split(",").map(Number);
    const layers = Number(map.dataset.layers), cell = side / layers;
    const start = Math.floor((at.x - left) / cell), length = layers - Math.floor((at.y - top) / cell);
    if (start < 0 || length < 1 || start + length > layers) return null;
    map.table = map.table || map.dataset.values.split(",");
    const value = map.table[start * layers - (start * (start - 1)) / 2 + length - 1];
    const cursor = map.querySelector(".cursor");
    for (const [key, number] of Object.entries({
      x: left + start * cell, y: top + (layers - length) * cell, width: cell, height: cell,
    })) cursor.setAttribute(key, number);
    cursor.setAttribute("visibility", "visible");
    const name = length === 1 ? `layer ${start}` : `layers ${start}–${start + length - 1} (${length})`;
    return value ? `${name}: cosine ${(value / 10000).toFixed(4)}` : `${name}: not measured`;
  }

  function look(event) {
    const target = event.target instanceof Element ? event.target : document.body;
    const map = target.closest("svg.heatmap"), mark = target.closest("[data-tip]");
    const text = map ? cellAt(map, event) : mark && mark.dataset.tip;
    if (text) show(text, event.clientX, event.clientY);
    else hide();
  }
  document.addEventListener("pointermove", look);
  document.addEventListener("pointerdown", look);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // on paper nothing can be opened
  const closed = [];
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((d) => { closed.push(d); d.open = true; }));
  addEventListener("afterprint", () => { closed.splice(0).forEach((d) => { d.open = false; }); });
})();
