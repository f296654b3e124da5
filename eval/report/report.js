"use strict";
// Tabs and sortable columns of the report, and its browser of examples: unpacks what examples.py packed and shows a page of the selected examples. All text
// is added to the page as text, never as markup, because models wrote it. The selection is in the address, after #examples?.

const PER_PAGE = 25;
const FOLDED = 800; // characters shown of a longer text
const FOLDED_SAID = 160; // of a judge's answer
const MOST_CELLS = 1e6; // of the table that compares two texts

const part = (id) => document.getElementById(id);
const form = part("choice"), found = part("found"), cards = part("cards"), data = part("packed").dataset;
let head, examples, matches = [], page = 1;

const START = "#examples?";

async function unpack() {
  const text = atob(part("packed").textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const lines = (await new Response(stream).text()).trimEnd().split("\n");
  [head, ...examples] = lines.map((line) => JSON.parse(line));
  examples.forEach((example, i) => (example.number = i + 1));
}

// ── the selection ──────────────────────────────────────────────────────────────────────────────────────────────

const choice = () => Object.fromEntries(new FormData(form));

function offer(name, values) {
  const select = form.elements[name], distinct = [...new Set(values)].filter(Boolean);
  for (const value of distinct) select.add(new Option(value, value));
  select.closest("label").hidden = distinct.length < 2;
}

function offerAll() {
  offer("category", examples.map((example) => example.category).sort());
  offer("system", head.columns.map(([system]) => system));
  offer("decoding", head.columns.map(([, decoding]) => decoding));
  offer("judge", head.comparisons.map(({ judge }) => judge));
  offer("against", head.comparisons.map(({ opponent }) => opponent));
  form.elements.outcome.closest("label").hidden = !head.comparisons.length;
  const both = examples.some((example) => example.verdicts.some((verdict) => verdict?.orders.length > 1));
  form.elements.sort.closest("label").hidden = !examples.some((example) => gain(example, {}) !== null);
  for (const option of form.elements.sort.options) if (option.value) option.text += ` (${head.metric})`;
  if (!both) form.elements.outcome.querySelector("[value=flips]").remove();
  if (!head.columns.some(([system]) => system === data.baseline)) form.elements.marked.querySelector("[value=baseline]").remove();
}

// The difference of an example's score between a system and the baseline, under one decoding; null without both.
function gain(example, { system, decoding }) {
  const wanted = system && system !== data.baseline ? system : data.best;
  const ours = head.columns.findIndex(([name, how]) => name === wanted && (!decoding || how === decoding));
  if (ours < 0) return null;
  const theirs = head.columns.findIndex(([name, how]) => name === data.baseline && how === head.columns[ours][1]);
  const [a, b] = [example.scores[ours], example.scores[theirs]].map((score) => score ?? null);
  return a === null || b === null ? null : a - b;
}

function sorted(chosen, found) {
  if (!chosen.sort) return found;
  const sign = chosen.sort === "gain" ? -1 : 1, gains = new Map(found.map((example) => [example, gain(example, chosen)]));
  return found.filter((example) => gains.get(example) !== null).sort((a, b) => sign * (gains.get(a) - gains.get(b)));
}

function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(START.length));
  for (const field of form.elements) if (field.name) {
    const value = wanted.get(field.name) ?? "";
    field.value = field.options && ![...field.options].some((option) => option.value === value) ? "" : value;
  }
  page = Number.parseInt(wanted.get("page")) || 1;
}

function writeAddress() {
  const chosen = new URLSearchParams(Object.entries(choice()).filter(([, value]) => value));
  if (page > 1) chosen.set("page", page);
  if (chosen.size || location.hash.startsWith(START)) history.replaceState(null, "", START + chosen);
}


const OUTCOMES = { a: "wins", tie: "ties", b: "loses" };
const flips = (verdict) => new Set(verdict.orders.map(({ winner }) => winner)).size > 1;

function isChosen(example, { search, category, system, decoding, judge, against, outcome }) {
  if (category && example.category !== category) return false;
  if (search) {
    example.all ??= [example.id, example.prompt, example.target, ...example.outputs].join("\n").toLowerCase();
    if (!example.all.includes(search.toLowerCase())) return false;
  }
  return !outcome || head.comparisons.some((comparison, i) => {
    const verdict = example.verdicts[i];
    if (!verdict || (system && comparison.system !== system)) return false;
    if (decoding && comparison.decoding !== decoding) return false;
    if ((judge && comparison.judge !== judge) || (against && comparison.opponent !== against)) return false;
    return outcome === "flips" ? flips(verdict) : outcome === OUTCOMES[verdict.winner];
  });
}

function choose() {
  const chosen = choice();
  matches = sorted(chosen, examples.filter((example) => isChosen(example, chosen)));
  show();
}

