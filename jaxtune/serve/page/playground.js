// Playground: one question to two models side by side, answered as they write.
import { call, stream } from "./api.js";
import { asPython, sample } from "./code.js";
import { button, choice, empty, field, h, heading, mark, notice } from "./dom.js";
import { number, t } from "./texts.js";

export async function show(place, { query, signal }) {
  const about = await call("/v1/jaxtune/about", { signal });
  place.append(heading(t("nav.playground"), t("play.lead")));
  const names = [...about.bases.map((m) => m.id), ...about.tuned.map((m) => m.id)];
  if (!names.length) return place.append(empty(t("new.nomodels"), t("new.nomodels.text")));
  const wanted = query.get("model") ?? about.tuned[0]?.id ?? names[0];
  const base = about.tuned.find((m) => m.id === wanted)?.base ?? names[0];
  const room = about.bases.find((m) => m.id === base)?.max_position_embeddings ?? 2048;
  const longest = Math.min(256, Math.floor(room / 2), about.limits.answer_tokens);
  const sides = [side(t("play.left"), names, base), side(t("play.right"), names, wanted)];

  const decimal = (value) => h("input", { type: "text", inputmode: "decimal", autocomplete: "off", value });
  const inputs = { temperature: decimal("0.7"), top_p: decimal("1"), max_completion_tokens: decimal(String(longest)), seed: decimal("") };
  const system = h("textarea", { rows: 2 });
  const message = h("textarea", { rows: 3, placeholder: t("play.placeholder") });
  const [code, done] = [sample(), h("p", { class: "unseen", role: "status" })];
  let running = null;

  const settings = () => Object.fromEntries(Object.entries(inputs).filter(([, i]) => i.value.trim() !== "").map(([k, i]) => [k, Number(i.value)]));
  const begin = () => (system.value.trim() ? [{ role: "system", content: system.value.trim() }] : []);
  const changed = () => code.update(asPython("answer = client.chat.completions.create", {
    model: sides[1].model.value, messages: [...begin(), { role: "user", content: message.value.trim() || "…" }], ...settings() }));

  const send = h("button", { type: "submit", class: "primary" }, t("play.send"));
  const stop = button(t("play.stop"), () => running?.abort(), { hidden: true, class: "danger" });
  const clear = button(t("play.clear"), () => { running?.abort(); sides.forEach((s) => s.clear()); message.focus(); });
  const form = h("form", { novalidate: true, class: "ask" },
    field(t("play.message"), message), h("div", { class: "actions" }, send, stop, clear, h("span", { class: "hint" }, t("play.keys"))),
    h("details", {}, h("summary", {}, t("play.settings")), field(t("play.system"), system),
      h("div", { class: "fields four" }, Object.entries(inputs).map(([k, i]) => field(t(`play.${k}`), i, { name: k })))), code.element);

  form.addEventListener("submit", async (e) => {
    e.preventDefault();
    const text = message.value.trim();
    const odd = Object.values(inputs).find((i) => i.value.trim() !== "" && !Number.isFinite(Number(i.value)));
    Object.values(inputs).forEach((i) => mark(i, i === odd ? t("error.number") : null));
    mark(message, text ? null : t("error.empty"));
    if (running || !text || odd) return (odd ?? message).focus();
    running = new AbortController();
    const quit = () => running?.abort();
    signal.addEventListener("abort", quit);
    [send.hidden, stop.hidden] = [true, false];
    stop.focus();
    message.value = "";
    done.textContent = "";
    await Promise.all(sides.map((one) => one.ask(text, begin(), settings(), running.signal)));
    signal.removeEventListener("abort", quit);
    running = null;
    [send.hidden, stop.hidden] = [false, true];
    if (!signal.aborted) { message.focus(); done.textContent = t("play.done"); }
  });
  message.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); form.requestSubmit(); }
  });
  form.addEventListener("input", changed);
  sides.forEach((one) => one.model.addEventListener("change", changed));
  changed();
  place.append(h("div", { class: "sides" }, sides.map((one) => one.element)), form, done);
}

/** One model and what was said with it. */
function side(title, names, chosen) {
  const model = choice(names.map((n) => [n, n]), chosen);
  const talk = h("ol", { class: "talk", role: "log", "aria-label": title, tabindex: "0" });
  const blank = h("p", { class: "blank" }, t("play.blank"));
  let said = [];
  const turn = (role, text) => {
    const words = h("p", {}, text);
    const place = h("li", { class: role }, h("span", { class: "who" }, t(`play.${role}`)), words);
    talk.append(place);
    talk.scrollTop = talk.scrollHeight;
    return { words, place };
  };

  async function ask(text, begin, settings, signal) {
    blank.remove();
    turn("user", text);
    const { words, place } = turn("assistant", "");
    place.setAttribute("aria-busy", "true"); // readers of screens hear the answer when it is whole
    place.classList.add("writing");
    const messages = [...begin, ...said, { role: "user", content: text }];
    const [start, facts] = [performance.now(), []];
    let [whole, first, usage, reason] = ["", null, null, null];
    try {
      const body = { model: model.value, messages, ...settings, stream: true, stream_options: { include_usage: true } };
      for await (const chunk of stream("/v1/chat/completions", body, signal)) {
        usage = chunk.usage ?? usage;
        reason = chunk.choices[0]?.finish_reason ?? reason;
        const piece = chunk.choices[0]?.delta?.content;
        if (!piece) continue;
        first ??= performance.now();
        whole += piece;
        words.append(whole === piece ? piece.trimStart() : piece);
        talk.scrollTop = talk.scrollHeight;
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else place.append(notice(error));
    }
    place.removeAttribute("aria-busy");
    place.classList.remove("writing");
    if (whole) said = [...said, { role: "user", content: text }, { role: "assistant", content: whole }];
    const end = performance.now();
    if (first) facts.push(t("play.first", { ms: number(first - start) }));
    if (usage && first && end > first) facts.push(t("play.rate", { n: number((1000 * usage.completion_tokens) / (end - start), 1) }));
    if (usage) facts.push(t("play.used", { n: number(usage.completion_tokens), time: t("seconds", { n: number((end - start) / 1000, 1) }) }));
    if (reason && reason !== "stop") facts.push(t(reason === "stopped" ? "play.stopped" : "play.ended", { reason }));
    place.append(h("small", {}, facts.join(" · ")));
    talk.scrollTop = talk.scrollHeight;
  }

  talk.append(blank);
  return {
    model, ask,
    clear() { said = []; talk.replaceChildren(blank); },
    element: h("section", { class: "side", "aria-label": title }, field(title, model), talk),
  };
}
