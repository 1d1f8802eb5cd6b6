const picture = $(".preview"), bar = $(".steps"), text = $(".text");

function draw() {
  const now = props.value || {};
  const preview = now.preview || "";
  if (preview.startsWith("data:image/jpeg;base64,")) { picture.setAttribute("src", preview); picture.hidden = false; picture.dataset.seen = "1"; }
  if (now.kind !== "running") { picture.hidden = true; picture.removeAttribute("src"); }
  bar.max = now.steps || 1;
  bar.value = now.kind === "done" ? bar.max : now.step || 0;
  bar.hidden = !["running", "done"].includes(now.kind);
  text.dataset.kind = now.kind || "";
  text.textContent = now.text || "Ready.";
}
watch("value", draw);
draw();
text.dataset.ready = "1";
