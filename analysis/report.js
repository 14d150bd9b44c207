"use strict";
// The results page: tables that sort and filter, figures that zoom and tell their points. Everything is in the page.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  document.documentElement.classList.add("js");

  // --- tables ---------------------------------------------------------------------------------------------------

  const key = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.dataset.v ?? cell.textContent).trim();
    return text !== "" && isFinite(text) ? Number(text) : text;
  };
  // Numbers before words, what is empty last in both directions.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  };

  const sortable = (table) => {
    const heads = all("thead th", table);
    const sort = (column, direction) => {
      const sign = direction === "descending" ? -1 : 1;
      const keyed = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      keyed.sort(([a], [b]) => compare(a, b, sign));
      table.tBodies[0].append(...keyed.map(([, row]) => row));
      heads.forEach((head, i) => {
        if (i === column) head.setAttribute("aria-sort", direction);
        else head.removeAttribute("aria-sort");
      });
    };
    const turned = (column) => (heads[column].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      button.addEventListener("click", () => sort(column, turned(column)));
      head.append(button);
    });
    if (!table.classList.contains("cards")) return;
    // Cards have no heads to press.
    const choice = make("select", {}, make("option", { value: "" }, "as listed"));
    const listed = [...table.tBodies[0].rows];
    heads.forEach((head, i) => choice.append(make("option", { value: i }, head.textContent.trim())));
    choice.addEventListener("change", () => {
      if (choice.value !== "") return sort(Number(choice.value), "ascending");
      table.tBodies[0].append(...listed);
      heads.forEach((head) => head.removeAttribute("aria-sort"));
    });
    table.parentElement.before(make("label", { className: "sort-by" }, "Sort by ", choice));
  };
  all("table.sortable").forEach(sortable);

  const filter = document.getElementById("filter");
  if (filter) {
    const rows = all("#claims tbody tr");
    const verdicts = all("button[data-verdict]");
    const [words, paper, told] = ["words", "paper", "told"].map((name) => document.getElementById(name));
    const apply = () => {
      const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const pressed = verdicts.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.verdict);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !(
          asked.every((word) => text.includes(word)) &&
          (paper.value === "" || row.dataset.paper === paper.value) &&
          (pressed.length === 0 || pressed.includes(row.dataset.verdict))
        );
        shown += !row.hidden;
      }
      told.textContent = shown ? `${shown} of ${rows.length} claims` : "No claim matches.";
    };
    verdicts.forEach((button) =>
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
        apply();
      }),
    );
    words.addEventListener("input", apply);
    paper.addEventListener("change", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    filter.addEventListener("reset", () => {
      verdicts.forEach((button) => button.setAttribute("aria-pressed", "false"));
      setTimeout(apply); // the fields are emptied after this event
    });
    apply();
  }

  // --- commands -------------------------------------------------------------------------------------------------

  const copied = async (source) => {
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      return document.execCommand("copy");
    }
    return true;
  };
  all("button.copy").forEach((button) => {
    const name = button.textContent;
    button.addEventListener("click", async () => {
      button.textContent = (await copied(document.getElementById(button.dataset.of))) ? "Copied" : "Press Ctrl+C";
      setTimeout(() => (button.textContent = name), 1600);
    });
  });

  // --- figures --------------------------------------------------------------------------------------------------

  const NEAR = 28; // pixels
  const MOST_ZOOM = 40;

  const number = (value) => {
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(value.toPrecision(4)));
    const [digits, power] = value.toExponential(3).split("e");
    const raised = [...String(Number(power))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
    return `${Number(digits)} × 10${raised}`;
  };

  const figure = (frame) => {
    const svg = frame.querySelector("svg");
    const readout = frame.querySelector(".readout");
    const home = [0, 0, svg.viewBox.baseVal.width, svg.viewBox.baseVal.height];
    const data = frame.querySelector("script");
    const axes = data ? JSON.parse(data.textContent).axes : [];
    const series = axes.flatMap((a) => a.series.map((s) => ({ ...s, axes: a })));
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    ring.setAttribute("class", "ring");
    let view = [...home];
    let at = null; // [series, point] that is told

    const look = (x, y, w, h) => {
      const size = [Math.min(home[2], w), Math.min(home[3], h)];
      view = [x, y].map((corner, i) => Math.min(home[2 + i] - size[i], Math.max(0, corner))).concat(size);
      svg.setAttribute("viewBox", view.map((v) => v.toFixed(3)).join(" "));
      frame.classList.toggle("zoomed", size[0] < home[2] || size[1] < home[3]);
      if (at) tell(...at);
    };
    const inside = (clientX, clientY) => {
      const point = new DOMPoint(clientX, clientY).matrixTransform(svg.getScreenCTM().inverse());
      return [point.x, point.y];
    };
    const zoom = (factor, [x, y] = [view[0] + view[2] / 2, view[1] + view[3] / 2]) => {
      const k = Math.max(1 / factor, home[2] / MOST_ZOOM / view[2]);
      look(x - (x - view[0]) * k, y - (y - view[1]) * k, view[2] * k, view[3] * k);
    };
    const pan = (dx, dy) => look(view[0] + dx, view[1] + dy, view[2], view[3]);
    const whole = () => {
      frame.classList.remove("panel");
      look(...home);
    };

    const hush = () => {
      at = null;
      ring.remove();
      readout.hidden = true;
    };
    const tell = (s, point) => {
      at = [s, point];
      const scale = svg.getScreenCTM().a;
      ring.setAttribute("cx", point[0]);
      ring.setAttribute("cy", point[1]);
      ring.setAttribute("r", 6.5 / scale);
      svg.append(ring);
      const between = point.length > 5 ? ` (${number(point[4])} to ${number(point[5])})` : "";
      const line = (name, value) => make("div", {}, make("span", {}, name), make("b", {}, value));
      const swatch = make("i");
      swatch.style.background = s.colour;
      const lines = [line(s.axes.x || "x", number(point[2])), line(s.axes.y || "y", number(point[3]) + between)];
      readout.replaceChildren(...(s.name ? [make("p", {}, swatch, s.name)] : []), ...lines);
      readout.hidden = false;
      const box = frame.getBoundingClientRect();
      const place = new DOMPoint(point[0], point[1]).matrixTransform(svg.getScreenCTM());
      // Beside the point, to the right and below where there is room.
      const beside = (from, size, room) => Math.max(0, Math.min(from + 14 + size > room ? from - 14 - size : from + 14, room - size));
      readout.style.left = `${beside(place.x - box.left, readout.offsetWidth, box.width)}px`;
      readout.style.top = `${beside(place.y - box.top, readout.offsetHeight, box.height)}px`;
    };
    const hover = (clientX, clientY) => {
      const [x, y] = inside(clientX, clientY);
      const scale = svg.getScreenCTM().a;
      let [nearest, found] = [NEAR / scale, null];
      for (const s of series) {
        const [left, top, width, height] = s.axes.box;
        if (x < left || x > left + width || y < top || y > top + height) continue;
        for (const point of s.points) {
          const distance = Math.hypot(point[0] - x, point[1] - y);
          // What was drawn later lies on top.
          if (distance <= nearest) [nearest, found] = [distance, [s, point]];
        }
      }
      if (found) tell(...found);
      else hush();
    };
    // Along a series, or to the next one's point that is nearest.
    const step = (along, across) => {
      if (!series.length) return;
      if (!at) return tell(series[0], series[0].points[0]);
      let [s, point] = at;
      if (across) {
        s = series[(series.indexOf(s) + across + series.length) % series.length];
        const far = (p) => Math.hypot(p[0] - point[0], p[1] - point[1]);
        return tell(s, s.points.reduce((best, p) => (far(p) < far(best) ? p : best)));
      }
      tell(s, s.points[Math.min(s.points.length - 1, Math.max(0, s.points.indexOf(point) + along))]);
    };

    // Fingers and mouse. A wheel zooms once the figure was clicked (or with Ctrl, as a pinch on a pad says it), so that
    // one can scroll past it.
    const fingers = new Map();
    let moved = 0;
    svg.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event);
      moved = 0;
    });
    svg.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (!before) return hover(event.clientX, event.clientY);
      const [a, b] = [inside(before.clientX, before.clientY), inside(event.clientX, event.clientY)];
      moved += Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY);
      if (moved > 3 && !svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
      if (fingers.size === 1) pan(a[0] - b[0], a[1] - b[1]);
      if (fingers.size === 2) {
        const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
        const apart = (e) => Math.hypot(e.clientX - other.clientX, e.clientY - other.clientY);
        zoom(apart(event) / Math.max(1, apart(before)), inside(other.clientX, other.clientY));
      }
      fingers.set(event.pointerId, event);
    });
    const lift = (event) => {
      if (fingers.delete(event.pointerId) && event.type === "pointerup" && moved <= 3) hover(event.clientX, event.clientY);
    };
    svg.addEventListener("pointerup", lift);
    svg.addEventListener("pointercancel", lift);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !fingers.size && hush());
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== svg) return;
      event.preventDefault();
      zoom(Math.exp(-Math.max(-80, Math.min(80, event.deltaY)) / 250), inside(event.clientX, event.clientY));
    }, { passive: false });
    svg.addEventListener("dblclick", (event) => zoom(2, inside(event.clientX, event.clientY)));
    svg.addEventListener("blur", hush);

    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const keys = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: whole, Escape: hush };
    svg.addEventListener("keydown", (event) => {
      const arrow = arrows[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || !(arrow || keys[event.key])) return;
      event.preventDefault();
      if (!arrow) keys[event.key]();
      else if (event.shiftKey) pan((arrow[0] * view[2]) / 8, (arrow[1] * view[3]) / 8);
      else step(...arrow);
    });

    const tools = frame.parentElement.querySelector(".tools");
    const tool = (text, name, act) => {
      const button = make("button", { type: "button", title: name, ariaLabel: name }, text);
      button.addEventListener("click", act);
      tools.append(button);
    };
    tool("+", "Zoom in", () => zoom(1.5));
    tool("−", "Zoom out", () => zoom(1 / 1.5));
    tool("Reset", "Show the whole figure", whole);
    const panels = axes.filter((a) => a.box[2] * a.box[3] > 0.04 * home[2] * home[3]);
    (panels.length > 1 ? panels : []).forEach((a, i) => {
      const [x, y, w, h] = a.box;
      const name = `Panel ${i + 1}`;
      tool(name, a.title ? `${name}: ${a.title}` : name, () => {
        frame.classList.add("panel");
        look(x - 45, y - 22, w + 55, h + 60);
      });
    });
    tools.hidden = false;
  };
  all(".frame").forEach(figure);
})();
