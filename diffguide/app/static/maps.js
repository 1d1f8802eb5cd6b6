// The map of every word over the picture, from numbers: no round trip for a slider, no file for a map.
const STOPS = [[0, [20, 20, 60]], [0.4, [150, 30, 110]], [0.7, [245, 110, 40]], [1, [255, 245, 150]]];
const SIDE = 256;
const slider = $(".step"), strength = $(".heat"), regions = $(".boxes"), list = $(".words");
let picture = null, shown = "";

function colour(level) {
  let n = 1;
  while (n < STOPS.length - 1 && STOPS[n][0] < level) n++;
  const [[a, from], [b, to]] = [STOPS[n - 1], STOPS[n]], part = clamp((level - a) / (b - a));
  return from.map((c, i) => c + (to[i] - c) * part);
}

function bytes(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }

function load() {
  const value = props.value || {}, words = value.words || [];
  $(".all").hidden = !words.length;
  $(".empty").hidden = words.length > 0;
  slider.max = value.steps || 0;
  if (shown !== value.picture) slider.value = 0;
  shown = value.picture;
  if (!words.length) return list.replaceChildren();
  list.replaceChildren(...words.map((word) => make("li", {},
    make("canvas", { role: "img", "aria-label": `Where the model looked at ${word.word}` }), make("div", { class: "caption" }, word.word))));
  picture = new Image();
  picture.addEventListener("load", draw);
  picture.src = value.picture;
  draw();
}

function draw() {
  const value = props.value || {}, step = Number(slider.value), [h, w] = value.grid || [1, 1];
  $(".number").textContent = step ? `${step} of ${value.steps}` : "mean of all";
  const share = Number(strength.value), wide = value.size ? value.size[0] / value.size[1] : w / h;
  for (const [n, word] of (value.words || []).entries()) {
    const canvas = list.children[n].firstChild, pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = wide >= 1 ? [SIDE, Math.round(SIDE / wide)] : [Math.round(SIDE * wide), SIDE];
    if (picture && picture.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const all = bytes(word.maps), cells = all.subarray(step * h * w, (step + 1) * h * w);
    const small = document.createElement("canvas");
    [small.width, small.height] = [w, h];
    const data = new ImageData(w, h);
    cells.forEach((level, i) => { const [r, g, b] = colour(level / 255); data.data.set([r, g, b, 255 * share * (0.45 + 0.55 * level / 255)], 4 * i); });
    small.getContext("2d").putImageData(data, 0, 0);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (regions.checked) for (const box of value.boxes || []) {
      pen.strokeStyle = box.color; pen.lineWidth = box.words.includes(word.word) ? 4 : 1.5;
      pen.strokeRect(box.box[0] * canvas.width, box.box[1] * canvas.height, (box.box[2] - box.box[0]) * canvas.width, (box.box[3] - box.box[1]) * canvas.height);
    }
  }
  list.dataset.step = step;
}
slider.addEventListener("input", draw);
strength.addEventListener("input", draw);
regions.addEventListener("change", draw);
watch("value", load);
load();
list.dataset.ready = "1";
