// Turns the page's data, which is lists of numbers, into nodes and graphs, and shows the blocks of a graph.

const data = JSON.parse(document.getElementById("data").textContent);
const RESIDENT = new Set(["placeholder", "get_attr", "output"]);

/** A node, with its users and its counterparts ("twins") on the other side. */
function nodeOf(entry, number, side) {
  const node = { number, side, name: entry[0], inputs: entry[1], bytes: entry[2], moved: entry[3], users: [], twins: [] };
  data.fields.forEach((field, i) => { node[field] = data.strings[entry[4 + i]]; });
  return node;
}

function graphOf(raw) {
  const graph = { ...raw, before: raw.before.map((e, i) => nodeOf(e, i, "before")), after: raw.after.map((e, i) => nodeOf(e, i, "after")) };
  for (const side of [graph.before, graph.after])
    for (const node of side) for (const input of node.inputs) side[input].users.push(node.number);
  const origins = new Map(graph.before.map((node) => [node.name, node]));
  for (const node of graph.after) {
    const origin = origins.get(node.origin || node.name);
    if (origin && (node.origin || RESIDENT.has(node.op))) { origin.twins.push(node.number); node.twins.push(origin.number); }
  }
  return graph;
}

/** The CSS class that colours a node. */
function formOf(node, kind) {
  if (kind === "-") return "removed";
  if (node.op === "tree_attention") return "attention";
  if (RESIDENT.has(node.op)) return "input";
  return node.form === "compact" || node.form === "boundary" ? node.form : "full";
}

function inBytes(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024 || unit === "GiB") return (unit === "B" ? count : count.toFixed(1)) + " " + unit;
    count /= 1024;
  }
}

/** Whether a line is shown: inputs and weights are not, unless they were added. */
function isShown([kind, before, after], graph) {
  const node = after >= 0 ? graph.after[after] : graph.before[before];
  return !RESIDENT.has(node.op) || kind === "+";
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** The module of a node within its layer. */
function within(module) {
  const match = /^(?:(?:.*?)\.)?\d+(?=\.|$)/.exec(module);
  return match ? module.slice(match[0].length).replace(/^\./, "") : module;
}

class BlockView {
  /** One layer, or several equal ones. Rows are created when it is opened, so that long pages load fast. */
  constructor(page, block) {
    this.page = page;
    this.layers = block.layers.map((lines) => lines.filter((line) => isShown(line, page.graph)));
    this.block = block;
    this.layer = 0;
    const count = this.layers.length;
    const lines = this.layers[0];
    this.button = make("button", { "aria-expanded": "false", onclick: () => this.toggle() },
      make("span", { class: "name" }, block.numbers.length ? block.title.replace(/ \(.*/, "") : "outside layers"));
    if (count > 1) this.button.append(make("span", { class: "badge" }, `${count} equal layers`));
    this.button.append(make("span", { class: "counts" }, this.counts(lines)), this.strip(lines));
    this.body = make("div", { hidden: "" });
    this.element = make("div", { class: "block" }, this.button, this.body);
  }

  counts(lines) {
    const counts = { "~": 0, "+": 0, "-": 0, " ": 0 };
    for (const [kind] of lines) counts[kind] += 1;
    const labels = { "~": "once per node", "+": "added", "-": "removed", " ": "unchanged" };
    return Object.keys(labels).filter((kind) => counts[kind]).map((kind) => `${counts[kind]} ${labels[kind]}`).join(", ");
  }

  strip(lines) {
    const strip = make("span", { class: "strip", "aria-hidden": "true" });
    for (const line of lines) strip.append(make("i", { class: this.lineForm(line), style: "flex:1" }));
    return strip;
  }

  lineForm([kind, before, after]) {
    const graph = this.page.graph;
    return formOf(after >= 0 ? graph.after[after] : graph.before[before], kind);
  }

  toggle(open = this.body.hidden) {
    if (open && !this.body.hasChildNodes()) this.fill();
    this.body.hidden = !open;
    this.element.classList.toggle("open", open);
    this.button.setAttribute("aria-expanded", String(open));
  }

  show(layer) {
    this.layer = layer;
    this.body.replaceChildren();
    this.fill();
    this.toggle(true);
  }

  fill() {
    if (this.layers.length > 1) {
      const numbers = this.block.numbers.map((number, i) =>
        make("button", { "aria-pressed": String(i === this.layer), onclick: () => this.show(i) }, String(number)));
      this.body.append(make("div", { class: "numbers" }, make("span", { class: "quiet" }, "layer"), ...numbers));
    }
    const lines = make("div", { class: "lines" });
    let module = null;
    for (const line of this.layers[this.layer]) {
      const { before, after } = this.nodes(line);
      const here = within((after && after.module) || (before && before.module) || "");
      if (here !== module) lines.append(make("div", { class: "module" }, here || "\u00a0"));
      module = here;
      lines.append(this.row(line[0], before, after));
    }
    this.body.append(lines);
    this.page.paint();
  }

  nodes([, before, after]) {
    const graph = this.page.graph;
    return { before: graph.before[before], after: graph.after[after] };
  }

  row(kind, before, after) {
    const row = make("div", { class: before && after ? "row both" : "row", "data-kind": kind });
    row.append(this.cell(before, kind === "-" ? "removed" : "full"), this.cell(after, after && formOf(after, kind)));
    return row;
  }

  cell(node, form) {
    if (!node) return make("span", { class: "cell empty" });
    const moved = node.moved ? ` \u00b7 ${inBytes(node.moved)} moved` : "";
    const cell = make("button", {
      class: `cell ${form}`, tabindex: "-1", "data-node": `${node.side}:${node.number}`,
      onclick: () => this.page.choose(node), onmouseenter: () => this.page.look(node), onmouseleave: () => this.page.look(null),
    }, make("b", {}, node.op), make("span", {}, `${node.shape} ${node.dtype}${moved}`));
    return cell;
  }

  find(node) {
    return this.layers.findIndex((lines) => lines.some((line) => line[node.side === "before" ? 1 : 2] === node.number));
  }
}
