// The page: head, sections, the choice of a run, light and dark.

const runs = data.runs;
const state = { run: 0, step: null };
const FAMILY = { gs: "Generalized Solver", gas: "Generalized Adversarial Solver", belm: "reversible solver (BELM)", s4s: "S4S", "s4s-alt": "S4S-Alt", ld3: "LD3", bns: "BNS", dyweight: "DyWeight" };

function theme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* a file may have no storage */ }
  const button = h("button", { type: "button", id: "theme" });
  function apply() {
    const name = chosen || (dark.matches ? "dark" : "light");
    root.dataset.theme = name;
    button.textContent = name === "dark" ? "☀ Light" : "☾ Dark";
    button.setAttribute("aria-label", name === "dark" ? "use light colours" : "use dark colours");
  }
  button.addEventListener("click", () => {
    const name = root.dataset.theme === "dark" ? "light" : "dark";
    chosen = name === (dark.matches ? "dark" : "light") ? null : name;  // what the system says needs no memory
    try { chosen ? localStorage.setItem("theme", chosen) : localStorage.removeItem("theme"); } catch { /* then for this time */ }
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
  return button;
}

const peak = (run) => run.memory.missing ? null :
  Math.max(...run.memory.operation.map((_, i) => Object.entries(run.memory.bytes).reduce((sum, [name, v]) => sum + (name === "host" ? 0 : v[i]), 0)));
const last = (run, name) => run.metrics[name]?.values?.at(-1);
const progressOf = (run) => run.finished ? "finished" : `not finished: ${number(run.updates)}${run.planned ? ` of ${number(run.planned)}` : ""} updates`;

function lead(run) {
  const found = verdict(run), teacher = run.teacher || {};
  const what = [`${FAMILY[run.family] || run.family} of `, h("strong", {}, `${run.steps} evaluations`), ` for ${run.model}`,
    teacher.steps ? `, learned from a teacher of ${teacher.steps} (${teacher.solver})` : "", ". "];
  if (!found) return h("p", { class: "lead" }, what, `The run is ${progressOf(run)}.`);
  return h("p", { class: "lead" }, what, found.best ? [`${found.at ? `With ${found.at} evaluations its` : "Its"} samples are `, h("strong", {}, `${number(found.ratio)} times nearer`),
    ` to the teacher's than those of ${found.best.solver}, the best classical solver with as many.`] : "");
}

function tiles(run) {
  const found = verdict(run), solver = run.solver.missing ? null : run.solver, most = peak(run), tile = [];
  if (found) tile.push([`L1 to the teacher${found.at && `, K = ${found.at}`}`, number(found.l1), found.best ? `${found.best.solver}: ${number(Number(found.best.l1))}` : "on held-out seeds"]);
  else if (last(run, "distance") !== undefined) tile.push(["L1 to the teacher", number(last(run, "distance")), "on selection seeds, so far"]);
  if (found && found.mine.psnr) tile.push(["PSNR", `${cell(found.mine.psnr)} dB`, found.best ? `${found.best.solver}: ${cell(found.best.psnr)} dB` : ""]);
  tile.push(["Network evaluations", `${run.steps}`, run.teacher?.steps ? `teacher: ${run.teacher.steps}` : ""]);
  if (solver) tile.push(["Learned numbers", solver["learned numbers"], `${solver.file}, ${bytes(Number(solver.bytes))}`]);
  if (most) tile.push(["Memory of an update", bytes(most), "at its peak, above weights"]);
  tile.push(["Updates", number(run.updates), last(run, "seconds_per_update") !== undefined ? `${number(last(run, "seconds_per_update"))} s each` : progressOf(run)]);
  return h("dl", { class: "figures" }, tile.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, more)))));
}

function overview() {
  const rows = runs.map((run) => {
    const found = verdict(run);
    return [run.name, run.model, run.family, `${run.steps}`, number(run.updates), found ? number(found.l1) + (found.at && ` at K = ${found.at}`) : last(run, "distance") !== undefined ? `${number(last(run, "distance"))} so far` : "–",
      found ? cell(found.mine.psnr) : "–", found?.best ? `${found.best.solver}, ${number(Number(found.best.l1))}` : "–", found?.ratio ? `${found.ratio.toFixed(2)}×` : "–",
      peak(run) ? bytes(peak(run)) : "–", run.finished ? "finished" : "not finished"];
  });
  return table(["run", "model", "student", "K", "updates", "L1", "PSNR, dB", "best classical, L1", "nearer by", "memory of an update", "state"], rows,
    { caption: "Distance to the teacher on held-out seeds; of a run that is not finished, on selection seeds." });
}