// ── the cards ──────────────────────────────────────────────────────────────────────────────────────────────────

function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children); // strings become text
  return made;
}

function show() {
  const chosen = choice(), pages = Math.max(1, Math.ceil(matches.length / PER_PAGE));
  page = Math.min(Math.max(page, 1), pages);
  const first = (page - 1) * PER_PAGE, shown = matches.slice(first, first + PER_PAGE);
  cards.replaceChildren(...shown.map((example) => card(example, chosen)));
  const range = shown.length ? ` · ${first + 1} to ${first + shown.length} shown` : "";
  found.textContent = `${matches.length.toLocaleString("en")} of ${examples.length.toLocaleString("en")} examples${range}`;
  part("page").textContent = `Page ${page} of ${pages}`;
  part("previous").setAttribute("aria-disabled", page === 1); // a disabled button would lose the keyboard focus
  part("next").setAttribute("aria-disabled", page === pages);
  writeAddress();
}

function card(example, chosen) {
  const heading = element("h4", "", `Example ${example.number}`);
  if (example.category) heading.append(" ", element("span", "category", example.category));
  const prompt = element("section", "plain", element("h5", "", "prompt"), text([["", example.prompt]]));
  const target = element("section", "target", element("h5", "", "target"), text([["", example.target]]));
  const outputs = head.columns.flatMap(([system, decoding], i) => {
    const left = chosen.system && ![chosen.system, chosen.against, data.baseline].includes(system);
    const other = chosen.decoding && chosen.decoding !== decoding;
    return left || other || example.outputs[i] === null ? [] : [output(example, i, chosen)];
  });
  const made = element("article", "card", heading, prompt, element("div", "side", target, ...outputs));
  made.append(element("p", "id", `example_id ${example.id}`));
  return made;
}

function output(example, column, chosen) {
  const [system, decoding] = head.columns[column], isBaseline = system === data.baseline;
  const written = example.outputs[column], other = reference(example, column, chosen.marked);
  const made = element("section", "", element("h5", "", `${system}, ${decoding}${isBaseline ? " (baseline)" : ""}`));
  const score = example.scores[column] ?? null;
  if (score !== null) made.append(element("p", "score", `${head.metric}: ${score.toPrecision(4)}`));
  head.comparisons.forEach((comparison, i) => {
    const { judge, opponent } = comparison, verdict = example.verdicts[i];
    if (comparison.system !== system || comparison.decoding !== decoding || !verdict) return;
    if ((chosen.judge && judge !== chosen.judge) || (chosen.against && opponent !== chosen.against)) return;
    made.append(judgement(comparison, verdict));
  });
  const parts = other === null ? null : differences(other, written);
  if (other !== null && parts === null) made.append(element("p", "remark", "Too long for a word-by-word comparison."));
  made.append(text(parts ?? [["", written]]));
  return made;
}

// The text that differences are marked against; null without marks.
function reference(example, column, marked) {
  const [system, decoding] = head.columns[column];
  if (marked === "target") return example.target;
  if (marked !== "baseline" || system === data.baseline) return null;
  const baseline = head.columns.findIndex(([name, how]) => name === data.baseline && how === decoding);
  return baseline < 0 ? null : example.outputs[baseline];
}

const SIGNS = { wins: "▲", ties: "=", loses: "▼" };

function judgement({ judge, opponent, system }, verdict) {
  const name = OUTCOMES[verdict.winner];
  const signed = element("strong", name, `${SIGNS[name]} ${name}`);
  const line = element("p", "", `${judge}: `, signed, ` against ${opponent}`);
  const made = element("div", "verdict", line);
  if (flips(verdict)) line.append(" · ", element("strong", "flips", "⇄ the orders disagree"));
  for (const { order, winner, said } of verdict.orders) {
    const first = order === "ab" ? system : opponent, better = { a: system, tie: "a tie", b: opponent }[winner];
    const label = verdict.orders.length > 1 ? `${first} shown first → ${better}\n` : "";
    made.append(text([["", label + said]], FOLDED_SAID));
  }
  return made;
}

// A text of parts [mark, text], a long one folded; mark is "", "ins" or "del".
function text(parts, folded = FOLDED) {
  const box = element("div", "text"), length = parts.reduce((sum, [, words]) => sum + words.length, 0);
  const fill = (room) => {
    box.replaceChildren();
    for (const [mark, words] of parts) {
      if (room <= 0) break;
      const cut = words.slice(0, room).replace(/[\ud800-\udbff]$/, ""); // never half of a character
      if (mark) box.append(element(mark, "", cut.trimEnd()), cut.slice(cut.trimEnd().length));
      else box.append(cut);
      room -= words.length;
    }
  };
  fill(folded);
  if (length <= folded) return box;
  const button = element("button", "fold", "");
  button.type = "button";
  const unfold = (whole) => {
    fill(whole ? Infinity : folded);
    button.textContent = whole ? "Show less" : `Show all ${length.toLocaleString("en")} characters`;
    button.setAttribute("aria-expanded", whole);
  };
  button.addEventListener("click", () => unfold(button.getAttribute("aria-expanded") === "false"));
  unfold(false);
  return element("div", "", box, button);
}

