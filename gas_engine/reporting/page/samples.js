// Teacher, students and the best classical solver, side by side; larger and with their errors on demand.

let samplesShown = 0;

function samples(run) {
  const part = run.samples;
  if (part.missing) return [missing(part)];
  const place = h("div", { class: `strips${part.width <= 128 ? " small-pixels" : ""}`, tabindex: 0, role: "region", "aria-label": "samples, scrolls sideways" });
  const tile = part.width <= 32 ? 64 : part.width <= 128 ? 96 : 160;
  place.style.setProperty("--tile", `${tile}px`);
  const scaleBar = h("div", { class: "ramp heat" }, "0", h("i", {}), `${number(part.top)} or more: mean |x − teacher| over channels, range of x 2`);
  function fill(kind) {
    place.replaceChildren(...part.rows.map((row) => {
      const images = kind === "errors" && row.errors.length ? row.errors : row.images;
      const error = images === row.errors;
      return h("div", { class: "strip" }, h("h3", {}, error ? `|${row.name} − teacher|` : row.name, " ", h("small", {}, row.setting)),
        h("div", { class: "images" }, images.map((uri, i) => h("button", { type: "button", class: "tile", "aria-label": `enlarge sample ${i + 1}, ${row.name}`, onclick: () => zoom(part, i) },
          h("img", { src: uri, alt: "", class: error ? "error" : null, loading: "lazy" })))));
    }));
    scaleBar.hidden = kind !== "errors";
  }
  const choice = pills("show", ["samples", "differences from the teacher"], samplesShown, (i) => { samplesShown = i; fill(i ? "errors" : "images"); });
  fill(samplesShown ? "errors" : "images");
  return [h("p", { class: "note" }, `The first ${part.count} held-out seeds, ${part.first_seed} on, the same noise in every column. Choose one to enlarge it.`), choice, place, scaleBar];
}

// One sample in large; pointing at a place magnifies it in every picture.
function zoom(part, index) {
  const title = h("h2", {}), place = h("div", { class: `zoomed${part.width <= 128 ? " small-pixels" : ""}` });
  const dialog = h("dialog", { "aria-label": "enlarged sample" });
  const go = (by) => { index = (index + by + part.count) % part.count; fill(); };
  function lens(uri, error, alt) {
    return h("div", { class: "lens" }, h("img", { src: uri, class: error ? "error" : null, alt }));
  }
  function magnify(event, factor) {
    const box = event.currentTarget.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top].map((v, i) => `${(100 * v) / (i ? box.height : box.width)}%`);
    place.querySelectorAll(".lens img").forEach((image) => {
      image.style.transformOrigin = at.join(" ");
      image.style.transform = factor > 1 ? `scale(${factor})` : "";
    });
  }
  function fill() {
    title.textContent = `seed ${part.first_seed + index}`;
    place.style.setProperty("--columns", part.rows.length);
    dialog.style.setProperty("--columns", part.rows.length);
    place.replaceChildren(...part.rows.map((row) => figure(row.name, row.setting, lens(row.images[index], false, `${row.name}, sample ${index + 1}`))),
    ...part.rows.map((row) => row.errors.length
      ? figure("", "|difference|", lens(row.errors[index], true, `difference of ${row.name} from the teacher`))
      : h("span", {})));
    place.querySelectorAll(".lens").forEach((box) => {
      let held = false;
      box.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse" || held) magnify(event, 3); });
      box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" || !held) magnify(event, 1); });
      box.addEventListener("click", (event) => { held = !held; magnify(event, held ? 3 : 1); });
    });
  }
  dialog.append(h("div", { class: "bar" }, title,
    h("button", { type: "button", "aria-label": "previous sample", onclick: () => go(-1) }, "←"),
    h("button", { type: "button", "aria-label": "next sample", onclick: () => go(1) }, "→"),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close")), place,
  h("div", { class: "ramp heat", style: "margin-top:.8rem" }, "0", h("i", {}), `${number(part.top)} or more`),
  h("p", { class: "note hint" }, "Differences are on one scale. Point at a picture to magnify that place in all of them; click to hold it."));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  fill();
  dialog.showModal();
}
