const WORDS = { problem: "Problem: ", warning: "Note: ", fine: "", fact: "" };
const list = $(".list");

function draw() {
  const notes = (props.value && props.value.notes) || [];
  list.replaceChildren(...notes.map(({ level, text }) => make("li", { "data-level": level }, make("span", { class: "word" }, WORDS[level] || ""), text)));
}
watch("value", draw);
draw();
list.dataset.ready = "1";
