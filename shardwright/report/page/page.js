"use strict";
// The page of a plan. All that is shown comes from the JSON in #data; docs/plan_page.md says what is in it.
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

// -- header ---------------------------------------------------------------------------------------------------------------

function drawHeader() {
  const mesh = data.meshes[data.mesh];
  const ranks = product(mesh.sizes);
  const count = sum(data.parameters.map((row) => row.inputs.length * product(data.tensors[row.tensor][0])));
  const about = [
    `${ranks.toLocaleString("en")} ${ranks === 1 ? "rank" : "ranks"}`,
    data.step && `machine ${data.step.machine}${data.step.assumed ? " (assumed)" : ""}`,
    `mode ${data.mode}`,
    `${scaled(count, ["", "k", "M", "B", "T"], 1000).trim()} parameters`,
    `${data.nodes.kinds.length.toLocaleString("en")} operators`,
  ];
  at("subtitle").append(about.filter(Boolean).join(" · "));
  at("axes").append(
    el("span", {}, "mesh"),
    ...axisNames.map((name) => {
      const of = data.meshes.find((mesh) => mesh.axes.includes(name));
      return el("span", {}, axisTag(name, `${name} = ${of.sizes[of.axes.indexOf(name)]}`));
    }),
    el("span", {}, el("i", { class: "swatch", style: "background:var(--whole)" }), "whole on every rank"),
    el("span", {}, el("i", { class: "swatch partial", style: "--stripe:var(--ink)" }), "sum pending"),
  );
  at("notes").append(...data.notes.map((note) => el("li", {}, note)));
  document.body.classList.toggle("unpriced", !data.step);
  if (data.step) drawTiles();
  else at("facts").remove();
}

function drawTiles() {
  const { step, search, memory } = data;
  const parts = Object.entries(step.parts).filter(([, count]) => count > 0);
  const label = parts.map(([name, count]) => `${name} ${seconds(count)}`).join(", ");
  const tile = (name, value, ...more) =>
    el("div", { class: "tile" }, el("span", { class: "name" }, name), el("b", {}, value), ...more);
  const small = (...text) => el("span", { class: "small" }, ...text);
  at("facts").append(
    tile(
      "a step takes",
      seconds(whole),
      el(
        "div",
        { class: "stack", role: "img", "aria-label": label },
        parts.map(([name, count]) =>
          el("i", { style: `flex:${count / whole} 0 0;background:var(--${name})`, title: `${name} ${seconds(count)}` }),
        ),
      ),
      el(
        "div",
        { class: "legend" },
        parts.map(([name, count]) =>
          el("span", {}, swatch(name), `${name} ${seconds(count)}`, el("span", { class: "soft" }, percent(count / whole))),
        ),
      ),
    ),
    tile("a rank sends", bytes(step.bytes), small("in a step")),
  );
  if (memory) {
    const share = memory.limit ? memory.peak / memory.limit : 0;
    at("facts").append(
      tile(
        "a rank holds at most",
        bytes(memory.peak),
        memory.limit
          ? el("div", { class: share > 1 ? "gauge over" : "gauge" }, el("i", { style: `width:${Math.min(100, 100 * share)}%` }))
          : "",
        small(
          memory.limit ? `${percent(share)} of ${bytes(memory.limit)}` : "no limit was asked for",
          share > 1 ? ": it does not fit" : "",
        ),
      ),
    );
  }
  at("facts").append(
    tile("really split", percent(step.flops_split), small(`of FLOPs; ${percent(step.parameters_split)} of parameters`)),
  );
  if (search) {
    const tried = search.tried.length > 1 ? `, the best of ${search.tried.length} meshes` : "";
    at("facts").append(
      tile(
        "certified",
        search.gap === null ? "—" : search.gap === 0 ? "optimal" : `≤ ${percentExactly(search.gap)}`,
        small(
          search.gap === null ? "nothing is certified; " : search.gap === 0 ? "" : "from the best plan; ",
          `${search.method}, ${seconds(search.planning)}${tried}`,
        ),
      ),
    );
  }
}
const percentExactly = (share) => `${(100 * share).toPrecision(2)} %`;

// -- where the time goes --------------------------------------------------------------------------------------------------

function drawHot() {
  const found = new Map();
  data.nodes.kinds.forEach((index, node) => {
    const kind = data.kinds[index];
    const place = modulePaths[node].replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
    const own = [...kind.cost];
    for (const move of [...kind.moves, ...kind.after]) {
      if (!move.seconds) continue;
      own[move.parameter ? 3 : 2] -= move.seconds;
      const cost = [0, 0, 0, 0];
      cost[move.parameter ? 3 : 2] = move.seconds;
      const label = kind.after.includes(move) ? "output" : kind.inputs[move.of][2];
      add(place, node, `${kind.op}${label ? `, ${label}` : ""}: ${moveText(move)}`, cost);
    }
    add(
      place,
      node,
      kind.op,
      own.map((part) => Math.max(part, 0)),
    );
  });
  function add(place, node, what, cost) {
    const key = `${place}|${what}`;
    const row = found.get(key) || { node, place, what, count: 0, cost: [0, 0, 0, 0] };
    row.count += 1;
    row.cost = row.cost.map((before, part) => before + cost[part]);
    found.set(key, row);
  }
  const rows = [...found.values()]
    .sort((a, b) => sum(b.cost) - sum(a.cost))
    .slice(0, 8)
    .filter((row) => sum(row.cost) > 0);
  at("hot").append(
    el(
      "ol",
      {},
      rows.map((row) =>
        el(
          "li",
          {},
          el(
            "button",
            {
              class: "row",
              type: "button",
              title: `${row.what}; select to show it below`,
              click: () => reveal(row.node),
            },
            el(
              "span",
              {},
              el("span", { class: "where mono" }, row.count > 1 ? row.place : modulePaths[row.node] || "the model"),
              el("span", { class: "what" }, row.count > 1 ? `${row.count} × ` : "", row.what),
            ),
            numbers(row.cost, sum(rows[0].cost)),
          ),
        ),
      ),
    ),
  );
}
const stepText = ([kind, axes]) => `${kind.replaceAll("_", " ")}${axes.length ? ` over ${axes.join(", ")}` : ""}`;
function moveText(move) {
  const steps = (list) => list.map(stepText).join(", ");
  return [steps(move.forward), move.backward.length && `backward ${steps(move.backward)}`].filter(Boolean).join("; ");
}

