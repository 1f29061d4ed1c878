// Drawings: curves that can be read with a pointer, with keys and as a table; bars; a ruler with a needle.
import { fresh, h, s } from "./dom.js";
import { figure, number, t } from "./texts.js";

const HEIGHT = 260;
const EDGE = { left: 56, right: 16, top: 14, bottom: 30 };

/** Round values that divide a range into about n parts. */
export function ticks(low, high, n) {
  const step = 10 ** Math.floor(Math.log10((high - low) / n || 1));
  const wide = step * ([1, 2, 5, 10].find((m) => (high - low) / (step * m) <= n) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / wide - 1e-9); k * wide <= high + wide * 1e-9; k++) found.push(Number((k * wide).toPrecision(12)));
  return found;
}

function bounds(values, pad) {
  let [low, high] = [Infinity, -Infinity];
  for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
  const more = (high - low) * pad;
  return [low >= 0 ? Math.max(0, low - more) : low - more, high + more];
}

/**
 * Curves over steps. Series are {name, tone, dashed, points: [[step, value], …]}, by rising step.
 * Gives {element, update(series)}.
 */
export function curves(title) {
  const legend = h("ul", { class: "legend" });
  const plot = h("div", { class: "plot", role: "slider", tabindex: "0", "aria-label": t("chart.read", { title }) });
  const list = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title });
  const details = h("details", { class: "quiet", ontoggle: () => fillTable() }, h("summary", {}, t("chart.table")), list);
  const id = fresh("chart");
  const element = h("figure", { class: "chart", "aria-labelledby": id }, h("figcaption", { id }, title), legend, plot, details);
  let [series, steps, at] = [[], [], null];

  function draw() {
    const width = plot.clientWidth;
    if (!width || !steps.length) return;
    const [x0, x1] = [steps[0], Math.max(steps.at(-1), steps[0] + 1)];
    const [y0, y1] = bounds(series.flatMap((c) => c.points.map((p) => p[1])), 0.06);
    const x = (v) => EDGE.left + ((v - x0) / (x1 - x0)) * (width - EDGE.left - EDGE.right);
    const y = (v) => HEIGHT - EDGE.bottom - ((v - y0) / (y1 - y0)) * (HEIGHT - EDGE.top - EDGE.bottom);
    const spots = (c) => c.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    const [below, beside] = [ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger), ticks(y0, y1, 5)];
    const hand = at === null ? null : s("line", { class: "hand", x1: x(at), x2: x(at), y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
    const dots = series.flatMap((c) => {
      const shown = at === null ? c.points.slice(-1) : c.points.filter((p) => p[0] === at);
      return shown.map(([a, b]) => s("circle", { class: `dot tone-${c.tone}`, cx: x(a), cy: y(b), r: 3.5 }));
    });
    plot.replaceChildren(s("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" },
      beside.map((v) => [s("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(v), y2: y(v) }),
        s("text", { class: "tick", x: EDGE.left - 8, y: y(v) + 4, "text-anchor": "end" }, figure(v))]),
      below.map((v) => [s("line", { class: "notch", x1: x(v), x2: x(v), y1: HEIGHT - EDGE.bottom, y2: HEIGHT - EDGE.bottom + 5 }),
        s("text", { class: "tick", x: x(v), y: HEIGHT - 8, "text-anchor": "middle" }, number(v))]),
      s("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: HEIGHT - EDGE.bottom, y2: HEIGHT - EDGE.bottom }),
      series.map((c) => s("polyline", { class: `curve tone-${c.tone}${c.dashed ? " dashed" : ""}`, points: spots(c) })),
      hand, dots));
    read();
  }

  /** The legend shows the values at the hand, else the last. */
  function read() {
    const values = series.map((c) => (at === null ? c.points.at(-1) : c.points.find((p) => p[0] === at))?.[1]);
    legend.replaceChildren(h("li", { class: "step" }, t("chart.step", { n: number(at ?? steps.at(-1)) })),
      ...series.map((c, i) => h("li", {}, s("svg", { width: 22, height: 8, "aria-hidden": "true" },
        s("line", { class: `curve tone-${c.tone}${c.dashed ? " dashed" : ""}`, x1: 0, x2: 22, y1: 4, y2: 4 })),
      h("span", {}, c.name), h("output", {}, figure(values[i])))));
    plot.setAttribute("aria-valuemin", steps[0]);
    plot.setAttribute("aria-valuemax", steps.at(-1));
    plot.setAttribute("aria-valuenow", at ?? steps.at(-1));
    const said = series.map((c, i) => `${c.name} ${figure(values[i])}`).join(", ");
    plot.setAttribute("aria-valuetext", `${t("chart.step", { n: at ?? steps.at(-1) })}: ${said}`);
  }

  function fillTable() {
    if (!details.open) return;
    const stride = Math.ceil(steps.length / 500);
    const rows = steps.filter((_, i) => i % stride === 0 || i === steps.length - 1);
    const maps = series.map((c) => new Map(c.points));
    list.replaceChildren(h("table", {}, h("caption", { class: "unseen" }, title),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("step")), series.map((c) => h("th", { scope: "col", class: "num" }, c.name)))),
      h("tbody", {}, rows.map((n) => h("tr", {}, h("th", { scope: "row" }, number(n)), maps.map((m) => h("td", { class: "num" }, figure(m.get(n)))))))));
  }

  plot.addEventListener("pointermove", (e) => {
    if (!steps.length) return;
    const width = plot.clientWidth - EDGE.left - EDGE.right;
    const wanted = steps[0] + ((e.offsetX - EDGE.left) / width) * (steps.at(-1) - steps[0]);
    at = steps.reduce((best, n) => (Math.abs(n - wanted) < Math.abs(best - wanted) ? n : best), steps[0]);
    draw();
  });
  plot.addEventListener("pointerleave", () => { at = null; draw(); });
  plot.addEventListener("blur", () => { at = null; draw(); });
  plot.addEventListener("keydown", (e) => {
    const here = at === null ? steps.length - 1 : steps.indexOf(at);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: steps.length - 1, PageDown: here - 10, PageUp: here + 10, Escape: null }[e.key];
    if (to === undefined || !steps.length) return;
    e.preventDefault();
    at = to === null ? null : steps[Math.min(Math.max(to, 0), steps.length - 1)];
    draw();
  });
  new ResizeObserver(draw).observe(plot);

  return {
    element,
    update(given) {
      series = given.filter((c) => c.points.length);
      steps = [...new Set(series.flatMap((c) => c.points.map((p) => p[0])))].sort((a, b) => a - b);
      element.hidden = !steps.length;
      draw();
      fillTable();
    },
  };
}

