// Curves, stacked areas and points, in axes with units.

const MARGIN = { left: 58, right: 12, top: 10, bottom: 40 };

function axes(width, height, x, y, xLabel, yLabel) {
  const { left, right, top, bottom } = MARGIN, end = width - right, base = height - bottom;
  const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const [xText, yText] = [x, y].map((one) => tickText(one.ticks));
  for (const tick of y.ticks) {
    svg.append(s("line", { class: "gridline", x1: left, x2: end, y1: y(tick), y2: y(tick) }),
      s("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, yText(tick)));
  }
  const room = Math.max(1, Math.ceil(x.ticks.length / ((end - left) / 56)));
  x.ticks.forEach((tick, i) => {
    svg.append(s("line", { class: "axis", x1: x(tick), x2: x(tick), y1: base, y2: base + 5 }));
    if (i % room === 0) svg.append(s("text", { x: x(tick), y: base + 18, "text-anchor": "middle" }, xText(tick)));
  });
  svg.append(s("line", { class: "axis", x1: left, x2: end, y1: base, y2: base }),
    s("text", { x: end, y: height - 4, "text-anchor": "end" }, xLabel),
    s("text", { x: 0, y: 4, "dominant-baseline": "hanging", class: "name" }, yLabel));
  return svg;
}

function path(points) {
  let text = "", open = false;
  for (const [x, y] of points) {
    if (!Number.isFinite(x) || !Number.isFinite(y)) { open = false; continue; }
    text += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  }
  return text;
}

// series: {name, colour, steps, values, dashed}; now(): where the slider stands, or null.
function curves(series, xLabel, yLabel, { log = true, now = () => null, height = 250, label = "" } = {}) {
  const positive = log && series.every(({ values }) => values.every((v) => v === null || v > 0));
  const values = extent(series.flatMap((one) => one.values), positive);
  const steps = extent([0, ...series.flatMap((one) => one.steps)]);
  if (!values || !steps) return h("p", { class: "missing" }, "There is nothing to draw yet.");
  const far = positive && values[1] / values[0] > 8;
  const pad = (values[1] - values[0]) * 0.06 || Math.abs(values[1]) * 0.1 || 1;
  const range = far ? [values[0] / 1.15, values[1] * 1.15] : [values[0] - pad, values[1] + pad];
  return drawn((width) => {
    const x = scale(steps, [MARGIN.left, width - MARGIN.right]);
    const y = scale(range, [height - MARGIN.bottom, MARGIN.top + 16], far);
    const svg = axes(width, height, x, y, xLabel, yLabel);
    for (const one of series) {
      const points = one.steps.map((step, i) => [x(step), one.values[i] === null ? NaN : y(one.values[i])]);
      svg.append(s("path", { class: `curve${one.dashed ? " dashed" : ""}`, "--c": one.colour, d: path(points) }));
      if (points.length <= 12 && !one.dashed) {
        svg.append(...points.map(([px, py]) => s("circle", { class: "dot", "--c": one.colour, cx: px, cy: py, r: 3.5 })));
      }
    }
    const at = now();
    if (at !== null && at >= steps[0] && at <= steps[1]) {
      svg.append(s("line", { class: "now", x1: x(at), x2: x(at), y1: MARGIN.top + 16, y2: height - MARGIN.bottom }));
    }
    return svg;
  }, label || `${yLabel} against ${xLabel}`);
}

// parts: {name: [value]}, one above the other.
function stacked(xs, parts, colours, xLabel, yLabel, label) {
  const height = 280, names = Object.keys(parts);
  const tops = xs.map((_, i) => names.reduce((sum, name) => sum + parts[name][i], 0));
  const most = Math.max(...tops, 1), unit = 1024 ** Math.min(3, Math.floor(Math.log2(most) / 10));
  const named = { 1: "B", 1024: "KiB", 1048576: "MiB", 1073741824: "GiB" }[unit];
  return drawn((width) => {
    const x = scale([xs[0], xs[xs.length - 1]], [MARGIN.left, width - MARGIN.right]);
    const y = scale([0, (most / unit) * 1.06], [height - MARGIN.bottom, MARGIN.top + 16]);
    const svg = axes(width, height, x, y, xLabel, `${yLabel}, ${named}`);
    let below = xs.map(() => 0);
    for (const name of names) {
      const above = below.map((v, i) => v + parts[name][i] / unit);
      const up = above.flatMap((v, i) => [[x(xs[i]), y(v)], [x(xs[i + 1] ?? xs[i]), y(v)]]);
      const down = below.flatMap((v, i) => [[x(xs[i]), y(v)], [x(xs[i + 1] ?? xs[i]), y(v)]]).reverse();
      svg.append(s("path", { class: "area", "--c": colours[name], d: `${path([...up, ...down])}Z` }));
      below = above;
    }
    const at = tops.indexOf(most), edge = x(xs[at]) > width / 2;
    svg.append(s("circle", { class: "dot", "--c": "var(--ink)", cx: x(xs[at]), cy: y(most / unit), r: 3.5 }),
      s("text", { class: "name", x: x(xs[at]) + (edge ? -8 : 8), y: y(most / unit) - 6, "text-anchor": edge ? "end" : "start" },
        `peak ${bytes(most)}`));
    return svg;
  }, label);
}

// points: {x, y, colour, filled, ring, title}
function scatter(points, xLabel, yLabel, label) {
  const height = 300;
  const far = (values) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 8;
  const spread = (key) => {
    const values = points.map((p) => p[key]), log = far(values), low = Math.min(...values), high = Math.max(...values);
    return [log ? [low / 1.2, high * 1.2] : [0, high * 1.06 || 1], log];
  };
  return drawn((width) => {
    const [xs, xLog] = spread("x"), [ys, yLog] = spread("y");
    const x = scale(xs, [MARGIN.left, width - MARGIN.right], xLog);
    const y = scale(ys, [height - MARGIN.bottom, MARGIN.top + 16], yLog);
    const svg = axes(width, height, x, y, xLabel, yLabel);
    for (const p of points) {
      svg.append(s("circle", { class: p.filled ? "dot" : "ghost", "--c": p.colour, cx: x(p.x), cy: y(p.y), r: 5 }, s("title", {}, p.title)));
      if (p.ring) svg.append(s("circle", { class: "cross", cx: x(p.x), cy: y(p.y), r: 10 }));
    }
    return svg;
  }, label);
}