// What `ours` has and `theirs` lacks, and the other way round, word by word, by a longest common subsequence; null
// where the texts are too long for one.
function differences(theirs, ours) {
  const words = (written) => written.match(/\S+\s*|\s+/g) ?? [];
  const a = words(theirs), b = words(ours), same = (i, j) => a[i].trimEnd() === b[j].trimEnd();
  let start = 0, n = a.length, m = b.length;
  while (start < n && start < m && same(start, start)) start++;
  while (n > start && m > start && same(n - 1, m - 1)) n--, m--;
  const width = m - start + 1;
  if ((n - start + 1) * width > MOST_CELLS) return null;
  const common = new Uint16Array((n - start + 1) * width), at = (i, j) => (i - start) * width + j - start;
  for (let i = n - 1; i >= start; i--)
    for (let j = m - 1; j >= start; j--)
      common[at(i, j)] = same(i, j) ? common[at(i + 1, j + 1)] + 1 : Math.max(common[at(i + 1, j)], common[at(i, j + 1)]);
  const parts = [["", b.slice(0, start).join("")]];
  const add = (mark, word) => (parts.at(-1)[0] === mark ? (parts.at(-1)[1] += word) : parts.push([mark, word]));
  for (let i = start, j = start; i < n || j < m; ) {
    if (i < n && j < m && same(i, j)) add("", b[j++]), i++;
    else if (j === m || (i < n && common[at(i + 1, j)] >= common[at(i, j + 1)])) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  add("", b.slice(m).join(""));
  return parts;
}

// ── what the reader does ────────────────────────────────────────────────────────────────────────────────────────

function turn(by) {
  page += by;
  show();
  part("examples").scrollIntoView();
}

// ── tabs and sortable columns ───────────────────────────────────────────────────────────────────────────────────

function makeTabs(box, number) {
  const panels = [...box.children];
  if (panels.length < 2) return;
  const list = element("div"), tabs = panels.map((panel, i) => {
    const heading = panel.querySelector("h3"), tab = element("button", "", heading.textContent);
    heading.hidden = true;
    panel.id ||= `panel-${number}-${i}`;
    Object.assign(tab, { type: "button", id: `tab-${panel.id}` });
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => select(i));
    return tab;
  });
  const select = (chosen, focus) => {
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", i === chosen);
      tab.tabIndex = i === chosen ? 0 : -1;
      panels[i].hidden = i !== chosen;
    });
    if (focus) tabs[chosen].focus();
  };
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", box.closest("section").querySelector("h2").textContent);
  list.append(...tabs);
  list.addEventListener("keydown", ({ key }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key], now = tabs.indexOf(document.activeElement);
    if (step) select((now + step + tabs.length) % tabs.length, true);
  });
  box.before(list);
  select(0);
  const open = () => {
    const asked = panels.findIndex((panel) => `#${panel.id}` === location.hash);
    if (asked < 0) return;
    select(asked);
    panels[asked].scrollIntoView();
  };
  open();
  window.addEventListener("hashchange", open);
}

// The number that a cell begins with, or its text; null, which comes last, of a cell without a value.
function sortKey(row, column) {
  const written = row.cells[column].textContent.replace(/[,★\s]/g, ""), number = Number.parseFloat(written);
  if (written === "–") return null;
  return Number.isNaN(number) ? written : number;
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) return;
  heads.forEach((head, column) => {
    const button = element("button", "", ...head.childNodes);
    button.type = "button";
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort"), falling = before ? before === "ascending" : column > 0;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => [sortKey(row, column), row]), sign = falling ? -1 : 1;
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });
}

async function start() {
  document.querySelectorAll(".tabs").forEach(makeTabs);
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  if (!("DecompressionStream" in window)) {
    found.textContent = "This browser is too old to unpack the examples; one of 2023 or later can.";
    return;
  }
  await unpack();
  offerAll();
  readAddress();
  choose();
  form.hidden = part("pages").hidden = false;
  if (location.hash.startsWith(START)) part("examples").scrollIntoView();
  let waiting;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    clearTimeout(waiting);
    page = 1;
    waiting = setTimeout(choose, target.type === "search" ? 150 : 0);
  });
  part("previous").addEventListener("click", () => turn(-1));
  part("next").addEventListener("click", () => turn(1));
  window.addEventListener("hashchange", () => {
    if (!location.hash.startsWith(START)) return;
    readAddress();
    choose();
  });
}

start();
