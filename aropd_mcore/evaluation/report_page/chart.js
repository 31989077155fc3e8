// Elements, number formats and charts. All text is inserted as text nodes, never as HTML.

function element(namespace, tag, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const h = (tag, attributes, ...children) => element(null, tag, attributes, children);
const fill = (host, ...children) =>
  host.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
const svg = (tag, attributes, ...children) =>
  element("http://www.w3.org/2000/svg", tag, attributes, children);

const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const seriesColor = (index) => `var(--s${index % 8})`;
const seriesDash = (index) => DASHES[Math.floor(index / 2) % DASHES.length];

/** Formats a number in a unit: nats, share, tokens, seconds, or none. */
function format(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const minus = (text) => text.replace("-", "−");
  if (unit === "share") {
    const percent = 100 * value,
      size = Math.abs(percent);
    return minus(`${percent.toFixed(size === 0 || size >= 10 ? 1 : size >= 0.1 ? 2 : 3)} %`);
  }
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (unit === "tokens" && (size >= 100 || Number.isInteger(value)))
    return Math.round(value).toLocaleString("en").replaceAll(",", "\u2009");
  if (unit === "seconds" && size < 5e-4) return "< 0.001";
  if (size >= 1e5 || size < 1e-4) {
    const [digits, power] = value.toExponential(2).split("e");
    return minus(`${digits}e${Number(power)}`);
  }
  const digits =
    size >= 1000
      ? 0
      : size >= 100
        ? 1
        : size >= 1
          ? 2
          : unit === "seconds"
            ? 3
            : size >= 0.01
              ? 4
              : 5;
  return minus(value.toFixed(digits));
}
const withUnit = (value, unit) =>
  (unit === "nats" || unit === "seconds") && value !== null
    ? `${format(value, unit)} ${unit === "nats" ? "nats" : "s"}`
    : format(value, unit);

function ticks(low, high, count, unit) {
  if (!(high > low)) return [low];
  const scale = unit === "share" ? 100 : 1,
    raw = (scale * (high - low)) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10]
    .map((factor) => factor * power)
    .find((size) => size >= raw * 0.999);
  const positions = [];
  for (
    let at = Math.ceil((scale * low) / step - 1e-9) * step;
    at <= scale * high + step * 1e-6;
    at += step
  )
    positions.push(at / scale);
  return positions;
}
function tickText(value, all, unit) {
  const scale = unit === "share" ? 100 : 1,
    step = all.length > 1 ? scale * (all[1] - all[0]) : 1;
  const digits = Math.max(
    0,
    Math.min(
      6,
      -Math.floor(Math.log10(step) + 1e-9) +
        (Math.abs(step / 10 ** Math.floor(Math.log10(step)) - 2.5) < 0.01 ? 1 : 0),
    ),
  );
  const size = Math.abs(scale * value);
  const text =
    size >= 1e6
      ? (scale * value).toExponential(0).replace("e+", "e")
      : (scale * value).toFixed(digits);
  return text.replace(/^-/, "−") + (unit === "share" ? " %" : "");
}

function key(color, dash, kind) {
  return svg(
    "svg",
    { class: "key", viewBox: "0 0 22 12", "aria-hidden": "true" },
    kind === "block"
      ? svg("rect", { x: 4, y: 0, width: 12, height: 12, rx: 2, style: `fill:${color}` })
      : svg("line", {
          x1: 0,
          x2: 22,
          y1: 6,
          y2: 6,
          "stroke-width": 2.5,
          "stroke-dasharray": dash,
          style: `stroke:${color}`,
        }),
  );
}
const legend = (series) =>
  h(
    "ul",
    { class: "legend" },
    series.map((one) => h("li", {}, key(one.color, one.dash, one.kind), one.name)),
  );

