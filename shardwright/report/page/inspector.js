// The panel at the side: the operator or tensor that is selected, and which rank holds which slice.

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