const TITLES = { loss: "Loss", distance: "Distance to the teacher, L1", distillation: "Distillation loss", adversarial: "Adversarial loss", d_loss: "Discriminator's loss",
  d_gap: "|D(real) − D(fake)|", r1: "Penalty R1", r2: "Penalty R2", bits_lost: "Bits that codes hold, an element and step", rate: "Learning rate", seconds_per_update: "Seconds an update", memory_mib: "Peak memory of the process or device, MiB", skipped: "Updates skipped" };
let trainingCharts = [];

function training() {
  const names = Object.keys(TITLES).filter((name) => runs.some((run) => run.metrics[name]));
  const main = names.filter((name) => name === "loss" || name === "distance");
  const varied = (name) => new Set(runs.flatMap((run) => run.metrics[name]?.values || [])).size > 1;
  const more = names.filter((name) => !main.includes(name) && varied(name));
  const chart = (name, height) => {
    const series = runs.map((run, i) => ({ name: run.name, colour: colour(i), ...(run.metrics[name] || { steps: [], values: [] }) })).filter((one) => one.steps.length);
    const box = curves(series, "update", TITLES[name], { now: () => state.step, height, label: `${TITLES[name]} over training` });
    trainingCharts.push(box);
    return box;
  };
  trainingCharts = [];
  if (!names.length) return [missing(runs[0].metrics)];
  return [runs.length > 1 && legend(runs.map((run, i) => [run.name, colour(i)])),
    h("div", { class: "pair block" }, main.map((name) => h("figure", {}, chart(name, 270)))),
    more.length > 0 && h("details", { open: runs.some((run) => run.metrics.d_loss) }, h("summary", {}, "More of what was measured"), h("div", { class: "pair block" }, more.map((name) => h("figure", {}, chart(name, 210)))))];
}

function section(id, title, text, ...content) {
  return h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), text && h("p", { class: "note" }, text), content);
}

function build() {
  const run = runs[state.run], several = runs.length > 1;
  // A part that cannot be drawn says so, and the rest of the page goes on.
  const guarded = (part) => { try { return part(); } catch (error) { console.warn(error); return h("p", { class: "missing" }, "This part could not be drawn from the run's files."); } };
  const of = several ? ` · ${run.name}` : "";
  const moved = (step) => { state.step = step; trainingCharts.forEach((box) => box.redraw && box.redraw()); };
  const details = [
    section("samples", `Samples${of}`, null, guarded(() => samples(run))),
    section("learned", `What was learned${of}`, "Move through training: times, offsets and coefficients are those of the averaged solver at that moment.", guarded(() => learned(run, moved))),
    section("comparison", `Beside other solvers${of}`, null, guarded(() => comparison(run)), guarded(() => evaluation(run))),
    section("memory", `Memory${of}`, null, guarded(() => memory(run))),
    section("plan", `The plan${of}`, null, guarded(() => plan(run))),
  ];
  return details;
}

function page() {
  const several = runs.length > 1, place = h("div", {}), main = document.getElementById("page");
  const trained = section("training", "Training", null, training());
  const fill = () => place.replaceChildren(...build());
  const links = [several && ["runs", "Runs"], ["samples", "Samples"], ["learned", "What was learned"], ["comparison", "Comparison"], ["memory", "Memory"], ["plan", "Plan"], ["training", "Training"], ["options", "Options"]].filter(Boolean);
  const words = several ? `${runs.length} runs` : runs[0].name;
  main.replaceChildren(...[
    h("div", { class: "eyebrow" }, h("span", {}, "gas_engine · report"), theme()),
    h("header", {}, h("h1", {}, words), several ? h("p", { class: "lead" }, runs.map((run) => run.name).join(", ")) : lead(runs[0]), !several && tiles(runs[0]),
      h("nav", { "aria-label": "sections" }, links.map(([id, name]) => h("a", { href: `#${id}` }, name)))),
    several && section("runs", "Runs", null, overview(), h("div", { class: "block" }, pills("In detail", runs.map((run) => run.name), 0, (i) => { state.run = i; fill(); }, true))),
    place, trained, section("options", "Options", null, options(runs)),
    h("footer", {}, h("p", { class: "note block" }, `Made by gas_engine ${data.version}.`)),
  ].filter(Boolean));
  fill();
}

page();
