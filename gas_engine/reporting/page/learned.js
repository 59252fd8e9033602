// What was learned: times, offsets and tableau at one moment of training, which a slider chooses.

const GRID_NAMES = { logSNR: "even in log-SNR", uniform: "even in time", quadratic: "even in √time", karras: "Karras" };

// Times of states on one axis, noise at the left: learned, told to the network, and the grids of theory.
function timesDrawing(history, row) {
  const known = (row.levels || []).length > 0, level = (r, told) => known ? (told ? r.told_levels : r.levels) : (told ? r.told : r.times);
  const start = history.rows[0], grids = Object.entries(history.grids);
  const all = [...history.rows.flatMap((r) => [...level(r, false), ...level(r, true)]), ...grids.flatMap(([, g]) => g.levels)];
  const [low, high] = extent(all, true) || [0, 1];
  const lines = ["learned", "told", ...grids.map(([name]) => name)];
  return (width) => {
    const narrow = width < 520, left = narrow ? 8 : 128, gap = narrow ? 46 : 34, top = narrow ? 26 : 14;
    const height = top + gap * lines.length + 42, base = height - 42;
    const x = scale([high, low], [left + 8, width - 14], low > 0);
    x.ticks = low > 0 ? logTicks(low, high) : linearTicks(low, high, 5);
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (const tick of x.ticks) {
      svg.append(s("line", { class: "gridline", x1: x(tick), x2: x(tick), y1: 4, y2: base }),
        s("text", { x: x(tick), y: base + 16, "text-anchor": "middle" }, number(tick)));
    }
    svg.append(s("text", { x: width - 4, y: height - 4, "text-anchor": "end" },
      known ? "noise-to-signal ratio σ/α  (noise → data)" : "time t  (noise → data)"));
    lines.forEach((name, i) => {
      const y = top + gap * i + (narrow ? 6 : 10);
      const said = name === "learned" ? "learned times" : name === "told" ? "told to the network" : GRID_NAMES[name] || name;
      svg.append(s("text", { class: i < 2 ? "name" : "", x: narrow ? 0 : left - 12, y: narrow ? y - 12 : y + 4, "text-anchor": narrow ? "start" : "end" }, said),
        s("line", { class: "axis", x1: left, x2: width - 8, y1: y, y2: y }));
      const put = (values, make) => values.forEach((v, n) => { if (v !== null) svg.append(make(x(v), n)); });
      if (name === "learned") {
        put(level(start, false), (px) => s("circle", { class: "ghost", "--c": "var(--soft)", cx: px, cy: y, r: 5.5 }));
        put(level(row, false), (px, n) => s("circle", { class: "dot", "--c": colour(0), cx: px, cy: y, r: 6 }, s("title", {}, `state ${n}: t = ${number(row.times[n], 4)}`)));
      } else if (name === "told") {
        put(level(row, true), (px, n) => s("path", { class: "cross", d: `M${px - 4.5} ${y - 4.5}l9 9m0 -9l-9 9` }, s("title", {}, `evaluation ${n + 1}: t = ${number(row.told[n], 4)}`)));
      } else {
        put(history.grids[name].levels, (px) => s("circle", { class: "dot", "--c": "var(--soft)", cx: px, cy: y, r: 3.5 }));
      }
    });
    return svg;
  };
}