// -- memory over time -----------------------------------------------------------------------------------------------------

const PARTS = {
  parameters: "what a rank stores of the parameters",
  optimizer: "what the optimizer keeps between steps",
  gradients: "of the stored parameters",
  activations: "kept from the forward for the backward",
  transient: "what comes and goes: results, gathered parameters, gradients on their way, buffers of collectives",
};

function drawMemory() {
  const { memory } = data;
  const names = Object.keys(memory.parts).filter((name) => memory.parts[name] !== 0);
  const count = memory.nodes.length;
  const value = (name, point) =>
    (Array.isArray(memory.parts[name]) ? memory.parts[name][point] : memory.parts[name]) * memory.unit;
  const totals = memory.nodes.map((_, point) => sum(names.map((name) => value(name, point))));
  const highest = memory.highest;
  const chart = el("svg", {
    id: "chart",
    tabindex: 0,
    role: "img",
    "aria-label": "bytes in use over a step; arrow keys move along it",
  });
  const moment = el("p", { id: "moment", "aria-live": "polite" });
  const legend = el(
    "div",
    { class: "legend" },
    names.map((name) => el("span", { title: PARTS[name] }, swatch(name), name)),
  );
  at("memory").append(chart, moment, legend);
  const left = 52,
    top = 10,
    bottom = 20;
  let width = 0,
    height = 0,
    point = highest;
  const roof = Math.max(memory.peak, memory.limit && memory.limit < 1.8 * memory.peak ? memory.limit : 0) * 1.06;
  const x = (point) => left + ((width - left) * (point + 0.5)) / count;
  const y = (size) => top + (height - top - bottom) * (1 - size / roof);
  const phaseOf = (point) => memory.phases.find(([, length]) => (point -= length) < 0)[0];
  const cursor = el("line", { class: "cursor" });

  function draw() {
    [width, height] = [chart.clientWidth || 600, chart.clientHeight || 230];
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.replaceChildren(...ticks(), ...areas(), ...limit(), ...phases(), cursor);
    show(point);
  }
  function ticks() {
    const step = niceStep(roof / 4);
    const found = [];
    for (let size = 0; size <= roof; size += step) {
      found.push(
        el("line", { class: "tick", x1: left, x2: width, y1: y(size), y2: y(size) }),
        el("text", { x: left - 6, y: y(size) + 4, "text-anchor": "end" }, bytes(size)),
      );
    }
    return found;
  }
  function areas() {
    const shown = columns();
    const below = shown.map(() => 0);
    return names.map((name) => {
      const under = shown.map((point, i) => `${x(point).toFixed(1)} ${y(below[i]).toFixed(1)}`);
      shown.forEach((point, i) => {
        below[i] += value(name, point);
      });
      const over = shown.map((point, i) => `${x(point).toFixed(1)} ${y(below[i]).toFixed(1)}`);
      return el("path", {
        "data-part": name,
        d: `M${over.join("L")}L${under.reverse().join("L")}Z`,
        style: `fill:var(--${name})`,
      });
    });
  }
  function columns() {
    // no more points than there is room for, of each column the highest
    const room = Math.max(1, Math.floor(width));
    if (count <= room) return totals.map((_, point) => point);
    const best = [];
    totals.forEach((total, point) => {
      const column = Math.floor((point * room) / count);
      if (best[column] === undefined || total > totals[best[column]]) best[column] = point;
    });
    return best;
  }
  function limit() {
    if (!memory.limit) return [];
    if (memory.limit > roof)
      return [el("text", { x: width - 4, y: top + 8, "text-anchor": "end" }, `the limit is ${bytes(memory.limit)}, above`)];
    return [
      el("line", { class: "limit", x1: left, x2: width, y1: y(memory.limit), y2: y(memory.limit) }),
      el("text", { x: width - 4, y: y(memory.limit) + 13, "text-anchor": "end" }, `limit ${bytes(memory.limit)}`),
    ];
  }
  function phases() {
    let start = 0;
    return memory.phases.flatMap(([name, length]) => {
      const middle = x(start + length / 2);
      const line = el("line", { class: "tick", x1: x(start), x2: x(start), y1: top, y2: height - bottom });
      start += length;
      return length < count / 20 ? [] : [line, el("text", { x: middle, y: height - 5, "text-anchor": "middle" }, name)];
    });
  }
  function show(next) {
    point = Math.max(0, Math.min(count - 1, next));
    for (const [name, value] of Object.entries({ x1: x(point), x2: x(point), y1: top, y2: height - bottom }))
      cursor.setAttribute(name, value);
    const node = memory.nodes[point];
    const sizes = names
      .map((name) => value(name, point) > 0 && `${name} ${bytes(value(name, point))}`)
      .filter(Boolean)
      .join(", ");
    moment.replaceChildren(
      el("b", {}, `${bytes(totals[point])} in the ${phaseOf(point)}`),
      point === highest ? " (the peak)" : "",
      ", ",
      el("code", {}, isNode(point) ? placeOf(node) : node),
      `: ${sizes}`,
    );
  }
  const isNode = (point) => typeof memory.nodes[point] === "number"; // the others are steps of the whole program
  const pointAt = (event) => Math.floor(((event.clientX - chart.getBoundingClientRect().left - left) / (width - left)) * count);
  chart.addEventListener("pointermove", (event) => show(pointAt(event)));
  chart.addEventListener("pointerleave", () => show(highest));
  chart.addEventListener("click", () => isNode(point) && reveal(memory.nodes[point]));
  chart.addEventListener("keydown", (event) => {
    const far = { ArrowLeft: -1, ArrowRight: 1, PageUp: -Math.ceil(count / 50), PageDown: Math.ceil(count / 50) }[event.key];
    if (far) show(point + far);
    else if (event.key === "Enter" && isNode(point)) reveal(memory.nodes[point]);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(draw).observe(chart);
  draw();
}
function niceStep(size) {
  const power = 10 ** Math.floor(Math.log10(size));
  return [1, 2, 5, 10].find((factor) => factor * power >= size) * power;
}

// -- the tree of modules --------------------------------------------------------------------------------------------------

const FEW = 4; // operators that cost nothing are put away from this many on
const MOST_ROWS = 150; // operators of one run that are drawn at once
let wanted = null; // which nodes the search wants: a prefix sum over nodes, or null for all
const wants = (start, stop) => !wanted || wanted[stop] > wanted[start];

/** Draws items into a parent. `shift`: from the first copy's nodes to those of the copy shown; `times`: how many are alike. */
function drawItems(parent, items, shift, times, path) {
  for (const item of items) {
    if (Array.isArray(item)) drawRuns(parent, item[0] + shift, item[1] + shift, times);
    else if (!wants(item.start + shift, item.start + shift + item.length * item.names.length)) continue;
    else if (item.length * item.names.length === 1) parent.append(drawOperator(item.start + shift, times, item.names[0]));
    else {
      parent.append(drawModule(item, shift, times, path));
    }
  }
}
/** Operators in a row; many that are made where they are wanted, at no price, are put away together. */
function drawRuns(parent, start, stop, times) {
  const free = (node) => data.step && !wanted && !kindOf(node).price && !kindOf(node).moves.length;
  for (let node = start; node < stop;) {
    let end = node + 1;
    while (end < stop && free(end) === free(node)) end += 1;
    if (free(node) && end - node >= FEW) parent.append(drawAside(node, end, times));
    else drawRun(parent, node, end, times);
    node = end;
  }
}
function drawAside(start, stop, times) {
  const inside = el("div", { class: "inside" });
  const made = el(
    "details",
    { toggle: () => made.open && made.show() },
    el(
      "summary",
      {},
      el(
        "span",
        { class: "label" },
        el(
          "span",
          { class: "soft" },
          `${stop - start} operators that every rank runs, at no price: `,
          [...new Set(Array.from({ length: stop - start }, (_, i) => kindOf(start + i).op))].join(", "),
        ),
      ),
    ),
    inside,
  );
  made.holds = (node) => node >= start && node < stop;
  made.show = () => {
    if (!inside.childElementCount) drawRun(inside, start, stop, times);
    made.open = true;
    return inside;
  };
  return made;
}
function drawRun(parent, start, stop, times) {
  let drawn = 0;
  for (let node = start; node < stop; node++) {
    if (!wants(node, node + 1)) continue;
    if (drawn++ >= MOST_ROWS) {
      const rest = node;
      parent.append(
        el(
          "button",
          {
            class: "more",
            type: "button",
            click: (event) => {
              const box = el("div");
              drawRun(box, rest, stop, times);
              event.currentTarget.replaceWith(...box.children);
            },
          },
          `${stop - node} more operators`,
        ),
      );
      return;
    }
    parent.append(drawOperator(node, times));
  }
}

function drawModule(item, shift, times, path) {
  const many = item.names.length;
  const start = item.start + shift;
  const cost = costOf(start, start + item.length * many).map((part) => part * times);
  const inside = el("div", { class: "inside" });
  let copy = 0;
  const redraw = () => {
    inside.replaceChildren();
    if (many > 1) inside.append(copySelect());
    drawItems(inside, item.items, shift + copy * item.length, times * many, join(path, item.names[copy]));
  };
  const copySelect = () =>
    el(
      "label",
      { class: "copies" },
      "shown is",
      el(
        "select",
        {
          change: (event) => {
            copy = event.target.selectedIndex;
            redraw();
          },
        },
        item.names.map((name, i) => el("option", { selected: i === copy && "" }, join(path, name))),
      ),
      data.step ? `; times are of all ${many * times} together` : "",
    );
  const name =
    many > 1
      ? [join(path, item.names[0]), " … ", join(path, item.names[many - 1])]
      : [path && el("span", { class: "soft" }, `${path}.`), item.names[0]];
  const made = el(
    "details",
    { toggle: () => made.open && !inside.childElementCount && redraw() },
    el(
      "summary",
      { class: heat(sum(cost)).trim() },
      el(
        "span",
        { class: "row" },
        el(
          "span",
          { class: "label" },
          el("span", { class: "module mono" }, name),
          " ",
          many > 1 ? el("span", { class: "badge alike" }, `${many} alike`) : "",
          " ",
          el("span", { class: "badge" }, `${item.length} ${item.length === 1 ? "operator" : "operators"}`),
        ),
        data.step ? numbers(cost) : [],
      ),
    ),
    inside,
  );
  made.show = (node) => {
    // opens the module at the copy that a node stands in
    const next = Math.floor((node - start) / item.length);
    if (next !== copy || !inside.childElementCount) {
      copy = next;
      redraw();
    }
    made.open = true;
    return inside;
  };
  made.holds = (node) => node >= start && node < start + item.length * many;
  if (wanted) made.show(firstWanted(start));
  return made;
}
const firstWanted = (node) => {
  while (!wants(node, node + 1)) node += 1;
  return node;
};

function drawOperator(node, times, module = "") {
  const kind = kindOf(node);
  const own = [...kind.cost];
  for (const move of [...kind.moves, ...kind.after]) own[move.parameter ? 3 : 2] -= move.seconds;
  const cost = own.map((part) => Math.max(0, part) * times);
  const reads = data.nodes.reads[node];
  const chips = kind.inputs.map(([tensor, layout, name], i) =>
    tensorChip({ node, text: `input ${i}`, value: valueOf(reads[i]).name }, tensor, layout, name),
  );
  const made = kind.outputs.map(([tensor, layout, computed], i) =>
    tensorChip({ node, text: kind.outputs.length > 1 ? `output ${i}` : "output" }, tensor, layout, "", computed),
  );
  return el(
    "div",
    { class: `operator${heat(sum(cost))}`, id: `node${node}`, "data-node": data.nodes.names[node] },
    data.step ? "" : kind.inputs.map(([, layout, name], i) => drawChange(valueOf(reads[i]), layout, name)),
    kind.moves.map((move) => drawMove(move, times, kind.inputs[move.of][2] || valueOf(reads[move.of]).name)),
    el(
      "div",
      { class: "row" },
      el(
        "span",
        {},
        module && el("span", { class: "mono" }, el("b", {}, module), " / "),
        el(
          "button",
          {
            class: "name mono",
            type: "button",
            click: (event) => select(event.currentTarget.closest(".operator"), () => showOperator(node)),
          },
          kind.op,
        ),
        " ",
        kind.args ? el("span", { class: "args mono" }, kind.args) : "",
        " ",
        kind.configured ? el("span", { class: "badge configured" }, "configured") : "",
      ),
      data.step ? numbers(cost) : [],
    ),
    el("div", { class: "tensors" }, chips, el("span", { class: "arrow" }, "→"), made),
    kind.own
      ? el(
          "div",
          { class: "move" },
          el(
            "span",
            { class: "chips", title: "collectives that the operator runs itself; its time has them" },
            el("span", { class: "soft" }, "its own"),
            kind.own[0].map(stepChip("forward")),
            kind.own[1].map(stepChip("backward")),
          ),
        )
      : "",
    kind.after.map((move) => drawMove(move, times, "output")),
  );
}

/** Where prices are missing: that a value is read in another layout than it is in. */
function drawChange(value, layout, name) {
  const [here, there] = [data.layouts[value.layout], data.layouts[layout]];
  return here.text === there.text && here.mesh === there.mesh
    ? ""
    : el("div", { class: "move soft" }, `⇄ ${name || value.name}: `, el("code", {}, `${here.text} → ${there.text}`));
}

/** A collective, `forward` or `backward`: what it is, the axes it runs over, bytes and seconds. */
const stepChip =
  (direction) =>
  ([kind, axes, size, time]) =>
    el(
      "span",
      {
        class: `step ${direction}`,
        title: `${direction}: ${kind} over ${axes.join(", ") || "all axes"}, a rank sends ${bytes(size)}`,
      },
      direction === "backward" ? "← " : "",
      kind,
      axes.map((axis) => axisTag(axis)),
      el("span", { class: "soft" }, bytes(size), " ", seconds(time)),
    );

/** A redistribution: what it does forward and backward, each collective a chip. */
function drawMove(move, times, name) {
  const cost = [0, 0, move.parameter ? 0 : move.seconds * times, move.parameter ? move.seconds * times : 0];
  return el(
    "div",
    { class: `move${heat(sum(cost))}` },
    el(
      "div",
      { class: "row" },
      el(
        "span",
        { class: "chips" },
        el("span", { class: "soft" }, "⇄ ", name),
        move.forward.map(stepChip("forward")),
        move.backward.map(stepChip("backward")),
        move.shared ? el("span", { class: "soft" }, "shared with an operator above") : "",
        move.bucket ? el("span", { class: "soft", title: "they begin together, so that each takes less" }, "in collectives shared with other parameters") : "",
        move.hidden ? el("span", { class: "soft", title: "behind computing; only the rest is counted" }, "partly hidden") : "",
      ),
      data.step ? numbers(cost) : [],
    ),
  );
}

function drawTree() {
  const tree = at("tree");
  tree.replaceChildren();
  drawItems(tree, data.tree, 0, 1, "");
  if (!wanted) {
    if (data.returned.length) {
      tree.append(
        el(
          "div",
          { class: "operator" },
          el("span", { class: "mono" }, "returned"),
          data.returned.map((move) => drawMove(move, 1, "output")),
        ),
      );
    }
    const modules = [...tree.children].filter((child) => child.show);
    const costs = new Map(
      modules
        .map((child) => [child, data.tree.find((item) => item.start !== undefined && child.holds(item.start))])
        .filter(([, item]) => item),
    );
    const hottest = modules.filter((child) => costs.has(child)).sort((a, b) => total(costs.get(b)) - total(costs.get(a)))[0];
    if (hottest) hottest.show(costs.get(hottest).start);
  }
}
const total = (item) =>
  sum(costOf(item.start, item.start + item.length * item.names.length)) || item.length * item.names.length;

/** Opens what a node stands in, and shows it. */
function reveal(node) {
  if (wanted && !wants(node, node + 1)) {
    at("search").value = "";
    search("");
  }
  let inside = at("tree");
  for (;;) {
    const next = [...inside.children].find((child) => child.holds && child.holds(node));
    if (!next) break;
    inside = next.show(node);
  }
  for (let more; !at(`node${node}`) && (more = inside.querySelector(":scope > .more"));) more.click();
  const row = at(`node${node}`);
  row.scrollIntoView({ block: "center" });
  row.querySelector(".name").focus({ preventScroll: true });
  select(row, () => showOperator(node));
}

let texts = null;
function search(query) {
  const words = query.trim().toLowerCase().split(/\s+/).filter(Boolean);
  wanted = null;
  at("found").replaceChildren();
  if (words.length) {
    texts ||= data.nodes.names.map((name, node) => `${modulePaths[node]} ${kindOf(node).op} ${name}`.toLowerCase());
    wanted = [0];
    texts.forEach((text, node) => wanted.push(wanted[node] + words.every((word) => text.includes(word))));
    const count = wanted[wanted.length - 1];
    at("found").append(`${count.toLocaleString("en")} of ${texts.length.toLocaleString("en")} operators match`);
  }
  drawTree();
}

// -- what is selected -----------------------------------------------------------------------------------------------------

let selected = null;
function deselect() {
  if (selected) {
    selected.classList.remove("selected");
    if (selected.matches(".tensor")) selected.setAttribute("aria-pressed", "false");
  }
  selected = null;
  at("inspector").classList.remove("shown");
}
function select(element, show) {
  deselect();
  selected = element;
  if (element.matches(".tensor")) element.setAttribute("aria-pressed", "true");
  else element.classList.add("selected");
  at("inspector").replaceChildren(
    el("button", { class: "close", type: "button", "aria-label": "close", click: deselect }, "×"),
    ...show(),
  );
  at("inspector").classList.add("shown");
  at("inspector").scrollTop = 0;
}
function factsOf(pairs) {
  return el(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, text]) => text !== "" && text !== undefined && text !== null)
      .flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]),
  );
}

