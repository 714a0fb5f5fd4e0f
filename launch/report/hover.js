"use strict";
// Shows the numbers below the pointer, at the same step in every chart.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll("[data-chart]")];
  const format = (value) => {
    if (value === null) return "-";
    const size = Math.abs(value);
    if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 });
    if (size > 0 && size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const show = (figure, share, isUnder) => {
    const chart = charts.charts[figure.dataset.chart];
    const cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
    const step = chart.x[0] + share * (chart.x[1] - chart.x[0]);
    cursor.setAttribute("transform", `translate(${1000 * share} 0)`);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = !isUnder;
    if (!isUnder) return;
    tip.textContent = "";
    const head = document.createElement("b");
    head.textContent = `step ${Math.round(step).toLocaleString("en")}`;
    tip.append(head);
    for (const series of chart.series) {
      const xs = series.xs ?? charts.xs[series.run];
      if (!xs.length) continue;
      const at = nearest(xs, step), value = series.values[at];
      const line = document.createElement("div"), name = document.createElement("span");
      name.className = `c${series.color % 8}`;
      name.textContent = `${series.label}: `;
      line.append(name, format(value));
      if (series.low && series.low[at] !== null) line.append(` [${format(series.low[at])}, ${format(series.high[at])}]`);
      if (series.xs) line.append(` at ${xs[at]}`);
      tip.append(line);
    }
    const width = tip.parentElement.clientWidth, left = share * width;
    tip.style.left = left > width / 2 ? "auto" : `${left + 10}px`;
    tip.style.right = left > width / 2 ? `${width - left + 10}px` : "auto";
  };
  const hide = () => {
    for (const figure of figures) {
      figure.querySelector(".cursor").setAttribute("visibility", "hidden");
      figure.querySelector(".tip").hidden = true;
    }
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
    area.addEventListener("pointerleave", hide);
  }
})();