/**
 * Line chart over numbers or categories. Its crosshair follows the pointer and the arrow keys.
 *
 * spec: title, series [{name, color, dash, points [{x, y, low, high}], faint [{x, y}]}], xLabel,
 * yLabel, unit, categories (names of x = 0, 1, ...), dots, dodge (shift series apart), height,
 * fromZero, range.
 */
function lineChart(host, spec) {
  host.classList.add("chart");
  let state = null;
  const draw = () => {
    const width = Math.max(host.clientWidth, 220),
      height = spec.height || 300;
    const all = spec.series
      .flatMap((one) => [...one.points, ...(one.faint || [])])
      .filter((p) => p.y !== null && p.y !== undefined);
    host.replaceChildren();
    if (!all.length)
      return void host.append(h("p", { class: "note" }, "No selected run reports this metric."));
    const ys = all.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
    let low = Math.min(...ys),
      high = Math.max(...ys);
    if (spec.fromZero && low > 0) low = 0;
    if (spec.range) [low, high] = spec.range;
    if (low === high)
      [low, high] = [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
    const yTicks = ticks(low, high, Math.max(2, Math.round(height / 65)), spec.unit);
    const step = yTicks.length > 1 ? yTicks[1] - yTicks[0] : 0;
    if (!spec.range && step) {
      low = Math.min(low, yTicks[0]);
      high = Math.max(high, yTicks.at(-1));
      if (low < yTicks[0] - step * 1e-6) {
        low = yTicks[0] - step;
        yTicks.unshift(low);
      }
      if (high > yTicks.at(-1) + step * 1e-6) {
        high = yTicks.at(-1) + step;
        yTicks.push(high);
      }
    }
    const names = yTicks.map((at) => tickText(at, yTicks, spec.unit));
    const left = 12 + 7 * Math.max(...names.map((name) => name.length)),
      right = 14,
      top = 26,
      bottom = 40;
    const xs = [...new Set(all.map((p) => p.x))].sort((a, b) => a - b);
    const pad = spec.categories ? 0.5 : 0;
    const first = spec.categories ? -pad : xs[0],
      last = spec.categories ? spec.categories.length - 1 + pad : xs.at(-1);
    const acrossPlot = (x) => left + ((x - first) / (last - first || 1)) * (width - left - right),
      px = acrossPlot;
    const py = (y) => top + (1 - (y - low) / (high - low)) * (height - top - bottom);
    const root = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      height,
      role: "img",
      tabindex: 0,
      "aria-label": `${spec.title}. Use the arrow keys to read the values.`,
    });
    root.append(svg("text", { x: 0, y: 12 }, spec.yLabel));
    yTicks.forEach((at, i) =>
      root.append(
        svg("line", { class: "axis", x1: left, x2: width - right, y1: py(at), y2: py(at) }),
        svg("text", { x: left - 8, y: py(at) + 4, "text-anchor": "end" }, names[i]),
      ),
    );
    const room = Math.max(2, Math.floor((width - left - right) / 80));
    const xTicks = spec.categories ? spec.categories.map((_, i) => i) : ticks(first, last, room);
    const every = spec.categories
      ? Math.ceil(
          (spec.categories.length * 9 * Math.max(...spec.categories.map((c) => c.length))) /
            (width - left - right),
        )
      : 1;
    xTicks.forEach(
      (at, i) =>
        i % every ||
        root.append(
          svg(
            "text",
            { x: px(at), y: height - bottom + 18, "text-anchor": "middle" },
            spec.categories ? spec.categories[at] : tickText(at, xTicks),
          ),
        ),
    );
    root.append(
      svg(
        "text",
        { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" },
        spec.xLabel,
      ),
    );
    spec.series.forEach((one, number) => {
      const aside = spec.dodge ? 9 * (number - (spec.series.length - 1) / 2) : 0;
      const px = (x) => acrossPlot(x) + aside;
      const path = (points) => {
        let text = "",
          open = false;
        for (const p of points) {
          if (p.y === null || p.y === undefined) {
            open = false;
            continue;
          }
          text += `${open ? "L" : "M"}${px(p.x).toFixed(1)} ${py(p.y).toFixed(1)}`;
          open = true;
        }
        return text;
      };
      if (one.faint)
        root.append(
          svg("path", {
            d: path(one.faint),
            fill: "none",
            "stroke-width": 1,
            opacity: 0.28,
            style: `stroke:${one.color}`,
          }),
        );
      for (const p of one.points)
        if (p.low !== undefined && p.low !== null)
          root.append(
            svg("line", {
              x1: px(p.x),
              x2: px(p.x),
              y1: py(p.low),
              y2: py(p.high),
              "stroke-width": 1.5,
              style: `stroke:${one.color}`,
            }),
          );
      root.append(
        svg("path", {
          d: path(one.points),
          fill: "none",
          "stroke-width": 2,
          "stroke-linejoin": "round",
          "stroke-dasharray": one.dash || null,
          style: `stroke:${one.color}`,
        }),
      );
      if (spec.dots || one.points.length < 2)
        for (const p of one.points)
          if (p.y !== null)
            root.append(
              svg("circle", { cx: px(p.x), cy: py(p.y), r: 3.5, style: `fill:${one.color}` }),
            );
    });
    const cross = svg("line", {
      class: "cross",
      y1: top,
      y2: height - bottom,
      visibility: "hidden",
    });
    root.append(cross);
    const tip = h("div", { class: "tip", hidden: true, role: "status" });
    let index = -1;
    const show = (at) => {
      index = Math.max(0, Math.min(xs.length - 1, at));
      const x = xs[index];
      cross.setAttribute("x1", px(x));
      cross.setAttribute("x2", px(x));
      cross.setAttribute("visibility", "visible");
      const rows = spec.series
        .map((one) => [one, one.points.find((p) => p.x >= x - 1e-9)])
        .filter(([, p]) => p && Math.abs(p.x - x) < 1e-9);
      tip.replaceChildren(
        h("b", {}, spec.categories ? spec.categories[x] : `${spec.xName || spec.xLabel} ${x}`),
        ...rows.map(([one, p]) =>
          h(
            "div",
            {},
            h("span", {}, key(one.color, one.dash), one.name),
            h("span", {}, withUnit(p.y, spec.unit) + (p.note ? ` ${p.note}` : "")),
          ),
        ),
      );
      tip.hidden = false;
      const place =
        px(x) + 12 + tip.offsetWidth > width ? px(x) - 12 - tip.offsetWidth : px(x) + 12;
      tip.style.left = `${Math.max(0, Math.min(place, width - tip.offsetWidth))}px`;
      tip.style.top = `${top}px`;
    };
    const hide = () => {
      tip.hidden = true;
      cross.setAttribute("visibility", "hidden");
      index = -1;
    };
    root.addEventListener("pointermove", (event) => {
      const at =
        ((event.clientX - root.getBoundingClientRect().left) * width) /
        root.getBoundingClientRect().width;
      let best = 0;
      xs.forEach((x, i) => {
        if (Math.abs(px(x) - at) < Math.abs(px(xs[best]) - at)) best = i;
      });
      show(best);
    });
    root.addEventListener("pointerleave", hide);
    root.addEventListener("blur", hide);
    root.addEventListener("keydown", (event) => {
      const move = {
        ArrowRight: 1,
        ArrowLeft: -1,
        PageDown: 10,
        PageUp: -10,
        Home: -Infinity,
        End: Infinity,
      }[event.key];
      if (event.key === "Escape") hide();
      if (move === undefined) return;
      event.preventDefault();
      show(
        index < 0
          ? move < 0 && move !== -Infinity
            ? xs.length - 1
            : move === Infinity
              ? xs.length - 1
              : 0
          : index + move,
      );
    });
    host.append(root, tip);
    state = width;
  };
  draw();
  new ResizeObserver(() => {
    if (Math.max(host.clientWidth, 220) !== state) requestAnimationFrame(draw);
  }).observe(host);
  return {
    update(next) {
      spec = next;
      draw();
    },
  };
}

