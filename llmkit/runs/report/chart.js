// ---------------------------------------------------------------- the chart

// Draws one chart into `figure`. Each line has `label`, `color`, `xs`, `ys` (null where there is no number) and, where
// they apply, `smooth` (a moving average), `dots`, `dash`; each mark, a vertical line, has `x`, and `text` or `color`.
// `view` is what the switches say: `x`, `log`, `smooth`, `zoom`.
function drawChart(figure, spec, lines, marks, view, onZoom) {
  figure.replaceChildren(el("figcaption", {}, spec.title));
  const frame = frameOf(figure, spec, lines, view);
  if (!frame) {
    figure.append(el("p", { class: "empty" }, lines.length ? "No values in this range." : "No run is shown."));
    return;
  }
  const ends = lines.map((line) => `${line.label} ends at ${frame.write(line.ys.findLast((y) => y !== null) ?? NaN)}`);
  const picture = svg("svg", {
    viewBox: `0 0 ${frame.width} ${frame.height}`,
    role: "img",
    "aria-label": `${spec.title} over ${frame.axis.label}: ${ends.join(", ")}`,
    tabindex: 0,
  });
  drawAxes(picture, frame, spec, view);
  const plot = clipped(picture, frame);
  for (const mark of marks) drawMark(plot, frame, mark, spec);
  for (const line of lines) drawLine(plot, frame, line, view.smooth && line.smooth);
  figure.append(picture, addCursor(figure, picture, frame, lines, view));
  addZoom(picture, frame, onZoom);
}

// What is where: the ranges of both axes and the functions from values to pixels; null where there is nothing to draw.
function frameOf(figure, spec, lines, view) {
  const log = Boolean(spec.log && view.log);
  const seen = ([x, y]) => y !== null && (!log || y > 0) && (!view.zoom || (x >= view.zoom[0] && x <= view.zoom[1]));
  const inside = lines.flatMap((line) => line.xs.map((x, i) => [x, line.ys[i]])).filter(seen);
  if (!inside.length) return null;
  let [x0, x1] = view.zoom || limits(inside.map(([x]) => x));
  if (!view.zoom && x0 < 0.1 * x1) x0 = 0;
  if (x1 === x0) [x0, x1] = x0 ? [0, 2 * x0] : [0, 1];
  let [y0, y1] = limits(inside.map(([, y]) => y));
  if (log) {
    const room = Math.max((y1 / y0) ** 0.05, 1.005);
    [y0, y1] = [y0 / room, y1 * room];
  } else {
    if (y0 > 0 && y0 < 0.35 * y1) y0 = 0; // nearly: then from zero
    const room = y1 > y0 ? 0.06 * (y1 - y0) : 0.1 * Math.abs(y1) || 1;
    [y0, y1] = [y0 === 0 ? 0 : y0 - room, y1 + room];
  }
  const width = Math.max(260, figure.clientWidth - 1);
  const height = spec.wide ? Math.min(400, Math.max(260, width * 0.4)) : 210;
  const write = spec.percent ? percent : decimal;
  const writeTick = !spec.percent && y1 >= 1e4 ? quantity : write;
  const yTicks = (log ? logTicks : linearTicks)(y0, y1, spec.wide ? 6 : 4);
  const left = 14 + 6.6 * Math.max(...yTicks.map((tick) => writeTick(tick).length));
  const [right, top, bottom] = [width - 16, 10, height - 34];
  const scale = log ? Math.log : (y) => y;
  return {
    axis: AXES[view.x],
    log,
    x0,
    x1,
    y0,
    y1,
    width,
    height,
    left,
    right,
    top,
    bottom,
    write,
    writeTick,
    yTicks,
    px: (x) => left + ((x - x0) / (x1 - x0)) * (right - left),
    py: (y) => bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (bottom - top),
    xAt: (clientX, box) => x0 + ((((clientX - box.left) / box.width) * width - left) / (right - left)) * (x1 - x0),
    shows: (y) => y !== null && (!log || y > 0),
  };
}

