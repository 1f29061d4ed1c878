// Data: files to train on; one file: its report, and what of it is trained on.
import { all, call, save, upload } from "./api.js";
import { histogram, ruler, shares } from "./charts.js";
import { button, choice, confirmed, empty, fail, field, fresh, h, heading, notice, refresh, table, tell } from "./dom.js";
import { bytes, known, number, t, when } from "./texts.js";

const SHOWN = 8; // examples of a preview

export async function show(place, { rest, signal }) {
  await (rest ? one(place, rest, signal) : list(place, signal));
}

async function list(place, signal) {
  const [rows, going] = [h("section", { "aria-label": t("data.files") }), h("div", { class: "uploads" })];
  const load = async () => {
    const files = await all("/v1/files", 1000, signal);
    refresh(rows, files, () => (files.length ? filesTable(files, load) : empty(t("data.none"), t("data.none.text"))));
  };
  place.append(heading(t("nav.data"), t("data.lead")), drop((file) => send(file, going, load)), going, rows);
  await load();
}

function drop(send) {
  const id = fresh("field");
  const input = h("input", { type: "file", id, accept: ".jsonl,.json", multiple: true, class: "unseen", onchange: () => {
    [...input.files].forEach(send);
    input.value = "";
  } });
  const zone = h("div", { class: "drop" }, input, h("label", { for: id },
    h("strong", {}, t("data.drop")), h("span", { class: "choose" }, t("data.choose"))), h("p", { class: "hint" }, t("data.format")),
  h("pre", { class: "sample", tabindex: "0", "aria-label": t("data.sample") },
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'));
  const over = (on) => (e) => { e.preventDefault(); zone.classList.toggle("over", on); };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (e) => { over(false)(e); [...e.dataTransfer.files].forEach(send); });
  return zone;
}

async function send(file, going, load) {
  const bar = ruler(t("data.uploading", { name: file.name }));
  const line = h("div", { class: "going" }, h("span", {}, file.name), bar.element);
  going.append(line);
  try {
    const made = await upload(file, (share) => bar.set(share, true));
    line.remove();
    tell(t("data.uploaded", { name: made.filename }));
    await load();
  } catch (error) {
    line.replaceChildren(h("span", {}, file.name), notice(error), button(t("close"), () => line.remove()));
  }
}

function filesTable(files, load) {
  const trained = (f) => f.purpose === "fine-tune";
  return table(t("data.files"), [
    { title: t("data.name"), cell: (f) => trained(f) ? h("a", { href: `#/data/${f.id}`, "data-key": f.id }, f.filename) : f.filename },
    { title: t("data.purpose"), cell: (f) => known(`purpose.${f.purpose}`) ? t(`purpose.${f.purpose}`) : f.purpose },
    { title: t("size"), class: "num", cell: (f) => bytes(f.bytes) },
    { title: t("created"), class: "time", cell: (f) => when(f.created_at) },
    { title: "", class: "act", cell: (f) => [
      button(t("download"), (e) => download(f, e.target), { class: "plain", "aria-label": t("data.download", { name: f.filename }) }),
      button(t("delete"), (e) => remove(f, load, e.target), { class: "plain", "aria-label": t("data.delete", { name: f.filename }) }),
    ] },
  ], files);
}

async function download(file, near) {
  try {
    await save(`/v1/files/${file.id}/content`, file.filename, () => {});
  } catch (error) {
    near.closest("section, .heading").after(notice(error));
  }
}

async function remove(file, then, near) {
  if (!(await confirmed(t("data.delete", { name: file.filename }), t("data.delete.text"), t("delete")))) return;
  try {
    await call(`/v1/files/${file.id}`, { method: "DELETE" });
    tell(t("data.deleted", { name: file.filename }));
    await then();
  } catch (error) {
    near.closest("section, .heading").after(notice(error));
  }
}

async function one(place, id, signal) {
  const [file, about] = await Promise.all([call(`/v1/files/${id}`, { signal }), call("/v1/jaxtune/about", { signal })]);
  const [report, preview] = [h("section", { "aria-live": "polite" }), h("section", { "aria-live": "polite" })];
  const bases = about.bases.map((b) => [b.id, b.id]);
  const look = () => Promise.all([
    examine(report, `/v1/jaxtune/files/${id}/report?model=${encodeURIComponent(model.value)}`, drawReport, signal),
    examine(preview, `/v1/jaxtune/files/${id}/preview?n=${SHOWN}&model=${encodeURIComponent(model.value)}`, drawPreview, signal),
  ]);
  const model = choice(bases, bases[0]?.[0], { onchange: look });
  place.append(
    h("p", { class: "trail" }, h("a", { href: "#/data" }, t("nav.data"))),
    heading(file.filename, `${bytes(file.bytes)} · ${when(file.created_at)} · ${file.id}`,
      h("a", { class: "button primary", href: `#/new?file=${id}` }, t("data.tune")),
      button(t("delete"), (e) => remove(file, () => { location.hash = "#/data"; }, e.target))),
    bases.length ? field(t("data.model"), model, { hint: t("data.model.hint") }) : notice(t("new.nomodels"), "note"), report, preview);
  if (bases.length) look();
}

async function examine(place, path, draw, signal) {
  place.replaceChildren(h("p", { class: "busy" }, t("data.looking")));
  try {
    place.replaceChildren(...draw(await call(path, { signal })).flat().filter(Boolean));
  } catch (error) {
    fail(place, error);
  }
}

function drawReport(r) {
  const facts = [
    ["report.format", known(`format.${r.format}`) ? t(`format.${r.format}`) : "–"], ["report.examples", number(r.examples)],
    ["report.bad", number(r.error_count)], ["report.tokens", number(r.tokens?.total)], ["report.trained", number(r.tokens?.trained)],
    ["report.cut", number(r.tokens?.longer)],
  ];
  const remarks = r.remarks.map((x) => h("li", {}, known(`remark.${x.check}`) ? t(`remark.${x.check}`, { n: number(x.count), of: number(r.examples) }) : x.message,
    h("small", {}, ` ${t("report.lines", { lines: x.lines.map((n) => number(n)).join(", ") })}`)));
  const more = r.error_count - r.errors.length;
  return [
    h("h2", {}, t("report.title")),
    r.failure ? notice(r.errors.length ? t("report.unfit") : r.failure.message) : h("div", { class: "notice good" }, h("span", { class: "sign", "aria-hidden": "true" }, "✓"), h("p", {}, t("report.ok"))),
    h("dl", { class: "facts" }, facts.map(([key, value]) => h("div", {}, h("dt", {}, t(key)), h("dd", {}, value)))),
    r.errors.length ? [h("h3", {}, t("report.problems")), table(t("report.problems"), [
      { title: t("report.line"), cell: (e) => (e.line === null ? "–" : number(e.line)) },
      { title: t("report.path"), cell: (e) => h("code", {}, e.path || "–") },
      { title: t("report.what"), cell: (e) => e.message },
    ], r.errors)] : null,
    more > 0 ? h("p", { class: "hint" }, t("report.more", { n: number(more) })) : null,
    remarks.length ? [h("h3", {}, t("report.remarks")), h("ul", { class: "warnings" }, remarks)] : null,
    h("div", { class: "pair" }, r.tokens ? histogram(t("report.lengths"), r.tokens.lengths.bins.map(([low, high, count]) => ({ low, high, count }))) : null,
      r.labels ? shares(t("report.labels"), Object.entries(r.labels)) : null),
  ];
}

function drawPreview(p) {
  const examples = p.data.map((example, i) => h("li", {},
    h("pre", { class: "example", "aria-label": t("preview.example", { n: i + 1 }) }, example.map(([text, trained]) =>
      trained ? h("mark", {}, h("span", { class: "unseen" }, t("preview.start")), text, h("span", { class: "unseen" }, t("preview.end"))) : text))));
  return [h("h2", {}, t("preview.title")), h("p", { class: "lead" }, t("preview.lead"), " ", h("mark", {}, t("preview.mark"))),
    h("ol", { class: "examples" }, examples)];
}