/**
 * Histogram of shares on a logarithmic scale, because rare values matter.
 *
 * spec: title, xLabel, yLabel, bins [{from, to, share, name, color}].
 */
function histogram(host, spec) {
  host.classList.add("chart");
  const draw = () => {
    const width = Math.max(host.clientWidth, 220),
      height = 250,
      left = 60,
      right = 8,
      top = 26,
      bottom = 40;
    const present = spec.bins.filter((bin) => bin.share > 0).map((bin) => bin.share);
    const lowest = 10 ** Math.floor(Math.log10(Math.min(...present)) - 0.01);
    const py = (share) => top + (Math.log10(share) / Math.log10(lowest)) * (height - top - bottom);
    const [first, last] = [spec.bins[0].from, spec.bins.at(-1).to];
    const px = (x) => left + ((x - first) / (last - first)) * (width - left - right);
    const root = svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title },
      svg("text", { x: 0, y: 12 }, spec.yLabel),
    );
    for (let at = 1; at > lowest * 0.5; at /= 10)
      root.append(
        svg("line", { class: "axis", x1: left, x2: width - right, y1: py(at), y2: py(at) }),
        svg(
          "text",
          { x: left - 8, y: py(at) + 4, "text-anchor": "end" },
          `${Number((100 * at).toPrecision(1))} %`,
        ),
      );
    for (const bin of spec.bins)
      if (bin.share > 0)
        root.append(
          svg(
            "rect",
            {
              x: px(bin.from) + 0.5,
              width: Math.max(px(bin.to) - px(bin.from) - 1, 1),
              y: py(bin.share),
              height: Math.max(height - bottom - py(bin.share), 1),
              style: `fill:${bin.color}`,
            },
            svg("title", {}, `${bin.name}: ${format(bin.share, "share")}`),
          ),
        );
    ticks(first, last, width / 70).forEach((at, _, all) =>
      root.append(
        svg(
          "text",
          { x: px(at), y: height - bottom + 18, "text-anchor": "middle" },
          tickText(at, all),
        ),
      ),
    );
    root.append(
      svg(
        "text",
        { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" },
        spec.xLabel,
      ),
    );
    host.replaceChildren(root);
  };
  draw();
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(host);
}