function showOperator(node) {
  const kind = kindOf(node);
  const name = data.nodes.names[node];
  const [forward, backward, own, kept] = kind.price || [];
  const chip = ([tensor, layout, label], i) =>
    el(
      "div",
      { class: "tensors" },
      tensorChip(
        { node, text: `input ${i}`, value: valueOf(data.nodes.reads[node][i]).name },
        tensor,
        layout,
        label || valueOf(data.nodes.reads[node][i]).name,
      ),
    );
  return [
    el("h2", {}, placeOf(node)),
    factsOf([
      ["name", el("code", {}, name)],
      ["arguments", kind.args && el("code", {}, kind.args)],
      ["source", kind.source],
      ["forward", kind.price && seconds(forward)],
      ["backward", kind.price && seconds(backward)],
      ["its own collectives", own ? [seconds(own), kind.own ? `: ${moveText({ forward: kind.own[0], backward: kind.own[1] })}` : ""] : ""],
      ["kept for backward", kept ? bytes(kept) : ""],
    ]),
    kind.price ? el("p", { class: "soft" }, "of this one operator, on the busiest rank") : "",
    el("h3", {}, "reads"),
    ...kind.inputs.map(chip),
    el("h3", {}, "makes"),
    ...kind.outputs.map(([tensor, layout, computed], i) =>
      el("div", { class: "tensors" }, tensorChip({ node, text: `output ${i}` }, tensor, layout, "", computed)),
    ),
    ...kind.moves
      .concat(kind.after)
      .flatMap((move, i) => [
        i ? "" : el("h3", {}, "redistributes"),
        el(
          "p",
          {},
          el("code", {}, kind.after.includes(move) ? "output" : kind.inputs[move.of][2] || valueOf(data.nodes.reads[node][move.of]).name),
          ` ${data.layouts[move.from].text} → ${data.layouts[move.to].text}: ${moveText(move)}, `,
          `${bytes(sum([...move.forward, ...move.backward].map((step) => step[2])))}, ${seconds(move.seconds)}`,
          move.shared ? " (paid by an operator above)" : "",
        ),
      ]),
    el("h3", {}, "why, and what else it could do"),
    el("code", {}, `print(plan.explain("${name}"))`),
  ];
}

