const COLOURS = ["#e6194b", "#4363d8", "#f58231", "#3cb44b", "#911eb4", "#008b99", "#c71585", "#9a6324"];
const MOST = 128, LEAST = 0.01, STEP = 0.01, HISTORY = 200;
const stage = $(".stage"), boxes = $(".boxes"), label = $(".label"), live = $(".live"), snap = $(".snap"), rows = $("tbody");
const EDGES = [["x0", 0], ["y0", 1], ["x1", 2], ["y1", 3]];
const NAMES = ["left", "top", "right", "bottom"];
let state = { items: [], ...copy(props.value || {}) };
let known = JSON.stringify(props.value); // what Python has, too
let chosen = null, drag = null, past = [], future = [], scale = 1, under = "", count = 0;

const say = (text) => { live.textContent = text; };
const find = (id) => state.items.find((item) => item.id === id);
const percent = (value) => Math.round(value * 100);
const round = (value) => Math.round(value * 1e4) / 1e4;
const told = (item) => item.phrase || "no phrase yet";
const lines = () => { const [h, w] = (snap.value || "").split("x").map(Number); return h ? [w, h, w, h] : null; };
const snapped = (value, axis) => { const n = lines(); return n ? Math.round(value * n[axis]) / n[axis] : value; };

function publish(before) {
  if (before) { past.push(before); past.splice(0, past.length - HISTORY); future = []; }
  known = JSON.stringify(state);
  props.value = copy(state);
  trigger("input");
}

function size() { return (props.size && props.size[0]) ? props.size : state.size || [512, 512]; }

function fit() { // screen pixels of a unit of the viewBox, so that handles and letters have one size on every screen
  const [w, h] = size();
  stage.setAttribute("viewBox", `0 0 ${w} ${h}`);
  $(".frame").style.width = `min(100%, calc(68vh * ${w / h}))`;
  stage.style.aspectRatio = `${w} / ${h}`;
  const drawn = stage.getBoundingClientRect().width;
  scale = drawn ? w / drawn : 1;
}

function draw() {
  fit();
  const [w, h] = size();
  const picture = $(".under");
  picture.setAttribute("width", w); picture.setAttribute("height", h);
  const href = under || props.under || "";
  if (href) picture.setAttribute("href", href); else picture.removeAttribute("href");
  drawGrid(w, h);
  const focused = element.contains(document.activeElement) && document.activeElement.closest("g.item");
  const back = focused ? focused.dataset.id : null;
  boxes.replaceChildren(...state.items.map((item, number) => shape(item, number, w, h)));
  if (back) { // who had a region's focus has the chosen one's now
    const group = find(chosen) && boxes.querySelector(`[data-id="${CSS.escape(chosen)}"]`);
    (group || stage).focus({ preventScroll: true });
  }
  place();
  drawTable();
  for (const button of element.querySelectorAll("[data-act]")) {
    const act = button.dataset.act;
    const off = act === "undo" ? !past.length : act === "redo" ? !future.length : ["add", "under"].includes(act) ? false : !find(chosen);
    button.setAttribute("aria-disabled", off);
  }
  $("[data-act=under]").textContent = under ? "No picture below" : "Picture below";
}

function drawGrid(w, h) {
  const n = lines(), all = [];
  if (n) {
    for (let i = 1; i < n[0]; i++) all.push([i / n[0] * w, 0, i / n[0] * w, h]);
    for (let i = 1; i < n[1]; i++) all.push([0, i / n[1] * h, w, i / n[1] * h]);
  }
  $(".grid").replaceChildren(...all.map(([x1, y1, x2, y2]) => make("svg:line", { x1, y1, x2, y2 })));
}

function short(words, room) { // what a box is wide enough for, the number at least; letters are some 8 pixels wide
  return words.length <= room ? words : words.slice(0, Math.max(1, Math.floor(room) - 1)).trimEnd() + (room < 3 ? "" : "…");
}

