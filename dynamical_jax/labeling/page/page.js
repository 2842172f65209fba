"use strict";
// One page, no library. All text from elsewhere (class names, file names) is set as text, never as markup.

const KEYS = "123456789acdefijklmoqrtvwy0";  // The other letters do something else.
const AHEAD = 9;
const $ = (id) => document.getElementById(id);
const state = {
  tab: "label", offers: [], again: [], status: null, grid: [], gridClass: "", busy: false, zoom: false,
  hint: false, suspects: [], sure: "",
};

function kept(store, name, make) {
  try {
    if (!store.getItem(name)) store.setItem(name, make());
    return store.getItem(name);
  } catch { return make(); }
}
const randomName = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
// A tab is a client: two tabs are shown different pictures. A reload is the same one.
const client = kept(sessionStorage, "client", randomName);
const who = () => { try { return localStorage.getItem("who") || ""; } catch { return ""; } };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const source = (id, size) => `image/${size}/${id}`;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: {"content-type": "application/json"},
    body: JSON.stringify({client, who: who(), count: AHEAD, ...body}),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    trouble("The program cannot be reached. What was labeled is on disk: give the same command again, and open the address that it prints.");
    throw new Error("unreachable");
  }
  if (answer.status === 404) trouble("The program was started anew: open the address that it printed.");
  const value = await answer.json().catch(() => ({error: `the program answered ${answer.status}`}));
  if (!answer.ok) {
    if (answer.status !== 404) say(value.error || `the program answered ${answer.status}`);
    throw new Error(value.error);
  }
  trouble("");
  if (value.status) { state.status = value.status; showStatus(); }
  return value;
}

function trouble(text) { $("trouble").hidden = !text; $("trouble").textContent = text; }
let saying;
function say(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(saying);
  saying = setTimeout(() => { $("toast").hidden = true; }, Math.max(3000, 60 * text.length));
}

// What is done one after the other: a key that comes before the next picture is there is of no picture.
async function alone(work) {
  if (state.busy) return;
  state.busy = true;
  try { await work(); } catch { /* was said */ } finally { state.busy = false; }
}
// What is to be done in any case, once that is done.
function soon(work) {
  if (state.busy) setTimeout(() => soon(work), 30);
  else alone(work);
}

// Labeling.

const current = () => state.again[0] || state.offers[0];
const counted = (number, one, more) => `${number} ${number === 1 ? one : more || `${one}s`}`;
const classes = () => (state.status ? state.status.classes : []);
// A class whose name is a key has that one, if it is free when the class comes; others the first that is free.
function keys() {
  const taken = [];
  for (const {name} of classes()) {
    const own = name.length === 1 && KEYS.includes(name) && !taken.includes(name) ? name : null;
    taken.push(own || [...KEYS].find((key) => !taken.includes(key)) || "");
  }
  return taken;
}
function thumbnail(id, name = "") {
  const image = make("img", {src: source(id, "thumb"), alt: name});
  image.onload = () => image.classList.toggle("pixels", image.naturalWidth <= 64);
  return image;
}

function take(value) {
  state.offers = value.offers;
  for (const conflict of value.conflicts || []) {
    say(`${conflict.who} had labeled this “${conflict.before}”. Both are in the log; the later one, “${conflict.label}”, counts.`);
  }
  show();
}

function give(what, label = "") {
  const offer = current();
  if (!offer) return;
  alone(async () => {
    const value = await ask("answer", {given: [{id: offer.id, what, label}]});
    if (state.again.length) state.again.shift();
    state.zoom = false;
    take(value);
  });
}

function undo() {
  alone(async () => {
    state.again = [];
    const value = await ask("undo", {});
    if (!value.undone.length) say("There is nothing to take back.");
    else if (value.undone.length > 1) say(`${value.undone.length} answers taken back`);
    else if (value.undone[0].label) say(`Taken back: it is “${value.undone[0].label}” again.`);
    take(value);
    if (state.tab === "grid") await loadGrid();
  });
}

