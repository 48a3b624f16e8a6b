"use strict";
// The data of the page, the JSON in #data (see docs/plan_page.md), and its numbers, layouts and costs as text and elements.
// page.py puts its scripts behind each other, so that they are one script.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// -- elements, and numbers for people -------------------------------------------------------------------------------------

const SVG = new Set(["svg", "g", "rect", "path", "line", "text"]);

/** An element. Attributes that are functions are listeners; children that are strings become text, never markup. */
function el(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function scaled(number, units, base) {
  let at = 0;
  while (at < units.length - 1 && Math.abs(number) >= 999.5) {
    number /= base;
    at += 1;
  }
  return `${number >= 100 || (at === 0 && Number.isInteger(number)) ? number.toFixed(0) : number.toPrecision(3)} ${units[at]}`;
}
const bytes = (count) => scaled(count, ["B", "kB", "MB", "GB", "TB", "PB"], 1000);
const seconds = (count) => (count ? scaled(count * 1e9, ["ns", "µs", "ms", "s"], 1000) : "0 s");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

const swatch = (name) => el("i", { class: "swatch", style: `background:var(--${name})` });

// -- axes and layouts -----------------------------------------------------------------------------------------------------

const axisNames = [...new Set([...data.meshes[data.mesh].axes, ...data.meshes.flatMap((mesh) => mesh.axes)])];
const axisColour = (name) => `var(--axis${axisNames.indexOf(name) % 8})`;
const axisTag = (name, text = name) => el("span", { class: "axis", style: `background:${axisColour(name)}` }, text);

/** The global rank at a position of a mesh, row-major, and back. */
function rankAt(mesh, position) {
  for (const [first, step, count] of mesh.ranks) {
    if (position < count) return first + step * position;
    position -= count;
  }
  return -1;
}
function positionOf(mesh, rank) {
  let before = 0;
  for (const [first, step, count] of mesh.ranks) {
    const k = (rank - first) / step;
    if (Number.isInteger(k) && k >= 0 && k < count) return before + k;
    before += count;
  }
  return -1;
}
function coordinatesOf(mesh, position) {
  const found = [];
  for (let a = mesh.sizes.length - 1; a >= 0; a--) {
    found[a] = position % mesh.sizes[a];
    position = Math.floor(position / mesh.sizes[a]);
  }
  return found;
}

/** [start, stop] of a dim that ranks at some coordinates hold: each axis chunks the piece that the one before it left. */
function boundsOfDim(layout, dim, size, coordinates, depth = Infinity) {
  const sizes = data.meshes[layout.mesh].sizes;
  const axes = layout.dims[dim];
  const explicit = layout.sizes && layout.sizes[dim];
  if (explicit) {
    const index = axes.reduce((index, axis) => index * sizes[axis] + coordinates[axis], 0);
    const start = sum(explicit.slice(0, index));
    return [start, start + explicit[index]];
  }
  let start = 0;
  for (const axis of axes.slice(0, depth)) {
    const step = Math.ceil(size / sizes[axis]);
    const offset = Math.min(size, coordinates[axis] * step);
    start += offset;
    size = Math.min(step, size - offset);
  }
  return [start, start + size];
}

/** What a rank holds of a tensor of some shape: [start, stop] of each dim. */
function holds(layout, shape, rank) {
  const mesh = data.meshes[layout.mesh];
  const coordinates = coordinatesOf(mesh, positionOf(mesh, rank));
  return shape.map((size, dim) => boundsOfDim(layout, dim, size, coordinates));
}
const localShape = (bounds) => bounds.map(([start, stop]) => stop - start);
const boundsText = ([start, stop]) => `${start}:${stop}`;

/** Shape of the largest piece. */
function largestPiece(layout, shape) {
  const sizes = data.meshes[layout.mesh].sizes;
  return shape.map((size, dim) => {
    const explicit = layout.sizes && layout.sizes[dim];
    return explicit ? Math.max(...explicit) : layout.dims[dim].reduce((left, axis) => Math.ceil(left / sizes[axis]), size);
  });
}
function pieceBytes([tensor, layout]) {
  const [shape, , itemsize] = data.tensors[tensor];
  return product(largestPiece(data.layouts[layout], shape)) * itemsize;
}

/** A background in stripes of some axes' colours. */
function tint(names) {
  const stripes = names.map((name, i) => {
    const pale = `color-mix(in srgb, ${axisColour(name)} 22%, var(--card))`;
    return `${pale} ${(100 * i) / names.length}%, ${pale} ${(100 * (i + 1)) / names.length}%`;
  });
  return names.length ? `background:linear-gradient(90deg, ${stripes.join(", ")})` : undefined;
}

/** A tensor with its layout, as a button: each dim with the axes that split it, grey where it is whole. */
function tensorChip(what, tensor, layoutIndex, label, computed = layoutIndex) {
  const [shape, dtype] = data.tensors[tensor];
  const layout = data.layouts[layoutIndex];
  const names = data.meshes[layout.mesh].axes;
  const dims = shape.map((size, dim) =>
    el(
      "span",
      { class: "dim", style: tint(layout.dims[dim].map((axis) => names[axis])) },
      String(size),
      layout.dims[dim].map((axis) => axisTag(names[axis])),
    ),
  );
  const partial = (layout.partial || []).map(([axis, op]) =>
    el("span", { class: "partial", style: `--stripe:${axisColour(names[axis])}` }, el("b", {}, `${op} `, axisTag(names[axis]))),
  );
  return el(
    "button",
    {
      class: "tensor",
      type: "button",
      "aria-pressed": "false",
      title: `${dtype} [${shape.join(", ")}] as ${layout.text}`,
      click: (event) => select(event.currentTarget, () => showTensor(what, tensor, layoutIndex, computed)),
    },
    label && el("span", { class: "of" }, label),
    dims.length ? dims : el("span", { class: "dim" }, "scalar"),
    partial,
  );
}

// -- nodes: what they cost, where they stand ------------------------------------------------------------------------------

const whole = data.step ? data.step.seconds : 0;
const kindOf = (node) => data.kinds[data.nodes.kinds[node]];
const COSTS = ["forward", "backward", "redistribution", "parameters"];

/** Seconds of a kind of operator by part, its redistributions included. */
for (const kind of data.kinds) {
  const [forward, backward, own] = kind.price || [0, 0, 0];
  kind.moves ||= [];
  kind.after ||= [];
  const moved = (ofParameter) =>
    sum([...kind.moves, ...kind.after].filter((move) => !!move.parameter === ofParameter).map((move) => move.seconds));
  kind.cost = [forward, backward, own + moved(false), moved(true)];
}
const costBefore = [[0, 0, 0, 0]]; // of all nodes before each
const firstOutput = [data.inputs.length]; // the number of each node's first value
data.nodes.kinds.forEach((kind, node) => {
  costBefore.push(costBefore[node].map((before, part) => before + data.kinds[kind].cost[part]));
  firstOutput.push(firstOutput[node] + data.kinds[kind].outputs.length);
});
const costOf = (start, stop) => COSTS.map((_, part) => costBefore[stop][part] - costBefore[start][part]);

const join = (path, name) => (path ? `${path}.${name}` : name);

/** The modules of every node, by its number. */
const modulePaths = (() => {
  const paths = new Array(data.nodes.kinds.length).fill("");
  (function walk(items, shift, path) {
    for (const item of items) {
      if (Array.isArray(item)) for (let node = item[0]; node < item[1]; node++) paths[node + shift] = path;
      else item.names.forEach((name, copy) => walk(item.items, shift + copy * item.length, join(path, name)));
    }
  })(data.tree, 0, "");
  return paths;
})();
const placeOf = (node) => `${modulePaths[node] ? modulePaths[node] + " / " : ""}${kindOf(node).op}`;

/** What a value is called, and the layout it is handed over in. */
function valueOf(number) {
  if (number < data.inputs.length) return { name: data.inputs[number][0], layout: data.inputs[number][3] };
  let low = 0;
  let high = data.nodes.kinds.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (firstOutput[middle] <= number) low = middle;
    else high = middle - 1;
  }
  const position = number - firstOutput[low];
  return { node: low, name: data.nodes.names[low], layout: kindOf(low).outputs[position][1] };
}

