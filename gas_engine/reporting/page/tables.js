// Tables: comparison, options, the plan; and memory.

const HEADS = {
  solver: "solver", setting: "setting", steps: "K", samples: "samples", l1: "L1", l2: "L2", rmse: "RMSE", psnr: "PSNR, dB",
  lpips: "LPIPS", fd_data: "FD to data", fd_teacher: "FD to teacher", kid_data: "KID to data",
};
const cell = (text) => (text !== "" && Number.isFinite(Number(text)) ? number(Number(text), 3, true) : text === "inf" ? "∞" : text || "–");
const numeric = (text) => text === "" || text === "inf" || Number.isFinite(Number(text));

function table(columns, rows, { ours = () => false, caption = null, wrap = [] } = {}) {
  const right = columns.map((_, i) => i > 0 && rows.every((row) => numeric(String(row[i])) || /^[−\d.,\u202f]+(×|%|×10[⁰-⁹⁻¹²³]+| [KMGT]?i?B)?$|^[–∞]$/.test(row[i])));
  const kind = (i) => [right[i] && "number", wrap.includes(i) && "wrap"].filter(Boolean).join(" ") || null;
  const scroll = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption || "table" }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map((name, i) => h("th", { scope: "col", class: kind(i) }, name)))),
    h("tbody", {}, rows.map((row, r) => h("tr", { class: ours(row, r) ? "ours" : null }, row.map((text, i) =>
      h(i ? "td" : "th", { scope: i ? null : "row", class: kind(i) }, text)))))));
  return caption ? [h("p", { class: "note" }, caption), scroll] : scroll;
}

function records(part) {
  return part.missing ? [] : part.rows.map((row) => Object.fromEntries(part.columns.map((name, i) => [name, row[i]])));
}

// Of a run of several K, that of a row; "" in a run of one.
const stepsOf = (row) => /^K = (\d+)/.exec(row.setting || "")?.[1] ?? "";

// Ours, the best of the classical solvers of as many evaluations, and how many times nearer ours is; of several K, the
// fewest ("at").
function verdict(run) {
  const rows = records(run.comparison), mine = rows[0];
  if (!mine) return null;
  const classical = rows.filter((row) => row.solver !== "teacher" && stepsOf(row) === stepsOf(mine) && /(grid|uniform|quadratic|logSNR|karras)/.test(row.setting || ""));
  const best = classical.reduce((a, b) => (a && Number(a.l1) <= Number(b.l1) ? a : b), null);
  return { mine, best, at: stepsOf(mine), l1: Number(mine.l1), ratio: best && Number(best.l1) / Number(mine.l1) };
}

function comparison(run) {
  const part = run.comparison;
  if (part.missing) return [missing(part)];
  const all = records(part), own = all.filter((row) => row.solver === all[0].solver);
  const mine = (row) => Number((own.find((one) => stepsOf(one) === stepsOf(row)) || own[0]).l1);
  const shown = part.columns.map((_, i) => i).filter((i) => part.rows.some((row) => row[i] !== ""));
  const columns = shown.map((i) => HEADS[part.columns[i]] || part.columns[i]);
  const rows = part.rows.map((row) => shown.map((i) => (i ? cell(row[i]) : row[i])));
  if (own.every((row) => Number(row.l1) > 0)) {
    columns.push("L1 / ours");
    rows.forEach((row, r) => row.push(all[r].solver === "teacher" ? "–" : `${(Number(all[r].l1) / mine(all[r])).toFixed(2)}×`));
  }
  const fd = part.columns.includes("fd_data") && part.rows.some((row) => row[part.columns.indexOf("fd_data")] !== "");
  return [table(columns, rows, { ours: (_, r) => own.includes(all[r]), wrap: [1], caption: "Distance to the teacher's samples on held-out seeds; smaller is nearer, except PSNR." }),
    fd && h("p", { class: "note" }, "FD: Fréchet distance on features, in their own units.")];
}

function evaluation(run) {
  const part = run.evaluation;
  if (part.missing) return [];
  const shown = part.columns.map((_, i) => i).filter((i) => part.columns[i] !== "detail" && part.rows.some((row) => row[i] !== ""));
  return [h("div", { class: "block" }, table(shown.map((i) => HEADS[part.columns[i]] || part.columns[i]),
    part.rows.map((row) => shown.map((i) => (part.columns[i] === "solver" ? row[i] : cell(row[i])))), { caption: "Evaluation" }))];
}

