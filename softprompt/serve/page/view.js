// The view: who answers, the conversation with each side, what an answer cost. Texts of others are text, never markup.

import { button, linkButton, make, showCard, showCode, showSheet, written } from "./sheet.js";
import { address, ask, CHAT, get, PLAIN, Refused } from "./stream.js";
import { startingLanguage, WORDS } from "./words.js";

const KEY = "softprompt key";
const NUM_SAMPLES = 6;
const at = (id) => document.getElementById(id);
const kept = (name) => localStorage.getItem(`softprompt ${name}`);
const keep = (name, value) => localStorage.setItem(`softprompt ${name}`, value);

let words, language;
let speakers = [];
let running = null; // an AbortController while answers come
const sides = [0, 1].map((index) => ({ index, chosen: null, talk: [], ...sideBox(index) }));

const number = (value, digits = 0) => written(value, language, digits);
const key = () => sessionStorage.getItem(KEY);
const say = (text) => (at("status").textContent = text);

// ---- who can answer ---------------------------------------------------------------------------------------------------

// Base, text prompts and prompts in the order of the list. A text prompt is what an evaluation lets compete: the base, told in a system
// turn what the prompt was started from, in front of the system turn that all its rows had.
function speakersOf(models) {
  const base = models.find((one) => one.kind === "base");
  const told = models.filter((one) => base && one.text);
  const text = (one) => ({ kind: "text", id: `text ${one.name}`, model: base.name, of: one, wish: [one.text, one.system].filter(Boolean).join("\n") });
  const plain = (one) => ({ kind: one.kind, id: `${one.kind} ${one.name}`, model: one.name, of: one, wish: null });
  const kind = (name) => models.filter((one) => one.kind === name).map(plain);
  return [...kind("base"), ...told.map(text), ...kind("prompt"), ...kind("ensemble")];
}

const called = (one) => (one.kind === "text" ? words.textOf(one.of.name) : one.of.name);

async function load() {
  let models;
  try {
    models = await get("page/models.json", key());
  } catch (error) {
    return error.status === 401 ? locked() : say((at("about").textContent = explained(error)));
  }
  at("unlock").hidden = true;
  speakers = speakersOf(models);
  const prompts = speakers.filter((one) => one.kind === "prompt");
  const first = speakers.find((one) => one.kind === "text") ?? speakers[0];
  for (const side of sides) {
    const usual = side.index ? (prompts[0] ?? speakers.at(-1)) : first;
    side.chosen = speakers.find((one) => one.id === side.chosen?.id) ?? usual;
  }
  draw();
  if ([document.body, at("key")].includes(document.activeElement)) at("question").focus();
}

function locked() {
  at("key-note").textContent = key() ? words.keyRefused : words.keyNote;
  at("unlock").hidden = false;
  at("key").focus();
}

function explained(error) {
  if (!(error instanceof Refused)) return words.unreachable;
  return error.seconds ? `${error.message} (${words.later(number(error.seconds))})` : error.message || words.broken;
}

// ---- drawing ----------------------------------------------------------------------------------------------------------

function sideBox(index) {
  const select = make("select", { id: `side-${index}` });
  const label = make("label", { for: `side-${index}` });
  const facts = make("p", { class: "facts note" });
  at("sides").append(make("div", { class: "side" }, label, select, facts));
  return { select, label, facts };
}

function draw() {
  document.documentElement.lang = language;
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = words[one.dataset.word];
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", words[one.dataset.label]);
  const prompts = speakers.filter((one) => one.kind === "prompt");
  const base = speakers.find((one) => one.kind === "base");
  if (base) at("about").textContent = words.about(base.of.name, prompts.length);
  at("sides").hidden = at("asking").hidden = !speakers.length;
  sides.forEach(drawSide);
  drawSamples();
}

function drawSide(side) {
  side.label.textContent = words.side[side.index];
  const groups = Object.entries(words.kinds).map(([kind, name]) => {
    const own = speakers.filter((one) => one.kind === kind);
    return own.length && make("optgroup", { label: name }, ...own.map((one) => make("option", { value: one.id }, called(one))));
  });
  side.select.replaceChildren(...groups.filter(Boolean));
  if (!side.chosen) return;
  side.select.value = side.chosen.id;
  side.facts.replaceChildren(...factsOf(side.chosen));
}