/** The cells at the right of a row: a bar by part, as long as `full` is the whole bar, seconds, and the share of the step. */
function numbers(cost, full = largest) {
  const total = sum(cost);
  const parts = COSTS.map(
    (name, part) => cost[part] > 0 && el("i", { style: `width:${(100 * cost[part]) / full}%;background:var(--${name})` }),
  ).filter(Boolean);
  const title = COSTS.map((name, part) => cost[part] && `${name} ${seconds(cost[part])}`)
    .filter(Boolean)
    .join(", ");
  return [
    parts.length ? el("span", { class: "meter", title }, parts) : el("span"),
    el("span", { class: "time" }, total ? seconds(total) : ""),
    el("span", { class: "share" }, total >= whole * 0.0005 ? percent(total / whole) : ""),
  ];
}
/** The bars of the tree are as long as the dearest thing at its top, or they could not be seen. */
const largest = Math.max(
  0,
  ...data.tree.map((item) =>
    Array.isArray(item)
      ? Math.max(...Array.from({ length: item[1] - item[0] }, (_, i) => sum(costOf(item[0] + i, item[0] + i + 1))))
      : sum(costOf(item.start, item.start + item.length * item.names.length)),
  ),
);
const HOT = 0.04; // share of the step from which a row is highlighted
const heat = (total) => (whole && total >= HOT * whole ? " hot" : "");
