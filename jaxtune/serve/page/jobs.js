// Jobs: all of them, and the way to one.
import { all } from "./api.js";
import { ruler } from "./charts.js";
import { empty, every, h, heading, notice, refresh, table } from "./dom.js";
import * as job from "./job.js";
import { duration, known, number, t, when } from "./texts.js";

export const FINAL = ["succeeded", "failed", "cancelled"];

export async function show(place, given) {
  if (given.rest) return job.show(place, given);
  const rows = h("section", { "aria-label": t("nav.jobs") });
  place.append(heading(t("nav.jobs"), t("jobs.lead"), h("a", { class: "button primary", href: "#/new" }, t("nav.new"))), rows);
  const load = async () => {
    const jobs = await all("/v1/fine_tuning/jobs", 500, given.signal);
    refresh(rows, jobs, () => (jobs.length ? listed(jobs) : empty(t("jobs.none"), t("jobs.none.text"), h("a", { class: "button primary", href: "#/new" }, t("nav.new")))));
  };
  await load();
  keep(load, rows, given.signal, 3);
}

/** Load again and again; what goes wrong is said above, and the next try goes on. */
export function keep(load, place, signal, seconds) {
  let wrong = null;
  every(seconds, async () => {
    try {
      const go = await load();
      wrong?.remove();
      wrong = null;
      return go;
    } catch (error) {
      if (error.name === "AbortError" || signal.aborted) return false;
      const now = notice(error);
      wrong ? wrong.replaceWith(now) : place.before(now);
      wrong = now;
      return error.status === 404 || error.status === 401 ? false : true;
    }
  }, signal);
}

/** A job's state as a sign and a word. */
export const state = (status) =>
  h("span", { class: `state ${status}` }, h("span", { class: "lamp", "aria-hidden": "true" }), known(`state.${status}`) ? t(`state.${status}`) : status);

/** What a job has done of what it will: {step, total, share}. */
export function progress(j) {
  const { step = 0, total_steps: total = 0 } = j.jaxtune?.progress ?? {};
  return { step, total, share: j.status === "succeeded" ? 1 : total ? step / total : 0 };
}

/** How long it is still expected to take, in seconds. */
export const left = (j) => (j.estimated_finish && !FINAL.includes(j.status) ? j.estimated_finish - Date.now() / 1000 : null);

function listed(jobs) {
  return table(t("nav.jobs"), [
    { title: t("jobs.job"), cell: (j) => h("a", { href: `#/jobs/${j.id}`, "data-key": j.id }, j.user_provided_suffix || j.fine_tuned_model?.split(":")[3] || t("jobs.untitled"), h("code", {}, `…${j.id.slice(-6)}`)) },
    { title: t("new.model"), cell: (j) => j.model },
    { title: t("jobs.state"), cell: (j) => state(j.status) },
    { title: t("jobs.progress"), class: "wide", cell: (j) => {
      const { step, total, share } = progress(j);
      const bar = ruler(t("jobs.progress"));
      bar.set(share, j.status === "running");
      return [bar.element, h("small", {}, total ? t("jobs.steps", { step: number(step), total: number(total) }) : "", left(j) ? ` · ${duration(left(j))}` : "")];
    } },
    { title: t("created"), class: "time", cell: (j) => when(j.created_at) },
  ], jobs);
}