function show() {
  const offer = current();
  const picture = $("picture");
  picture.hidden = !offer;
  $("empty").hidden = !!offer;
  if (offer) {
    const address = source(offer.id, state.zoom ? "full" : "large");
    if (picture.getAttribute("src") !== address) picture.src = address;
    picture.classList.toggle("zoomed", state.zoom);
    picture.alt = offer.name;
    picture.dataset.id = offer.id;
    for (const later of state.offers.slice(1, 3)) new Image().src = source(later.id, "large");
  } else {
    picture.removeAttribute("src");
    delete picture.dataset.id;
    const status = state.status;
    $("empty").textContent = !status ? "" : status.finished
      ? `All images are labeled${status.aside ? `, but for ${status.aside} that were set aside` : ""}.`
      : "The next pictures are with others, or being chosen.";
  }
  $("name").textContent = offer ? offer.name : "";
  $("again").textContent = offer && offer.label ? `is labeled “${offer.label}”` : "";
  $("hint").setAttribute("aria-pressed", state.hint);
  $("guess").hidden = !state.hint || !offer;
  if (offer) {
    $("guess").textContent = offer.predicted
      ? `the model: ${offer.predicted}, ${percent(offer.confidence)} sure` : "the model has no guess yet";
  }
  $("next").replaceChildren(...state.offers.slice(state.again.length ? 0 : 1)
    .map((later) => make("li", {}, thumbnail(later.id))));
  showClasses();
  watch();
}

$("picture").addEventListener("load", () => {
  const picture = $("picture");
  picture.classList.toggle("pixels", Math.max(picture.naturalWidth, picture.naturalHeight) <= 128);
  size();
});
$("picture").addEventListener("error", () => {
  if (!$("picture").getAttribute("src")) return;
  $("picture").hidden = true;
  $("empty").hidden = false;
  $("empty").textContent = "This file cannot be read: b sets it aside.";
});
function size() {
  const picture = $("picture"), frame = $("frame");
  const fit = Math.min(frame.clientWidth / picture.naturalWidth, frame.clientHeight / picture.naturalHeight);
  picture.style.width = state.zoom ? `${Math.round(picture.naturalWidth * Math.max(1, 2.5 * fit))}px` : "";
}
function zoom() {
  if (!current()) return;
  state.zoom = !state.zoom;
  show();
  size();
  const frame = $("frame");
  frame.scrollTo((frame.scrollWidth - frame.clientWidth) / 2, (frame.scrollHeight - frame.clientHeight) / 2);
  if (state.zoom) frame.focus();  // The arrow keys move the picture.
}
$("picture").addEventListener("click", zoom);

function classButtons(press, given) {
  const named = keys();
  return classes().map(({name, count}, index) => make(
    "button", {title: name, "data-name": name, class: name === given && "given", onclick: () => press(name)},
    named[index] ? make("kbd", {}, named[index]) : null, " ", name, make("small", {}, String(count))));
}
let shownClasses = "";
function showClasses() {
  const offer = current();
  const now = JSON.stringify([classes(), offer && offer.label, state.grid.map((cell) => cell.given)]);
  if (now === shownClasses) return;  // A button under a finger must not be another one.
  shownClasses = now;
  $("classes").replaceChildren(...classButtons((name) => give("label", name), offer && offer.label));
  $("grid-classes").replaceChildren(...classButtons(correct));
  $("class-names").replaceChildren(...classes().map(({name}) => make("option", {value: name})));
  $("new-class").classList.toggle("open", !classes().length || document.activeElement === $("new-name"));
}

$("new-class").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("new-name").value.trim();
  if (!name) return;
  if (classes().some((known) => known.name === name)) {
    leaveName();
    give("label", name);
    return;
  }
  alone(async () => {
    const value = await ask("class", {name, sure: state.sure === name});
    if (value.alike) {
      state.sure = name;
      say(`There is a class “${value.alike}”. Enter once more makes “${name}” another one.`);
      return;
    }
    leaveName();
    showClasses();
    const key = keys()[classes().findIndex((known) => known.name === name)];
    say(key ? `“${name}” has the key ${key}.` : `“${name}” has no key: n and its name, or a click.`);
  });
});
function leaveName() {
  $("new-name").value = state.sure = "";
  $("new-name").blur();
  $("new-class").classList.toggle("open", !classes().length);
}
function openName() {
  $("new-class").classList.add("open");
  $("new-name").focus();
}

$("undo").onclick = $("grid-undo").onclick = undo;
$("skip").onclick = () => give("skip");
$("broken").onclick = () => give("broken");
$("zoom").onclick = zoom;
$("add").onclick = openName;
$("hint").onclick = () => { state.hint = !state.hint; show(); };

// The grid.

