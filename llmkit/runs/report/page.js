// ---------------------------------------------------------------- words and tables

function table(spec) {
  const best = new Set((spec.best || []).map(([row, column]) => `${row},${column}`));
  const heads = spec.columns.some((name) => name)
    ? [el("thead", {}, el("tr", {}, ...spec.columns.map((name) => el("th", { scope: "col" }, ...breakable(name)))))]
    : [];
  const data = (cell, r, c) => el("td", { class: best.has(`${r},${c}`) ? "best" : null }, cell);
  const rows = spec.rows.map(([name, ...cells], r) =>
    el("tr", {}, el("th", { scope: "row" }, ...breakable(name)), ...cells.map((cell, c) => data(cell, r, c))),
  );
  const body = el("table", {}, ...heads, el("tbody", {}, ...rows));
  const scroll = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": spec.title }, body);
  if (spec.folded) {
    const summary = el("summary", {}, `${spec.title} (${spec.rows.length})`);
    return el("div", { class: "card" }, el("details", {}, summary, scroll));
  }
  const note = spec.note ? el("p", { class: "note" }, spec.note) : null;
  return el("div", { class: "card" }, el("h3", {}, spec.title), note, scroll);
}

function comparison(spec) {
  const node = table({ ...spec, columns: ["", ...runs.map((run) => run.name)] });
  node.classList.add("across");
  node.querySelectorAll("thead th").forEach((head, i) => i && head.prepend(swatch(i - 1)));
  return node;
}

const badge = (run) => el("span", { class: `state ${run.state.kind}` }, run.state.text);

function trouble(run) {
  if (!run.broken.length) return null;
  const [key, step, value] = run.broken[0];
  const more = run.broken.length > 1 ? `, and ${run.broken.length - 1} more` : "";
  return el("p", { class: "trouble" }, `Not finite: ${key} is ${value} at step ${step}${more}.`);
}

function head() {
  if (!several) {
    const run = runs[0];
    return el(
      "header",
      {},
      el("p", { class: "kind" }, "llmkit run"),
      el("h1", {}, ...breakable(run.name)),
      badge(run),
      el("p", { class: "lead" }, run.headline),
      trouble(run),
      el(
        "dl",
        { class: "tiles" },
        ...run.figures.map(([name, text, note]) =>
          el("div", {}, el("dt", {}, name), el("dd", {}, text), note ? el("dd", { class: "note" }, note) : null),
        ),
      ),
    );
  }
  return el(
    "header",
    {},
    el("p", { class: "kind" }, "llmkit runs"),
    el("h1", {}, `${runs.length} runs compared`),
    el(
      "ul",
      { class: "runs" },
      ...runs.map((run, r) =>
        el(
          "li",
          {},
          el("div", {}, swatch(r), el("b", {}, ...breakable(run.name)), badge(run)),
          el("p", {}, run.headline),
          trouble(run),
        ),
      ),
    ),
  );
}

// ---------------------------------------------------------------- samples

function continuation(prompt, text) {
  const starts = text.startsWith(prompt);
  return el(
    "pre",
    {},
    starts ? el("span", { class: "prompt" }, prompt) : null,
    starts ? text.slice(prompt.length) : text,
  );
}

