// Colours the spots of a Bokeh plot by what the page's data holds. Names go into the page as text
// only. Lengths are those of the plot: micrometres, or pixels where the scale is not known.
"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  await Bokeh.embed.embed_item(JSON.parse($("item").textContent), "plot");
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const [plot, spots, source, glyph, mapper] = ["plot", "spots", "source", "glyph", "mapper"].map(model);

  // --- values -----------------------------------------------------------------------------------
  const MISSING = 65535;
  const decoded = new Map();
  function steps(text) {
    if (!decoded.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      decoded.set(text, Uint16Array.from({length: bytes.length / 2}, (_, i) => view.getUint16(2 * i, true)));
    }
    return decoded.get(text);
  }
  const number = (part, i) => {
    const step = steps(part.steps)[i];
    return step === MISSING ? NaN : part.low + step * part.step;
  };
  const of = {
    measured: (gene, i) => number(gene.measured, i),
    predicted: (gene, i) => number(gene.predicted, i),
    difference: (gene, i) => number(gene.predicted, i) - number(gene.measured, i),
  };
  const said = (value) => (Number.isNaN(value) ? "none" : value.toFixed(2));

  // --- colours ----------------------------------------------------------------------------------
  const count = data.barcodes.length;
  function paint(value, palette, low, high) {
    mapper.setv({palette, low, high});
    source.data = {...source.data, value: Float32Array.from({length: count}, (_, i) => value(i))};
    spots.visible = true;
  }
  function showGroups(layer) {
    const codes = steps(layer.codes);
    paint((i) => (codes[i] === MISSING ? NaN : codes[i]), layer.colors.length ? layer.colors : ["#000000"],
      -0.5, Math.max(layer.colors.length, 1) - 0.5);
    const rows = layer.names.map((name, i) => [name, layer.colors[i], layer.counts[i]]);
    if (layer.none) rows.push(["none", data.grey, layer.none]);
    $("key").replaceChildren(...rows.map(([name, color, n]) => {
      const [item, dot, share] = ["li", "i", "span"].map((tag) => document.createElement(tag));
      dot.style.background = color;
      share.textContent = `${Math.round((100 * n) / count)}%`;
      item.append(dot, name, share);
      return item;
    }));
    legend(layer.title, true);
  }
  function showGene(gene, kind) {
    const [low, high] = gene.scales[kind];
    const ramp = data.ramps[kind === "difference" ? "difference" : "value"];
    paint((i) => of[kind](gene, i), ramp, low, high);
    $("ramp").style.background = `linear-gradient(90deg, ${ramp.filter((_, i) => i % 15 === 0).join(", ")})`;
    $("low").textContent = said(low);
    $("high").textContent = said(high);
    legend(kind === "difference" ? `${gene.name}, predicted − measured` : `${gene.name}, ${kind}`, false);
  }
  function legend(title, groups) {
    $("legend").hidden = false;
    $("legend-title").textContent = title;
    $("key").hidden = !groups;
    $("scale").hidden = groups;
  }

  // --- what is chosen ---------------------------------------------------------------------------
  let gene = data.genes[0];
  let kind = "measured";
  let layer = null;
  const KINDS = ["measured", "predicted", "difference"];
  function radio(name, text, checked, change) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), {type: "radio", name, checked, value: text});
    input.addEventListener("change", change);
    label.append(input);
    return label;
  }
  function choose(next) {
    layer = next;
    $("gene-choice").hidden = layer !== "gene";
    if (layer === "gene") return chooseGene();
    if (layer) return showGroups(layer);
    spots.visible = false;
    $("legend").hidden = true;
  }
  function chooseGene() {
    if (!(kind in gene.scales)) kind = KINDS.find((name) => name in gene.scales);
    for (const input of $("kinds").querySelectorAll("input")) {
      input.disabled = !(input.value in gene.scales);
      input.checked = input.value === kind;
    }
    showGene(gene, kind);
  }
  function listGenes() {
    const part = $("search").value.trim().toLowerCase();
    const found = data.genes.filter((g) => g.name.toLowerCase().includes(part));
    $("gene").replaceChildren(...found.map((g) => new Option(g.name, g.name, false, g === gene)));
    return found;
  }
  function offer(title, value, checked) {
    const label = radio("layer", title, checked, () => choose(value));
    label.className = "choice";
    label.append(title);
    $("layers").append(label);
  }
  const choices = data.groups.map((group) => [group.title, group]);
  if (data.genes.length) choices.push(["Genes", "gene"]);
  if (data.image) choices.push(["Histology only", null]);
  choices.forEach(([title, value], i) => offer(title, value, i === 0));
  for (const name of KINDS) {
    const label = radio("kind", name, false, () => { kind = name; chooseGene(); });
    label.append(Object.assign(document.createElement("span"), {textContent: name}));
    $("kinds").append(label);
  }
  $("search").addEventListener("input", () => {
    const found = listGenes();
    if (found.length && !found.includes(gene)) { gene = found[0]; $("gene").selectedIndex = 0; chooseGene(); }
  });
  $("gene").addEventListener("change", () => {
    gene = data.genes.find((g) => g.name === $("gene").value);
    chooseGene();
  });
  $("opacity").addEventListener("input", () => { glyph.fill_alpha = {value: $("opacity").value / 100}; });

  // --- moving -----------------------------------------------------------------------------------
  const home = [plot.x_range.start, plot.x_range.end, plot.y_range.start, plot.y_range.end];
  const middle = () => [plot.x_range, plot.y_range].map((r) => (r.start + r.end) / 2);
  let [perPixel, whole, ours] = [1, true, false];
  function look([x, y], scale) {
    const [w, h] = [plot.inner_width, plot.inner_height].map((side) => (side * scale) / 2);
    if (!(w > 0 && h > 0)) return;
    [perPixel, ours] = [scale, true];
    plot.x_range.setv({start: x - w, end: x + w});
    plot.y_range.setv({start: y - h, end: y + h});
    ours = false;
  }
  function fit() {
    const scale = Math.max((home[1] - home[0]) / plot.inner_width, (home[3] - home[2]) / plot.inner_height);
    look([(home[0] + home[1]) / 2, (home[2] + home[3]) / 2], scale);
    whole = true;
  }
  function zoom(factor) {
    look(middle(), perPixel * factor);
    whole = false;
  }
  const resized = () => (whole ? fit() : look(middle(), perPixel));
  plot.x_range.change.connect(() => {
    if (ours) return;
    perPixel = (plot.x_range.end - plot.x_range.start) / plot.inner_width;
    whole = false;
  });
  for (const side of ["inner_width", "inner_height"]) plot.properties[side].change.connect(resized);
  $("in").addEventListener("click", () => zoom(1 / 1.5));
  $("out").addEventListener("click", () => zoom(1.5));
  $("fit").addEventListener("click", fit);
  fit();

  // --- values of a spot -------------------------------------------------------------------------
  const tip = $("tip");
  const area = $("area");
  function rows(i) {
    const found = data.groups.map((g) => {
      const code = steps(g.codes)[i];
      return [g.title, code === MISSING ? "none" : g.names[code]];
    });
    if (gene) {
      for (const name of KINDS) {
        if (name in gene.scales) found.push([`${gene.name} ${name}`, said(of[name](gene, i))]);
      }
    }
    return found;
  }
  let pointer = [0, 0];
  area.addEventListener("mousemove", (event) => {
    const box = area.getBoundingClientRect();
    pointer = [event.clientX - box.left, event.clientY - box.top];
  }, {capture: true});
  area.addEventListener("mouseleave", () => { tip.hidden = true; });
  source.inspect.connect(() => {
    const [i] = source.inspected.indices;
    tip.hidden = i === undefined;
    if (tip.hidden) return;
    const list = document.createElement("dl");
    for (const [name, value] of rows(i)) {
      const [term, detail] = ["dt", "dd"].map((tag) => document.createElement(tag));
      term.textContent = name;
      detail.textContent = value;
      list.append(term, detail);
    }
    const heading = document.createElement("b");
    heading.textContent = data.barcodes[i];
    tip.replaceChildren(heading, list);
    const [x, y] = pointer;
    tip.style.left = `${Math.max(4, x + 16 + tip.offsetWidth > area.clientWidth ? x - 16 - tip.offsetWidth : x + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 16, area.clientHeight - tip.offsetHeight - 4))}px`;
  });

  listGenes();
  choose(choices.length ? choices[0][1] : null);
  document.body.dataset.ready = "yes";
})();
