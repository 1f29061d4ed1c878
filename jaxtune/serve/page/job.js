// One job: its curves as they grow, what happened, what it left.
import { all, call, save } from "./api.js";
import { curves, ruler } from "./charts.js";
import { button, confirmed, fail, h, heading, notice, refresh, table, tell } from "./dom.js";
import { FINAL, keep, left, progress, state } from "./jobs.js";
import { bytes, clock, duration, figure, known, number, t, when } from "./texts.js";

const PATH = "/v1/fine_tuning/jobs/";

/** All measurements of a job that came after those that are there; `kept` is {rows, last}. */
export async function measured(id, kept, signal) {
  for (let more = true; more; ) {
    const page = await call(`/v1/jaxtune/jobs/${id}/metrics${kept.last ? `?after=${kept.last}` : ""}`, { signal });
    kept.rows.push(...page.data);
    kept.last = page.last_id;
    more = page.has_more;
  }
}

/** One curve's points out of measurements; a step that was measured twice counts with the last. */
export function points(rows, name) {
  const found = new Map(rows.filter((r) => Number.isFinite(r[name])).map((r) => [r.step, r[name]]));
  return [...found].sort((a, b) => a[0] - b[0]);
}

export async function show(place, { rest: id, signal }) {
  const parts = Object.fromEntries(["head", "figures", "events", "checkpoints", "results", "settings"].map((n) => [n, h("section", { class: n })]));
  const [bar, loss, accuracy] = [ruler(t("jobs.progress")), curves(t("job.loss")), curves(t("job.accuracy"))];
  const [waiting, log] = [h("p", { class: "waiting" }, t("job.waiting")), logs(id, signal)];
  const said = h("p", { class: "unseen", role: "status" });
  const kept = { rows: [], last: null };
  let [before, wrong] = [null, h("div", {})];

  const act = (verb) => async (e) => {
    if (verb === "cancel" && !(await confirmed(t("job.cancel.title"), t("job.cancel.text"), t("job.cancel")))) return;
    e.target.disabled = true;
    wrong.replaceChildren();
    try {
      await call(`${PATH}${id}/${verb}`, { method: "POST" });
      await load();
    } catch (error) {
      fail(wrong, error);
    } finally {
      e.target.disabled = false;
    }
  };

  const load = async () => {
    const [job, events, checkpoints] = await Promise.all([
      call(PATH + id, { signal }), call(`/v1/jaxtune/jobs/${id}/messages`, { signal }), all(`${PATH}${id}/checkpoints`, 100, signal),
      measured(id, kept, signal),
    ]);
    const over = FINAL.includes(job.status);
    refresh(parts.head, [job.status, job.fine_tuned_model, job.error], () => head(job, act));
    refresh(parts.figures, [job.jaxtune?.progress, job.estimated_finish, job.status, kept.rows.length], () => readings(job, kept.rows));
    refresh(parts.events, events.data, () => happened(events.data));
    refresh(parts.checkpoints, checkpoints, () => saved(checkpoints));
    refresh(parts.results, job.result_files, () => results(job));
    refresh(parts.settings, [job.hyperparameters, job.jaxtune?.knobs, job.seed], () => settings(job));
    bar.set(progress(job).share, job.status === "running");
    loss.update([curve(kept.rows, "train_loss", 0), curve(kept.rows, "valid_loss", 1, true), curve(kept.rows, "full_valid_loss", 2, true)]);
    accuracy.update([curve(kept.rows, "train_mean_token_accuracy", 0), curve(kept.rows, "valid_mean_token_accuracy", 1, true), curve(kept.rows, "full_valid_mean_token_accuracy", 2, true)]);
    waiting.hidden = kept.rows.length > 0 || over;
    if (before && before !== job.status) said.textContent = `${t("jobs.state")}: ${word(job.status)}`;
    before = job.status;
    return !over;
  };
  await load();
  place.append(h("p", { class: "trail" }, h("a", { href: "#/jobs" }, t("nav.jobs"))), parts.head, said, wrong, bar.element, parts.figures, waiting,
    h("div", { class: "pair" }, loss.element, accuracy.element), h("div", { class: "columns even" }, parts.events, h("div", {}, parts.checkpoints, parts.results, parts.settings)), log);
  keep(load, bar.element, signal, 2);
}

const word = (status) => (known(`state.${status}`) ? t(`state.${status}`) : status);
const curve = (rows, name, tone, dashed) => ({ name: t(`metric.${name}`), tone, dashed, points: points(rows, name) });