function shape(item, number, w, h) {
  const [x0, y0, x1, y1] = item.box.map((v, axis) => v * (axis % 2 ? h : w));
  const is = item.id === chosen;
  const aria = `Region ${number + 1}, ${told(item)}, left ${percent(item.box[0])}%, top ${percent(item.box[1])}%, right ${percent(item.box[2])}%, bottom ${percent(item.box[3])}%`;
  const group = make("svg:g", { class: "item", "data-id": item.id, "data-chosen": is ? "1" : "0", tabindex: "0", role: "button", "aria-label": aria });
  const box = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  if (item.mask) {
    const id = `mask-${item.id}`;
    const image = make("svg:image", { width: w, height: h, preserveAspectRatio: "none", href: "data:image/png;base64," + item.mask.slice(4) });
    group.append(make("svg:mask", { id }, image), make("svg:rect", { width: w, height: h, fill: item.color, "fill-opacity": ".45", mask: `url(#${id})`, "pointer-events": "none" }));
  }
  group.append(make("svg:rect", { ...box, class: item.mask ? "body masked" : "body", fill: item.color, stroke: item.color }));
  const text = make("svg:text", { x: x0 + 6 * scale, y: y0 + 19 * scale, "font-size": 15 * scale, "stroke-width": 4 * scale });
  const title = make("svg:title", {});
  title.textContent = item.phrase;
  text.textContent = short(`${number + 1} ${item.phrase || "(no phrase)"}`, (x1 - x0 - 10 * scale) / (7.8 * scale));
  group.append(title, text);
  if (is && !item.mask) {
    const reach = Math.min(22 * scale, (x1 - x0) / 2.5, (y1 - y0) / 2.5), half = 6 * scale;
    for (const [at, [x, y]] of [[x0, y0], [x1, y0], [x0, y1], [x1, y1]].entries()) {
      const [left, top] = [at % 2 ? x - reach : x - 22 * scale, at > 1 ? y - reach : y - 22 * scale];
      group.append(make("svg:rect", { class: "hit", "data-corner": at, x: left, y: top, width: reach + 22 * scale, height: reach + 22 * scale, style: `cursor:${at % 3 ? "nesw" : "nwse"}-resize` }));
      group.append(make("svg:rect", { class: "handle", x: x - half, y: y - half, width: 2 * half, height: 2 * half }));
    }
  }
  return group;
}

function place() { // the phrase is written where the region is
  const item = find(chosen);
  label.hidden = !item || Boolean(drag);
  if (!item) return;
  if (document.activeElement !== label) label.value = item.phrase;
  const frame = stage.getBoundingClientRect();
  const wide = Math.min(220, 0.7 * frame.width);
  label.style.left = `${clamp(item.box[0] * frame.width, 0, Math.max(0, frame.width - wide))}px`;
  const below = item.box[3] * frame.height + 6;
  label.style.top = `${below + 36 < frame.height ? below : Math.max(0, item.box[3] * frame.height - 42)}px`;
}

function drawTable() {
  if (rows.contains(document.activeElement)) return; // the row that is being edited is right already
  rows.replaceChildren(...state.items.map((item, number) => make("tr", {},
    make("td", {}, String(number + 1)),
    make("td", {}, cell(item, "phrase", { class: "phrase", maxlength: 300, "aria-label": `Phrase of region ${number + 1}` })),
    ...NAMES.map((name, axis) => make("td", {}, cell(item, axis, { type: "number", min: 0, max: 1, step: 0.01, disabled: Boolean(item.mask), "aria-label": `${name} of region ${number + 1}` }))),
    make("td", {}, cell(item, "weight", { type: "number", min: 0, max: 10, step: 0.1, "aria-label": `Weight of region ${number + 1}` })),
    make("td", {}, cell(item, "color", { type: "color", "aria-label": `Colour of region ${number + 1}` })))));
}

function cell(item, field, attributes) {
  const input = make("input", attributes);
  input.value = typeof field === "number" ? round(item.box[field]) : field === "weight" ? item.weight ?? 1 : item[field] ?? "";
  input.addEventListener("change", () => edit(item.id, field, input));
  input.addEventListener("focus", () => { if (chosen !== item.id) { chosen = item.id; draw(); } });
  return input;
}

function edit(id, field, input) {
  const item = find(id), before = copy(state);
  if (!item) return;
  if (typeof field === "number" || field === "weight") {
    const value = Number(input.value), box = item.box.slice();
    if (typeof field === "number") box[field] = value;
    const fine = input.value !== "" && Number.isFinite(value) && (field === "weight" ? value >= 0 && value <= 10 : value >= 0 && value <= 1 && box[0] < box[2] && box[1] < box[3]);
    input.setAttribute("aria-invalid", !fine);
    if (!fine) { say(field === "weight" ? "A weight is 0 to 10" : "A region's left is below its right, its top below its bottom, all from 0 to 1"); return; }
    if (field === "weight") item.weight = value; else item.box = box;
  } else rename(item, field, input.value);
  if (JSON.stringify(before) !== JSON.stringify(state)) publish(before);
  draw();
}