function drawAxes(picture, frame, spec, view) {
  const { axis, x0, x1, left, right, bottom, px, py } = frame;
  for (const tick of frame.yTicks) {
    const text = { class: "tick", x: left - 7, y: py(tick) + 4, "text-anchor": "end" };
    picture.append(svg("line", { class: "grid", x1: left, x2: right, y1: py(tick), y2: py(tick) }));
    picture.append(svg("text", text, frame.writeTick(tick)));
  }
  const count = Math.max(2, Math.floor((right - left) / (spec.wide || view.x === "seconds" ? 95 : 60)));
  const end = x1 + 0.004 * (x1 - x0); // 9.9999 billion tokens are 10
  const ticks = view.x === "seconds" ? timeTicks(x0, end, count) : linearTicks(x0, end, count, view.x === "step");
  for (const tick of ticks) {
    const at = px(tick);
    const anchor = at > right - 24 ? "end" : at < left + 4 ? "start" : "middle";
    const x = anchor === "end" ? Math.min(at + 14, frame.width - 1) : anchor === "start" ? at - 4 : at;
    picture.append(svg("line", { class: "notch", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    picture.append(svg("text", { class: "tick", x, y: bottom + 17, "text-anchor": anchor }, axis.format(tick)));
  }
  picture.append(svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
  picture.append(svg("text", { class: "axis", x: right, y: bottom + 31, "text-anchor": "end" }, axis.label));
}

let clips = 0;

function clipped(picture, { left, right, top, bottom }) {
  const clip = svg("clipPath", { id: `clip-${++clips}` });
  clip.append(svg("rect", { x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8 }));
  const plot = svg("g", { "clip-path": `url(#clip-${clips})` });
  picture.append(clip, plot);
  return plot;
}

function drawMark(plot, { x0, x1, width, top, bottom, px }, mark, spec) {
  if (mark.x < x0 || mark.x > x1) return;
  const at = px(mark.x);
  const style = mark.color ? { style: `stroke:${mark.color}` } : {};
  plot.append(svg("line", { class: "mark", x1: at, x2: at, y1: top, y2: bottom, ...style }));
  if (!spec.wide || !mark.text) return;
  const place = at > width - 90 ? { x: at - 5, "text-anchor": "end" } : { x: at + 5 };
  plot.append(svg("text", { class: "tick", y: top + 9, ...place }, mark.text));
}

function drawLine(plot, { px, py, left, right, shows }, line, smooth) {
  const path = (ys) => {
    let pen = "M"; // lifted where there is no number
    return ys
      .map((y, i) => {
        const point = shows(y) ? `${pen}${px(line.xs[i]).toFixed(1)} ${py(y).toFixed(1)}` : "";
        pen = shows(y) ? "L" : "M";
        return point;
      })
      .join("");
  };
  const style = { stroke: line.color, "stroke-dasharray": line.dash || "none" };
  const raw = smooth ? "line faint" : line.dots ? "line strong" : "line";
  plot.append(svg("path", { class: raw, ...style, d: path(line.ys) }));
  if (smooth) plot.append(svg("path", { class: "line", ...style, d: path(line.smooth) }));
  const dots = line.dots && line.xs.length <= (right - left) / 14;
  const shown = line.ys.map(shows);
  shown.forEach((there, i) => {
    const y = line.ys[i];
    const alone = !shown[i - 1] && !shown[i + 1]; // a path through one point draws nothing
    if (there && (dots || alone))
      plot.append(svg("circle", { class: "dot", cx: px(line.xs[i]), cy: py(y), r: 3.4, fill: line.color }));
  });
}

// What is under the pointer, or under the cursor that the arrow keys move, in a box beside it.
function addCursor(figure, picture, frame, lines, view) {
  const { axis, x0, x1, top, bottom, width, px, py } = frame;
  const cursor = svg("line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
  const spots = svg("g");
  picture.append(cursor, spots);
  const tip = el("div", { class: "tip", role: "status", hidden: true });
  const stops = [...new Set(lines.flatMap((line) => line.xs))].filter((x) => x >= x0 && x <= x1).sort((a, b) => a - b);
  let stop = -1;
  const hide = () => {
    stop = -1;
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
    spots.replaceChildren();
  };
  const show = (index) => {
    if (!stops.length) return;
    stop = Math.min(Math.max(index, 0), stops.length - 1);
    const x = stops[stop];
    const near = lines
      .map((line) => ({ line, at: line.xs[nearest(line.xs, x)], y: line.ys[nearest(line.xs, x)] }))
      .filter(({ at, y }) => y !== null && at >= x0 && at <= x1 && Math.abs(px(at) - px(x)) < 24);
    for (const [key, value] of [
      ["x1", px(x)],
      ["x2", px(x)],
      ["visibility", "visible"],
    ])
      cursor.setAttribute(key, value);
    spots.replaceChildren(
      ...near
        .filter(({ y }) => frame.shows(y))
        .map(({ line, at, y }) => svg("circle", { class: "dot", cx: px(at), cy: py(y), r: 4.5, fill: line.color })),
    );
    const rows = near.map(({ line, at, y }) =>
      el(
        "div",
        {},
        el("span", { class: "swatch", style: `background:${line.color}` }),
        el("span", {}, line.label),
        el("b", {}, frame.write(y)),
        at === x ? null : el("small", {}, ` at ${axis.format(at)}`),
      ),
    );
    const unit = view.x === "tokens" ? ` ${axis.label}` : "";
    tip.replaceChildren(
      el("div", { class: "at" }, (view.x === "step" ? "step " : "") + axis.format(x) + unit),
      ...rows,
    );
    tip.hidden = false;
    const [at, room] = [(px(x) / width) * figure.clientWidth, figure.clientWidth - tip.offsetWidth];
    tip.style.left = `${Math.max(0, Math.min(at + 14 > room ? at - 14 - tip.offsetWidth : at + 14, room))}px`;
  };
  const point = (event) => show(nearest(stops, frame.xAt(event.clientX, picture.getBoundingClientRect())));
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointerleave", hide);
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (event.key === "Escape") hide();
    if (jump === undefined) return;
    event.preventDefault();
    show(stop + jump);
  });
  return tip;
}

// A drag of the mouse chooses a range of x; a double click gives the whole back.
function addZoom(picture, { x0, x1, top, bottom, px, xAt }, onZoom) {
  const chosen = svg("rect", { class: "chosen", y: top, height: bottom - top, visibility: "hidden" });
  picture.append(chosen);
  let from = null;
  const range = (event) => {
    const to = xAt(event.clientX, picture.getBoundingClientRect());
    return [Math.max(x0, Math.min(from, to)), Math.min(x1, Math.max(from, to))];
  };
  picture.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    picture.setPointerCapture(event.pointerId);
    from = xAt(event.clientX, picture.getBoundingClientRect());
  });
  picture.addEventListener("pointermove", (event) => {
    if (from === null) return;
    const [low, high] = range(event).map(px);
    for (const [key, value] of [
      ["x", low],
      ["width", Math.max(0, high - low)],
      ["visibility", "visible"],
    ]) {
      chosen.setAttribute(key, value);
    }
  });
  picture.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const [low, high] = range(event);
    from = null;
    chosen.setAttribute("visibility", "hidden");
    if (px(high) - px(low) > 8) onZoom([low, high]);
  });
  picture.addEventListener("dblclick", () => onZoom(null));
}
