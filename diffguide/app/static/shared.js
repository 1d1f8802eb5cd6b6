// What every part uses. `element`, `props`, `trigger` and `watch` are gradio's.
const SVG = "http://www.w3.org/2000/svg";
const $ = (selector) => element.querySelector(selector);
const copy = (value) => JSON.parse(JSON.stringify(value));
const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));

// An element with attributes and children; texts of users come in here, as text.
function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) node.setAttribute(name, String(value));
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
