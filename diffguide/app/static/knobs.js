const cards = $(".cards"), add = $(".add"), live = $(".live");
let chosen = read(), open = {};

function read() { return copy((props.value && props.value.methods) || []); }
const row = (name) => (props.methods || []).find((method) => method.name === name);
const spoken = (name) => name.replaceAll("_", " ");
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function publish() { props.value = { methods: copy(chosen) }; trigger("input"); }

function draw() {
  const rest = (props.methods || []).filter((method) => method.mode === props.mode && !chosen.some((c) => c.name === method.name));
  add.replaceChildren(make("option", { value: "" }, "choose…"), ...rest.map((method) => {
    const needs = { needed: " (needs regions)", taken: " (takes regions)" }[method.layout] || "";
    return make("option", { value: method.name, title: method.help }, method.name + needs);
  }));
  cards.replaceChildren(...chosen.map(card));
  $(".none").hidden = chosen.length > 0;
}

add.addEventListener("change", () => {
  if (!add.value) return;
  chosen.push({ name: add.value, params: {} });
  live.textContent = `${add.value} added`;
  publish(); draw(); add.focus();
});

function card(spec, place) {
  const method = row(spec.name);
  if (!method) return make("fieldset", { class: "card" }, make("legend", {}, spec.name), make("p", { class: "about" }, "No such method here."), remove(place));
  const first = (knob) => knob.name in method.neutral || ["window", "heads"].includes(knob.name) || (knob.type.startsWith("text") && !knob.default.length && knob.name !== "layers");
  const main = method.params.filter(first), more = method.params.filter((knob) => !first(knob));
  const strength = main.sort((a, b) => (b.name in method.neutral) - (a.name in method.neutral));
  const rest = make("details", { ontoggle: (event) => { open[spec.name] = event.target.open; }, open: Boolean(open[spec.name]) },
    make("summary", {}, `${more.length} more knobs`), ...more.map((knob) => control(spec, knob)));
  return make("fieldset", { class: "card", "data-method": spec.name },
    make("legend", {}, spec.name),
    make("p", { class: "about" }, method.help + (method.paper ? ` (${method.paper})` : "")),
    make("div", { class: "tools" }, remove(place),
      make("button", { type: "button", onclick: () => { spec.params = {}; publish(); draw(); } }, "Defaults"),
      place ? make("button", { type: "button", "aria-label": `Let ${spec.name} act earlier`, onclick: () => { chosen.splice(place - 1, 0, ...chosen.splice(place, 1)); publish(); draw(); } }, "Earlier") : null),
    ...strength.map((knob) => control(spec, knob)), more.length ? rest : null);
}

function remove(place) {
  return make("button", { type: "button", "aria-label": `Remove ${chosen[place].name}`, onclick: () => { chosen.splice(place, 1); publish(); draw(); } }, "Remove");
}

function set(spec, knob, value) {
  if (same(value, knob.default)) delete spec.params[knob.name]; else spec.params[knob.name] = value;
  publish();
}

function control(spec, knob) {
  const value = spec.params[knob.name] ?? knob.default, id = `${element.id || "k"}-${spec.name}-${knob.name}`.replace(/[^\w-]/g, "");
  const named = { "aria-label": `${spec.name} ${spoken(knob.name)}`, "data-knob": knob.name };
  const box = make("div", { class: "knob" }, make("span", { class: "name" }, spoken(knob.name)));
  const fault = make("span", { class: "fault", id: `${id}-fault` });
  const help = make("span", { class: "help" }, knob.help + (knob.range && !knob.choices ? `; ${knob.range}` : ""));
  if (knob.choices) {
    const select = make("select", { ...named, onchange: () => set(spec, knob, select.value) }, ...knob.choices.map((c) => make("option", { value: c }, c)));
    select.value = value;
    box.append(select);
  } else if (knob.type === "true/false") {
    const tick = make("input", { ...named, type: "checkbox", onchange: () => set(spec, knob, tick.checked) });
    tick.checked = value;
    box.append(tick);
  } else if (knob.type === "start:stop") box.append(pair(spec, knob, value, named, fault));
  else if (["number", "integer"].includes(knob.type)) number(box, spec, knob, value, named, fault);
  else text(box, spec, knob, value, named, fault);
  box.append(help, fault);
  if (knob.name === "heads") box.append(grid(spec, knob, value));
  return box;
}

