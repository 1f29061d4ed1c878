// Models: what there is to tune, and what was tuned: card, download, delete.
import { call, save } from "./api.js";
import { button, confirmed, empty, h, heading, notice, reading, table, tell } from "./dom.js";
import { bytes, number, t, when } from "./texts.js";

const path = (id) => id.split("/").map(encodeURIComponent).join("/").replaceAll("%3A", ":");

export async function show(place, { signal }) {
  const [tuned, bases, wrong] = [h("section", {}), h("section", {}), h("div", {})];
  place.append(heading(t("nav.models"), t("models.lead")), wrong, tuned, bases);
  const load = async () => {
    const about = await call("/v1/jaxtune/about", { signal });
    tuned.replaceChildren(h("h2", {}, t("models.tuned")), about.tuned.length ? tunedTable(about.tuned, load, wrong)
      : empty(t("models.none"), t("models.none.text"), h("a", { class: "button primary", href: "#/new" }, t("nav.new"))));
    bases.replaceChildren(h("h2", {}, t("models.bases")), about.bases.length ? basesTable(about.bases) : empty(t("new.nomodels"), t("new.nomodels.text")));
  };
  await load();
}

/** Do something of a button, and say above the tables what went wrong. */
const doing = (wrong, work) => async (e) => {
  e.target.disabled = true;
  wrong.replaceChildren();
  try {
    await work(e.target);
  } catch (error) {
    wrong.replaceChildren(notice(error));
    wrong.scrollIntoView({ block: "nearest" });
  } finally {
    e.target.disabled = false;
  }
};

function tunedTable(models, load, wrong) {
  const act = (m) => {
    const fetchAs = (form) => button(t(`models.${form}`), doing(wrong, async (self) => {
      const text = self.textContent;
      self.textContent = t(form === "merged" ? "models.merging" : "models.packing");
      try {
        let n = 0;
        await save(`/v1/jaxtune/models/${path(m.id)}/download?form=${form}`, `${m.id.replaceAll(/[^A-Za-z0-9_-]+/g, "-")}-${form}.zip`, (now) => { n = now; self.textContent = bytes(now); });
        tell(t("saved", { size: bytes(n) }));
      } finally {
        self.textContent = text;
      }
    }), { class: "plain", "aria-label": t(`models.${form}.of`, { name: m.id }) });
    return h("div", { class: "acts" },
      h("a", { class: "button plain", href: `#/playground?model=${encodeURIComponent(m.id)}`, "aria-label": t("models.try.of", { name: m.id }) }, t("job.try")),
      button(t("models.card"), doing(wrong, async () => reading(m.id, [t(`kind.${m.kind}`, { base: m.base }), m.step === null ? null : t("chart.step", { n: number(m.step) }), m.job, when(m.created)].filter(Boolean).join(" · "), (await call(`/v1/jaxtune/models/${path(m.id)}/card`)).text)), { class: "plain", "aria-label": t("models.card.of", { name: m.id }) }),
      m.kind === "adapter" ? fetchAs("adapter") : null, fetchAs("merged"),
      button(t("delete"), doing(wrong, async () => {
        if (!(await confirmed(t("models.delete", { name: m.id }), t("models.delete.text"), t("delete")))) return;
        await call(`/v1/models/${path(m.id)}`, { method: "DELETE" });
        tell(t("data.deleted", { name: m.id }));
        await load();
        document.querySelector("h1").focus();
      }), { class: "plain", "aria-label": t("models.delete", { name: m.id }) }));
  };
  return table(t("models.tuned"), [
    { title: t("data.name"), class: "name", cell: (m) => named(m, models) },
    { title: t("models.kind"), cell: (m) => t(`kind.${m.kind}`, { base: m.base }) },
    { title: t("created"), class: "time", cell: (m) => h("a", { href: `#/jobs/${m.job}` }, when(m.created)) },
    { title: "", class: "act", cell: act },
  ], models);
}

/** A model's name; that of a checkpoint under its model without what it shares with it. */
function named(m, models) {
  const above = m.step !== null && models.find((x) => x.step === null && m.id.startsWith(`${x.id}:`));
  if (!above) return h("code", {}, m.id);
  return h("code", { class: "child" }, h("span", { class: "unseen" }, above.id), m.id.slice(above.id.length));
}

const basesTable = (models) => table(t("models.bases"), [
  { title: t("data.name"), cell: (m) => h("code", {}, m.id) },
  { title: t("models.family"), cell: (m) => m.model_type ?? "–" },
  { title: t("models.layers"), class: "num", cell: (m) => number(m.num_hidden_layers) },
  { title: t("models.context"), class: "num", cell: (m) => number(m.max_position_embeddings) },
  { title: t("size"), class: "num", cell: (m) => bytes(m.bytes) },
  { title: "", class: "act", cell: (m) => h("a", { href: `#/new?model=${encodeURIComponent(m.id)}`, "aria-label": t("models.tune.of", { name: m.id }) }, t("models.tune")) },
], models);
