// Elements, and the sheet over the page that shows a card, or a request as code.

import { asCurl, asPython } from "./stream.js";

const at = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.toggleAttribute(name, value !== false);
  for (const [name, value] of Object.entries(attributes)) if (typeof value === "string") made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function button(attributes, text, act) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

export const linkButton = (text, label, act) => button({ class: "link", "aria-label": label }, text, act);

export function written(value, language, digits) {
  return new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

export function showSheet(title, ...children) {
  at("sheet-title").textContent = title;
  at("sheet-body").replaceChildren(...children);
  at("sheet-status").textContent = "";
  at("sheet").showModal();
}

export function showCard(words, language, name, card) {
  const { data, base, metrics, versions } = card;
  const number = (value) => written(value, language, Number.isInteger(value) ? 0 : 4);
  const lines = (pairs) => pairs.map((pair) => pair.join(" ")).join("\n");
  const values = {
    ...card,
    base: [base.name, base.gguf_file].filter(Boolean).join(", "),
    train: data.num_train ? words.rows(number(data.num_train), data.train) : null,
    held: data.num_eval ? number(data.num_eval) : null,
    metrics: lines(Object.entries(metrics).filter(([, value]) => value !== null).map(([key, value]) => [key, number(value)])),
    versions: lines(Object.entries(versions)),
  };
  const rows = Object.entries(words.facts).filter(([key]) => values[key] || values[key] === 0);
  const cells = rows.map(([key, title]) => make("tr", {}, make("th", { scope: "row" }, title), make("td", {}, String(values[key]))));
  showSheet(words.cardOf(name), make("table", {}, make("tbody", {}, ...cells)));
}

export function showCode(words, name, request, key) {
  const forms = { curl: asCurl(request, key), Python: asPython(request, key) };
  const parts = Object.entries(forms).flatMap(([title, text]) => {
    const shown = make("pre", {}, text);
    const copy = button({ "aria-label": `${words.copy}: ${title}` }, words.copy, () => copied(words, text, shown));
    return [make("div", { class: "row" }, make("h3", {}, title), copy), shown];
  });
  showSheet(words.codeOf(name), ...parts);
}

// A page that came over plain HTTP from elsewhere has no clipboard: there the text is selected.
async function copied(words, text, shown) {
  getSelection().selectAllChildren(shown);
  await navigator.clipboard?.writeText(text).then(() => (at("sheet-status").textContent = words.copied), () => undefined);
}

at("close").addEventListener("click", () => at("sheet").close());
