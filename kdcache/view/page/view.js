// The page of `kd view`: a list of samples, and one sample token by token. token.js shows the candidates that the teacher
// (and a student) considered at a token; elements.js holds what both use.
"use strict";

const TOKENS = 1500; // shown at first, and added by each press of "Show more"
// The lowest value of each shade, in nats; values below the first are not shaded.
const EDGES = { entropy: [0.25, 0.75, 1.5, 2.5, 3.5, 5], kl: [0.1, 0.25, 0.6, 1.2, 2.5, 5] };

const list = { search: "", sort: "cache", split: "", offset: 0, request: null };
let about = null;
let open = null; // the sample on the page: the answer of /api/sample, with `chunks`, `opinion`, `shade`, `at`, `pinned`

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
