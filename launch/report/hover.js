"use strict";
// Shows the numbers below the pointer, at the same step in every chart.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll("[data-chart]")];
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  const show = (figure, share, isUnder) => {
    const step = data.x[0] + share * (data.x[1] - data.x[0]);
    const cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
    cursor.setAttribute("transform", `translate(${100 * share} 0)`);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = !isUnder;
    if (!isUnder) return;
    const head = document.createElement("b");
    head.textContent = `step ${Math.round(step).toLocaleString("en")}`;
    tip.replaceChildren(head);
    for (const series of data.charts[figure.dataset.chart]) {
      const line = document.createElement("div"), name = document.createElement("span");
      name.className = `c${series.color}`;
      name.textContent = `${series.label}: `;
      line.append(name, series.texts[nearest(data.steps[series.steps], step)]);
      tip.append(line);
    }
    const width = tip.parentElement.clientWidth, left = share * width;
    tip.style.left = left > width / 2 ? "auto" : `${left + 10}px`;
    tip.style.right = left > width / 2 ? `${width - left + 10}px` : "auto";
  };
  for (const figure of figures) {
    const area = figure.querySelector(".area");
    const move = (event) => {
      const box = area.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      for (const other of figures) show(other, share, other === figure);
    };
    area.addEventListener("pointermove", move);
    area.addEventListener("pointerdown", move);
    area.addEventListener("pointerleave", () => {
      for (const other of figures) {
        other.querySelector(".cursor").setAttribute("visibility", "hidden");
        other.querySelector(".tip").hidden = true;
      }
    });
  }
})();
