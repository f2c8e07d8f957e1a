"use strict";
// The pages of suspects: look, mark, save. What was marked is a log of actions, [verdict, [images], [what the run said of
// each], whether a saved file holds it]: of an image its last action holds, and undo takes the last action back. The
// browser keeps the log; nothing leaves this page. What the run says of an image it has from merged marks: only actions
// after that are kept. A saved file holds the images of the log alone: of others this page may know less than the run.

const STORE = document.body.dataset.marks; // names the run, and what it shows: marks of another run never appear
const desks = [...document.querySelectorAll("section.suspects")].map(makeDesk);
const all = desks.flatMap((desk) => desk.pages.flat());
const given = new Map(all.filter((t) => t.node.dataset.verdict).map((t) => [t.image, t.node.dataset.verdict])); // by the run
let log = readLog();
let last = desks[0]; // the category that was worked on last

const ACTIONS = {
  defect: (desk) => mark(desk, "defect"),
  fine: (desk) => mark(desk, "fine"),
  undo,
  rest: (desk) => {
    say("fine", desk.pages[desk.page].filter((tile) => !verdicts().has(tile.image)));
    turn(desk, 1);
  },
  maps: (desk) => desk.section.classList.toggle("maps"),
  before: (desk) => turn(desk, -1),
  next: (desk) => turn(desk, 1),
  save,
  ArrowLeft: (desk) => step(desk, -1),
  ArrowRight: (desk) => step(desk, 1),
  ArrowUp: (desk) => step(desk, -columns(desk)),
  ArrowDown: (desk) => step(desk, columns(desk)),
};
const KEYS = { d: "defect", f: "fine", u: "undo", n: "rest", m: "maps", s: "save", PageUp: "before", PageDown: "next" };

function makeDesk(section) {
  const category = section.dataset.category;
  const tile = (node, page) => ({ node, page, category, path: node.dataset.path, image: `${category}/${node.dataset.path}` });
  const tiles = (page) => [...page.querySelectorAll(".tile")].map((node) => tile(node, page));
  const pages = [...section.querySelectorAll(".page")].map(tiles);
  const bars = pages.map(() => document.createElement("i"));
  section.querySelector(".seen").append(...bars);
  section.classList.add("working");
  return { section, pages, bars, page: 0, at: 0 };
}

// ---- the log ----

function readLog() {
  try {
    return unmerged(JSON.parse(localStorage.getItem(STORE)) || []);
  } catch {
    return []; // the browser keeps nothing
  }
}

function unmerged(actions) {
  const merged = new Map(); // image → the last action that says what the run says: it was merged, and those before it
  actions.forEach(([verdict, images], number) => images.filter((image) => given.get(image) === verdict).forEach((image) => merged.set(image, number)));
  const left = actions.map(([verdict, images, before = [], saved], number) => {
    const newer = (image, i) => (merged.has(image) ? number > merged.get(image) : (before[i] ?? null) === (given.get(image) ?? null));
    return [verdict, images.filter(newer), before.filter((_, i) => newer(images[i], i)), saved];
  });
  return left.filter(([, images]) => images.length);
}

function keepLog() {
  try {
    localStorage.setItem(STORE, JSON.stringify(log));
  } catch {
    desks.forEach((desk) => (desk.section.querySelector(".kept-not").hidden = false));
  }
}

function verdicts() {
  const said = new Map(given);
  for (const [verdict, images] of log) if (verdict) images.forEach((image) => said.set(image, verdict));
  return said;
}

function say(verdict, tiles) {
  const images = tiles.map((tile) => tile.image);
  if (images.length) log.push([verdict, images, images.map((image) => given.get(image) ?? null)]);
  keepLog();
}

function undo() {
  const action = log.filter(([verdict]) => verdict).pop();
  if (!action) return;
  const [, images, , saved] = action;
  if (saved) action[0] = null; // it may be merged: the next file holds what was said before
  else log.splice(log.indexOf(action), 1);
  keepLog();
  for (const desk of desks) if (goTo(desk, images[0])) last = desk;
}

// ---- moving ----

function goTo(desk, image) {
  const page = desk.pages.findIndex((tiles) => tiles.some((tile) => tile.image === image));
  if (page >= 0) Object.assign(desk, { page, at: desk.pages[page].findIndex((tile) => tile.image === image) });
  return page >= 0;
}

function mark(desk, verdict) {
  say(verdict, [desk.pages[desk.page][desk.at]]);
  step(desk, 1);
}

function step(desk, by) {
  if (desk.pages[desk.page][desk.at + by]) desk.at += by;
}

function turn(desk, by) {
  if (desk.pages[desk.page + by]) Object.assign(desk, { page: desk.page + by, at: 0 });
}

function columns(desk) {
  const nodes = desk.pages[desk.page].map((tile) => tile.node);
  const second = nodes.findIndex((node) => node.offsetTop > nodes[0].offsetTop);
  return second > 0 ? second : nodes.length;
}

// ---- marks.csv: no name is a formula to a spreadsheet, and read_cell of llb/files.py reads it back ----

function cell(text, mark) {
  return `"${(/^[=+\-@\t\r]/.test(text) ? mark : "") + text.replaceAll('"', '""')}"`;
}