function rename(item, field, value) {
  if (field === "phrase" && item.phrase !== value) delete item.group; // it may be one of another phrase's now
  item[field] = value;
}

function at(event) {
  const frame = stage.getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}

function fresh(box) {
  const used = new Set(state.items.map((item) => item.color));
  const color = COLOURS.find((c) => !used.has(c)) || COLOURS[state.items.length % COLOURS.length];
  return { id: `n${Date.now().toString(36)}-${count++}`, phrase: "", box, color, weight: 1 };
}

const between = (p, q) => [Math.min(p[0], q[0]), Math.min(p[1], q[1]), Math.max(p[0], q[0]), Math.max(p[1], q[1])];

stage.addEventListener("pointerdown", (event) => {
  if (event.button || drag) return;
  write();
  const p = at(event), group = event.target.closest("g.item"), before = copy(state);
  try { stage.setPointerCapture(event.pointerId); } catch (_) { /* a synthetic event has no pointer to hold */ }
  const corner = event.target.dataset.corner;
  if (corner !== undefined) {
    const box = find(group.dataset.id).box;
    drag = { kind: "size", id: group.dataset.id, fixed: [corner % 2 ? box[0] : box[2], corner > 1 ? box[1] : box[3]], before };
  } else if (group && !event.shiftKey) {
    chosen = group.dataset.id;
    drag = { kind: find(chosen).mask ? "none" : "move", id: chosen, from: p, box: find(chosen).box.slice(), before };
  } else { chosen = null; drag = { kind: "new", id: null, from: p, before }; }
  draw();
  stage.focus({ preventScroll: true });
  event.preventDefault();
});

stage.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const p = at(event).map(snapped);
  if (drag.kind === "new") {
    const raw = at(event);
    if (!drag.id) {
      if (Math.hypot(raw[0] - drag.from[0], raw[1] - drag.from[1]) < LEAST || state.items.length >= MOST) return;
      const item = fresh([0, 0, 0, 0]);
      state.items.push(item);
      drag.id = chosen = item.id;
    }
    find(drag.id).box = between(drag.from.map(snapped), p).map(round);
  } else if (drag.kind === "size") find(drag.id).box = between(drag.fixed, p).map(round);
  else if (drag.kind === "move") {
    const [x0, y0, x1, y1] = drag.box, raw = at(event);
    const x = clamp(snapped(x0 + raw[0] - drag.from[0], 0), 0, 1 - (x1 - x0)), y = clamp(snapped(y0 + raw[1] - drag.from[1], 1), 0, 1 - (y1 - y0));
    find(drag.id).box = [x, y, x + x1 - x0, y + y1 - y0].map(round);
  }
  draw();
});

stage.addEventListener("pointerup", () => {
  if (!drag) return;
  const { kind, before, id } = drag, item = find(id);
  drag = null;
  if (item && (item.box[2] - item.box[0] < LEAST / 2 || item.box[3] - item.box[1] < LEAST / 2)) { state = before; chosen = null; say("Too small, not kept"); }
  else if (item && JSON.stringify(before) !== JSON.stringify(state)) { publish(before); say(kind === "new" ? "Region drawn, write its words" : "Region changed"); }
  draw();
  if (kind === "new" && find(id)) { label.focus({ preventScroll: true }); }
});
stage.addEventListener("pointercancel", () => { if (drag) { state = drag.before; drag = null; chosen = null; draw(); } });
stage.addEventListener("dblclick", () => { if (find(chosen)) { label.focus(); label.select(); } });
stage.addEventListener("focusin", (event) => {
  const group = event.target.closest && event.target.closest("g.item");
  if (group && group.dataset.id !== chosen && !drag) { chosen = group.dataset.id; draw(); }
});

function write() { // what was typed for a region is its phrase, whatever ends the typing
  const item = find(chosen);
  if (!item || label.hidden || item.phrase === label.value) return;
  const before = copy(state);
  rename(item, "phrase", label.value);
  publish(before);
  draw();
}
label.addEventListener("change", write);
label.addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === "Escape") {
    write();
    const id = chosen;
    stage.focus({ preventScroll: true });
    const group = boxes.querySelector(`[data-id="${CSS.escape(id)}"]`);
    if (group) group.focus({ preventScroll: true });
    event.preventDefault();
  }
});