/** How often values lie where: bins of {low, high, count}. */
export function histogram(title, bins) {
  const [width, height, floor] = [400, 130, 104];
  const most = Math.max(...bins.map((b) => b.count), 1);
  const wide = width / bins.length;
  const marks = [0, Math.floor(bins.length / 2), bins.length - 1];
  return h("figure", { class: "chart" }, h("figcaption", {}, title),
    s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": t("chart.bins", { title, low: number(bins[0].low), high: number(bins.at(-1).high), most: number(most) }) },
      bins.map((b, i) => {
        const tall = b.count ? Math.max((b.count / most) * (floor - 8), 2) : 0;
        return s("rect", { class: "bar", x: i * wide + 1, width: Math.max(wide - 2, 1), y: floor - tall, height: tall },
          s("title", {}, `${number(b.low)}–${number(b.high)}: ${number(b.count)}`));
      }),
      s("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
      [...new Set(marks)].map((i) => s("text", {
        class: "tick", x: i === 0 ? 0 : i === bins.length - 1 ? width : (i + 0.5) * wide, y: height - 8,
        "text-anchor": i === 0 ? "start" : i === bins.length - 1 ? "end" : "middle",
      }, number(i === bins.length - 1 ? bins[i].high : bins[i].low)))));
}

/** Shares by name: [[name, count], …], as bars beside a list. */
export function shares(title, items) {
  const total = items.reduce((n, [, count]) => n + count, 0) || 1;
  const id = fresh("chart");
  return h("figure", { class: "chart", "aria-labelledby": id }, h("figcaption", { id }, title),
    h("ul", { class: "shares" }, items.map(([name, count]) => h("li", {}, h("span", { class: "name" }, name),
      s("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
        s("rect", { class: "trough", width: 100, height: 6 }), s("rect", { class: "bar", width: (100 * count) / total, height: 6 })),
      h("span", { class: "num" }, `${number(count)} · ${number((100 * count) / total, 1)} %`)))));
}

/** How much of what fits into what: [[name, bytes, tone], …] in one bar. */
export function stack(items, total) {
  let x = 0;
  return s("svg", { class: "stack", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: "trough", width: 100, height: 8 }),
    items.map(([, n, tone]) => {
      const wide = (100 * n) / Math.max(total, 1);
      x += wide;
      return s("rect", { class: `part-${tone}`, x: x - wide, width: wide, height: 8 });
    }));
}

/** Progress as a ruler with a needle. Gives {element, set(share, text)}. */
export function ruler(label) {
  const needle = h("span", { class: "needle" });
  const element = h("div", { class: "ruler", role: "progressbar", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" }, needle);
  return {
    element,
    set(share, live = false) {
      const percent = Math.round(1000 * Math.min(Math.max(share, 0), 1)) / 10;
      element.setAttribute("aria-valuenow", percent);
      element.style.setProperty("--at", `${percent}%`);
      element.classList.toggle("live", live);
    },
  };
}
