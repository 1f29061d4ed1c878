// What the page says, in the reader's language, and numbers and times as they are written there.
const LANGUAGES = { en: "English", zh: "中文" };
let words = {};
let language = "en";

/** A text by its key, with {names} filled in. */
export function t(key, values = {}) {
  const text = words[key];
  if (text === undefined) throw new Error(`no text for ${key}`);
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Whether there is a text of this key. */
export const known = (key) => key in words;

export const languages = () => Object.entries(LANGUAGES);
export const current = () => language;

/** The language chosen before, else the browser's. */
export function preferred() {
  const kept = localStorage.getItem("jaxtune.language");
  if (kept in LANGUAGES) return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export async function speak(code) {
  const answer = await fetch(`/page/texts.${code}.json`);
  words = await answer.json();
  language = code;
  localStorage.setItem("jaxtune.language", code);
  document.documentElement.lang = code === "zh" ? "zh-Hans" : code;
}

export const number = (x, digits = 0) =>
  x === null || x === undefined ? "–" : x.toLocaleString(language, { maximumFractionDigits: digits });

/** A measurement with four digits that count. */
export const figure = (x) =>
  x === null || x === undefined ? "–" : x.toLocaleString(language, { maximumSignificantDigits: 4, useGrouping: false });

export function bytes(n) {
  if (n === null || n === undefined) return "–";
  let unit = 0;
  while (n >= 1024 && unit < 4) { n /= 1024; unit += 1; }
  return `${number(n, n < 10 && unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.max(0, Math.round(seconds));
  const two = (x) => String(x).padStart(2, "0");
  if (s < 60) return t("seconds", { n: s });
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor(s / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

export const when = (unix) =>
  unix ? new Date(unix * 1000).toLocaleString(language, { dateStyle: "medium", timeStyle: "short" }) : "–";

export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString(language);