/** Small line chart without axes. */
function sparkline(series) {
  const all = series.flatMap((one) => one.points).filter((p) => p.y !== null);
  const root = svg("svg", {
    viewBox: "0 0 100 30",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  const [x0, x1] = [Math.min(...all.map((p) => p.x)), Math.max(...all.map((p) => p.x))];
  const [y0, y1] = [Math.min(...all.map((p) => p.y)), Math.max(...all.map((p) => p.y))];
  for (const one of series) {
    const d = one.points
      .filter((p) => p.y !== null)
      .map(
        (p, i) =>
          `${i ? "L" : "M"}${((100 * (p.x - x0)) / (x1 - x0 || 1)).toFixed(2)} ${(28 - (26 * (p.y - y0)) / (y1 - y0 || 1)).toFixed(2)}`,
      )
      .join("");
    root.append(
      svg("path", {
        d,
        fill: "none",
        "stroke-width": 1.5,
        "vector-effect": "non-scaling-stroke",
        "stroke-dasharray": one.dash || null,
        style: `stroke:${one.color}`,
      }),
    );
  }
  return root;
}

function table(heads, rows, attributes) {
  const [first, ...others] = heads;
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": attributes.label },
    h(
      "table",
      { class: attributes.class || null },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, ...[first].flat()),
          others.map((head) => h("th", { scope: "col" }, ...[head].flat())),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([name, ...cells]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, ...[name].flat()),
            cells.map((cell) =>
              cell instanceof HTMLTableCellElement ? cell : h("td", {}, ...[cell].flat()),
            ),
          ),
        ),
      ),
    ),
  );
}