async function loadGrid(name = state.gridClass) {
  const value = await ask("grid", {name});
  state.grid = value.grid.map((offer) => ({...offer, given: offer.predicted}));
  state.gridClass = state.grid.length ? state.grid[0].predicted : name;
  const select = $("grid-class");
  select.replaceChildren(make("option", {value: ""}, "the most frequent"),
    ...classes().map((known) => make("option", {value: known.name}, known.name)));
  select.value = state.gridClass;
  $("accept").disabled = !state.grid.length;
  $("grid-empty").hidden = state.grid.length > 0;
  $("grid-empty").textContent = state.status.has_model
    ? "There is no further image without a label that the model takes for this."
    : "There is no model yet: it needs labels of two classes, and a batch that is done.";
  showGrid();
  if (state.grid.length) $("cells").firstChild.focus();
  else select.focus();
}

function showGrid() {
  const focused = [...$("cells").children].indexOf(document.activeElement);
  $("cells").replaceChildren(...state.grid.map((cell, index) => {
    const text = cell.given === null ? "left out" : cell.given === false ? "broken or none" : cell.given;
    return make("li", {
      tabindex: index === Math.max(0, focused) ? 0 : -1, title: cell.name, "aria-label": `${cell.name}: ${text}`,
      class: cell.given !== cell.predicted && (cell.given ? "wrong" : "wrong out"),
      onclick: (event) => {
        cell.given = cell.given === cell.predicted ? null : cell.predicted;
        event.currentTarget.focus();
        showGrid();
      },
    }, thumbnail(cell.id, cell.name), cell.given === cell.predicted ? null : make("span", {}, text));
  }));
  if (focused >= 0 && $("cells").children[focused]) $("cells").children[focused].focus();
  else lastCell = Math.min(lastCell, state.grid.length - 1);
  showClasses();
}
let lastCell = 0;
$("cells").addEventListener("focusin", (event) => {
  lastCell = [...$("cells").children].indexOf(event.target.closest("li"));
});

// A class for the picture in the grid that has the focus, or had it last.
function correct(name) {
  const cell = state.grid[lastCell];
  if (!cell) return;
  cell.given = name;
  const focused = document.activeElement;
  $("cells").children[lastCell].focus();
  showGrid();
  if (focused && focused.isConnected && focused.closest(".classes")) focused.focus();
}

function moveInGrid(key) {
  const cells = [...$("cells").children];
  if (!cells.length) return;
  const columns = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[key];
  const at = Math.min(cells.length - 1, Math.max(0, lastCell + step));
  for (const cell of cells) cell.tabIndex = -1;
  cells[at].tabIndex = 0;
  cells[at].focus();
}

function accept() {
  alone(async () => {
    const given = state.grid.filter((cell) => cell.given !== null).map((cell) => (
      cell.given === false ? {id: cell.id, what: "broken"} : {id: cell.id, what: "label", label: cell.given}));
    const out = state.grid.length - given.length;
    if (!given.length) return;
    take(await ask("answer", {given}));
    say(`${given.length} labeled${out ? `, ${out} left out` : ""}; u takes all of them back.`);
    await loadGrid();
  });
}
$("accept").onclick = accept;
$("grid-class").onchange = () => soon(() => loadGrid($("grid-class").value));

// Progress.

