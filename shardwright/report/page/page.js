// Draws everything, and listens for what is typed.

drawHeader();
drawTree();
if (data.step) drawHot();
if (data.memory) drawMemory();
drawParameters();
at("inspector").append(
  el("h2", {}, "Which rank holds what"),
  el(
    "p",
    { class: "soft" },
    "Select a tensor to see its pieces on the device grid, or an operator's name to see what it costs.",
  ),
);

let waiting;
at("search").addEventListener("input", (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => search(event.target.value), 120);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") deselect();
  if (event.key === "/" && !event.target.matches("input, select")) {
    at("search").focus();
    event.preventDefault();
  }
});