// What a side is, in a line, with the ways to its card and report.
function factsOf(one) {
  const { of: model, kind } = one;
  if (kind === "base") return [words.bare];
  if (kind === "ensemble") return [words.members(model.members.join(", "))];
  const said = kind === "text" ? [make("q", { class: "few" }, one.wish)] : [words.virtual(model.virtual, number(model.virtual))];
  if (kind === "text" && !["chat", "human-assistant"].includes(model.template)) said.push(words.otherTemplate, " ");
  said.push(linkButton(words.card, words.cardOf(model.name), () => openCard(model.name)));
  if (model.report) {
    const link = { href: String(address(model.report)), target: "_blank", rel: "noopener", "aria-label": words.reportOf(model.name) };
    said.push(" ", make("a", link, words.report));
  }
  return said;
}

async function openCard(name) {
  try {
    showCard(words, language, name, await get(`page/card/${encodeURIComponent(name)}`, key()));
  } catch (error) {
    showSheet(words.cardOf(name), make("p", { class: "trouble" }, explained(error)));
  }
}

function samples() {
  const found = new Map(sides.flatMap(({ chosen }) => chosen?.of.samples ?? []).map((one) => [one.question, one]));
  return [...found.values()];
}

function drawSamples() {
  const shown = samples().slice(0, NUM_SAMPLES);
  at("tries").hidden = !shown.length;
  const tried = ({ question }) => make("li", {}, button({ class: "try" }, question, () => put(question)));
  at("samples").replaceChildren(...shown.map(tried));
}

function put(question) {
  at("question").value = question;
  at("question").focus();
}

// ---- asking -----------------------------------------------------------------------------------------------------------

async function askBoth() {
  const text = at("question").value;
  if (running || !text.trim() || !speakers.length) return;
  const settings = ["temperature", "tokens", "seed"].map(at);
  const wrong = settings.find((one) => !one.checkValidity());
  if (wrong) {
    at("settings").open = true;
    return wrong.reportValidity();
  }
  const [temperature, max_tokens, seed] = settings.map((one) => Number(one.value));
  running = new AbortController();
  at("question").value = "";
  at("stop").hidden = false;
  at("anew").hidden = false;
  at("tries").open = false;
  at("turns").setAttribute("aria-busy", "true");
  say("");
  const pair = turnBox(text);
  const { signal } = running;
  await Promise.all(sides.map((side) => answer(side, text, { temperature, max_tokens, seed }, pair, signal)));
  running = null;
  at("turns").setAttribute("aria-busy", "false");
  if (document.activeElement === at("stop")) at("question").focus();
  at("stop").hidden = true;
  say(signal.aborted ? words.stopped : words.done);
}

