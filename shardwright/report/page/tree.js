// The tree of modules with their operators, and the search in it.

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
