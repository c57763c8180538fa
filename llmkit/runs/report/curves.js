// ---------------------------------------------------------------- the runs and their curves

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const several = runs.length > 1;
AXES.tokens.label = data.tokens;
// What the switches say; the browser keeps it while a page reloads.
const view = { x: "tokens", log: true, smooth: true, zoom: null, hidden: new Set(), ...history.state };
const color = (index) => `var(--c${index % 8})`;
const swatch = (index) => el("span", { class: "swatch", style: `background:${color(index)}` });
const drawings = []; // what to do to draw each chart anew

function redraw() {
  history.replaceState(view, "");
  for (const draw of drawings) draw();
}

// ---------------------------------------------------------------- charts

function linesOf(spec) {
  const keys = Object.entries(spec.lines);
  return runs.flatMap((run, r) =>
    view.hidden.has(r)
      ? []
      : keys.flatMap(([key, label], k) => {
          const curve = run.curves[key];
          if (!curve) return [];
          const dots = key.startsWith("eval_") || key.startsWith("hellaswag/");
          const second = several && k > 0 && !key.startsWith("eval_");
          return [
            {
              label: several ? (keys.length > 1 ? `${run.name}, ${label}` : run.name) : label,
              color: color(several ? r : k),
              dash: second ? "2 4" : (several ? r : k) >= 8 ? "7 4" : null,
              dots,
              xs: run.axes[curve.axis][view.x],
              ys: curve.values,
              smooth: curve.smooth,
            },
          ];
        }),
  );
}

function marksOf() {
  return runs.flatMap((run, r) =>
    view.hidden.has(r)
      ? []
      : run.resumes[view.x].map((x) => (several ? { x, color: color(r) } : { x, text: "resumed" })),
  );
}

function chart(spec) {
  const figure = el("figure", { class: spec.wide ? "chart wide" : "chart" });
  drawings.push(() => {
    const lines = linesOf(spec);
    drawChart(figure, spec, lines, marksOf(), view, zoom);
    const keys = Object.values(spec.lines);
    const caption = figure.querySelector("figcaption");
    if (!several && lines.length > 1) {
      caption.append(
        el(
          "span",
          { class: "keys" },
          ...lines.map((line) =>
            el("span", {}, el("span", { class: "swatch", style: `background:${line.color}` }), line.label),
          ),
        ),
      );
    } else if (several && keys.length > 1) {
      caption.append(
        el(
          "span",
          { class: "keys" },
          spec.title === "HellaSwag" ? `solid: ${keys[0]}, dotted: ${keys[1]}` : `line: ${keys[0]}, dots: ${keys[1]}`,
        ),
      );
    }
  });
  return figure;
}

function zoom(range) {
  view.zoom = range;
  document.getElementById("reset").hidden = !range;
  redraw();
}

function controls() {
  const radio = (value) =>
    el(
      "label",
      {},
      el("input", {
        type: "radio",
        name: "axis",
        value,
        checked: view.x === value,
        onchange: () => {
          view.x = value;
          zoom(null);
        },
      }),
      el("span", {}, { tokens: "tokens", seconds: "time", step: "steps" }[value]),
    );
  const check = (key, label) =>
    el(
      "label",
      { class: "check" },
      el("input", {
        type: "checkbox",
        id: key,
        checked: view[key],
        onchange: (event) => {
          view[key] = event.target.checked;
          redraw();
        },
      }),
      label,
    );
  const reset = el("button", { type: "button", id: "reset", hidden: !view.zoom, onclick: () => zoom(null) }, "Reset zoom");
  const legend = el(
    "div",
    { class: "legend", role: "group", "aria-label": "Runs shown" },
    ...runs.map((run, r) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": String(!view.hidden.has(r)),
          onclick: (event) => {
            view.hidden[view.hidden.has(r) ? "delete" : "add"](r);
            event.currentTarget.setAttribute("aria-pressed", String(!view.hidden.has(r)));
            redraw();
          },
        },
        swatch(r),
        ...breakable(run.name),
      ),
    ),
  );
  return el(
    "div",
    { class: "controls" },
    el("fieldset", { class: "segments" }, el("legend", {}, "Over"), ...Object.keys(AXES).map(radio)),
    check("log", "Log scale"),
    check("smooth", "Smooth"),
    reset,
    several ? legend : null,
  );
}