function showTensor(what, tensor, layoutIndex, computed) {
  const [shape, dtype, itemsize] = data.tensors[tensor];
  const layout = data.layouts[layoutIndex];
  const mesh = data.meshes[layout.mesh];
  const piece = largestPiece(layout, shape);
  const all = product(shape) * itemsize;
  const partial = (layout.partial || []).map(([axis, op]) => `${op} over ${mesh.axes[axis]}`).join(", ");
  const where = what.node === undefined ? what.text : `${placeOf(what.node)} · ${what.text}`;
  return [
    el("h2", {}, where),
    factsOf([
      ["value", what.value && el("code", {}, what.value)],
      ["tensor", el("code", {}, `${dtype} [${shape.join(", ")}]`)],
      ["whole", bytes(all)],
      ["layout", el("code", {}, layout.text)],
      ["computed as", computed !== layoutIndex ? el("code", {}, data.layouts[computed].text) : ""],
      ["a rank holds", `[${piece.join(", ")}] · ${bytes(product(piece) * itemsize)}`],
      ["pending", partial && `${partial}: ranks hold parts of a result, to be combined`],
    ]),
    ...drawPlacement(layout, shape, itemsize),
  ];
}

// -- which rank holds what ------------------------------------------------------------------------------------------------

const MOST_RANKS = 64; // of a device grid that shows every rank
const ROOMY = 32; // cells of a grid with room for slices

