"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const narrow = () => window.innerWidth < 640;
  const coarse = window.matchMedia("(pointer: coarse)").matches;

  /* Figures: colours are custom properties, var(--name), so that they follow the theme. */
  const resolve = (value, style, colour = false) => {
    if (typeof value === "string") {
      return colour && value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolve(item, style, colour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(
        ([key, item]) => [key, resolve(item, style, key === "color" || key === "colorscale")]));
    }
    return value;
  };
  const template = (style) => {
    const ink = style.getPropertyValue("--ink").trim();
    const rule = style.getPropertyValue("--rule").trim();
    const paper = style.getPropertyValue("--paper").trim();
    const line = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true, title: { standoff: 10 } };
    return {
      layout: {
        font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 12, color: ink },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: paper, bordercolor: ink, font: { color: ink, size: 12 }, align: "left", namelength: -1 },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: rule, activecolor: ink },
        xaxis: line,
        yaxis: line,
      },
    };
  };
  const keyed = (figure) => figure.data.some((trace) => trace.type === "heatmap" && !trace.texttemplate);
  const layoutOf = (figure, style, height) => {
    const layout = resolve(figure.layout, style);
    const many = figure.data.filter((trace) => trace.showlegend !== false && trace.name).length;
    const below = narrow() || many > 12;
    layout.template = template(style);
    layout.uirevision = "kept";
    layout.autosize = true;
    layout.height = height;
    layout.dragmode = coarse ? false : "zoom";
    layout.margin = { l: 4, r: 8, t: 26, b: 4, ...(layout.margin || {}) };
    layout.legend = {
      itemclick: "toggleothers",
      itemdoubleclick: "toggle",
      groupclick: "togglegroup",
      ...(below ? { orientation: "h", x: 0, y: -0.16, yanchor: "top" } : {}),
      ...(layout.legend || {}),
    };
    if (narrow() && keyed(figure)) layout.margin.b = 112;
    for (const axis of narrow() ? [layout.xaxis || {}, layout.yaxis || {}] : []) {
      if (axis.title) axis.title.font = { size: 11 };
      if (axis === layout.xaxis && axis.ticktext && axis.ticktext.length > 9) {
        const stride = Math.ceil(axis.ticktext.length / 8);
        if (axis.ticktext.every((text) => text.length < 8)) {
          axis.tickvals = axis.tickvals.filter((_, place) => place % stride === 0);
          axis.ticktext = axis.ticktext.filter((_, place) => place % stride === 0);
        }
      }
      if (axis.ticktext) axis.ticktext = axis.ticktext.map((text) => (text.length > 20 ? `${text.slice(0, 19)}…` : text));
    }
    return layout;
  };
  const tracesOf = (figure, style) => {
    const traces = resolve(figure.data, style);
    for (const trace of narrow() ? traces : []) {
      if (trace.type !== "heatmap") continue;
      const below = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", thickness: 9, len: 0.8,
        title: { text: "" } };
      trace.colorbar = { ...trace.colorbar, ...below, nticks: 4 };
      trace.showscale = !trace.texttemplate;
    }
    return traces;
  };
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };
  const plots = [...document.querySelectorAll(".plot")];
  /* A legend below takes its room from the plot: the figure grows with it. */
  const heightOf = (plot, figure) => {
    const rows = figure.data.filter((trace) => trace.showlegend !== false && trace.name);
    const chars = rows.reduce((sum, trace) => sum + trace.name.length * 7 + 48, 0);
    const below = narrow() || rows.length > 12;
    const lines = below && rows.length > 1 ? Math.ceil(chars / Math.max(plot.clientWidth - 20, 200)) : 0;
    return Number(plot.dataset.height) + 22 * lines + (narrow() && keyed(figure) ? 70 : 0);
  };
  const draw = (plot) => {
    const figure = data.figures[plot.id];
    const style = getComputedStyle(root);
    const height = heightOf(plot, figure);
    plot.style.height = `${height}px`;
    return window.Plotly.react(plot, tracesOf(figure, style), layoutOf(figure, style, height), config);
  };
  const drawAll = () => Promise.all(plots.map(draw));

  const isolate = (plot, label) => {
    const shown = plot.data.map((trace) => (!trace.legendgroup || !label || trace.legendgroup === label ? true : "legendonly"));
    const change = { visible: shown };
    if (plot.layout.meta && plot.layout.meta.bars !== "all") {
      const barred = plot.data.map((trace) => !trace.legendgroup || trace.legendgroup === label);
      Object.assign(change, { "error_x.visible": barred, "error_y.visible": barred });
    }
    window.Plotly.restyle(plot, change);
    plot.dataset.label = label;
    const select = document.querySelector(`select[data-isolates="${plot.id}"]`);
    if (select) select.value = label;
  };
  const listen = (plot) => {
    const select = document.querySelector(`select[data-isolates="${plot.id}"]`);
    if (!select) return;
    select.addEventListener("change", () => isolate(plot, select.value));
    plot.on("plotly_click", (event) => {
      const label = event.points[0].data.legendgroup || "";
      isolate(plot, plot.dataset.label === label ? "" : label);
    });
  };
  const begin = async () => {
    for (const plot of plots) {
      await draw(plot);
      listen(plot);
      await new Promise((done) => setTimeout(done, 0));
    }
    root.dataset.ready = "yes";
  };
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.matchMedia("(max-width: 639px)").addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => { root.dataset.print = ""; drawAll(); });
  window.addEventListener("afterprint", () => { delete root.dataset.print; drawAll(); });

  /* Tables: sorted by a click on a head, filtered by words. */
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.key === undefined ? cell.textContent.trim() : Number(cell.dataset.key);
  };
  const compare = (one, two) => {
    if (typeof one === "number" && typeof two === "number") return one - two;
    if (typeof one !== typeof two) return typeof one === "number" ? -1 : 1;
    return one.localeCompare(two, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((one, two) => (up ? 1 : -1) * compare(keyOf(one, column), keyOf(two, column)));
        table.tBodies[0].append(...rows);
      });
    });
  }
  const has = (text, words) => words.every((word) => text.includes(word));
  const wordsOf = (input) => input.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const input of document.querySelectorAll("input[data-filters]")) {
    const table = document.getElementById(input.dataset.filters);
    const told = document.querySelector(`[data-counts="${table.id}"]`);
    const filter = () => {
      const words = wordsOf(input);
      const rows = [...table.tBodies[0].rows];
      rows.forEach((row) => { row.hidden = !has(row.textContent.toLowerCase(), words); });
      told.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    };
    input.addEventListener("input", filter);
    filter();
  }

  /* Items: everything is put in as text, never as markup. */
  const FIRST = 12;
  const STEP = 60;
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const score = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(3));
  const card = (row, several) => {
    const made = element("article", undefined, `item ${row.kind}`);
    const head = element("header");
    head.append(element("b", row.kind === "lost" ? "▼ lost" : "▲ gained"), element("span", row.benchmark));
    if (several) head.append(element("span", `${row.label}, seed ${row.seed}`));
    if (row.group) head.append(element("span", row.group));
    head.append(element("span", `item ${row.index}`), element("span", `${score(row.before)} → ${score(row.after)}`));
    made.append(head);
    if (row.prompt) made.append(element("div", row.prompt, "prompt"));
    const list = element("dl", undefined, "pairs");
    for (const [name, text] of [["wanted", row.wanted], ["before", row.said_before], ["after", row.said_after]]) {
      if (text === null) continue;
      const pair = element("div");
      pair.append(element("dt", name), element("dd", text));
      list.append(pair);
    }
    if (list.children.length) made.append(list);
    return made;
  };
  const browse = (rows) => {
    const byId = (name) => document.getElementById(`items-${name}`);
    const texts = rows.map((row) => [row.prompt, row.wanted, row.said_before, row.said_after, row.group, row.label,
      row.benchmark].join("\n").toLowerCase());
    const runs = new Set(rows.map((row) => `${row.label}\n${row.seed}`));
    for (const key of ["benchmark", "label"]) {
      for (const value of new Set(rows.map((row) => row[key]))) {
        const option = element("option", value);
        option.value = value;
        byId(key).append(option);
      }
      byId(key).parentElement.hidden = byId(key).options.length < 3;
    }
    let found = [];
    let shown = 0;
    const more = () => {
      const next = Math.min(shown + (shown ? STEP : FIRST), found.length);
      byId("list").append(...found.slice(shown, next).map((row) => card(row, runs.size > 1)));
      shown = next;
      byId("more").hidden = shown >= found.length;
      byId("count").textContent = `${found.length} of ${rows.length} items found, ${shown} shown`;
    };
    const search = () => {
      const words = wordsOf(byId("search"));
      found = rows.filter((row, index) => ["kind", "benchmark", "label"].every(
        (key) => !byId(key).value || row[key] === byId(key).value) && has(texts[index], words));
      shown = 0;
      byId("list").replaceChildren();
      more();
    };
    byId("form").addEventListener("input", search);
    byId("form").addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", more);
    search();
  };
  if (data.items && document.getElementById("items-form")) browse(data.items);

  for (const button of document.querySelectorAll("button[data-copies]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        window.getSelection().selectAllChildren(source);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  begin();
})();