function save(desk) {
  const said = verdicts(), own = new Set(log.flatMap(([, images]) => images));
  const tiles = all.filter((t) => own.has(t.image) && said.has(t.image)); // the run has those of pages that are left out
  const lines = tiles.map((t) => [cell(t.category, "'"), cell(t.path, "./"), said.get(t.image)].join(","));
  log.forEach((action) => (action[3] = true));
  keepLog();
  desk.section.querySelector(".saved").textContent = `${tiles.length} marks are saved; then, with the path of the file,`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([["category,path,verdict", ...lines, ""].join("\n")], { type: "text/csv" }));
  link.download = "marks.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- what is seen ----

function show(desk) {
  const { section, pages, bars } = desk, said = verdicts(), tile = pages[desk.page][desk.at];
  const counts = pages.map((tiles) => ["defect", "fine"].map((v) => tiles.filter((t) => said.get(t.image) === v).length));
  const [defects, fine] = [0, 1].map((v) => counts.reduce((sum, count) => sum + count[v], 0));
  const text = (name, content) => (section.querySelector(name).textContent = content);
  pages.forEach(([{ page }], number) => {
    page.open = number === desk.page;
    page.classList.toggle("current", page.open);
    const [low, high] = [counts[number][0], counts[number][0] + counts[number][1]].map((n) => `${(100 * n) / pages[number].length}%`);
    bars[number].style.background = `linear-gradient(to right, var(--dropped) ${low}, var(--kept) ${low} ${high}, var(--line) ${high})`;
    bars[number].classList.toggle("current", page.open);
  });
  for (const { node, image } of pages.flat()) {
    node.classList.toggle("selected", node === tile.node);
    if (said.has(image)) node.dataset.verdict = said.get(image);
    else delete node.dataset.verdict;
  }
  section.querySelector(".look").replaceChildren(...[...tile.node.querySelectorAll("img")].map((img) => img.cloneNode()));
  const caption = [...tile.node.querySelector("figcaption").childNodes].filter((part) => part.className !== "path");
  const words = [...caption.map((part) => part.textContent.trim()), tile.path.split("/").pop()]; // folders tell the kind
  text(".what", words.filter(Boolean).join(" "));
  if (section.dataset.root) section.querySelector(".what").prepend(original(section.dataset.root, tile.path), " ");
  text(".where", `Page ${desk.page + 1} of ${pages.length}${pages[desk.page][0].page.dataset.by ? " (asked again)" : ""}`);
  text(".count", `${defects + fine} of ${pages.flat().length} seen: ${defects} defects, ${fine} fine`);
  text(".advice", advice(counts, pages, Math.min(defects, fine) < section.dataset.needed && section.dataset.needed));
  for (const img of (pages[desk.page + 1] || []).flatMap((t) => [...t.node.querySelectorAll("img")])) img.decode().catch(() => {});
}

function original(root, path) {
  const link = document.createElement("a");
  link.href = [root, ...path.split("/").map(encodeURIComponent)].join("/");
  link.target = "_blank";
  link.textContent = "original";
  return link;
}

function advice(counts, pages, needed) {
  const open = counts.findIndex(([defect, fine], number) => defect + fine < pages[number].length);
  const done = open < 0 ? pages.length : open; // pages that are seen, from the first on
  if (!done) return "Mark the defects of this page; then say that the rest is fine.";
  const found = `${counts[done - 1][0]} of page ${done}’s ${pages[done - 1].length} are defects: `;
  if (done < pages.length && needed) return `${found}look at one more; ${needed} of each verdict can teach the detector.`;
  return found + (counts[done - 1][0] > 1 && done < pages.length ? "look at one more, or save." : "save; llb.review says if it is enough.");
}

function perform(name, desk, scroll) {
  last = desk;
  ACTIONS[name](desk);
  desks.forEach(show);
  if (scroll) last.pages[last.page][last.at].node.scrollIntoView({ block: "nearest" });
}

document.addEventListener("click", ({ target }) => {
  const desk = desks.find(({ section }) => section.contains(target)), tile = target.closest(".tile"), button = target.closest("button");
  if (!desk) return;
  last = desk;
  if (button) perform(button.dataset.do, desk, true);
  const at = tile ? desk.pages[desk.page].findIndex(({ node }) => node === tile) : -1;
  if (at < 0) return;
  desk.at = at;
  show(desk);
  desk.section.focus({ preventScroll: true });
});

document.addEventListener("keydown", (event) => {
  const key = event.key.length > 1 ? event.key : event.key.toLowerCase(), name = KEYS[key] || key;
  if (!ACTIONS[name] || !last || event.ctrlKey || event.metaKey || event.altKey) return;
  const desk = desks.find(({ section }) => section.contains(document.activeElement));
  if (desk) {
    event.preventDefault();
    perform(name, desk, true);
  } else if (event.key.length === 1) last.section.focus(); // a letter typed elsewhere only leads to the suspects
});

window.addEventListener("storage", (event) => {
  if (event.key !== STORE) return;
  log = readLog(); // marked in another window
  desks.forEach(show);
});

for (const desk of desks) {
  const said = verdicts(), unseen = desk.pages.flat().find((tile) => !said.has(tile.image));
  if (unseen) goTo(desk, unseen.image);
  show(desk);
}
