// The page: the selected graph, tab and node; search and keys.

const $ = (selector) => document.querySelector(selector);

class Page {
  constructor() {
    this.chosen = null;
    this.looked = null;
    this.hits = [];
    this.hit = -1;
    const select = $("#graphs select");
    data.graphs.forEach((_, i) => select.append(make("option", { value: i }, String(i))));
    $("#graphs").hidden = data.graphs.length < 2;
    select.addEventListener("change", () => this.open(Number(select.value)));
    for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => this.tab(tab.dataset.tab));
    $("#search").addEventListener("input", () => this.search($("#search").value));
    $("#next").addEventListener("click", () => this.step(1));
    $("#previous").addEventListener("click", () => this.step(-1));
    $("#theme").addEventListener("click", () => this.theme());
    $("#help").addEventListener("click", () => $("#keys").showModal());
    document.addEventListener("keydown", (event) => this.key(event));
    if (data.graphs.length) this.open(0);
    else $("#heading").textContent = "Nothing was captured.";
  }

  open(number) {
    this.graph = graphOf(data.graphs[number]);
    this.chosen = this.looked = this.current = null;
    $("#heading").textContent = this.graph.heading;
    this.blocks = this.graph.blocks.map((block) => new BlockView(this, block)).filter((view) => view.layers[0].length);
    $("#blocks").replaceChildren(...this.blocks.map((view) => view.element));
    if (this.blocks.length === 1) this.blocks[0].toggle(true);
    this.refusals();
    drawTree($("#tree"), this.graph);
    this.describe(null);
    this.search($("#search").value);
  }

  tab(name) {
    for (const tab of document.querySelectorAll("[role=tab]")) tab.setAttribute("aria-selected", String(tab.dataset.tab === name));
    for (const panel of document.querySelectorAll("[role=tabpanel]")) panel.hidden = panel.id !== name;
  }

  theme() {
    const dark = document.documentElement.dataset.theme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  }

  // ------------------------------------------------------------------------------------------------------ nodes

  /** Select a node: scroll to it and show its details. */
  choose(node) {
    this.chosen = node;
    this.reveal(node);
    this.describe(node);
    this.paint();
  }

  letGo() {
    this.chosen = null;
    this.describe(null);
    this.paint();
  }

  reveal(node) {
    for (const view of this.blocks) {
      const layer = view.find(node);
      if (layer < 0) continue;
      if (view.layer !== layer) view.show(layer);
      view.toggle(true);
      const cell = this.cell(node);
      this.mark(cell.closest(".row"));
      this.tab("graph");
      cell.closest(".row").scrollIntoView({ block: "nearest" });
      return;
    }
  }

  cell(node) {
    return $(`[data-node="${node.side}:${node.number}"]`);
  }

  look(node) {
    this.looked = node;
    if (!this.chosen) this.describe(node);
    this.paint();
  }

  /** Highlight the inputs and users of the node, and its counterparts on the other side. */
  paint() {
    for (const cell of document.querySelectorAll(".near, .chosen, .hit")) cell.classList.remove("near", "chosen", "hit");
    for (const node of this.hits) this.cell(node)?.classList.add("hit");
    const node = this.chosen || this.looked;
    if (!node) return;
    const other = node.side === "before" ? "after" : "before";
    const near = [...node.inputs, ...node.users].map((number) => ({ side: node.side, number }));
    near.push(...node.twins.map((number) => ({ side: other, number })));
    for (const neighbour of near) this.cell(neighbour)?.classList.add("near");
    if (this.chosen) this.cell(this.chosen)?.classList.add("chosen");
  }

  describe(node) {
    const panel = $("#details");
    panel.classList.toggle("idle", !node);
    if (!node) {
      panel.replaceChildren(make("p", { class: "quiet" }, "Point at a node to see its details; click to keep them."));
      return;
    }
    const list = make("dl");
    const say = (name, ...values) => { if (values.some((value) => value !== "")) list.append(make("dt", {}, name), make("dd", {}, ...values)); };
    say("name", node.name);
    say("module", node.module);
    say("source", node.source && make("code", {}, node.source));
    say("shape", `${node.shape} ${node.dtype}`.trim());
    say("size", node.bytes ? inBytes(node.bytes) : "");
    say("moved", node.moved ? `${inBytes(node.moved)} between rows and nodes` : "");
    say("form", { compact: "compact: once per node", full: "full: once per row", boundary: "boundary: converts between rows and nodes", either: "either: in the form that its readers need" }[node.form] || "");
    const annotated = node.value || !node.twins.length || node.side === "before" ? node : this.graph.before[node.twins[0]];
    say("value", annotated.value);
    say("rule", annotated.rule);
    say("reason", annotated.reason);
    say("arguments", node.arguments);
    say("reads", this.links(node.side, node.inputs));
    say("read by", this.links(node.side, node.users));
    const other = node.side === "before" ? "after" : "before";
    say(node.side === "before" ? "became" : "was", this.links(other, node.twins));
    const close = make("button", { class: "close", "aria-label": "Deselect the node", onclick: () => this.letGo() }, "\u00d7");
    panel.replaceChildren(make("h2", {}, `${node.op} (${node.side})`), close, list);
  }

  links(side, numbers) {
    if (!numbers.length) return "";
    const go = (number) => make("button", { "data-link": `${side}:${number}`, onclick: () => this.choose(this.graph[side][number]) }, this.graph[side][number].name);
    return make("span", { class: "links" }, ...numbers.slice(0, 40).map(go), numbers.length > 40 ? ` and ${numbers.length - 40} more` : "");
  }

  // --------------------------------------------------------------------------------------------------- refusals

  refusals() {
    const { refusals, attentions, notes, folded, heading, advice } = this.graph;
    $("[data-tab=refusals] .count").textContent = refusals.length ? `(${refusals.length})` : "";
    const panel = $("#refusals");
    panel.replaceChildren(make("p", {}, folded ? "" : heading), make("p", { class: "quiet" }, advice));
    if (!refusals.length) panel.append(make("div", { class: "refusal good" }, "No refusals."));
    for (const refusal of refusals) {
      const node = this.graph.before.find((candidate) => candidate.name === refusal.node);
      const box = make("div", { class: "refusal" }, make("strong", {}, refusal.reason),
        make("p", {}, `${refusal.op}${refusal.module ? " in " + refusal.module : ""}`),
        make("p", { class: "source" }, refusal.source), make("p", { class: "quiet" }, refusal.advice));
      if (node) box.append(make("button", { onclick: () => this.choose(node) }, "Show in the graph"));
      panel.append(box);
    }
    for (const attention of attentions)
      panel.append(make("div", { class: attention.causal && !attention.full_form ? "refusal good" : "refusal" },
        make("strong", {}, `attention in ${attention.module || "the model"}`), make("p", {}, attention.status), make("p", { class: "source" }, attention.source)));
    for (const note of notes) panel.append(make("p", { class: "quiet" }, note));
  }

  // ----------------------------------------------------------------------------------------------------- search

  search(text) {
    const query = text.trim().toLowerCase();
    this.hits = [];
    if (query) {
      for (const side of ["before", "after"])
        for (const node of this.graph[side])
          if (!RESIDENT.has(node.op) && [node.name, node.op, node.module, node.source].some((field) => field.toLowerCase().includes(query))) this.hits.push(node);
    }
    this.hit = -1;
    $("#found").textContent = query ? String(this.hits.length) : "";
    this.paint();
  }

  step(by) {
    if (!this.hits.length) return;
    this.hit = (this.hit + by + this.hits.length) % this.hits.length;
    $("#found").textContent = `${this.hit + 1}/${this.hits.length}`;
    this.choose(this.hits[this.hit]);
  }

  // ------------------------------------------------------------------------------------------------------- keys

  /** The elements that the arrow keys walk through: layer headings, and the rows of open layers. */
  places() {
    return [...document.querySelectorAll("#blocks .block > button, #blocks .row")].filter((element) => element.offsetParent !== null);
  }

  mark(place) {
    this.current?.classList.remove("current");
    this.current = place;
    place.classList.add("current");
  }

  walk(by) {
    const places = this.places();
    const at = places.indexOf(this.current);
    const place = places[Math.max(0, Math.min(places.length - 1, at < 0 ? 0 : at + by))];
    if (!place) return;
    this.mark(place);
    place.scrollIntoView({ block: "nearest" });
    if (place.matches("button")) place.focus();
    else { document.activeElement.blur(); this.hold(place); }
  }

  hold(row) {
    const cells = row.querySelectorAll("[data-node]");
    const [side, number] = cells[cells.length - 1].dataset.node.split(":");
    this.chosen = this.graph[side][Number(number)];
    this.describe(this.chosen);
    this.paint();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("#keys").open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Enter" && event.target.id === "search") this.step(event.shiftKey ? -1 : 1);
      else if (event.key === "Escape") event.target.blur();
      return;
    }
    const tabs = { 1: "graph", 2: "refusals", 3: "tree" };
    const actions = {
      j: () => this.walk(1), ArrowDown: () => this.walk(1), k: () => this.walk(-1), ArrowUp: () => this.walk(-1),
      "/": () => $("#search").focus(), n: () => this.step(1), N: () => this.step(-1), t: () => this.theme(),
      o: () => { const open = this.blocks.some((view) => view.body.hidden); this.blocks.forEach((view) => view.toggle(open)); },
      "?": () => $("#keys").showModal(),
      Escape: () => this.letGo(),
    };
    const action = actions[event.key] || (tabs[event.key] && (() => this.tab(tabs[event.key])));
    if (!action) return;
    event.preventDefault();
    action();
  }
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const page = new Page();
// The rows of a layer are created when it is first opened. In print all layers are open.
addEventListener("beforeprint", () => page.blocks?.forEach((view) => view.body.hasChildNodes() || view.fill()));