/** The tensor in pieces, the device grid in the same colours, and a question: what does this rank hold? */
function drawPlacement(layout, shape, itemsize) {
  const mesh = data.meshes[layout.mesh];
  const ranks = product(mesh.sizes);
  const splitting = [...new Set(layout.dims.flat())].sort((a, b) => a - b).filter((axis) => mesh.sizes[axis] > 1);
  const pieces = product(splitting.map((axis) => mesh.sizes[axis]));
  const roomy = Math.min(ranks, pieces === 1 || ranks > MOST_RANKS ? pieces : ranks) <= ROOMY;
  const colour = colours(layout, shape);
  const answer = el("p", {});
  const box = el("div");
  const light = (bounds) =>
    box
      .querySelectorAll("[data-slice]")
      .forEach((cell) => cell.classList.toggle("lit", covers(cell.dataset.slice.split(","), bounds.map(boundsText))));
  const say = (rank) => {
    const position = positionOf(mesh, rank);
    if (position < 0) {
      answer.replaceChildren(`no rank of this mesh; it has ${ranks}`);
      return;
    }
    const bounds = holds(layout, shape, rank);
    const coordinates = coordinatesOf(mesh, position);
    const local = localShape(bounds);
    answer.replaceChildren(
      el("code", { id: "slice" }, `[${bounds.map(boundsText).join(", ")}]`),
      ` · [${local.join(", ")}] · ${bytes(product(local) * itemsize)} · `,
      ...mesh.axes.map((name, a) => axisTag(name, `${name} ${coordinates[a]}`)).flatMap((tag) => [tag, " "]),
      `· ${copiesText(ranks, pieces)}`,
    );
    light(bounds);
  };
  const cell = (position, text) => {
    const rank = rankAt(mesh, position);
    const bounds = holds(layout, shape, rank);
    const empty = bounds.some(([start, stop]) => start === stop);
    const slice = bounds.map(boundsText);
    return el(
      "div",
      {
        class: empty ? "cell empty" : "cell",
        style: `background:${colour(bounds)}`,
        title: `rank ${rank}: [${slice.join(", ")}]`,
        "data-rank": rank,
        "data-slice": slice.join(","),
        pointerenter: () => {
          input.value = rank;
          say(rank);
        },
      },
      el("b", {}, text === undefined ? String(rank) : text),
      roomy ? shownDims(layout).map((dim) => el("span", {}, slice[dim])) : "",
    );
  };
  const input = el("input", {
    type: "number",
    min: 0,
    id: "rank",
    value: rankAt(mesh, 0),
    input: (event) => say(Number(event.target.value)),
  });
  box.append(
    ...drawTensor(layout, shape, colour),
    el("label", { class: "who" }, "rank", input, "holds"),
    answer,
    el("h3", {}, "device grid"),
    ...(ranks <= MOST_RANKS
      ? deviceGrid(
          mesh,
          mesh.sizes.map((_, a) => a),
          cell,
        )
      : pieces <= MOST_RANKS
        ? [
            el("p", { class: "soft" }, reducedText(mesh, splitting, ranks / pieces)),
            ...deviceGrid(mesh, splitting, cell, ranks / pieces),
          ]
        : strips(layout, shape, splitting, ranks / pieces)),
  );
  setTimeout(() => say(Number(input.value)));
  return [box];
}
const copiesText = (ranks, pieces) =>
  ranks > pieces ? `the same as ${ranks / pieces - 1} other ${ranks / pieces > 2 ? "ranks" : "rank"}` : "no other rank has it";
