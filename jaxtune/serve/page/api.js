// The service. Errors come out of its envelope; a key is asked for where the service wants one, and kept for this tab.
import { fresh, h } from "./dom.js";
import { t } from "./texts.js";

const KEPT = "jaxtune.key";

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message || t("error.status", { status }));
    this.name = "ApiError";
    Object.assign(this, { status, param: error?.param ?? null, code: error?.code ?? null });
  }
}

const headers = () => {
  const key = sessionStorage.getItem(KEPT);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

let asking = null;
/** A dialog for the key; requests that come meanwhile wait for the same one. Resolves to whether one was given. */
function askForKey(message) {
  asking ??= new Promise((resolve) => {
    const [id, about] = [fresh("dialog"), fresh("about")];
    const input = h("input", { type: "password", id: fresh("field"), autocomplete: "off", required: true, spellcheck: "false", autofocus: true });
    const dialog = h("dialog", { "aria-labelledby": id, "aria-describedby": about, onclose: () => {
      dialog.remove();
      asking = null;
      if (dialog.returnValue === "yes") sessionStorage.setItem(KEPT, input.value.trim());
      resolve(dialog.returnValue === "yes");
    } },
    h("form", { method: "dialog" }, h("h2", { id }, t("key.title")), h("p", { id: about }, t("key.text")),
      message ? h("p", { class: "wrong", role: "alert" }, message) : null,
      h("label", { for: input.id }, t("key.label")), input,
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close("no") }, t("cancel")),
        h("button", { value: "yes", class: "primary" }, t("key.use")))));
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
  return asking;
}

async function answer(path, options) {
  for (;;) {
    const used = sessionStorage.getItem(KEPT);
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: t("error.network") });
    }
    if (response.ok) return response;
    const error = new ApiError(response.status, (await response.json().catch(() => null))?.error);
    const changed = sessionStorage.getItem(KEPT) !== used;
    if (response.status !== 401 || !(changed || (await askForKey(used ? error.message : null)))) throw error;
  }
}

const options = ({ method = "GET", json, signal } = {}) => ({
  method, signal,
  headers: json === undefined ? {} : { "Content-Type": "application/json" },
  body: json === undefined ? undefined : JSON.stringify(json),
});

/** JSON of the service. Raises ApiError. */
export const call = async (path, given) => (await answer(path, options(given))).json();

/** Bytes of the service, `seen(n)` told how many are there; saved under a name. */
export async function save(path, name, seen, signal) {
  const response = await answer(path, options({ signal }));
  const [chunks, reader] = [[], response.body.getReader()];
  let n = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    seen((n += value.length));
  }
  const url = URL.createObjectURL(new Blob(chunks));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

/** Events of a stream, as they come. Raises ApiError, also where the stream ends before it said so. */
export async function* stream(path, json, signal) {
  const response = await answer(path, options({ method: "POST", json, signal }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, { message: t("error.cut") });
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(response.status, event.error);
      yield event;
    }
  }
}

/** Upload a file to train on; `seen(share)` is told how far it is. */
export async function upload(file, seen) {
  await call("/v1/jaxtune/about"); // asks for a key before the bytes are sent
  return new Promise((resolve, reject) => {
    const [form, request] = [new FormData(), new XMLHttpRequest()];
    form.append("purpose", "fine-tune");
    form.append("file", file);
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (e) => seen(e.loaded / Math.max(e.total, 1));
    request.onerror = () => reject(new ApiError(0, { message: t("error.network") }));
    request.onload = () =>
      request.status < 300 ? resolve(request.response) : reject(new ApiError(request.status, request.response?.error));
    request.send(form);
  });
}

/** All items of a list that comes in pages, up to a number. */
export async function all(path, most, signal) {
  const found = [];
  for (let after = null; ; after = found.at(-1).id) {
    const join = path.includes("?") ? "&" : "?";
    const page = await call(`${path}${join}limit=100${after ? `&after=${encodeURIComponent(after)}` : ""}`, { signal });
    found.push(...page.data);
    if (!page.has_more || !page.data.length || found.length >= most) return found;
  }
}