const PHASES = { states: "states", network: "network graph", loss: "loss", optimiser: "optimiser", discriminator: "discriminator", other: "other: gradients, batch", weights: "streamed weights" };

function memory(run) {
  const part = run.memory;
  if (part.missing) return [missing(part)];
  const order = Object.keys(PHASES), names = Object.keys(part.bytes).filter((name) => name !== "host" && part.bytes[name].some((v) => v > 0));
  names.sort((a, b) => (order.indexOf(a) + 99) % 99 - (order.indexOf(b) + 99) % 99);
  if (!names.length) return [h("p", { class: "missing" }, "The update allocated nothing that was counted.")];
  const colours = Object.fromEntries(names.map((name, i) => [name, colour([2, 0, 1, 4, 3, 6, 5][order.indexOf(name)] ?? i)]));
  const bytesOf = Object.fromEntries(names.map((name) => [name, part.bytes[name]]));
  const rows = names.map((name) => [PHASES[name] || name, bytes(Math.max(...part.bytes[name]))]);
  if (part.bytes.host) rows.push(["host memory, beside the device", bytes(Math.max(...part.bytes.host))]);
  return [h("p", { class: "note" }, "One update, operation by operation: bytes of live tensors by what made them, above the weights, the optimiser's state and the teacher set."),
    stacked(part.operation, bytesOf, colours, "operation of the update", "alive", "Live bytes by phase over one update"),
    legend(names.map((name) => [PHASES[name] || name, colours[name]])),
    h("details", {}, h("summary", {}, "Most of each, in numbers"), table(["made by", "at most alive"], rows))];
}

function plan(run) {
  const part = run.plan;
  if (part.missing) return [missing(part)];
  const rows = records(part), chosen = rows.find((row) => row.feasible === "True");
  const blocks = [...new Set(rows.map((row) => row.blocks))];
  const timed = rows.every((row) => Number(row.seconds) > 0);
  const points = rows.map((row) => ({
    x: Number(timed ? row.seconds : row.time), y: Number(row.bytes) / 2 ** 20, colour: colour(blocks.indexOf(row.blocks)), filled: row.feasible === "True",
    ring: row === chosen, title: `micro-batch ${row.micro_batch}, ${row.graphs} graphs, blocks ${row.blocks}: ${bytes(Number(row.bytes))}` })).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y));
  const best = rows.filter((row) => row.feasible === "True").slice(0, 8);
  return [h("p", { class: "note" }, `${number(part.count)} ways to run an update: predicted time and peak. The ring is the choice; hollow points are too large for the budget.`),
    points.length > 0 && scatter(points, timed ? "time of an update, s" : "time of an update, evaluations of the batch", "peak, MiB", "Plans: peak against time"),
    legend(blocks.map((name, i) => [`blocks ${name}`, colour(i)])),
    h("div", { class: "block" }, table(["blocks", "graphs", "trajectory", "micro-batch", "calls", "peak", timed ? "time, s" : "time, evaluations"],
      best.map((row) => [row.blocks, row.graphs, row.trajectory, row.micro_batch, row.calls, bytes(Number(row.bytes)), number(Number(timed ? row.seconds : row.time))]),
      { ours: (_, r) => r === 0, caption: "The fastest that fit" }))];
}

function options(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.options)))];
  const value = (run, name) => (name in run.options ? run.options[name] : "–");
  const differing = names.filter((name) => runs.length > 1 && name !== "out" && new Set(runs.map((run) => value(run, name))).size > 1);
  const flag = (name) => `--${name.replaceAll("_", "-")}`;
  const heads = ["option", ...runs.map((run) => run.name)];
  const list = (some) => table(heads, some.map((name) => [flag(name), ...runs.map((run) => value(run, name))]), { wrap: heads.map((_, i) => i).slice(1) });
  return [runs.length > 1 && (differing.length ? [h("p", {}, "What differs between the runs:"), list(differing)] : h("p", {}, "The runs have the same options.")),
    h("details", {}, h("summary", {}, runs.length > 1 ? "All options" : `All ${names.length} options of the run`), list(names))];
}