const covers = (shown, held) => shown.length === held.length && shown.every((text, i) => text === "*" || text === held[i]);

/** The dims that cells and the picture show: up to two, split ones first. */
function shownDims(layout) {
  const order = layout.dims.map((_, dim) => dim).sort((a, b) => !layout.dims[a].length - !layout.dims[b].length || a - b);
  return order.slice(0, 2).sort((a, b) => a - b);
}

/** A colour for each piece: the hue along the dim with most pieces, the lightness along all others. */
function colours(layout, shape) {
  const { sizes } = data.meshes[layout.mesh];
  const counts = shape.map((_, dim) => product(layout.dims[dim].map((axis) => sizes[axis])));
  const order = counts.map((_, dim) => dim).sort((a, b) => counts[b] - counts[a]);
  const index = ([start], dim) => {
    const explicit = layout.sizes && layout.sizes[dim];
    return explicit
      ? explicit.findIndex((_, i) => sum(explicit.slice(0, i + 1)) > start)
      : Math.floor((start * counts[dim]) / Math.max(1, shape[dim]));
  };
  return (bounds) => {
    if (!bounds.length) return "hsl(209 65% 82%)";
    const hue = (209 + (360 * index(bounds[order[0]], order[0])) / counts[order[0]]) % 360;
    const others = order
      .slice(1)
      .reduce(([at, of], dim) => [at * counts[dim] + index(bounds[dim], dim), of * counts[dim]], [0, 1]);
    return `hsl(${hue.toFixed(0)} 65% ${(84 - (26 * others[0]) / others[1]).toFixed(0)}%)`;
  };
}

