// One token of the sample on the page: choosing it, and the panel with its candidates. `open` is the sample (view.js).
"use strict";

const CHUNK = 256; // positions per request for candidates
const CANDIDATES = 10; // shown at first

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