function turnBox(text) {
  const asked = make("p", { class: "asked" }, text);
  const pair = make("div", { class: "pair" });
  const turn = make("article", { "aria-label": text.slice(0, 80) }, asked);
  const wanted = samples().find((one) => one.question === text)?.wanted;
  if (wanted) turn.append(make("p", { class: "note wanted" }, `${words.wanted}: ${wanted}`));
  turn.append(pair);
  at("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return pair;
}

async function answer(side, text, settings, pair, signal) {
  const who = side.chosen;
  const talk = [...side.talk, { role: "user", content: text }];
  const box = answerBox(called(who));
  pair.append(box.whole);
  const forms = requests(who, talk, settings);
  for (const request of forms) {
    box.asCode(request);
    try {
      const said = await stream(request, box, signal);
      if (side.chosen.id === who.id) side.talk = [...talk, { role: "assistant", content: said }];
      return;
    } catch (error) {
      if (error.status === 400 && request !== forms.at(-1)) continue; // some chat templates know no system turn
      box.tell(error.name === "AbortError" ? words.stopped : explained(error), "trouble");
      if (error.status === 401) locked();
      return;
    }
  }
}

// How the conversation is asked, the second way where the first is refused. A text prompt is its system turn, or stands in its first turn
// where a chat template knows no system; for a prompt that learned from plain dialogue the base reads plain dialogue, not its chat template.
function requests({ model, wish, of }, talk, settings) {
  const body = { model, ...settings };
  const chat = (messages) => ({ path: CHAT, body: { ...body, messages } });
  if (wish === null) return [chat(talk)];
  if (of.template === "human-assistant") {
    const turns = talk.map(({ role, content }) => `${role === "user" ? "Human" : "Assistant"}: ${content}`.trim());
    return [{ path: PLAIN, body: { ...body, prompt: [wish, ...turns, "Assistant:"].join("\n\n"), stop: ["\n\nHuman:"] } }];
  }
  const [first, ...others] = talk;
  return [chat([{ role: "system", content: wish }, ...talk]), chat([{ role: "user", content: `${wish}\n${first.content}` }, ...others])];
}

async function stream(request, box, signal) {
  const began = performance.now();
  const seconds = () => (performance.now() - began) / 1000;
  let first = null, said = "", usage = null, finish = null;
  for await (const piece of ask(request, key(), signal)) {
    if (piece.text || piece.thought) first ??= seconds();
    if (piece.thought) following(() => box.think(piece.thought));
    const text = said ? piece.text : piece.text?.trimStart();
    if (text) following(() => box.write(text));
    said += text ?? "";
    usage = piece.usage ?? usage;
    finish = piece.finish ?? finish;
  }
  if (!said) box.tell(words.nothing);
  if (finish === "length") box.tell(words.cut);
  following(() => box.cost(usage, first ?? seconds(), seconds()));
  return said;
}

// Keeps the end of the page in sight where it was in sight before.
function following(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - innerHeight < 40;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function answerBox(name) {
  const said = make("p", { class: "said" });
  const thoughts = make("p", { class: "said note" });
  const thinking = make("details", { hidden: true }, make("summary", {}, words.thoughts), thoughts);
  const notes = make("div");
  let request;
  const code = linkButton(words.code, words.codeOf(name), () => showCode(words, name, request, key()));
  const head = make("div", { class: "head note" }, make("h2", {}, name), code);
  const whole = make("div", { class: "answer", role: "group", "aria-label": name }, head, thinking, said, notes);
  return {
    whole,
    asCode: (asked) => (request = asked),
    write: (text) => said.append(text),
    think: (text) => ((thinking.hidden = false), thoughts.append(text)),
    tell: (text, kind = "") => notes.append(make("p", { class: `note ${kind}` }, text)),
    cost: (usage, first, total) => whole.append(costOf(usage, first, total)),
  };
}

function costOf(usage, first, total) {
  const { virtual_tokens: virtual, cached_tokens: cached } = usage?.prompt_tokens_details ?? {};
  const values = [
    usage && words.answered(usage.completion_tokens, number(usage.completion_tokens)),
    words.seconds(number(first, 2)),
    words.seconds(number(total, 2)),
    usage && words.read(number(usage.prompt_tokens), virtual && number(virtual)),
    cached && number(cached),
  ];
  const pairs = values.map((value, index) => value && make("div", {}, make("dt", {}, words.cost[index]), make("dd", {}, value)));
  return make("dl", { class: "cost" }, ...pairs.filter(Boolean));
}

// ---- what the reader does ----------------------------------------------------------------------------------------------

for (const side of sides) {
  side.select.addEventListener("change", () => {
    const chosen = speakers.find((one) => one.id === side.select.value);
    if (chosen === side.chosen) return;
    side.chosen = chosen;
    if (side.talk.length) say(words.restarted(called(side.chosen)));
    side.talk = [];
    draw();
  });
}

at("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  askBoth();
});
at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value);
  at("key").value = "";
  load();
});
at("stop").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", () => {
  running?.abort();
  for (const side of sides) side.talk = [];
  at("turns").replaceChildren();
  at("anew").hidden = true;
  at("question").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("sheet").open) running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !at("sheet").open) askBoth();
});
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && load());
at("language").addEventListener("change", () => {
  keep("language", at("language").value);
  speak(at("language").value);
});
at("appearance").addEventListener("change", () => {
  keep("appearance", at("appearance").value);
  document.documentElement.dataset.theme = at("appearance").value;
});

function speak(wanted) {
  language = wanted;
  words = WORDS[language];
  at("language").value = language;
  draw();
}

document.documentElement.dataset.theme = at("appearance").value = kept("appearance") ?? "";
speak(startingLanguage(kept("language")));
load();