function step(from, to, word) {
  if (!from.length) return;
  to.push(copy(state));
  state = from.pop();
  publish();
  say(word);
}

function act(name) {
  write();
  const before = copy(state), item = find(chosen), place = state.items.indexOf(item);
  if (name === "undo") step(past, future, "Undone");
  else if (name === "redo") step(future, past, "Done again");
  else if (name === "add" && state.items.length < MOST) {
    const shift = (state.items.length % 5) * 0.05, added = fresh([0.3, 0.3, 0.6, 0.6].map((v) => v + shift - 0.1));
    state.items.push(added); chosen = added.id; publish(before); draw(); label.focus({ preventScroll: true });
  } else if (name === "under") {
    if (under) { URL.revokeObjectURL(under); under = ""; } else $(".file").click();
  } else if (item && name === "remove") { state.items.splice(place, 1); chosen = null; publish(before); say("Region deleted"); }
  else if (item && name === "duplicate" && state.items.length < MOST) {
    const other = { ...copy(item), id: fresh([]).id }, [x, y] = [Math.min(0.03, 1 - item.box[2]), Math.min(0.03, 1 - item.box[3])];
    other.box = [item.box[0] + x, item.box[1] + y, item.box[2] + x, item.box[3] + y].map(round);
    state.items.push(other); chosen = other.id; publish(before); say("Region duplicated");
  } else if (item && (name === "forward" || name === "back")) {
    const to = clamp(place + (name === "forward" ? 1 : -1), 0, state.items.length - 1);
    if (to !== place) { state.items.splice(place, 1); state.items.splice(to, 0, item); publish(before); say(`Now number ${to + 1}`); }
  }
  draw();
}
$(".bar").addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (button && button.getAttribute("aria-disabled") !== "true") act(button.dataset.act);
});
$(".file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file && file.type.startsWith("image/")) under = URL.createObjectURL(file);
  event.target.value = "";
  draw();
});
snap.addEventListener("change", draw);

stage.addEventListener("keydown", (event) => {
  const item = find(chosen), key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
  const arrow = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key];
  if (command && key === "z") act(event.shiftKey ? "redo" : "undo");
  else if (command && key === "y") act("redo");
  else if (command && key === "d") act("duplicate");
  else if (key === "delete" || key === "backspace") act("remove");
  else if (key === "escape") { chosen = null; draw(); stage.focus({ preventScroll: true }); }
  else if (key === "enter" && item) { label.focus(); label.select(); }
  else if (arrow && item && !item.mask) {
    const before = copy(state), n = lines(), fine = event.altKey ? 5 : 1;
    const by = [0, 1].map((axis) => arrow[axis] * (n ? 1 / n[axis] : STEP * fine)), [x0, y0, x1, y1] = item.box;
    if (event.shiftKey) item.box = [x0, y0, clamp(x1 + by[0], x0 + LEAST), clamp(y1 + by[1], y0 + LEAST)].map(round);
    else { const x = clamp(x0 + by[0], 0, 1 - (x1 - x0)), y = clamp(y0 + by[1], 0, 1 - (y1 - y0)); item.box = [x, y, x + x1 - x0, y + y1 - y0].map(round); }
    if (JSON.stringify(before) !== JSON.stringify(state)) publish(before);
    draw();
  } else return;
  event.preventDefault();
});

function grids() {
  const now = snap.value, all = [["", "off"], ...(props.grids || []).map(([h, w]) => [`${h}x${w}`, `${w} × ${h}`])];
  snap.replaceChildren(...all.map(([value, text]) => make("option", { value }, text)));
  snap.value = all.some(([value]) => value === now) ? now : "";
}

watch("value", () => {
  if (JSON.stringify(props.value) === known) return; // heard of other things as well, perhaps amid a drag
  known = JSON.stringify(props.value);
  const given = { items: [], ...copy(props.value || {}) };
  if (JSON.stringify(given) === JSON.stringify(state)) return;
  past.push(state); future = []; state = given; drag = null;
  if (!find(chosen)) chosen = null;
  draw();
});
watch("size", draw);
watch("under", draw);
watch("grids", () => { grids(); draw(); });
new ResizeObserver(() => { if (!drag) draw(); }).observe($(".canvas"));
grids();
draw();
stage.dataset.ready = "1";
