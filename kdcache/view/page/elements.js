// What the scripts of this page share: elements, and texts and numbers as they are shown. The texts of a cache may come from
// anybody, so they reach the page only as text nodes.
"use strict";

const TEXT = [2000, 1000]; // characters that are shown of the beginning and the end of a long text

const $ = (id) => document.getElementById(id);

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
