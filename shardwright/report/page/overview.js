// The header, where the time goes, the memory over time, and the table of parameters.

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
