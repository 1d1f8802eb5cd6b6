const INKS = ["#d95f0e", "#2166ac", "#2e7d32", "#7b1fa2", "#00838f", "#c2185b"];
const LEFT = 46, RIGHT = 12, TOP = 12, BOTTOM = 34, WIDE = 640, HIGH = 280;
const plot = $(".plot");

function draw() {
  const value = props.value || {}, series = value.series || [];
  const points = series.flatMap((s) => s.points);
  $(".empty").hidden = points.length > 0 || !value.cost;
  plot.toggleAttribute("hidden", !points.length);
  $(".cost").textContent = value.cost || "";
  $(".names").replaceChildren(...series.map((s, n) => { const mark = make("span"); mark.style.background = INKS[n % INKS.length]; return make("li", {}, mark, s.name); }));
  if (!points.length) return plot.replaceChildren();
  const most = Math.max(...points.map((p) => p[1])) || 1, last = Math.max(...points.map((p) => p[0]), 1);
  const x = (v) => LEFT + (v - 1) / Math.max(1, last - 1) * (WIDE - LEFT - RIGHT), y = (v) => HIGH - BOTTOM - v / most * (HIGH - TOP - BOTTOM);
  const ticks = [0, 0.5, 1].flatMap((part) => [
    make("svg:line", { x1: LEFT, x2: WIDE - RIGHT, y1: y(part * most), y2: y(part * most) }),
    make("svg:text", { x: LEFT - 6, y: y(part * most) + 4, "text-anchor": "end" }, (part * most).toPrecision(2))]);
  const steps = (value.steps || []).map(([pass, step]) => make("svg:text", { x: x(pass), y: HIGH - 16, "text-anchor": "middle" }, String(step)));
  const caption = make("svg:text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 2, "text-anchor": "middle" }, "denoising step (each point is a gradient pass)");
  const paths = series.map((s, n) => make("svg:path", { stroke: INKS[n % INKS.length], d: s.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("") }));
  const dots = series.flatMap((s, n) => s.points.map(([a, b]) => make("svg:circle", { cx: x(a), cy: y(b), r: 3, fill: INKS[n % INKS.length] })));
  plot.replaceChildren(...ticks, ...steps, caption, ...paths, ...dots);
}
watch("value", draw);
draw();
