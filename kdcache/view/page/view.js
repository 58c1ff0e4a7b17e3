// The page of `kd view`: a list of samples, one sample token by token, and the candidates that the teacher (and a student)
// considered at a token. The texts of a cache may come from anybody, so they reach the page only as text nodes.
"use strict";

const CHUNK = 256; // positions per request for candidates
const TOKENS = 1500; // shown at first, and added by each press of "Show more"
const TEXT = [2000, 1000]; // characters that are shown of the beginning and the end of a long text
const CANDIDATES = 10; // shown at first
// The lowest value of each shade, in nats; values below the first are not shaded.
const EDGES = { entropy: [0.25, 0.75, 1.5, 2.5, 3.5, 5], kl: [0.1, 0.25, 0.6, 1.2, 2.5, 5] };

const $ = (id) => document.getElementById(id);
const list = { search: "", sort: "cache", split: "", offset: 0, request: null };
let about = null;
let open = null; // the sample on the page: the answer of /api/sample, with `chunks`, `opinion`, `shade`, `at`, `pinned`

// --- elements, texts, numbers ------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Control characters, marks of text direction, and characters of no width. Joiners are allowed: scripts and emoji need them.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

// Text with signs for characters that cannot be seen. A line break breaks the line; in a `label` it is only a sign, and
// so are spaces at both ends.
function visible(text, label = false) {
  const fragment = document.createDocumentFragment();
  let rest = text;
  if (label) {
    const [, before, middle, after] = /^( *)([^]*?)( *)$/.exec(text);
    rest = middle;
    if (before) fragment.append(element("span", { class: "sign" }, "␣".repeat(before.length)));
    fragment.append(visibleMiddle(rest, true));
    if (after) fragment.append(element("span", { class: "sign" }, "␣".repeat(after.length)));
    return fragment;
  }
  return visibleMiddle(rest, false);
}

