// The same with OpenAI's client: what to type instead of clicking.
import { button, h, tell } from "./dom.js";
import { t } from "./texts.js";

/** A value as Python writes it. */
export function python(value, indent = 0) {
  const pad = " ".repeat(indent + 4);
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Array.isArray(value)
    ? value.map((v) => python(v, indent + 4))
    : Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v, indent + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = `${open}${items.join(", ")}${close}`;
  return line.length + indent < 76 ? line : `${open}\n${items.map((x) => `${pad}${x},\n`).join("")}${" ".repeat(indent)}${close}`;
}

const client = () => `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1")  # the key: OPENAI_API_KEY
`;

/** A call with these arguments; what only this service knows goes into extra_body. */
export const asPython = (name, given) =>
  `${client()}${name}(\n${Object.entries(given).map(([k, v]) => `    ${k}=${python(v, 4)},\n`).join("")})`;

/** A folded sample of code. Gives {element, update(text)}. */
export function sample() {
  const code = h("code", {});
  const copy = button(t("copy"), async () => {
    await navigator.clipboard.writeText(code.textContent);
    tell(t("copied"));
  }, { class: "plain" });
  return {
    element: h("details", { class: "code" }, h("summary", {}, t("code.title")), h("div", {}, copy, h("pre", { tabindex: "0", "aria-label": t("code.title") }, code))),
    update(text) { code.textContent = text; },
  };
}
