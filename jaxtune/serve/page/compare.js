// Compare: curves of several jobs over each other, and what they were asked for side by side.
import { all, call } from "./api.js";
import { curves } from "./charts.js";
import { choice, empty, fail, field, h, heading } from "./dom.js";
import { asked, measured, points } from "./job.js";
import { state } from "./jobs.js";
import { figure, known, t } from "./texts.js";

const MOST = 6; // runs that a drawing can tell apart
const METRICS = ["train_loss", "valid_loss", "full_valid_loss", "train_mean_token_accuracy", "valid_mean_token_accuracy", "full_valid_mean_token_accuracy"];

const title = (job) => `${job.user_provided_suffix || t("jobs.untitled")} …${job.id.slice(-6)}`;

export async function show(place, { query, signal }) {
  const jobs = await all("/v1/fine_tuning/jobs", 200, signal);
  place.append(heading(t("nav.compare"), t("compare.lead")));
  if (!jobs.length) return place.append(empty(t("jobs.none"), t("jobs.none.text"), h("a", { class: "button primary", href: "#/new" }, t("nav.new"))));
  const begun = jobs.filter((j) => j.jaxtune?.progress?.step || j.status === "succeeded");
  const chosen = new Set((query.get("jobs")?.split(",") ?? begun.slice(0, 2).map((j) => j.id)).filter((id) => jobs.some((j) => j.id === id)).slice(0, MOST));
  const rows = new Map();
  const metric = choice(METRICS.map((m) => [m, t(`metric.${m}`)]), "train_loss", { onchange: () => draw() });
  const [chart, side, wrong] = [curves(t("compare.curves")), h("section", {}), h("div", {})];
  const nothing = h("p", { class: "waiting" }, t("compare.nothing"));

  const boxes = jobs.map((j) => h("li", {}, h("label", {}, h("input", { type: "checkbox", checked: chosen.has(j.id), value: j.id, onchange: (e) => {
    e.target.checked ? chosen.add(j.id) : chosen.delete(j.id);
    history.replaceState(null, "", `#/compare?jobs=${[...chosen].join(",")}`);
    limit();
    draw();
  } }), h("span", {}, title(j)), state(j.status))));
  const inputs = boxes.map((b) => b.querySelector("input"));
  const limit = () => inputs.forEach((b) => { b.disabled = !b.checked && chosen.size >= MOST; });

  async function draw() {
    wrong.replaceChildren();
    try {
      await Promise.all([...chosen].filter((id) => !rows.has(id)).map(async (id) => {
        const kept = { rows: [], last: null };
        await measured(id, kept, signal);
        rows.set(id, kept.rows);
      }));
      const picked = jobs.filter((j) => chosen.has(j.id));
      const series = picked.map((j, i) => ({ name: title(j), tone: i, dashed: i % 2 === 1, points: points(rows.get(j.id), metric.value) }));
      chart.update(series);
      nothing.hidden = series.some((c) => c.points.length);
      side.replaceChildren(...beside(picked, rows));
    } catch (error) {
      fail(wrong, error);
    }
  }
  limit();
  place.append(h("fieldset", {}, h("legend", {}, t("compare.choose", { n: MOST })), h("ul", { class: "boxes" }, boxes)),
    field(t("compare.metric"), metric), wrong, nothing, chart.element, side);
  await draw();
}

/** A row for each setting and last score, marked where the runs differ. */
function beside(jobs, rows) {
  if (!jobs.length) return [];
  const settings = jobs.map((j) => asked(j));
  const scores = jobs.map((j) => Object.fromEntries(METRICS.map((m) => [m, points(rows.get(j.id), m).at(-1)?.[1]])));
  const names = (list) => [...new Set(list.flatMap((x) => Object.keys(x).filter((k) => x[k] !== null && x[k] !== undefined)))];
  const label = (k) => (known(`new.${k}`) ? t(`new.${k}`) : known(`metric.${k}`) ? t(`metric.${k}`) : k);
  const line = (k, list, shown) => {
    const values = list.map((x) => shown(x[k]));
    const differs = new Set(values).size > 1;
    return h("tr", { class: differs ? "differs" : "" }, h("th", { scope: "row" }, label(k), differs ? h("span", { class: "unseen" }, t("compare.differs")) : null), values.map((v) => h("td", {}, v)));
  };
  const plain = (v) => (v === null || v === undefined ? "–" : String(v));
  return [h("h2", {}, t("compare.side")), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("compare.side") }, h("table", { class: "side" },
    h("caption", { class: "unseen" }, t("compare.side")),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "unseen" }, t("compare.setting"))), jobs.map((j) => h("th", { scope: "col" }, h("a", { href: `#/jobs/${j.id}` }, title(j)))))),
    h("tbody", {}, names(settings).map((k) => line(k, settings, plain)), names(scores).map((k) => line(k, scores, figure)))))];
}