function visibleMiddle(text, label) {
  const fragment = document.createDocumentFragment();
  let from = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > from) fragment.append(text.slice(from, match.index));
    from = match.index + 1;
    const mark = match[0];
    if (mark === "\n") fragment.append(label ? element("span", { class: "sign" }, "↵") : element("span", { class: "break" }, "\n"));
    else if (mark === "\t") fragment.append(label ? element("span", { class: "sign" }, "⇥") : element("span", { class: "tab" }, "\t"));
    else fragment.append(element("span", { class: "control" }, `U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
  }
  fragment.append(text.slice(from));
  return fragment;
}

// A text of any length. The middle of a long one is shown by a button.
function bounded(text) {
  const [head, tail] = TEXT;
  if (text.length <= head + tail + 500) return visible(text);
  const fragment = document.createDocumentFragment();
  const [first, last] = [cut(text, head), cut(text, text.length - tail)];
  const more = element("button", { type: "button", class: "more" }, `Show the ${count(last - first)} characters between`);
  more.addEventListener("click", () => more.replaceWith(visible(text.slice(first, last))));
  fragment.append(visible(text.slice(0, first)), more, visible(text.slice(last)));
  return fragment;
}

// The next place that is not between the two halves of a character.
function cut(text, at) {
  return /[\udc00-\udfff]/.test(text.charAt(at)) ? at + 1 : at;
}

const count = (n) => n.toLocaleString("en");
const nats = (x) => (x === null ? "–" : x.toFixed(x !== 0 && Math.abs(x) < 0.095 ? 3 : 2).replace("-", "−"));

function percent(p) {
  if (p === null) return "–";
  if (p > 0 && p < 0.0005) return "<0.1%";
  return `${(100 * p).toFixed(p < 0.9995 || p === 1 ? 1 : 2)}%`;
}

const mean = (values) => {
  const present = values.filter((value) => value !== null);
  return present.length ? present.reduce((a, b) => a + b, 0) / present.length : null;
};

async function ask(question, parameters = {}, signal = undefined) {
  const answer = await fetch(`api/${question}?${new URLSearchParams(parameters)}`, { signal });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

const failure = (error) => (error instanceof TypeError ? "kd view does not answer. Does it still run in the terminal?" : error.message);

// --- the list ----------------------------------------------------------------------------------------------------------

async function refresh() {
  list.request?.abort();
  const request = (list.request = new AbortController());
  const { search, sort, split, offset } = list;
  $("list").setAttribute("aria-busy", "true");
  try {
    const answer = await ask("samples", { search, sort, split, offset }, request.signal);
    if ("measuring" in answer) {
      $("note").textContent = `Measuring every sample once: ${Math.floor(100 * answer.measuring)}%`;
      await new Promise((resolve) => setTimeout(resolve, 200));
      if (list.request === request) refresh();
      return;
    }
    show(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("note").textContent = failure(error);
  }
  if (list.request === request) $("list").setAttribute("aria-busy", "false");
}

function show(answer) {
  $("rows").replaceChildren(...answer.rows.map(row));
  $("rows").querySelector("button")?.setAttribute("tabindex", "0");
  $("rows").parentElement.scrollTop = 0;
  const last = answer.offset + answer.rows.length;
  $("range").textContent = answer.total ? `${count(answer.offset + 1)}–${count(last)} of ${count(answer.total)}` : "";
  $("note").textContent = answer.total ? "" : "No sample contains this text.";
  $("previous").disabled = answer.offset === 0;
  $("next").disabled = last >= answer.total;
  list.page = answer.rows.length;
  mark();
  if (!open && !location.hash && answer.rows.length && wide()) history.replaceState(null, "", address(answer.rows[0].id)), route();
}

function row(sample) {
  const figures = {
    uncertain: sample.entropy !== null ? `${nats(sample.entropy)} nats` : "",
    worst: sample.ce !== null ? `${nats(sample.ce)} nats` : "",
  };
  const figure = figures[list.sort] ?? `${count(sample.tokens)} tokens`;
  const button = element(
    "button",
    { type: "button", class: "sample", tabindex: "-1", onclick: () => go(sample.id) },
    element("span", { class: "id" }, visible(sample.id)),
    element("span", { class: "figure" }, reward(sample.reward), figure),
    element("span", { class: "prompt" }, visible(sample.prompt.trim(), true)),
    element("span", { class: "answer" }, visible(sample.completion.trim(), true)),
  );
  button.dataset.id = sample.id;
  return element("li", {}, button);
}

function reward(value) {
  if (value === null) return null;
  const word = value >= 1 ? "right" : value <= 0 ? "wrong" : `reward ${nats(value)}`;
  return element("span", { class: `reward ${value >= 1 ? "right" : "wrong"}` }, word);
}

function mark() {
  for (const button of $("rows").querySelectorAll("button")) {
    if (open && button.dataset.id === open.id) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function rowKeys(event) {
  const buttons = [...$("rows").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (at < 0 || to === undefined || !buttons[to]) return;
  event.preventDefault();
  buttons[at].tabIndex = -1;
  buttons[to].tabIndex = 0;
  buttons[to].focus();
}

// --- one sample --------------------------------------------------------------------------------------------------------

const wide = () => matchMedia("(min-width: 800px)").matches;
const address = (id) => `#${encodeURIComponent(id)}`;
const go = (id) => (location.hash = address(id));

async function route() {
  const id = decodeURIComponent(location.hash.slice(1));
  document.body.dataset.screen = id ? "sample" : "list";
  if (!id || (open && open.id === id)) return;
  $("reader").setAttribute("aria-busy", "true");
  try {
    const answer = await ask("sample", { id });
    if (decodeURIComponent(location.hash.slice(1)) !== id) return;
    open = { ...answer, chunks: new Map(), opinion: null, shade: open?.shade ?? (about.student ? "kl" : "entropy"), at: null, pinned: null };
    draw();
    mark();
    if (about.student) askStudent(open);
  } catch (error) {
    open = null;
    $("reader").replaceChildren(back(), element("p", { role: "alert", class: "bad" }, failure(error)));
    $("panel").replaceChildren();
  }
  $("reader").setAttribute("aria-busy", "false");
}

// Let the student read the sample. The first time takes seconds, because the student is loaded.
async function askStudent(sample) {
  try {
    sample.opinion = await ask("opinion", { id: sample.id });
  } catch (error) {
    sample.opinion = { error: failure(error) };
  }
  if (open !== sample) return;
  sample.chunks.clear();
  facts();
  shade();
  point(sample.at);
}

function draw() {
  const { id, prompt, texts, reference } = open;
  const [before, content, after] = prompt;
  $("reader").replaceChildren(
    back(),
    element("h2", {}, visible(id)),
    element("p", { id: "about", class: "muted" }),
    element("div", { id: "shading" }),
    element("h3", {}, "Prompt"),
    element(
      "pre",
      { class: "text", id: "prompt" },
      element("span", { class: "muted" }, bounded(before)),
      bounded(content),
      element("span", { class: "muted" }, bounded(after)),
    ),
    element("h3", { id: "completion-title" }, "Completion"),
    element("pre", {
      class: "text tokens",
      id: "tokens",
      role: "listbox",
      "aria-labelledby": "completion-title",
      "aria-orientation": "horizontal",
      onpointerover: (event) => event.pointerType === "mouse" && hover(event.target),
      onpointerleave: () => point(open.pinned),
      onclick: (event) => pin(tokenOf(event.target)),
      onfocusin: (event) => pin(tokenOf(event.target)),
      onkeydown: tokenKeys,
    }),
    element("p", { id: "rest" }),
    ...(reference ? [element("h3", {}, "Reference"), element("pre", { class: "text", id: "reference" }, bounded(reference))] : []),
  );
  $("reader").scrollTop = 0;
  if (!wide()) scrollTo(0, 0);
  grow(TOKENS);
  facts();
  $("tokens").firstElementChild?.setAttribute("tabindex", "0");
  point(null);
  document.title = `${texts.length ? id : "kd view"} · kd view`;
}

function back() {
  const leave = () => {
    location.hash = "";
  };
  return element("button", { type: "button", class: "back", onclick: leave }, "← Samples");
}

// Show more tokens of a long completion.
function grow(more) {
  const tokens = $("tokens");
  const from = tokens.childElementCount;
  const to = Math.min(from + more, open.texts.length);
  const fragment = document.createDocumentFragment();
  for (let i = from; i < to; i++) fragment.append(...token(i));
  tokens.append(fragment);
  shade(from);
  const left = open.texts.length - to;
  const button = (label, n) => element("button", { type: "button", class: "more", onclick: () => grow(n) }, label);
  const buttons = [button(`Show ${count(Math.min(TOKENS, left))} more tokens`, TOKENS), button(`Show all ${count(open.texts.length)}`, left)];
  $("rest").replaceChildren(...(left ? buttons.slice(0, left > TOKENS ? 2 : 1) : []));
}

function token(i) {
  const part = i in open.escaped;
  const text = open.texts[i];
  const gap = / *(?=[^ ])/y.exec(text)?.[0] ?? ""; // spaces stay outside the shaded element, where they can hang over the end of a line
  const span = element("span", { role: "option", class: "token", tabindex: "-1", "aria-selected": "false" }, visible(text.slice(gap.length)));
  if (part && !text) {
    span.classList.add("continued");
    span.setAttribute("aria-label", "part of the character before");
  } else if (!text.trim()) {
    span.setAttribute("aria-label", text.includes("\n") ? "line break" : "space");
  }
  if (!open.supervised[i]) span.classList.add("unsupervised");
  span.dataset.i = i;
  return [gap, span];
}

function facts() {
  const { split, source, task, origin, prompt_tokens: prompt, texts, entropies, logprobs, opinion } = open;
  const ce = mean(logprobs);
  $("about").replaceChildren(
    visible([split, source, task, origin].filter(Boolean).join(" · ")),
    ` · ${count(prompt)} + ${count(texts.length)} tokens · entropy ${nats(mean(entropies))} · cross-entropy ${nats(ce && -ce)}`,
    opinion?.kl ? ` · student's KL ${nats(mean(opinion.kl))}` : "",
    " nats per token ",
    reward(open.reward) ?? "",
  );
  const choice = (name, label) => {
    const choose = () => {
      open.shade = name;
      facts();
      shade();
    };
    return element("button", { type: "button", "aria-pressed": String(open.shade === name), onclick: choose }, label);
  };
  const swatch = (step, i) => element("li", { class: open.shade, "data-shade": i }, i === EDGES[open.shade].length ? `${step}+` : String(step));
  let note = null;
  if (about.student && !opinion) note = "The student is reading this sample…";
  if (opinion?.error) note = opinion.error;
  $("shading").replaceChildren(
    about.student
      ? element("div", { class: "choice", role: "group", "aria-label": "Shade tokens by" }, choice("entropy", "Teacher's entropy"), choice("kl", "Student's KL"))
      : element("span", {}, "Teacher's entropy"),
    element("ol", { class: "legend", "aria-label": "Shades, each from this number of nats" }, ...[0, ...EDGES[open.shade]].map(swatch)),
    element("span", { class: "muted" }, "nats"),
    element("p", { role: "status", class: opinion?.error ? "bad" : "muted" }, note ?? ""),
  );
}

function shade(from = 0) {
  const values = open.shade === "kl" ? open.opinion?.kl : open.entropies;
  const edges = EDGES[open.shade];
  const tokens = $("tokens").children;
  $("tokens").classList.toggle("kl", open.shade === "kl");
  for (let i = from; i < tokens.length; i++) {
    const value = values?.[i] ?? 0;
    tokens[i].dataset.shade = edges.filter((edge) => value >= edge).length;
  }
}

// --- one token ---------------------------------------------------------------------------------------------------------

const tokenOf = (target) => target.closest?.(".token");

function hover(target) {
  const token = tokenOf(target);
  if (token) point(Number(token.dataset.i));
}

function pin(token) {
  if (!token || Number(token.dataset.i) === open.pinned) return;
  for (const previous of $("tokens").querySelectorAll('[tabindex="0"]')) {
    previous.tabIndex = -1;
    previous.setAttribute("aria-selected", "false");
  }
  token.tabIndex = 0;
  token.setAttribute("aria-selected", "true");
  open.pinned = Number(token.dataset.i);
  token.focus({ preventScroll: true });
  token.scrollIntoView({ block: "nearest" }); // on a phone the panel may cover it
  point(open.pinned);
}

function tokenKeys(event) {
  if (event.key === "Escape") return unpin();
  const tokens = $("tokens").children;
  const at = open.pinned ?? 0;
  let to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (event.key === "ArrowUp" || event.key === "ArrowDown") to = lineAway(at, event.key === "ArrowUp" ? -1 : 1);
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (to >= tokens.length && tokens.length < open.texts.length) grow(TOKENS);
  if (!tokens[to]) return;
  pin(tokens[to]);
}

// The token above (way -1) or below (way 1): on the nearest line in that direction, the nearest token.
function lineAway(at, way) {
  const tokens = $("tokens").children;
  const start = tokens[at].getClientRects()[0] ?? tokens[at].getBoundingClientRect();
  let nearest;
  let line = null;
  let distance = Infinity;
  for (let i = at + way; tokens[i]; i += way) {
    const box = tokens[i].getClientRects()[0];
    if (!box || way * (box.top - start.top) < start.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > start.height / 2) break;
    if (Math.abs(box.left - start.left) < distance) {
      distance = Math.abs(box.left - start.left);
      nearest = i;
    }
  }
  return nearest;
}

function unpin() {
  open.pinned = null;
  for (const token of $("tokens").querySelectorAll('[aria-selected="true"]')) token.setAttribute("aria-selected", "false");
  point(null);
}

// Show token i in the panel; null shows how to choose a token.
async function point(i) {
  const sample = open;
  sample.at = i;
  document.body.classList.toggle("pointing", i !== null);
  if (i === null) {
    $("panel").replaceChildren(element("p", { class: "muted" }, "Point at a token, or move through the tokens with the arrow keys, to see which other tokens the teacher considered."));
    return;
  }
  const first = i - (i % CHUNK);
  if (!sample.chunks.has(first)) sample.chunks.set(first, ask("candidates", { id: sample.id, first }));
  try {
    const chunk = await sample.chunks.get(first);
    if (open === sample && sample.at === i) panel(i, chunk.positions[i - first]);
  } catch (error) {
    sample.chunks.delete(first);
    if (open === sample && sample.at === i) $("panel").replaceChildren(element("p", { class: "bad", role: "alert" }, failure(error)));
  }
}

function panel(i, position) {
  const { texts, escaped, entropies, logprobs, ranks, supervised, opinion } = open;
  const text = escaped[i] ?? texts[i];
  const choice = (label) => element("span", { class: "label" }, visible(label, true));
  const student = opinion?.kl ? opinion : null;
  const figures = [
    ["Log-probability, nats", nats(logprobs[i]), student && nats(student.logprobs[i])],
    ["Rank", count(ranks[i]), student && count(student.ranks[i])],
    ["First choice", choice(position.texts[0] ?? ""), student && choice(student.best[i])],
    ["Entropy, nats", nats(entropies[i]), student && ""],
    student && ["KL to the teacher, nats", "", nats(student.kl[i])],
  ];
  const cells = (name, values, tag = "td") =>
    element("tr", {}, element("th", { scope: "row" }, name), ...values.filter((v) => v !== null).map((v) => element(tag, { class: "number" }, v)));
  const head = (whose) => element("span", { class: "key" }, element("i", { class: whose }), whose);
  $("panel").replaceChildren(
    element("button", { type: "button", class: "close", "aria-label": "Close", onclick: unpin }, "×"),
    element("h2", { class: "label" }, visible(text, true)),
    element("p", { class: "muted" }, `Token ${count(i + 1)} of ${count(texts.length)}${supervised[i] ? "" : ", not supervised"}`),
    element(
      "table",
      {},
      student ? element("thead", {}, cells("", [head("teacher"), head("student")], "th")) : null,
      element("tbody", {}, ...figures.filter(Boolean).map(([name, ...values]) => cells(name, values))),
    ),
    bars(i, position, CANDIDATES),
  );
  $("announcement").textContent = `Token ${i + 1}: entropy ${nats(entropies[i])} nats, rank ${ranks[i]}, probability ${percent(Math.exp(logprobs[i]))}`;
}

// The candidates with their probabilities, the teacher's above the student's; then the completion's token, if it is not
// one of them; then all other tokens together.
function bars(i, position, most) {
  const { texts, escaped, logprobs, opinion } = open;
  const both = Boolean(position.student);
  const line = (label, teacher, student, kind = "", note = "") =>
    element(
      "li",
      { class: `candidate ${kind}` },
      element("span", { class: "label", title: note || null }, label),
      element(
        "span",
        { class: "bars" },
        bar("teacher", teacher, both ? "Teacher " : ""),
        both ? bar("student", student, "Student ") : null,
      ),
    );
  const candidate = (label, kind, n) => line(visible(label, true), position.probabilities[n], position.student?.[n], `${kind}${position.drawn[n] ? " drawn" : ""}`);
  const candidates = position.texts.map((text, n) => candidate(text, position.given[n] ? "given" : "", n));
  const hidden = candidates.slice(most).filter((line) => !line.classList.contains("given"));
  const shown = candidates.filter((line) => !hidden.includes(line));
  if (!position.given.includes(true)) {
    const note = "The completion's token is not among the stored candidates";
    shown.push(line(visible(escaped[i] ?? texts[i], true), Math.exp(logprobs[i]), opinion?.logprobs ? Math.exp(opinion.logprobs[i]) : null, "given outside", note));
  }
  const items = element("ol", { class: "candidates", "aria-label": "Candidates" }, ...shown);
  if (hidden.length) {
    const all = () => {
      more.remove();
      items.querySelector(".tail").before(...hidden);
    };
    const more = element("li", {}, element("button", { type: "button", class: "more", onclick: all }, `Show ${count(hidden.length)} more`));
    items.append(more);
  }
  items.append(line("all others", position.tail, position.student_tail, "tail"));
  const notes = [];
  const drawn = position.drawn.includes(true);
  if (!position.given.includes(true)) notes.push(`The token itself is not among the stored candidates. ${drawn ? "A drawn candidate, or “all others”, stands for it." : "“All others” includes it."}`);
  if (drawn) {
    notes.push("Pale bars are drawn candidates. Each stands for many unlikely tokens and has the threshold's probability, so that the sum is right. The probability of the token itself is lower.");
    if (both) notes.push("The KL of one position is an estimate here and may be below 0. The mean over positions is right.");
  }
  return element("div", {}, items, ...notes.map((note) => element("p", { class: "muted" }, note)));
}

function bar(whose, probability, name) {
  const filled = element("span", { class: `bar ${whose}`, "aria-hidden": "true" });
  filled.style.setProperty("--share", probability ?? 0);
  return element("span", { class: "value" }, filled, element("span", { class: "visually-hidden" }, name), element("span", { class: "percent" }, percent(probability)));
}

// --- start -------------------------------------------------------------------------------------------------------------

function change(filters) {
  Object.assign(list, { offset: 0 }, filters);
  refresh();
}

async function begin() {
  let typing;
  $("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ search: event.target.value }), 200);
  });
  $("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
  $("split").addEventListener("change", (event) => change({ split: event.target.value }));
  $("previous").addEventListener("click", () => change({ offset: Math.max(0, list.offset - 50) }));
  $("next").addEventListener("click", () => change({ offset: list.offset + list.page }));
  $("rows").addEventListener("keydown", rowKeys);
  addEventListener("hashchange", route);
  try {
    about = await ask("about");
  } catch (error) {
    $("note").textContent = failure(error);
    return;
  }
  $("name").textContent = about.cache;
  $("facts").replaceChildren(
    `${count(about.samples)} samples · teacher `,
    visible(about.teacher),
    ` · ${about.sparsify}`,
    about.student ? " · student " : "",
    visible(about.student ?? ""),
  );
  $("sort").querySelector('[value="failed"]').hidden = !about.rewarded;
  for (const [split, n] of Object.entries(about.splits)) $("split").append(element("option", { value: split }, `${split} (${count(n)})`));
  if (location.hash) route();
  else if (about.sample) go(about.sample);
  refresh();
}

begin();