function head(job, act) {
  const verbs = { queued: ["pause", "cancel"], running: ["pause", "cancel"], validating_files: ["cancel"], paused: ["resume", "cancel"] }[job.status] ?? [];
  const buttons = verbs.map((v) => button(t(`job.${v}`), act(v), { class: v === "cancel" ? "danger" : "", "data-key": v }));
  if (job.fine_tuned_model) buttons.push(h("a", { class: "button primary", href: `#/playground?model=${encodeURIComponent(job.fine_tuned_model)}` }, t("job.try")));
  return [heading(job.user_provided_suffix || t("jobs.untitled"), h("code", {}, job.id), buttons),
    h("p", { class: "line" }, state(job.status), h("span", {}, `${t("job.on", { model: job.model })}`)),
    job.fine_tuned_model ? h("p", { class: "line" }, t("job.made"), " ", h("code", {}, job.fine_tuned_model)) : null,
    job.error?.message ? notice(job.error.message) : null].filter(Boolean);
}

function readings(job, rows) {
  const { step, total } = progress(job);
  const last = rows.at(-1) ?? {};
  const facts = [
    [t("step"), total ? `${number(step)} / ${number(total)}` : "–"], [t("metric.train_loss"), figure(last.train_loss)],
    [t("job.speed"), number(job.jaxtune?.progress?.tokens_per_second ?? last.tokens_per_second)],
    FINAL.includes(job.status) ? [t("job.took"), duration(job.finished_at - (job.jaxtune?.started_at ?? job.created_at))] : [t("job.left"), duration(left(job))],
    [t("report.trained"), number(job.trained_tokens)],
  ];
  return h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

const happened = (events) => [h("h2", {}, t("job.events")), h("ol", { class: "events", tabindex: "0", "aria-label": t("job.events") }, events.map((e) =>
  h("li", { class: e.level }, h("time", { datetime: new Date(e.created_at * 1000).toISOString() }, clock(e.created_at)), h("span", {}, e.message))))];

function saved(checkpoints) {
  if (!checkpoints.length) return [];
  return [h("h2", {}, t("job.checkpoints")), table(t("job.checkpoints"), [
    { title: t("step"), class: "num", cell: (c) => number(c.step_number) },
    { title: t("metric.train_loss"), class: "num", cell: (c) => figure(c.metrics.train_loss) },
    { title: t("metric.full_valid_loss"), class: "num", cell: (c) => figure(c.metrics.full_valid_loss ?? c.metrics.valid_loss) },
    { title: "", class: "act", cell: (c) => h("a", { href: `#/playground?model=${encodeURIComponent(c.fine_tuned_model_checkpoint)}`, "aria-label": t("job.try.step", { n: c.step_number }) }, t("job.try")) },
  ], checkpoints)];
}

const results = (job) => job.result_files.length ? [h("h2", {}, t("job.results")), h("ul", { class: "files" }, job.result_files.map((id) =>
  h("li", {}, h("code", {}, id), button(t("download"), async (e) => {
    try {
      const file = await call(`/v1/files/${id}`);
      await save(`/v1/files/${id}/content`, file.filename, () => {});
      tell(t("saved", { size: bytes(file.bytes) }));
    } catch (error) {
      e.target.after(notice(error));
    }
  }, { class: "plain", "data-key": id }))))] : [];

/** What a job was asked for, by name. */
export function asked(job) {
  return { model: job.model, training_file: job.training_file, validation_file: job.validation_file, seed: job.seed, ...job.hyperparameters, ...job.jaxtune?.knobs };
}

function settings(job) {
  const rows = Object.entries({ ...asked(job), created: when(job.created_at) }).filter(([, v]) => v !== null && v !== undefined);
  return [h("h2", {}, t("job.settings")), h("dl", { class: "list" }, rows.map(([name, value]) =>
    h("div", {}, h("dt", {}, known(`new.${name}`) ? t(`new.${name}`) : known(name) ? t(name) : name), h("dd", {}, String(value)))))];
}

/** The log, read on while it is unfolded. */
function logs(id, signal) {
  const text = h("pre", { tabindex: "0", class: "log", "aria-label": t("job.log") });
  const place = h("div", {}, text);
  let after = null;
  const load = async () => {
    if (!details.open) return true;
    const page = await call(`/v1/jaxtune/jobs/${id}/log${after === null ? "" : `?after=${after}`}`, { signal });
    const below = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
    if (page.text) text.append(page.text);
    else if (after === null) text.textContent = "";
    if (below) text.scrollTop = text.scrollHeight;
    after = page.next;
    return true;
  };
  let started = false;
  const details = h("details", { class: "quiet", ontoggle: () => {
    if (!started) keep(load, place, signal, 2);
    started = true;
  } }, h("summary", {}, t("job.log")), place);
  return details;
}