function right(value, knob) { // a number of the knob's kind and range
  return Number.isFinite(value) && (knob.type !== "integer" || Number.isInteger(value)) && value >= (knob.low ?? -Infinity) && value <= (knob.high ?? Infinity);
}

function judge(input, fault, fine, knob) {
  input.setAttribute("aria-invalid", !fine);
  fault.textContent = fine ? "" : `not ${knob.type === "integer" ? "a whole number" : "a number"} in ${knob.range || "range"}`;
  return fine;
}

function number(box, spec, knob, value, named, fault) {
  const exact = make("input", { ...named, type: "number", min: knob.low, max: knob.high, step: knob.type === "integer" ? 1 : "any" });
  exact.value = value;
  exact.addEventListener("change", () => {
    const typed = exact.value === "" ? NaN : Number(exact.value);
    if (judge(exact, fault, right(typed, knob), knob)) { if (slider) slider.value = typed; set(spec, knob, typed); }
  });
  let slider = null;
  if (knob.low !== null && knob.high !== null) {
    const far = knob.default && knob.high > 10 * Math.abs(knob.default) ? knob.low + 5 * (Math.abs(knob.default) - Math.min(0, knob.low)) : knob.high;
    const top = Math.min(knob.high, Math.max(far, value));
    const step = knob.type === "integer" ? 1 : (top - knob.low) / 200;
    slider = make("input", { type: "range", min: knob.low, max: top, step, "aria-label": `${named["aria-label"]}, slider` });
    slider.value = value;
    slider.addEventListener("input", () => { exact.value = tidy(slider.value); judge(exact, fault, true, knob); });
    slider.addEventListener("change", () => set(spec, knob, tidy(slider.value)));
  }
  box.append(exact);
  if (slider) { box.append(slider); slider.style.gridColumn = "1 / -1"; }
}

const tidy = (value) => Number(Number(value).toPrecision(4));

function pair(spec, knob, value, named, fault) {
  const now = value.slice(), parts = [];
  for (const [at, word] of ["from", "to"].entries()) {
    const exact = make("input", { type: "number", min: knob.low ?? 0, max: knob.high ?? 1, step: 0.01, "aria-label": `${named["aria-label"]} ${word}`, "data-knob": `${knob.name}-${word}` });
    const slider = make("input", { type: "range", min: knob.low ?? 0, max: knob.high ?? 1, step: 0.01, "aria-label": `${named["aria-label"]} ${word}, slider` });
    exact.value = slider.value = now[at];
    const take = (text, source, other) => {
      const typed = text === "" ? NaN : Number(text), next = now.slice();
      next[at] = typed;
      const fine = right(typed, knob) && next[0] <= next[1];
      judge(exact, fault, fine, knob);
      if (!fine) { if (right(typed, knob)) fault.textContent = "the start is not above the stop"; return; }
      now[at] = typed; other.value = typed; set(spec, knob, now.slice());
    };
    exact.addEventListener("change", () => take(exact.value, exact, slider));
    slider.addEventListener("change", () => take(slider.value, slider, exact));
    parts.push(make("span", {}, word), slider, exact);
  }
  return make("div", { class: "pair" }, ...parts);
}

function text(box, spec, knob, value, named, fault) { // a text, or a list between commas
  const list = knob.type.endsWith(",..."), whole = knob.type.startsWith("integer"), words = knob.type.startsWith("text");
  const id = `list-${spec.name}-${knob.name}`;
  const input = make("input", { ...named, type: "text", placeholder: list ? "by commas" : knob.name === "layers" ? "as the method has it" : "", list: knob.name === "layers" ? id : null });
  input.value = list ? value.join(", ") : value ?? "";
  input.addEventListener("change", () => {
    if (!list) { set(spec, knob, input.value); if (knob.name === "heads") draw(); return; }
    const parts = input.value.split(",").map((part) => part.trim()).filter(Boolean);
    const values = words ? parts : parts.map(Number);
    if (judge(input, fault, words || values.every((v) => right(v, { ...knob, type: whole ? "integer" : "number" })), { ...knob, type: whole ? "integer" : "number" })) set(spec, knob, values);
  });
  if (knob.name === "layers") {
    const layers = ["down", "mid", "up", "all", ...(props.layers || []).map((layer) => `L${layer.number}`)];
    box.append(make("datalist", { id }, ...layers.map((layer) => make("option", { value: layer }))));
  }
  box.append(input);
}

// The heads: a row for each layer, a button for each head, coloured by what a search found.
const parts = (value) => String(value).split(",").map((part) => part.trim()).filter(Boolean);

