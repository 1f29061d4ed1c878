// Elements. Texts only ever become text nodes: nothing here reads HTML.
import { t } from "./texts.js";

const SVG = "http://www.w3.org/2000/svg";

function build(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

/** An element: h("a", {href: "#/"}, "text", other). */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);

/** The same in a drawing. */
export const s = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);

let numbered = 0;
/** An id that no other element has. */
export const fresh = (stem) => `${stem}-${++numbered}`;

/** A labelled control with a hint and a place for what is wrong with it. */
export function field(label, control, { hint, name, wide } = {}) {
  control.id ||= fresh("field");
  if (name) control.name = name;
  const about = hint ? h("p", { class: "hint", id: `${control.id}-hint` }, hint) : null;
  const wrong = h("p", { class: "wrong", id: `${control.id}-wrong`, hidden: true });
  control.setAttribute("aria-describedby", [about?.id, wrong.id].filter(Boolean).join(" "));
  return h("div", { class: wide ? "field wide" : "field" }, h("label", { for: control.id }, label), control, about, wrong);
}

/** Say what is wrong with a control, or that nothing is. */
export function mark(control, message) {
  const place = document.getElementById(`${control.id}-wrong`);
  control.toggleAttribute("aria-invalid", Boolean(message));
  if (message) control.setAttribute("aria-invalid", "true");
  place.hidden = !message;
  place.textContent = message ?? "";
}

/** A list to choose from: [[value, text], …]. */
export function choice(pairs, chosen, props) {
  const options = pairs.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
  return h("select", props, options);
}

export const button = (text, onclick, props) => h("button", { type: "button", onclick, ...props }, text);

/** A heading of a view; it takes the focus when the view comes. */
export function heading(title, lead, ...beside) {
  document.title = `${title} · jaxtune`;
  const actions = beside.filter(Boolean);
  return h("div", { class: "heading" },
    h("div", {}, h("h1", { tabindex: "-1" }, title), lead ? h("p", { class: "lead" }, lead) : null),
    actions.length ? h("div", { class: "actions" }, actions) : null);
}

/** What stands where there is nothing yet. */
export const empty = (title, text, ...actions) =>
  h("div", { class: "empty" }, h("div", { class: "ruler", "aria-hidden": "true" }), h("h2", {}, title), h("p", {}, text),
    actions.length ? h("div", { class: "actions" }, actions) : null);

/** An error where it happened. */
export function notice(error, kind = "bad") {
  const message = typeof error === "string" ? error : error.message;
  return h("div", { class: `notice ${kind}`, role: kind === "bad" ? "alert" : "note" },
    h("span", { class: "sign", "aria-hidden": "true" }, kind === "bad" ? "!" : "i"), h("p", {}, message));
}

/** Show an error in a place, instead of what stood there; nothing where a view was only left. */
export function fail(place, error) {
  if (error.name === "AbortError") return;
  place.replaceChildren(notice(error));
}

let timer;
/** Tell everybody, readers of screens too. */
export function tell(text) {
  const place = document.getElementById("status");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(timer);
  timer = setTimeout(() => place.classList.remove("shown"), 4000);
}

/** A table: columns of {title, cell(row), class}; the first cell of a row is its heading. */
export function table(caption, columns, rows) {
  const cells = (row) => columns.map((c, i) => {
    const name = [c.class, c.title ? "" : "bare"].filter(Boolean).join(" ");
    return h(i ? "td" : "th", { class: name, scope: i ? null : "row", "data-title": c.title }, c.cell(row));
  });
  return h("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    h("table", { class: "stacked" }, h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, columns.map((c) =>
        h("th", { scope: "col", class: c.class }, c.title || h("span", { class: "unseen" }, t("actions")))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells(row))))));
}

/** Replace what a place shows only where `what` (of plain values) changed, so that focus and selection stay. */
export function refresh(place, what, render) {
  const now = JSON.stringify(what);
  if (place.shown === now) return;
  place.shown = now;
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  place.replaceChildren(...[render()].flat());
  if (focused) [...place.querySelectorAll("[data-key]")].find((e) => e.dataset.key === focused)?.focus();
}

/** Ask before something that cannot be undone. Resolves to whether it was confirmed. */
export function confirmed(title, text, yes) {
  return new Promise((resolve) => {
    const id = fresh("dialog");
    const dialog = h("dialog", { "aria-labelledby": id, onclose: () => { dialog.remove(); resolve(dialog.returnValue === "yes"); } },
      h("form", { method: "dialog" }, h("h2", { id }, title), h("p", {}, text),
        h("div", { class: "actions" }, h("button", { value: "no", autofocus: true }, t("keep")),
          h("button", { value: "yes", class: "danger" }, yes))));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A text in a window of its own. */
export function reading(title, lead, text) {
  const id = fresh("dialog");
  const dialog = h("dialog", { class: "wide", "aria-labelledby": id, onclose: () => dialog.remove() },
    h("form", { method: "dialog" }, h("div", { class: "heading" }, h("h2", { id }, title), h("button", { autofocus: true }, t("close"))),
      h("p", { class: "hint" }, lead),
      h("pre", { tabindex: "0", class: "prose", "aria-label": title }, text)));
  document.body.append(dialog);
  dialog.showModal();
}

/** Do something again and again while a view is there and looked at. It ends when `work` returns false. */
export async function every(seconds, work, signal) {
  while (!signal.aborted) {
    if (!document.hidden && (await work()) === false) return;
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}
