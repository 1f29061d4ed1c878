// New job: what to train, on what, how; what it will take; and the same as code.
import { all, call } from "./api.js";
import { stack } from "./charts.js";
import { asPython, sample } from "./code.js";
import { button, choice, empty, fail, field, h, heading, mark, notice, tell } from "./dom.js";
import { bytes, number, t } from "./texts.js";

const MACHINES = ["cpu:1", "v5e-1", "v5e-4", "v5e-8", "v6e-1", "v6e-8", "v5p-8"];
const TUNINGS = ["lora", "qlora", "full", "freeze"];

export async function show(place, { query, signal }) {
  const [about, files] = await Promise.all([call("/v1/jaxtune/about", { signal }), all("/v1/files?purpose=fine-tune", 1000, signal)]);
  place.append(heading(t("nav.new"), t("new.lead")));
  if (!about.bases.length) return place.append(empty(t("new.nomodels"), t("new.nomodels.text")));
  if (!files.length) return place.append(empty(t("data.none"), t("new.nofiles"), h("a", { class: "button primary", href: "#/data" }, t("new.todata"))));

  const of = (list) => list.map((x) => [x.id, x.id]);
  const named = files.map((f) => [f.id, `${f.filename} (${bytes(f.bytes)})`]);
  const text = (props) => h("input", { type: "text", autocomplete: "off", spellcheck: "false", ...props });
  const auto = () => text({ inputmode: "decimal", placeholder: "auto" });
  const count = () => text({ inputmode: "numeric", placeholder: "auto" });
  const inputs = {
    model: choice([...of(about.bases), ...of(about.tuned.filter((m) => m.step === null))], query.get("model") ?? about.bases[0].id),
    training_file: choice(named, query.get("file") ?? files[0].id),
    validation_file: choice([["", t("new.novalidation")], ...named], ""),
    tuning: choice(TUNINGS.map((x) => [x, t(`tuning.${x}`)]), "lora"),
    n_epochs: auto(), batch_size: count(), learning_rate_multiplier: auto(),
    suffix: text({ maxlength: 64 }), seed: text({ inputmode: "numeric" }),
    rank: count(), alpha: auto(), last: count(), max_length: count(), learning_rate: auto(),
    packing: choice([["", "auto"], ["true", t("yes")], ["false", t("no")]], ""), template: text({ placeholder: "auto" }),
    dtype: choice([["", "auto"], ["float32", "float32"], ["bfloat16", "bfloat16"]], ""),
  };
  const put = (name, wide) => field(t(`new.${name}`), inputs[name], { name, wide, hint: t(`new.${name}.hint`) });
  const only = { rank: ["lora", "qlora"], alpha: ["lora", "qlora"], last: ["freeze"] };
  const advanced = ["rank", "alpha", "last", "max_length", "learning_rate", "packing", "template", "dtype"].map((name) => put(name));
  const wrong = h("div", { role: "alert" });
  const code = sample();
  const start = h("button", { type: "submit", class: "primary" }, t("new.start"));
  const knobs = h("details", {}, h("summary", {}, t("new.advanced")), h("div", { class: "fields" }, advanced));
  const form = h("form", { novalidate: true, class: "columns" },
    h("div", {},
      h("fieldset", {}, h("legend", {}, t("new.what")), h("div", { class: "fields" }, put("model"), put("tuning"), put("training_file"), put("validation_file"))),
      h("fieldset", {}, h("legend", {}, t("new.how")), h("div", { class: "fields three" }, put("n_epochs"), put("batch_size"), put("learning_rate_multiplier"))),
      h("fieldset", {}, h("legend", {}, t("new.name")), h("div", { class: "fields" }, put("suffix"), put("seed")), knobs),
      wrong, h("div", { class: "actions" }, start), code.element),
    h("aside", { "aria-label": t("estimate.title") }, estimate(() => request(inputs, only), (error) => blame(error, inputs, wrong, knobs), signal)));

  const changed = () => {
    for (const [name, fits] of Object.entries(only)) inputs[name].closest(".field").hidden = !fits.includes(inputs.tuning.value);
    const { jaxtune, ...rest } = request(inputs, only);
    code.update(asPython("job = client.fine_tuning.jobs.create", jaxtune ? { ...rest, extra_body: { jaxtune } } : rest));
  };
  form.addEventListener("input", changed);
  form.addEventListener("submit", async (e) => {
    e.preventDefault();
    blame(null, inputs, wrong, knobs);
    start.disabled = true;
    try {
      const job = await call("/v1/fine_tuning/jobs", { method: "POST", json: request(inputs, only) });
      tell(t("new.started", { id: job.id }));
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      blame(error, inputs, wrong, knobs);
    } finally {
      start.disabled = false;
    }
  });
  changed();
  place.append(form);
}