// How far from each state's own time the network is told to be.
function offsetsDrawing(history, row) {
  const of = (r) => r.told.map((t, n) => t - r.times[n]), height = 240;
  const most = Math.max(1e-9, ...history.rows.flatMap(of).map(Math.abs));
  return (width) => {
    const x = (n) => MARGIN.left + ((n + 0.5) * (width - MARGIN.left - MARGIN.right)) / history.steps;
    const y = scale([-most * 1.1, most * 1.1], [height - 40, 26]);
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const text = tickText(y.ticks);
    for (const tick of y.ticks) {
      svg.append(s("line", { class: "gridline", x1: MARGIN.left, x2: width - 12, y1: y(tick), y2: y(tick) }),
        s("text", { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, text(tick)));
    }
    of(row).forEach((value, n) => {
      svg.append(s("line", { class: "curve", "--c": colour(0), x1: x(n), x2: x(n), y1: y(0), y2: y(value) }),
        s("circle", { class: "dot", "--c": colour(0), cx: x(n), cy: y(value), r: 5.5 }, s("title", {}, number(value, 4))),
        s("text", { x: x(n), y: height - 24, "text-anchor": "middle" }, n + 1));
    });
    svg.append(s("line", { class: "axis", x1: MARGIN.left, x2: width - 12, y1: y(0), y2: y(0) }),
      s("text", { x: width - 12, y: height - 4, "text-anchor": "end" }, "evaluation"),
      s("text", { class: "name", x: 0, y: 4, "dominant-baseline": "hanging" }, "offset, units of t"));
    return svg;
  };
}

// A lower triangle: row n makes x[n+1] from column j. limit: what the strongest colour stands for.
function matrixDrawing(matrix, limit, symbol) {
  const k = matrix.length;
  return (width) => {
    const left = 26, top = 22, size = Math.min(width - left, 420), cell = size / k;
    const svg = s("svg", { width: left + size, height: top + size, viewBox: `0 0 ${left + size} ${top + size}`, "aria-hidden": "true" });
    for (let n = 0; n < k; n += 1) {
      if (k <= 12 || n % 2 === 0) {
        svg.append(s("text", { x: left - 6, y: top + (n + 0.5) * cell + 4, "text-anchor": "end" }, `x${sub(n + 1)}`),
          s("text", { x: left + (n + 0.5) * cell, y: top - 8, "text-anchor": "middle" }, `${symbol}${sub(n)}`));
      }
      for (let j = 0; j <= n; j += 1) {
        const value = matrix[n][j], share = Math.min(100, (100 * Math.abs(value)) / limit);
        const fill = `color-mix(in oklab, var(--${value < 0 ? "negative" : "positive"}) ${(share * 0.82).toFixed(1)}%, var(--surface))`;
        const rect = s("rect", { class: "cell", x: left + j * cell, y: top + n * cell, width: cell, height: cell, rx: 5 },
          s("title", {}, `x${sub(n + 1)} from ${symbol}${sub(j)}: ${number(value, 5)}`));
        rect.style.fill = fill;
        svg.append(rect);
        if (cell > 30) {
          const text = Math.abs(value) >= 0.005 || (cell < 46 && value !== 0) ? value.toFixed(2) : Math.abs(value) < 5e-7 ? "0" : number(value, 1);
          svg.append(s("text", { class: "number", x: left + (j + 0.5) * cell, y: top + (n + 0.5) * cell }, text.replace("-", "−")));
        }
      }
    }
    return svg;
  };
}
const sub = (n) => [...String(n)].map((c) => "₀₁₂₃₄₅₆₇₈₉"[c]).join("");

function ramp(limit) {
  return h("div", { class: "ramp" }, `−${number(limit)}`, h("i", {}), number(limit));
}

// The section, with its slider; listeners are told of the update that it stands at.
function learned(run, moved) {
  if (run.histories.missing) return [missing(run.histories)];
  const all = run.histories.by_steps, state = { history: all[0], index: 0 };
  const place = h("div", {});
  const slider = h("input", { type: "range", min: 0, step: 1, id: "training", "aria-label": "moment of training" });
  const output = h("output", { for: "training" });
  const button = h("button", { type: "button" }, "▶ Play");
  let drawings = [], timer = null;

  function build() {
    const { history } = state, { rows } = history, start = rows[0];
    const difference = (m, from) => m.map((line, n) => line.map((v, j) => v - from[n][j]));
    const limit = (matrices) => Math.max(1e-6, ...matrices.flat(2).map(Math.abs));
    drawings = [];
    const keep = (label, make) => {
      const box = drawn((width) => make(rows[state.index])(width), label);
      drawings.push(box);
      return box;
    };
    const whole = ["A", "B"].map((name) => [name, limit(rows.map((r) => r[name]))]);
    const change = ["A", "B"].map((name) => [name, limit(rows.map((r) => difference(r[name], start[name])))]);
    const symbol = { A: "x", B: "F" }, meant = { A: "weights of the states", B: "weights of the network's outputs" };
    const levels = (start.levels || []).length ? "levels" : "times";
    const course = Array.from({ length: history.steps + 1 }, (_, n) => ({
      name: `state ${n}`, colour: colour(0), steps: rows.map((r) => r.step), values: rows.map((r) => r[levels][n]) }));
    const told = Array.from({ length: history.steps }, (_, n) => ({
      name: `told ${n}`, colour: "var(--soft)", dashed: true, steps: rows.map((r) => r.step),
      values: rows.map((r) => r[levels === "levels" ? "told_levels" : "told"][n]) }));
    const chart = curves([...told, ...course], "update", levels === "levels" ? "σ/α" : "time t",
      { now: () => rows[state.index].step, height: 300, label: "Learned times over training" });
    drawings.push(chart);
    place.replaceChildren(
      h("div", { class: "pair" },
        h("div", { class: "wide" }, figure("Times", "Where the solver's states lie between noise and data. Circles: where training began.",
          keep("Learned times, told times and reference grids against the noise level", (row) => timesDrawing(history, row)))),
        figure("Their course", "Every state over training; dashed, the time its network call is told.", chart),
        figure("Offsets", "Told time less the state's own time.", keep("Offsets of the told times", (row) => offsetsDrawing(history, row)))),
      h("div", { class: "quad block" },
        whole.map(([name, top]) => figure(`Tableau ${name}`, meant[name],
          keep(`Heat map of ${name}`, (row) => matrixDrawing(row[name], top, symbol[name])), ramp(top))),
        change.map(([name, top]) => figure(`Change of ${name}`, `since update ${start.step}`,
          keep(`Heat map of the change of ${name}`, (row) => matrixDrawing(difference(row[name], start[name]), top, symbol[name])), ramp(top)))));
    slider.max = rows.length - 1;
    show(rows.length - 1);
  }

  function show(index) {
    state.index = index;
    slider.value = index;
    const rows = state.history.rows, step = rows[index].step;
    output.textContent = `update ${number(step)} of ${number(rows[rows.length - 1].step)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    drawings.forEach((box) => box.redraw && box.redraw());
    moved(step, rows);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "▶ Play";
  }
  button.addEventListener("click", () => {
    if (timer) return stop();
    const last = state.history.rows.length - 1;
    if (still()) return show(state.index >= last ? 0 : state.index + 1);
    if (state.index >= last) show(0);
    button.textContent = "❚❚ Pause";
    const step = Math.max(1, Math.round(last / 80));
    timer = setInterval(() => {
      if (!button.isConnected || state.index >= last) return stop();
      show(Math.min(last, state.index + step));
    }, Math.max(50, Math.min(220, 5000 / Math.max(1, last))));
  });
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  const choice = all.length > 1 && pills("evaluations", all.map((one) => `K = ${one.steps}`), 0, (i) => { stop(); state.history = all[i]; build(); });
  build();
  return [choice, h("div", { class: "scrub" }, button, slider, output), place];
}