/** The tensor as a picture, of the dims that are shown; `*` stands in a slice for dims that are not. */
function drawTensor(layout, shape, colour) {
  const dims = shownDims(layout);
  if (!dims.length || shape.includes(0)) return [];
  const cuts = dims.map((dim) => piecesOf(layout, dim, shape[dim]));
  if (cuts.some((list) => list.length > 256))
    return [el("p", { class: "soft" }, `cut into ${cuts.map((list) => list.length).join(" × ")} pieces`)];
  const [rows, columns] = dims.length === 2 ? cuts : [[[0, 1]], cuts[0]];
  const width = 360,
    height = dims.length === 2 ? 130 : 34,
    left = 46,
    top = 4;
  const [down, across] = dims.length === 2 ? dims.map((dim) => shape[dim]) : [1, shape[dims[0]]];
  const picture = el("svg", {
    class: cuts.some((list) => list.length > 32) ? "picture fine" : "picture",
    viewBox: `0 0 ${width + left + 4} ${height + top + 18}`,
    role: "img",
    "aria-label": "the tensor in pieces",
  });
  for (const row of rows)
    for (const column of columns) {
      const bounds = shape.map((size) => [0, size]);
      dims.forEach((dim, i) => {
        bounds[dim] = dims.length === 2 ? [row, column][i] : column;
      });
      const slice = bounds.map((pair, dim) => (dims.includes(dim) || !layout.dims[dim].length ? boundsText(pair) : "*"));
      picture.append(
        el("rect", {
          x: left + (width * column[0]) / across,
          y: top + (height * row[0]) / down,
          width: (width * (column[1] - column[0])) / across,
          height: (height * (row[1] - row[0])) / down,
          "data-slice": slice.join(","),
          style: `fill:${colour(bounds)}`,
        }),
      );
    }
  const label = (x, y, anchor, text) => el("text", { x, y, "text-anchor": anchor }, text);
  picture.append(
    label(left, height + top + 13, "start", "0"),
    label(left + width, height + top + 13, "end", String(across)),
    label(left + width / 2, height + top + 13, "middle", `dim ${dims[dims.length - 1]}`),
  );
  if (dims.length === 2)
    picture.append(
      label(left - 5, top + 10, "end", "0"),
      label(left - 5, top + height, "end", String(down)),
      label(left - 5, top + height / 2 + 4, "end", `dim ${dims[0]}`),
    );
  const hidden = layout.dims.map((axes, dim) => axes.length && !dims.includes(dim) && `dim ${dim}`).filter(Boolean);
  return [picture, hidden.length ? el("p", { class: "soft" }, `${hidden.join(" and ")} split too, not drawn`) : ""];
}
function piecesOf(layout, dim, size) {
  const { sizes } = data.meshes[layout.mesh];
  const axes = layout.dims[dim];
  const count = product(axes.map((axis) => sizes[axis]));
  if (count > 256) return new Array(count);
  return Array.from({ length: count }, (_, index) => {
    const coordinates = [];
    for (const axis of [...axes].reverse()) {
      coordinates[axis] = index % sizes[axis];
      index = Math.floor(index / sizes[axis]);
    }
    return boundsOfDim(layout, dim, size, coordinates);
  });
}

/** Cells over some axes of a mesh: the last one runs to the right, the one before it down, all others make blocks. */
function deviceGrid(mesh, axes, cell, copies = 1) {
  const sizes = axes.map((axis) => mesh.sizes[axis]);
  const strides = axes.map((axis) => product(mesh.sizes.slice(axis + 1)));
  const inner = Math.max(0, axes.length - 2);
  const names = axes.map((axis) => mesh.axes[axis]);
  const across = sizes[axes.length - 1] || 1;
  const blocks = Array.from({ length: product(sizes.slice(0, inner)) }, (_, block) => {
    const coordinates = coordinatesOf({ sizes: sizes.slice(0, inner) }, block);
    const cells = Array.from({ length: product(sizes.slice(inner)) }, (_, i) => {
      const all = [...coordinates, ...coordinatesOf({ sizes: sizes.slice(inner) }, i)];
      const position = sum(all.map((coordinate, a) => coordinate * strides[a]));
      return cell(position, copies > 1 ? `${rankAt(mesh, position)} …` : undefined);
    });
    return el(
      "div",
      { class: "block" },
      inner
        ? el(
            "div",
            { class: "soft" },
            coordinates.flatMap((c, a) => [axisTag(names[a], `${names[a]} ${c}`), " "]),
          )
        : "",
      el(
        "div",
        {
          class: "grid",
          style: `grid-template-columns:repeat(${across},minmax(${across > 8 || !cells[0].querySelector("span") ? 20 : 42}px,1fr))`,
        },
        cells,
      ),
    );
  });
  const legend = axes.length
    ? el(
        "p",
        { class: "soft" },
        axes.length > 1 ? [axisTag(names[inner]), " down, "] : "",
        axisTag(names[names.length - 1]),
        " to the right",
      )
    : "";
  const room = Math.max(1, Math.floor(13 / across)); // blocks that fit beside each other
  const beside = [...Array(room).keys()].map((i) => room - i).find((n) => blocks.length % n === 0);
  return [legend, el("div", { class: "blocks", style: `grid-template-columns:repeat(${beside},auto)` }, blocks)];
}
function reducedText(mesh, splitting, copies) {
  const idle = mesh.axes.filter((_, a) => !splitting.includes(a) && mesh.sizes[a] > 1);
  return idle.length
    ? `one cell a piece; ${copies.toLocaleString("en")} ranks hold each, along ${idle.join(", ")}`
    : "one cell a piece";
}