function sampleCard(prompt) {
  const told = runs
    .map((run, r) => ({ r, run, sample: run.samples.find((sample) => sample.prompt === prompt) }))
    .filter(({ sample }) => sample);
  const steps = [...new Set(told.flatMap(({ sample }) => sample.steps))].sort((a, b) => a - b);
  const texts = el("div", { class: "texts" });
  const output = el("output", {});
  const show = (index) => {
    output.textContent = `step ${AXES.step.format(steps[index])}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    texts.replaceChildren(
      ...told.map(({ r, run, sample }) => {
        const at = sample.steps.findLastIndex((step) => step <= steps[index]);
        if (at < 0) return el("div", {});
        const name = several
          ? el(
              "p",
              { class: "note" },
              swatch(r),
              ...breakable(run.name),
              sample.steps[at] === steps[index] ? "" : ` (step ${AXES.step.format(sample.steps[at])})`,
            )
          : null;
        return el("div", {}, name, continuation(prompt, sample.texts[at]));
      }),
    );
    texts.style.minHeight = `${texts.offsetHeight}px`; // what is below stays in place while the slider moves
  };
  const slider = el("input", {
    type: "range",
    min: 0,
    max: steps.length - 1,
    value: steps.length - 1,
    "aria-label": "Step of the sample",
    oninput: (event) => show(+event.target.value),
  });
  const every = el(
    "details",
    {},
    el("summary", {}, `All ${steps.length} steps`),
    ...told.flatMap(({ r, run, sample }) =>
      sample.steps.map((step, i) =>
        el(
          "div",
          {},
          el(
            "p",
            { class: "note" },
            several ? swatch(r) : null,
            ...(several ? breakable(`${run.name}, `) : []),
            `step ${AXES.step.format(step)}`,
          ),
          continuation(prompt, sample.texts[i]),
        ),
      ),
    ),
  );
  show(steps.length - 1);
  return el(
    "div",
    { class: "card sample" },
    el("h3", {}, el("code", {}, prompt.trim() || "(nothing)")),
    steps.length > 1 ? el("div", { class: "slide" }, slider, output) : output,
    texts,
    steps.length > 1 ? every : null,
  );
}

// ---------------------------------------------------------------- all of it

const section = (title, ...children) => el("section", {}, el("h2", {}, title), ...children);
const specs = data.charts.flatMap((spec) =>
  several && spec.group
    ? Object.entries(spec.lines).map(([key, label]) => ({
        ...spec,
        title: `${spec.title}: ${label}`,
        lines: { [key]: label },
      }))
    : [spec],
);
const prompts = [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.prompt)))];
const [differing, final] = data.comparison;

const shown = document.getElementById("page");
shown.replaceChildren(
  ...[
    head(),
    several
      ? section(
          "Comparison",
          differing.rows.length
            ? comparison(differing)
            : el("p", { class: "note" }, "The runs have the same settings."),
          comparison(final),
        )
      : null,
    specs.length
      ? section(
          "Curves",
          controls(),
          el("div", { class: "charts" }, ...specs.map(chart)),
          el(
            "p",
            { class: "note help" },
            "Drag across a chart to zoom, double-click to go back. Arrow keys move the cursor of a focused chart." +
              (several && runs.some((run) => run.resumes.step.length)
                ? " A dashed vertical line in a run's color: it was resumed there."
                : ""),
          ),
        )
      : section("Curves", el("p", { class: "note" }, "Nothing was logged yet.")),
    prompts.length ? section("Samples", el("div", { class: "samples" }, ...prompts.map(sampleCard))) : null,
    ...runs.map((run, r) => {
      const cards = el("div", { class: "cards" }, ...run.tables.map(table));
      return several
        ? el("details", { class: "about" }, el("summary", {}, swatch(r), ...breakable(`All about ${run.name}`)), cards)
        : section("What it was", cards);
    }),
    el(
      "footer",
      {},
      `Made by llmkit from the log of the run${several ? "s" : ""}, ${data.made}.` +
        (data.live ? " A run writes its page at each evaluation; this one reloads itself to show it." : ""),
    ),
  ].filter((node) => node),
);

// A page of a run that goes on is read again, but not from under the hand of somebody who points or selects.
if (data.live) {
  setInterval(() => {
    if (!document.querySelector(".tip:not([hidden])") && !String(getSelection())) location.reload();
  }, 15_000);
}

let drawnAt = shown.clientWidth;
redraw();
new ResizeObserver(() => {
  if (shown.clientWidth === drawnAt) return;
  drawnAt = shown.clientWidth;
  requestAnimationFrame(redraw); // in a frame of its own: drawing changes sizes
}).observe(shown);
