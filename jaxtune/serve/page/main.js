// The frame: what stands around every view, and which view an address names.
import { call } from "./api.js";
import { choice, fail, fresh, h } from "./dom.js";
import { current, languages, preferred, speak, t } from "./texts.js";
import * as compare from "./compare.js";
import * as create from "./create.js";
import * as data from "./data.js";
import * as jobs from "./jobs.js";
import * as models from "./models.js";
import * as playground from "./playground.js";

const VIEWS = { data, new: create, jobs, compare, playground, models };
const content = document.getElementById("content");
let leaving = new AbortController();
let first = true;

/** Name, rest and query of an address such as #/jobs/ftjob-1?tab=log. */
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  return { name: name in VIEWS ? name : "data", rest: rest.map(decodeURIComponent).join("/"), query: new URLSearchParams(query) };
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { name, rest, query } = address();
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("aria-current", false);
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
  }
  const place = h("div", { class: "view" });
  content.replaceChildren(place);
  try {
    await VIEWS[name].show(place, { rest, query, signal });
  } catch (error) {
    if (!signal.aborted) fail(place, error);
  }
  if (signal.aborted) return;
  if (!first) (place.querySelector("h1") ?? content).focus();
  first = false;
}

function frame() {
  document.getElementById("skip").textContent = t("skip");
  const [language, theme] = [fresh("field"), fresh("field")];
  const themes = ["auto", "light", "dark"].map((x) => [x, t(`theme.${x}`)]);
  const about = h("p", { class: "about" });
  document.getElementById("rail").replaceChildren(
    h("a", { class: "brand", href: "#/data" }, h("img", { src: "/page/mark.svg", alt: "", width: "28", height: "28" }), "jaxtune"),
    h("nav", { "aria-label": t("nav") }, h("ul", {}, Object.keys(VIEWS).map((name) =>
      h("li", {}, h("a", { href: `#/${name}`, "data-view": name }, t(`nav.${name}`)))))),
    h("div", { class: "foot" },
      h("div", { class: "switches" },
        h("label", { for: language, class: "unseen" }, t("language")),
        choice(languages(), current(), { id: language, onchange: (e) => change(e.target.value) }),
        h("label", { for: theme, class: "unseen" }, t("theme")),
        choice(themes, document.documentElement.dataset.theme ?? "auto", { id: theme, onchange: (e) => paint(e.target.value) })),
      about));
  call("/v1/jaxtune/about").then((x) => {
    about.textContent = t("about", { version: x.version, organization: x.organization });
  }, () => {}); // the view says what is wrong
}

function paint(theme) {
  if (theme === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("jaxtune.theme");
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("jaxtune.theme", theme);
  }
}

async function change(language) {
  await speak(language);
  frame();
  first = true; // the focus stays at the switch
  document.querySelector(".switches select").focus();
  await show();
}

document.getElementById("skip").addEventListener("click", (e) => {
  e.preventDefault(); // the address names the view
  content.focus();
});
addEventListener("hashchange", show);
await speak(preferred());
frame();
await show();