/** For a grid that is too large: what each coordinate of an axis means, the axes above it at 0. */
function strips(layout, shape, splitting, copies) {
  const mesh = data.meshes[layout.mesh];
  const found = [
    el(
      "p",
      { class: "soft" },
      `${product(mesh.sizes).toLocaleString("en")} ranks: along each axis, the slice at each index, the axes that cut before it at 0; `,
      copies > 1 ? `${copies.toLocaleString("en")} ranks hold each piece` : "each rank holds another piece",
    ),
  ];
  for (const axis of splitting) {
    const dim = layout.dims.findIndex((axes) => axes.includes(axis));
    const depth = layout.dims[dim].indexOf(axis) + 1;
    const size = mesh.sizes[axis];
    const shown = size <= 8 ? [...Array(size).keys()] : [0, 1, 2, 3, 4, -1, size - 1];
    found.push(
      el("p", {}, axisTag(mesh.axes[axis], `${mesh.axes[axis]} = ${size}`), ` cuts dim ${dim}`),
      el(
        "div",
        { class: "strip" },
        shown.map((index) => {
          if (index < 0) return el("div", { class: "cell empty" }, "…");
          const coordinates = mesh.sizes.map(() => 0);
          coordinates[axis] = index;
          const [start, stop] = boundsOfDim(layout, dim, shape[dim], coordinates, depth);
          return el(
            "div",
            {
              class: "cell",
              style: `background:hsl(${(209 + (360 * index) / size).toFixed(0)} 65% 82%)`,
              "data-axis": mesh.axes[axis],
              "data-index": index,
            },
            el("b", {}, String(index)),
            el("span", {}, String(start)),
            el("span", {}, `:${stop}`),
          );
        }),
      ),
    );
  }
  return found;
}

// -- parameters -----------------------------------------------------------------------------------------------------------

const COLUMNS = [
  ["name", (row) => row.name],
  ["count", (row) => row.inputs.length],
  ["stored as", (row) => data.layouts[row.layout].text],
  ["whole", (row) => row.inputs.length * product(data.tensors[row.tensor][0]) * data.tensors[row.tensor][2]],
  ["a rank holds", (row) => row.inputs.length * pieceBytes([row.tensor, row.layout])],
  ["with state", (row) => row.inputs.length * (row.state || 0)],
  ["moves", (row) => row.inputs.length * (row.moves || 0)],
  ["update", (row) => row.inputs.length * (row.update || 0)],
];
function drawParameters() {
  const columns = data.step ? COLUMNS : COLUMNS.slice(0, 5);
  let order = [4, -1];
  const body = el("tbody");
  const heads = columns.map(([name], column) =>
    el(
      "th",
      { scope: "col", class: column === 0 || column === 2 ? "" : "number" },
      el(
        "button",
        {
          type: "button",
          click: () => {
            order = [column, order[0] === column ? -order[1] : column === 0 || column === 2 ? 1 : -1];
            fill();
          },
        },
        name,
      ),
    ),
  );
  function fill() {
    const [column, direction] = order;
    const key = columns[column][1];
    const rows = [...data.parameters].sort((a, b) => direction * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
    body.replaceChildren(
      ...rows.map((row) =>
        el(
          "tr",
          {},
          columns.map(([name, value], column) => {
            if (column === 0) return el("td", { class: "mono" }, rangeText(row));
            if (column === 1) return el("td", { class: "number" }, String(value(row)));
            if (column === 2) return el("td", {}, tensorChip({ text: rangeText(row) }, row.tensor, row.layout, ""));
            return el("td", { class: "number" }, column < 6 ? bytes(value(row)) : value(row) ? seconds(value(row)) : "");
          }),
        ),
      ),
    );
    heads.forEach((head, i) =>
      head.setAttribute("aria-sort", i !== column ? "none" : direction > 0 ? "ascending" : "descending"),
    );
  }
  fill();
  const totals = columns.map(([, value], column) =>
    column === 0
      ? el("td", {}, "all")
      : column === 2
        ? el("td")
        : el(
            "td",
            { class: "number" },
            column === 1
              ? String(sum(data.parameters.map(value)))
              : (column < 6 ? bytes : seconds)(sum(data.parameters.map(value))),
          ),
  );
  at("parameters").append(
    el(
      "div",
      { class: "scroll" },
      el("table", {}, el("thead", {}, el("tr", {}, heads)), body, el("tfoot", {}, el("tr", {}, totals))),
    ),
  );
}
/** blocks.*.norm of several layers as blocks.{0…31}.norm */
function rangeText(row) {
  if (row.inputs.length === 1 || !row.name.includes("*")) return data.inputs[row.inputs[0]][0];
  const number = (input) => data.inputs[input][0].split(".")[row.name.split(".").indexOf("*")];
  return row.name.replace("*", `{${number(row.inputs[0])}…${number(row.inputs[row.inputs.length - 1])}}`);
}

// -- all of it ------------------------------------------------------------------------------------------------------------

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