/** A number where one was typed; other words go as they are, and the service says what is wrong with them. */
const value = (text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : text);

/** The body of the request that the form stands for. */
function request(inputs, only) {
  const said = (name) => inputs[name].value.trim();
  const filled = (names) => Object.fromEntries(names.filter((n) => said(n) && said(n) !== "auto").map((n) => [n, value(said(n))]));
  const hyperparameters = filled(["n_epochs", "batch_size", "learning_rate_multiplier"]);
  const method = { type: "supervised", supervised: { hyperparameters } };
  const fits = ["rank", "alpha", "last", "max_length", "learning_rate", "template", "dtype"].filter((n) => !only[n] || only[n].includes(said("tuning")));
  const knobs = { ...(said("tuning") === "lora" ? {} : { tuning: said("tuning") }), ...filled(fits) };
  if (said("packing")) knobs.packing = said("packing") === "true";
  if ("template" in knobs) knobs.template = said("template");
  return {
    model: said("model"), training_file: said("training_file"),
    ...(said("validation_file") ? { validation_file: said("validation_file") } : {}),
    ...(Object.keys(hyperparameters).length ? { method } : {}),
    ...(said("suffix") ? { suffix: said("suffix") } : {}), ...(said("seed") ? { seed: value(said("seed")) } : {}),
    ...(Object.keys(knobs).length ? { jaxtune: knobs } : {}),
  };
}

/** Show an error at the control that it is about, else above the button; null clears. */
function blame(error, inputs, wrong, knobs) {
  for (const control of Object.values(inputs)) mark(control, null);
  wrong.replaceChildren();
  if (!error) return;
  const control = inputs[error.param?.split(".").at(-1)];
  if (!control) return wrong.append(notice(error));
  if (knobs.contains(control)) knobs.open = true;
  mark(control, error.message);
  control.focus();
}

function estimate(body, blamed, signal) {
  const out = h("div", { "aria-live": "polite" });
  const machine = choice(MACHINES.map((x) => [x, x === "cpu:1" ? t("estimate.cpu") : `TPU ${x}`]), "cpu:1");
  const ask = button(t("estimate.ask"), async () => {
    ask.disabled = true;
    out.replaceChildren(h("p", { class: "busy" }, t("estimate.asking")));
    try {
      const { model, training_file, method, jaxtune } = body();
      const json = { model, training_file, topology: machine.value, method, jaxtune };
      out.replaceChildren(...drawn(await call("/v1/jaxtune/estimate", { method: "POST", json, signal })));
    } catch (error) {
      if (error.param) { out.replaceChildren(); blamed(error); } else fail(out, error);
    } finally {
      ask.disabled = false;
    }
  });
  return h("div", { class: "panel" }, h("h2", {}, t("estimate.title")), h("p", { class: "hint" }, t("estimate.text")),
    field(t("estimate.machine"), machine), ask, out);
}

function drawn(e) {
  const m = e.memory;
  const parts = ["frozen", "trained", "optimiser", "activations", "temporaries"].map((k, i) => [t(`estimate.${k}`), m[k] ?? 0, i]);
  const verdict = e.fits === null ? "" : e.fits ? t("estimate.fits") : t("estimate.unfit");
  const speed = e.tokens_per_second_per_chip;
  return [
    h("p", { class: "big" }, bytes(m.peak), m.limit ? h("small", {}, t("estimate.of", { limit: bytes(m.limit) })) : null),
    verdict ? h("p", { class: e.fits ? "good" : "bad" }, verdict) : null,
    stack(parts, Math.max(m.limit ?? 0, parts.reduce((n, p) => n + p[1], 0))),
    h("dl", { class: "parts" }, parts.map(([name, n, i]) => h("div", {}, h("dt", { class: `part-${i}` }, name), h("dd", { class: "num" }, bytes(n))))),
    speed ? h("p", {}, t("estimate.speed", { n: number(speed) })) : null,
    h("p", { class: "hint" }, t("estimate.settings", { batch: number(e.settings.batch_size), length: number(e.settings.max_length) })),
  ].filter(Boolean);
}