const interval = (share) => `${percent(share.right / share.total)} (${percent(share.low)} to ${percent(share.high)})`;

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function chart(rounds) {
  const width = 720, height = 260, left = 44, right = 16, top = 12, bottom = 40;
  const most = Math.max(...rounds.map((round) => round.num_labeled)) * 1.05;
  const x = (labels) => left + (width - left - right) * labels / most;
  const y = (share) => top + (height - top - bottom) * (1 - share);
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Accuracy against labels; the table below has the numbers"});
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(svg("line", {class: "grid", x1: left, x2: width - right, y1: y(share), y2: y(share)}));
    picture.append(svg("text", {x: left - 6, y: y(share) + 4, "text-anchor": "end"}, percent(share)));
  }
  const shown = [...new Set(rounds.map((round) => round.num_labeled))];
  const every = Math.ceil(shown.length / 9);
  shown.filter((labels, index) => index % every === 0).forEach((labels) => {
    picture.append(svg("text", {x: x(labels), y: height - bottom + 18, "text-anchor": "middle"}, labels));
  });
  picture.append(svg("text", {x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle"}, "labels that the model had learned"));
  for (const [kind, shift] of [["query", 4], ["random", -4]]) {
    for (const round of rounds) {
      const share = round[kind];
      if (!share) continue;
      const at = x(round.num_labeled) + shift;
      picture.append(svg("line", {class: kind, x1: at, x2: at, y1: y(share.low), y2: y(share.high), "stroke-width": 1.5}));
      picture.append(kind === "random"
        ? svg("circle", {class: kind, cx: at, cy: y(share.right / share.total), r: 4.5})
        : svg("rect", {class: kind, x: at - 4, y: y(share.right / share.total) - 4, width: 8, height: 8}));
    }
  }
  return picture;
}

function gainText(gain) {
  if (gain.expected === null) return `What another 100 labels would bring cannot be told yet: ${gain.reason}.`;
  const points = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;
  const text = `Another 100 labels: ${points(gain.expected)} points of accuracy (95 %: ${points(gain.low)} to ${points(gain.high)}).`;
  return gain.low < 0 && gain.high > 0 ? `${text} Whether they bring anything cannot be told from so few random images.` : text;
}

async function loadProgress() {
  const value = await ask("progress");
  const status = value.status;
  const all = [];
  const heading = (text) => all.push(make("h2", {}, text));
  const line = (text, kind) => all.push(make("p", {class: kind}, text));
  heading("How good is the model?");
  if (value.now) {
    line(`${interval(value.now)} right`, "large");
    line(`on the ${counted(value.now.total, "random image")} of the last batches, each before the model learned from it; in brackets 95 %. That is an estimate for images without a label; the newest model may be a little better than those of the last batches.`, "quiet");
  } else {
    line("That is told once random images are labeled that there was a model for.", "quiet");
  }
  line(gainText(value.gain));
  line(value.stop.stop
    ? `You may stop: the model’s predictions do not change any more (${value.stop.why}).`
    : `No reason to stop yet: ${value.stop.why}.`);
  line("Rule: stop when the predictions of successive models agree, Bloodgood and Vijay-Shanker, 2009. It tells that more labels of this kind change little, not that the model is good.", "quiet");
  const learned = value.rounds.filter((round) => round.num_labeled > 0);
  if (learned.length) {
    heading("Batch by batch, before the model learned from it");
    all.push(make("p", {}, make("span", {class: "key-random"}, "● drawn at random: "), "how good the model is.  ",
      make("span", {class: "key-query"}, "■ asked for: "), "chosen for being hard, so the model looks worse on them than it is."));
    all.push(chart(learned));
    const cell = (share) => (share ? `${share.right} of ${share.total}` : "");
    const agreement = Object.fromEntries(value.agreement.map((one) => [one.num_labeled, one.kappa.toFixed(3)]));
    all.push(make("details", {}, make("summary", {}, "Numbers"), make("table", {},
      make("tr", {}, ...["labels", "random: right", "asked for: right", "agreement with the model before (κ)"].map((text) => make("th", {}, text))),
      ...learned.map((round) => make("tr", {}, ...[round.num_labeled, cell(round.random), cell(round.query), agreement[round.num_labeled] || ""]
        .map((text) => make("td", {}, String(text))))))));
  }
  heading("Labels");
  const most = Math.max(1, ...status.classes.map((one) => one.count));
  all.push(make("table", {}, ...status.classes.map((one) => make("tr", {}, make("td", {title: one.name}, one.name),
    make("td", {}, String(one.count)), make("td", {}, make("progress", {max: most, value: one.count}))))));
  line(`${status.labeled} of ${counted(status.images, "image")} labeled${status.aside ? `, ${status.aside} set aside` : ""}.`, "quiet");
  heading("Labels that may be wrong");
  all.push(make("p", {}, make("button", {onclick: () => soon(() => ask("review", {})), disabled: !!status.doing},
    value.suspects ? "Look again" : "Look for them"), make("span", {class: "quiet"}, " trains five models, each without a fifth of the labels, and lists where it is sure of another class.")));
  state.suspects = value.suspects || [];
  if (value.suspects && !value.suspects.length) line("None stands out.");
  if (state.suspects.length) {
    all.push(make("div", {id: "suspects"}, ...state.suspects.slice(0, 60).map((one, index) => make(
      "button", {title: one.path, onclick: () => secondLook(index)}, thumbnail(one.id, one.path),
      make("div", {}, `labeled ${one.label}`), make("div", {}, `model: ${one.predicted}, ${percent(one.confidence)}`)))));
  }
  heading("Take it with you");
  const link = (text, address) => make("a", {class: "button", href: address, download: ""}, text);
  all.push(make("p", {class: "links"}, link("labels.csv", "labels.csv"),
    status.has_model ? link("predictions for the rest", "predictions.csv") : null, link("for Label Studio", "label-studio.json"),
    make("button", {onclick: () => sort(false)}, "a folder for each class: links"), make("button", {onclick: () => sort(true)}, "… copies")));
  heading("Your name");
  all.push(make("p", {}, make("input", {maxlength: 60, value: who(), "aria-label": "Your name", onchange: (event) => {
    try { localStorage.setItem("who", event.target.value.trim()); } catch { say("This browser keeps nothing."); }
  }}), make("span", {class: "quiet"}, " stands in the log of answers.")));
  const typing = $("progress").contains(document.activeElement) && document.activeElement.tagName === "INPUT";
  if (!typing) {
    const open = $("progress").querySelector("details[open]");
    const focused = [...$("progress").querySelectorAll("a,button,summary")].indexOf(document.activeElement);
    $("progress").replaceChildren(...all);
    if (open && $("progress").querySelector("details")) $("progress").querySelector("details").open = true;
    if (focused >= 0) [...$("progress").querySelectorAll("a,button,summary")][focused]?.focus();
  }
}

function sort(copies) {
  alone(async () => {
    const value = await ask("sort", {copies});
    say(`${counted(value.count, copies ? "copy" : "link", copies ? "copies" : "links")} in ${value.folder}`);
  });
}

// The suspects from one on, in the label tab.
function secondLook(index) {
  state.again = state.suspects.slice(index).map((one) => ({...one, name: one.path}));
  state.hint = true;
  open("label");
}

// All of it.

function showStatus() {
  const status = state.status;
  document.title = `${status.folder}: ${status.labeled} labeled`;
  $("count").textContent = `${status.labeled} of ${status.images} labeled`
    + (status.batch.left ? ` · ${status.batch.left} left of this batch` : "");
  $("doing").hidden = !status.doing && !status.error;
  $("doing").firstChild.textContent = status.doing || `this went wrong: ${status.error}`;
  const bar = $("doing").querySelector("progress");
  bar.hidden = !status.doing;
  if (status.share === null) bar.removeAttribute("value"); else bar.value = status.share;
  showClasses();
}

function open(tab) {
  state.tab = tab;
  for (const name of ["label", "grid", "progress"]) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute("aria-selected", name === tab);
  }
  document.activeElement?.blur();
  if (tab === "label") { show(); soon(refresh); }
  if (tab === "grid") soon(() => loadGrid(""));
  if (tab === "progress") loadProgress().catch(() => {});
}
for (const name of ["label", "grid", "progress"]) {
  $(`tab-${name}`).onclick = () => { if (name === "label") state.again = []; open(name); };
}

async function refresh() { take(await ask("next", {})); }

let watching;
function watch() {
  clearTimeout(watching);
  const idle = state.status && !state.status.doing;
  watching = setTimeout(async () => {
    try {
      if (state.tab === "progress") await loadProgress();
      else if (!current() && state.tab === "label") await alone(refresh);
      else await ask("status");
    } catch { /* was said */ }
    watch();
  }, idle ? 5000 : 1000);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const key = event.key;
  if (event.target.matches("input, select")) {
    if (key === "Escape") { leaveName(); event.target.blur(); }
    return;
  }
  if (key === "Escape") {
    if (state.zoom) zoom();
    else { state.again = []; if (state.tab !== "label") open("label"); else show(); }
    return;
  }
  if (event.repeat && !key.startsWith("Arrow")) return;  // A key held down is one answer.
  const at = key.length === 1 ? keys().indexOf(key.toLowerCase()) : -1;
  const named = at >= 0 ? classes()[at].name : null;
  const does = {g: () => open("grid"), p: () => open("progress"), u: undo};
  if (state.tab === "label") {
    Object.assign(does, {s: () => give("skip"), b: () => give("broken"), h: $("hint").onclick, z: zoom, n: openName});
    if (named !== null) does[key.toLowerCase()] = () => give("label", named);
  } else if (state.tab === "grid") {
    const inCells = document.activeElement === document.body || $("cells").contains(document.activeElement);
    if (key.startsWith("Arrow")) does[key] = () => moveInGrid(key);
    if (key === "Enter" && inCells) does.Enter = accept;
    does.x = () => { const cell = state.grid[lastCell]; if (cell) correct(cell.given === null ? cell.predicted : null); };
    does.b = () => correct(false);
    if (named !== null) does[key.toLowerCase()] = () => correct(named);
  } else delete does.u;
  const act = does[key.length === 1 ? key.toLowerCase() : key];
  if (act) { event.preventDefault(); act(); }
});
window.addEventListener("resize", size);

open("label");