function like(name, pattern) { // as fnmatch has it: * ? [seq] [!seq]
  const source = pattern.replace(/[.+^${}()|\\]/g, "\\$&").replaceAll("*", ".*").replaceAll("?", ".").replaceAll("[!", "[^");
  try { return new RegExp(`^(?:${source})$`, "s").test(name); } catch (_) { return false; }
}

function headsOf(part) { // the heads that a part of the text names, none for what this model has not
  const unit = /^L(\d+)(?:H(\d+))?$/i.exec(part), preset = part.startsWith("@") && (props.presets || []).find((p) => p.name === part.slice(1));
  if (preset) return parts(preset.heads).filter((own) => !own.startsWith("@")).flatMap(headsOf);
  const [name, only] = unit ? [null, unit[2]] : part.split(":"), found = [];
  for (const layer of props.layers || []) {
    if (unit ? Number(unit[1]) !== layer.number : !(["all", layer.block].includes(name) || like(layer.name, name))) continue;
    for (let head = 0; head < layer.heads; head++) if (only === undefined || Number(only) === head) found.push(`L${layer.number}H${head}`);
  }
  return found;
}

function shade(name) {
  const heat = props.heat;
  if (!heat || !(name in heat.scores)) return null;
  const largest = Math.max(...Object.values(heat.scores).map((v) => Math.abs(v - heat.plain))) || 1;
  const part = (heat.scores[name] - heat.plain) / largest, end = part > 0 ? [217, 95, 14] : [33, 102, 172];
  const mixed = end.map((c) => Math.round(247 + (c - 247) * Math.min(1, Math.abs(part))));
  return { colour: `rgb(${mixed})`, ink: Math.abs(part) > 0.6 ? "#fff" : "#111", tip: `${name}: ${heat.scores[name].toPrecision(4)}, plain ${heat.plain.toPrecision(4)}` };
}

function grid(spec, knob, value) {
  const layers = props.layers || [], box = make("div", { class: "heads" });
  if (!layers.length) return box;
  const on = new Set(parts(value).flatMap(headsOf)), others = parts(value).filter((part) => !headsOf(part).length), most = Math.max(...layers.map((layer) => layer.heads));
  const put = (text) => { set(spec, knob, text); draw(); };
  const toggle = (name) => { const next = new Set(on); if (!next.delete(name)) next.add(name); put([...[...next].sort(byNumber), ...others].join(",")); };
  const head = (layer, number) => {
    const name = `L${layer.number}H${number}`, tone = shade(name);
    return make("td", {}, make("button", { type: "button", "aria-pressed": on.has(name), "aria-label": `head ${name}`, title: tone ? tone.tip : name, style: tone ? `background:${tone.colour};color:${tone.ink}` : null, onclick: () => toggle(name) }, on.has(name) ? "●" : ""));
  };
  box.append(make("table", {},
    make("thead", {}, make("tr", {}, make("td"), ...Array.from({ length: most }, (_, n) => make("th", { scope: "col" }, `H${n}`)))),
    make("tbody", {}, ...layers.map((layer) => make("tr", {}, make("th", { scope: "row", title: layer.name }, `L${layer.number} ${layer.block}`), ...Array.from({ length: layer.heads }, (_, n) => head(layer, n)))))));
  box.append(make("p", { class: "legend" }, props.heat ? "Orange heads raised the search's objective, blue ones lowered it." : "Layers are rows in running order; press heads to choose them. A search's heat map shows where one is given (--heads FOLDER)."));
  const presets = props.presets || [];
  if (presets.length) {
    const select = make("select", { "aria-label": `${spec.name} preset of heads`, onchange: () => {
      const preset = presets.find((p) => p.name === select.value);
      if (!preset) return;
      Object.assign(spec.params, preset.settings); put(preset.heads);
    } }, make("option", { value: "" }, "preset…"), ...presets.map((p) => make("option", { value: p.name }, `${p.name}: ${p.purpose}, for ${p.model}`)));
    box.append(select);
  }
  return box;
}

function byNumber(a, b) {
  const [p, q] = [a, b].map((name) => name.match(/\d+/g).map(Number));
  return p[0] - q[0] || p[1] - q[1];
}

watch("value", () => { const given = read(); if (!same(given, chosen)) { chosen = given; draw(); } });
watch(["methods", "mode", "layers", "presets", "heat"], draw);
draw();
cards.dataset.ready = "1";
