// The prefix tree of the batch: columns from left to right, sequences from top to bottom.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function drawTree(panel, graph) {
  panel.replaceChildren();
  if (!graph.tree.length) {
    panel.append(make("p", { class: "quiet" }, "No call of this graph was planned, so there is no prefix tree."));
    return;
  }
  const columns = Math.max(...graph.tree.map((edge) => edge[1]));
  const sequences = Math.max(...graph.tree.map((edge) => edge[2] + edge[3]));
  const width = 1000, top = 22;
  const row = Math.max(2, Math.min(24, 640 / sequences));
  const height = top + sequences * row;
  const caption = make("p", { "aria-live": "polite" });
  const summary = `${sequences} sequences, ${graph.rows.toLocaleString("en")} rows, ${graph.nodes.toLocaleString("en")} nodes. ` +
    "Each bar is a run of tokens; its height is the number of sequences that share it.";
  caption.textContent = summary;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary });
  const ticks = 8;
  for (let i = 0; i <= ticks; i++) {
    const x = (width * i) / ticks;
    drawing.append(svg("text", { x: i === ticks ? x - 2 : x + 2, y: 14, "text-anchor": i === ticks ? "end" : "start" }, String(Math.round((columns * i) / ticks))));
  }
  graph.tree.forEach(([start, stop, first, count], i) => {
    const about = `columns ${start} to ${stop - 1} (${stop - start} tokens), ${count === 1 ? "one sequence" : count + " sequences"}` +
      (graph.ids[i] && graph.ids[i].length ? `, ids ${graph.ids[i].join(" ")}${stop - start > graph.ids[i].length ? " ..." : ""}` : "");
    const bar = svg("rect", {
      x: (width * start) / columns, y: top + first * row, width: Math.max(0.5, (width * (stop - start)) / columns), height: count * row,
      "stroke-width": row > 4 ? 1 : 0.3, class: count > 1 ? "shared" : "", tabindex: count > 1 ? "0" : "-1",
    }, svg("title", {}, about));
    bar.addEventListener("mouseenter", () => { caption.textContent = about; });
    bar.addEventListener("focus", () => { caption.textContent = about; });
    bar.addEventListener("mouseleave", () => { caption.textContent = summary; });
    drawing.append(bar);
  });
  panel.append(caption, drawing);
}
