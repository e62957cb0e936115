/* The leaderboard page: filters, sorts, opens and draws what Python computed. Nothing is averaged, ranked or rounded here, and names
 * reach the document as text only. Sorting and the state of rows are TanStack Table's (table-core.min.js). */
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const { createTable, getCoreRowModel, getSortedRowModel } = globalThis.TableCore;
  const { el, svg } = globalThis.Elements;
  const DASH = "\u2013";
  const CROWD = 45; // points of a plane beyond which it has no arrows
  const LIMIT = 60; // lines of a block before "show all"
  const SHARES = [["acc", "ACC"], ["asr", "ASR"], ["ra", "RA"], ["d_acc", "dACC"]];
  const SELECTIONS = ["validation", "default", "strongest", "canary", "oracle", "leaky"];
  const MARKS = { validation: "o", default: "s", oracle: "X" };  // the others would crowd the dial
  const SHAPES = {
    o: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    s: "M-4.6-4.6h9.2v9.2h-9.2Z",
    D: "M0-6L6 0L0 6L-6 0Z",
    "^": "M0-5.5L5.8 4.5H-5.8Z",
    v: "M0 5.5L5.8-4.5H-5.8Z",
    "<": "M-5.5 0L4.5-5.8V5.8Z",
    ">": "M5.5 0L-4.5-5.8V5.8Z",
    P: "M-2-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
    X: "M-5.3-2.6l2.7-2.7L0-2.7l2.6-2.6l2.7 2.7L2.7 0l2.6 2.6l-2.7 2.7L0 2.7l-2.6 2.6l-2.7-2.7L-2.7 0Z",
    "*": "M0-7L1.65-2.27L6.66-2.16L2.66.87L4.11 5.66L0 2.8L-4.11 5.66L-2.66.87L-6.66-2.16L-1.65-2.27Z",
  };

  const compared = data.tracks.length > 0; // otherwise the matrix holds attacked models and nobody who defends them

  const word = (number) => data.words[number];
  const entryOf = (line) => data.entries[line.e];
  const placeOf = (line) => data.scenarios[line.p];
  const nameOf = (line) => `${word(entryOf(line).name)}, ${word(entryOf(line).scope)}`;
  const placeWords = (place) => `${word(place.a)} on ${word(place.b)}, ${word(place.d)}`;
  const dead = (line) => line.p !== undefined && !placeOf(line).implanted;

  function facts(numbers) {
    const pairs = [];
    for (let at = 0; at < numbers.length; at += 2) {
      pairs.push(el("dt", {}, word(numbers[at])), el("dd", {}, word(numbers[at + 1])));
    }
    return el("dl", { class: "facts" }, pairs);
  }

  function glyph(line) {
    const [colour, shape] = entryOf(line).look;
    return svg("svg", { class: "glyph", viewBox: "-8 -8 16 16", "aria-hidden": "true" },
      svg("path", { class: `mark k${colour}`, d: SHAPES[shape] }));
  }

  // -- which lines there are ---------------------------------------------------------------------------------------------------

  const VIEWS = { means: "Means over scenarios", places: "By scenario", cells: "Every attacked model" };
  const start = { view: "means", track: "", selection: "", dataset: "", backbone: "", attack: "", role: "", name: "" };
  const choice = { ...start };
  const all = new Set(); // blocks that show all of their lines

  const within = (place) => (!choice.dataset || word(place.d) === choice.dataset)
    && (!choice.backbone || word(place.b) === choice.backbone) && (!choice.attack || word(place.a) === choice.attack);
  /** A mean is over all implanted scenarios; where some are filtered away, the single scenarios are shown instead. */
  const partial = () => choice.view === "means" && data.scenarios.some((place) => place.implanted && !within(place));
  const shown = () => (partial() ? "places" : choice.view);

  function lines() {
    const view = shown();
    const chosen = data.tracks.map((track) => choice.selection || track.judged);
    const passes = (line) => line.s === chosen[line.t] && (!choice.track || word(data.tracks[line.t].name) === choice.track)
      && (!choice.role || (line.role === "defense") === (choice.role === "defense"))
      && nameOf(line).toLowerCase().includes(choice.name.toLowerCase()) && (view === "means" || within(placeOf(line)));
    const found = (view === "means" ? data.means : data.places).filter(passes);
    if (view !== "cells") return found;
    return found.flatMap(({ t, s, e, role, p, cells }) => cells.map((c) => ({ ...data.cells[c].by[s], t, s, e, role, p, c })));
  }

  const figure = (name) => (line) => (line[name] ? line[name][0] : undefined);
  const number = { sortingFn: "basic", sortUndefined: "last" };
  const text = { sortingFn: "alphanumeric" };
  const columns = [
    { id: "place", header: "#", accessorFn: (line) => line.place || undefined, ...number, views: ["means"] },
    { id: "name", header: "Defense", accessorFn: nameOf, ...text },
    { id: "where", header: "Scenario", accessorFn: (line) => (line.p === undefined ? "" : placeWords(placeOf(line))), ...text,
      views: ["places", "cells"] },
    { id: "seed", header: "Seed", accessorFn: (line) => (line.c === undefined ? undefined : data.cells[line.c].seed), ...number,
      views: ["cells"] },
    ...SHARES.map(([id, header]) => ({ id, header, accessorFn: figure(id), ...number, sortDescFirst: id !== "asr" })),
    { id: "cost", header: "Cost", accessorFn: figure("cost"), ...number, sortDescFirst: false },
    { id: "rank", header: "Rank", accessorFn: figure("rank"), ...number, sortDescFirst: false, views: ["means", "places"] },
    { id: "ok", header: "Cells", accessorFn: (line) => line.ok, ...number, views: ["means", "places"] },
  ];

  const table = createTable({
    data: lines(), columns, renderFallbackValue: null, autoResetAll: false, enableRowSelection: true,
    getRowId: (line) => [line.t, line.s, line.e, line.p ?? "", line.c ?? ""].join("-"),
    getCoreRowModel: getCoreRowModel(), getSortedRowModel: getSortedRowModel(), getRowCanExpand: () => true, state: {},
    onStateChange: (change) => table.setOptions((old) => ({ ...old, state: typeof change === "function" ? change(old.state) : change })),
  });
  const state = { ...table.initialState, pagination: { pageIndex: 0, pageSize: Number.MAX_SAFE_INTEGER } };
  table.setOptions((old) => ({ ...old, state }));

  function filter() {
    table.setOptions((old) => ({ ...old, data: lines() }));
    render();
  }

  // -- the plane and the dials -------------------------------------------------------------------------------------------------

  function grid(frame, xTicks, yTicks, xWords, yWords) {
    const { left, right, top, bottom, x, y } = frame;
    return [
      ...yTicks.map((tick) => [svg("path", { class: "grid", d: `M${left} ${y(tick)}H${right}` }),
        svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick))]),
      ...xTicks.map((tick) => [svg("path", { class: "grid", d: `M${x(tick)} ${top}V${bottom}` }),
        svg("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, String(tick))]),
      svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }),
      svg("text", { x: (left + right) / 2, y: bottom + 31, "text-anchor": "middle" }, xWords),
      svg("text", { x: left - 30, y: top - 8 }, yWords),
    ].flat();
  }

  /** ACC against ASR of some lines of one track; arrows start at the undefended model of the same place. */
  function plane(rows) {
    const picked = rows.filter((row) => row.getIsSelected());
    const points = (picked.length ? picked : rows).map((row) => row.original).filter((line) => line.acc && line.asr);
    if (!points.length) return null;
    const lowest = Math.min(...points.map((line) => 100 * line.acc[0]));
    const floor = [90, 80, 50].find((step) => lowest > step + 0.5) ?? 0;
    const frame = { left: 40, right: 350, top: 26, bottom: 290 };
    frame.x = (value) => frame.left + ((frame.right - frame.left) * value) / 100;
    frame.y = (value) => frame.bottom - ((frame.bottom - frame.top) * (value - floor)) / (100 - floor);
    const at = (line) => [frame.x(100 * line.asr[0]), frame.y(100 * line.acc[0])];
    const world = (line) => `${line.p}-${line.c === undefined ? "" : data.cells[line.c].seed}`;
    const origin = new Map(rows.map((row) => row.original).filter((line) => line.role === "reference" && line.acc && line.asr)
      .map((line) => [world(line), line]));
    const marks = [];
    for (const line of points) {
      const [x, y] = at(line);
      const from = origin.get(world(line));
      const [colour, shape] = entryOf(line).look;
      if (from && from !== line && points.length <= CROWD) {
        const [x0, y0] = at(from);
        if (Math.hypot(x - x0, y - y0) > 8 && y0 <= frame.bottom) {
          marks.unshift(svg("path", { class: `arrow k${colour}`, d: `M${x0.toFixed(1)} ${y0.toFixed(1)}L${x.toFixed(1)} ${y.toFixed(1)}` }));
        }
      }
      const where = line.p === undefined ? "" : `; ${placeWords(placeOf(line))}`;
      marks.push(svg("path", {
        class: `mark k${colour}${dead(line) ? " faint" : ""}`, d: SHAPES[shape], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
      }, svg("title", {}, `${nameOf(line)}${where}: ACC ${line.acc[1]} %, ASR ${line.asr[1]} %`)));
    }
    const ticks = [0, 20, 40, 60, 80, 100];
    const heights = [0, 1, 2, 3, 4, 5].map((step) => floor + (step * (100 - floor)) / 5);
    const words = `${picked.length ? "The ticked lines" : "All lines shown (tick some to draw them alone)"}, each with the mark beside its name.`
      + `${points.length <= CROWD ? " Strokes start at the undefended model." : ""} The best corner is upper left.`
      + `${floor ? ` ACC starts at ${floor} %.` : ""}`;
    return [
      svg("svg", { viewBox: "0 0 372 330", role: "img", "aria-label": `Plane of ACC against ASR, ${points.length} points; the table holds their figures` },
        grid(frame, ticks, heights, "ASR in %", "ACC in %"), marks),
      el("figcaption", {}, words),
    ];
  }

  const tickWords = (value) => String(Number(value.toPrecision(3)));

  /** ACC, ASR and RA of some cells along their dial, a path per seed, with a mark at what each selection chose. */
  function dial(cells) {
    const curves = cells.filter((cell) => cell.curve);
    if (!curves.length) return null;
    const xs = curves.flatMap((cell) => cell.curve.points.map((point) => point[0]));
    const [low, high] = [Math.min(...xs), Math.max(...xs)];
    const log = low > 0 && high / low > 100;
    const scale = (value) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    const frame = { left: 34, right: 248, top: 24, bottom: 140 };
    frame.x = (value) => frame.left + (frame.right - frame.left) * scale(value);
    frame.y = (value) => frame.bottom - ((frame.bottom - frame.top) * value) / 100;
    const paths = [];
    const marks = [];
    const ends = [];
    ["acc", "asr", "ra"].forEach((metric, column) => {
      for (const cell of curves) {
        const steps = cell.curve.points.map((point) => `${frame.x(point[0]).toFixed(1)} ${frame.y(100 * point[column + 1]).toFixed(1)}`);
        paths.push(svg("path", { class: `path path-${metric} m-${metric}`, d: `M${steps.join("L")}` }));
        for (const selection of Object.keys(MARKS)) {
          const pick = cell.by[selection];
          if (!pick || pick.dial === undefined || !pick[metric]) continue;
          marks.push(svg("path", {
            class: `mark m-${metric}`, d: SHAPES[MARKS[selection]],
            transform: `translate(${frame.x(pick.dial).toFixed(1)} ${frame.y(100 * pick[metric][0]).toFixed(1)}) scale(0.7)`,
          }, svg("title", {}, `${selection}, seed ${cell.seed}: ${metric.toUpperCase()} ${pick[metric][1]} %`)));
        }
      }
      const last = curves.map((cell) => frame.y(100 * cell.curve.points.at(-1)[column + 1])).sort((a, b) => a - b);
      ends.push({ metric, y: last[Math.floor(last.length / 2)] });
    });
    ends.sort((a, b) => a.y - b.y).forEach((end, position) => {
      if (position) end.y = Math.max(end.y, ends[position - 1].y + 12);
    });
    const over = Math.max(0, ends.at(-1).y - frame.bottom - 4); // names pushed apart must not leave the panel
    const names = ends.map(({ metric, y }) => svg("text", { class: `end m-${metric}`, x: frame.right + 5, y: y + 4 - over }, metric.toUpperCase()));
    const xTicks = log ? [low, Math.sqrt(low * high), high] : [low, (low + high) / 2, high];
    const axis = grid({ ...frame }, [], [0, 50, 100], word(curves[0].curve.name), "%");
    const below = xTicks.map((tick) => svg("text", { x: frame.x(tick), y: frame.bottom + 15, "text-anchor": "middle" }, tickWords(tick)));
    return svg("svg", {
      viewBox: "0 0 282 178", role: "img",
      "aria-label": `ACC, ASR and RA along the dial "${word(curves[0].curve.name)}", ${curves.length} seeds; figures in curves.csv`,
    }, axis, below, paths, marks, names);
  }

  // -- what a row opens to -----------------------------------------------------------------------------------------------------

  const shares = (line) => SHARES.map(([id]) => el("td", {}, line[id] ? line[id].slice(1).join(" ") : DASH));

  /** A plain table; its first columns are aligned left. */
  function small(header, body, left = 1) {
    return el("div", { class: "wide" }, el("table", {},
      el("thead", {}, el("tr", {}, header.map((name, at) => el("th", { class: at < left ? "left" : "", scope: "col" }, name)))),
      el("tbody", {}, body.map((cells) => el("tr", {}, cells)))));
  }

  function dials(places) {
    const panels = places.map((line) => [line, dial(line.cells.map((c) => data.cells[c]))]).filter(([, panel]) => panel);
    if (!panels.length) return null;
    return [
      el("h3", {}, "Along the dial"),
      el("p", { class: "quiet" }, "One path per seed: ACC solid, ASR dashed, RA dotted. Chosen by validation: circle, by default: square, "
        + "by the oracle: cross."),
      el("div", { class: "panels" }, panels.map(([line, panel]) => el("figure", {}, panel, el("figcaption", {}, placeWords(placeOf(line)))))),
    ];
  }

  function triggers(places) {
    const seen = new Set();
    const panels = places.map(placeOf).filter((place) => place.picture !== null && !seen.has(place.a) && seen.add(place.a)).map((place) => {
      const picture = data.pictures[place.picture];
      const lent = picture.attack === place.a ? "" : `, as drawn for ${word(picture.attack)}`;
      return el("figure", {},
        el("img", { src: picture.image, alt: `Trigger of ${word(place.a)}: clean images, triggered ones, their difference` }),
        el("figcaption", {}, `${word(place.a)}${lent}: clean, triggered, ${word(picture.difference)}`));
    });
    return panels.length ? [el("h3", {}, panels.length > 1 ? "Triggers" : "Trigger"), el("div", { class: "panels" }, panels)] : null;
  }

  function detail(line) {
    const same = (other) => other.t === line.t && other.s === line.s && other.e === line.e;
    if (line.c !== undefined) {
      const one = { p: line.p, cells: [line.c] };
      return [facts([...line.facts, ...data.cells[line.c].facts]), dials([one]), triggers([one])];
    }
    if (line.p !== undefined) {
      const seeds = line.cells.map((c) => [data.cells[c], data.cells[c].by[line.s]]).map(([cell, own]) => [
        el("td", { class: "left" }, `${cell.seed}`), ...shares(own),
      ]);
      return [facts(line.facts), el("h3", {}, "Seeds"), small(["Seed", "ACC", "ASR", "RA", "dACC"], seeds), dials([line]), triggers([line])];
    }
    const places = data.places.filter((other) => same(other) && placeOf(other).implanted);
    const body = places.map((other) => [
      el("td", { class: "left" }, placeWords(placeOf(other))), ...shares(other), el("td", {}, other.rank ? other.rank[1] : DASH),
    ]);
    return [facts(line.facts), el("h3", {}, "By scenario"), small(["Scenario", "ACC", "ASR", "RA", "dACC", "Rank"], body), dials(places), triggers(places)];
  }

  function unfold(row, width) {
    return el("tr", { class: "unfold", role: "row", id: `detail-${row.id}` },
      el("td", { class: "detail", role: "cell", colspan: width }, detail(row.original)));
  }

  // -- tables ------------------------------------------------------------------------------------------------------------------

  const CELLS = {
    place: (line) => ["Place", line.place ? String(line.place) : ""],
    seed: (line) => ["Seed", String(data.cells[line.c].seed)],
    cost: (line) => ["Cost", line.cost ? line.cost[1] : DASH],
    rank: (line) => ["Rank", line.rank ? line.rank[1] : DASH],
    ok: (line) => ["Cells", `${line.ok} / ${line.of}`],
    ...Object.fromEntries(SHARES.map(([id, header]) => [id, (line) => (line[id]
      ? [header, line[id][1], line[id][2] ? el("span", { class: "aside" }, line[id][2]) : null]
      : [header, (id === "acc" && word(line.missing)) || DASH])])),
  };

  function cellOf(id, line) {
    if (id !== "where") {
      const [name, ...content] = CELLS[id](line);
      return el("td", { role: "cell", class: id, "data-name": name }, content);
    }
    const place = placeOf(line);
    const badge = dead(line) ? el("span", { class: "badge" }, `not counted: ${word(place.state)}`) : null;
    return el("td", { role: "cell", class: "where left" }, word(place.a), el("span", { class: "aside" }, `${word(place.b)}, ${word(place.d)}`), badge);
  }

  function lineOf(row, visible) {
    const line = row.original;
    const open = row.getIsExpanded();
    const width = visible.length + 1;
    const button = el("button", {
      type: "button", class: "toggle", id: `open-${row.id}`, "aria-expanded": String(open), "aria-controls": `detail-${row.id}`,
    }, glyph(line), el("span", {}, word(entryOf(line).name)));
    const cells = visible.map((column) => (column.id === "name"
      ? el("td", { role: "cell", class: "name left" }, button, el("span", { class: "aside" }, word(entryOf(line).scope)))
      : cellOf(column.id, line)));
    const box = el("input", {
      type: "checkbox", id: `pick-${row.id}`, "aria-label": `Draw ${nameOf(line)} in the plane`, checked: row.getIsSelected(),
      change: () => { row.toggleSelected(); replane(line.t); },
    });
    const node = el("tr", { class: `line${open ? " open" : ""}${dead(line) ? " dead" : ""}`, role: "row" }, cells,
      el("td", { role: "cell", class: "pick", "data-name": "Plot" }, box));
    const toggle = () => {
      row.toggleExpanded();
      const now = row.getIsExpanded();
      node.classList.toggle("open", now);
      button.setAttribute("aria-expanded", String(now));
      if (now) node.after(unfold(row, width));
      else document.getElementById(`detail-${row.id}`).remove();
    };
    node.addEventListener("click", (event) => {
      const inside = event.target.closest("button, input, a");
      if ((inside && inside !== button) || (!inside && String(globalThis.getSelection()))) return;
      toggle();
    });
    return open ? [node, unfold(row, width)] : [node];
  }

  function head(visible, track) {
    return el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, visible.map((column) => {
      const sorted = column.getIsSorted();
      const direction = sorted === "asc" ? "ascending" : sorted === "desc" ? "descending" : "none";
      const left = ["name", "where"].includes(column.id);
      return el("th", { role: "columnheader", scope: "col", "aria-sort": direction, class: left ? "left" : column.id },
        el("button", { type: "button", id: `sort-${track}-${column.id}`, click: () => { column.toggleSorting(undefined, false); render(); } },
          column.columnDef.header));
    }), el("th", { role: "columnheader", scope: "col", class: "pick still", title: "Tick lines to draw them alone" }, "Plot")));
  }

  function block(key, title, rows, visible) {
    if (!rows.length) return null;
    const cut = all.has(key) ? rows : rows.slice(0, LIMIT);
    const group = title
      ? el("tr", { role: "row", class: "group" }, el("th", { role: "columnheader", scope: "rowgroup", colspan: visible.length + 1 }, title)) : null;
    const more = cut.length < rows.length
      ? el("tr", { role: "row", class: "group more" }, el("th", { role: "cell", colspan: visible.length + 1 },
        el("button", { type: "button", class: "plain", id: `more-${key}`, click: () => { all.add(key); render(); } },
          `Show all ${rows.length} lines`))) : null;
    return el("tbody", { role: "rowgroup" }, group, cut.map((row) => lineOf(row, visible)), more);
  }

  let sections = new Map();

  function replane(track) {
    const { rows, holder } = sections.get(track);
    holder.replaceChildren(...(plane(rows) ?? []).flat());
  }

  function section(track, rows) {
    const known = data.tracks[track];
    const selection = choice.selection || known.judged;
    const offered = known.selections.includes(selection);
    const why = selection === known.judged && selection !== "validation" && word(known.why) ? `; judged by default, since ${word(known.why)}` : "";
    const node = el("section", { class: "track", "aria-labelledby": `track-${track}` },
      el("h2", { id: `track-${track}` }, `Track: ${word(known.title)}`),
      el("p", { class: "quiet" }, `Selection: ${word(data.selections[selection])}${why}.`));
    const empty = !offered ? `This track has no ${selection} selection: ${word(known.why) || "its defenses have nothing to validate on"}.`
      : shown() === "means" && !data.scenarios.some((place) => place.implanted) ? word(data.nothing)
        : "No line of this track passes the filters.";
    if (!rows.length) {
      node.append(el("p", { class: "notice" }, empty));
      return node;
    }
    const visible = table.getAllLeafColumns().filter((column) => (column.columnDef.views ?? Object.keys(VIEWS)).includes(shown()));
    const alive = rows.filter((row) => !dead(row.original));
    const holder = el("figure", { class: "plane" });
    sections.set(track, { rows, holder });
    node.append(el("div", { class: "board" },
      el("div", { class: "wide" }, el("table", { role: "table", class: "boards", "aria-labelledby": `track-${track}` }, head(visible, track),
        block(`${track}-defense`, "", alive.filter((row) => row.original.role === "defense"), visible),
        block(`${track}-control`, "Reference and controls, not ranked", alive.filter((row) => row.original.role !== "defense"), visible),
        block(`${track}-dead`, "The attack did not implant, or is adversarial: shown, in no mean and no rank", rows.filter((row) => dead(row.original)), visible))),
      holder));
    replane(track);
    return node;
  }

  function render() {
    const focus = document.activeElement?.id;
    const rows = table.getRowModel().rows;
    sections = new Map();
    const tracks = data.tracks.map((_, at) => at).filter((at) => !choice.track || word(data.tracks[at].name) === choice.track);
    document.getElementById("boards").replaceChildren(...(compared ? [] : [
      el("p", { class: "notice" }, "No defense was run in this matrix: below are its attacked models.")]), ...tracks.map((at) => section(at, rows.filter((row) => row.original.t === at))));
    if (focus && document.activeElement?.id !== focus) document.getElementById(focus)?.focus({ preventScroll: true });
    const status = document.getElementById("status");
    const kept = data.scenarios.filter((place) => place.implanted && within(place)).length;
    const words = partial()
      ? `Filtered to ${kept} of ${data.scenarios.filter((place) => place.implanted).length} implanted scenarios: shown, in percent, is each `
        + `scenario by itself, mean and deviation over its seeds. Means over scenarios and their intervals are computed for the whole matrix only.`
      : { means: `Percent: means over all implanted scenarios, 95 % intervals in brackets; ${word(data.counted)}.`,
        places: "Percent, each scenario by itself: means and sample deviations over its seeds.",
        cells: "Percent, every attacked model by itself: one seed, no interval." }[choice.view];
    const line = compared ? `${words} ${rows.length} ${rows.length === 1 ? "line" : "lines"}.` : "";
    if (status.textContent !== line) status.textContent = line;
    status.classList.toggle("notice", partial());
  }

  // -- filters, scenarios, glossary --------------------------------------------------------------------------------------------

  function filters() {
    const distinct = (key) => [...new Set(data.scenarios.map((place) => word(place[key])))];
    const choose = (id) => (event) => {
      choice[id] = event.target.value;
      filter();
    };
    const options = (pairs, chosen) => pairs.map(([value, words]) => el("option", { value, selected: value === chosen }, words));
    const pick = (id, label, pairs) => el("label", {}, label, el("select", { id: `filter-${id}`, change: choose(id) }, options(pairs, choice[id])));
    const each = (label, values) => [["", label], ...values.map((value) => [value, value])];
    document.getElementById("filters").replaceChildren(...(compared ? [
      pick("view", "Show", Object.entries(VIEWS)),
      pick("track", "Track", each("all", data.tracks.map((track) => word(track.name)))),
      pick("selection", "Selection", each("as each track is judged", SELECTIONS.filter((name) => name in data.selections))),
      pick("dataset", "Dataset", each("all", distinct("d"))),
      pick("backbone", "Backbone", each("all", distinct("b"))),
      pick("attack", "Attack", each("all", distinct("a"))),
      pick("role", "Entries", [["", "all"], ["defense", "defenses"], ["control", "controls"]]),
      el("label", {}, "Name contains",
        el("input", { type: "search", id: "filter-name", value: choice.name, autocomplete: "off", input: choose("name") }))] : []),
      el("label", {}, "Colours", el("select", { id: "theme", change: (event) => {
        if (event.target.value) document.documentElement.dataset.theme = event.target.value;
        else delete document.documentElement.dataset.theme;
      } }, options([["", "as the system"], ["light", "light"], ["dark", "dark"]], document.documentElement.dataset.theme ?? ""))),
      compared ? el("button", { type: "button", class: "plain", id: "reset", click: () => {
        Object.assign(choice, start);
        all.clear();
        table.setSorting([]);
        table.setRowSelection({});
        filters();
        filter();
        document.getElementById("reset").focus();
      } }, "Reset") : "",
    );
  }

  function scenarios() {
    const body = data.scenarios.map((place) => [
      el("td", { class: "left" }, word(place.a)), el("td", { class: "left" }, `${word(place.b)}, ${word(place.d)}`), el("td", { class: "left" }, word(place.rate)),
      el("td", { class: "left" }, place.implanted ? word(place.state) : el("span", { class: "badge" }, `not counted: ${word(place.state)}`)),
      ...["acc", "asr", "ra"].map((name) => el("td", {}, place.undefended[name] ? place.undefended[name].slice(1).join(" ") : DASH)),
      el("td", {}, place.benign ? place.benign.slice(1).join(" ") : DASH),
    ]);
    document.getElementById("scenarios").append(el("details", { open: !compared }, el("summary", {}, "Scenarios: which attacks implanted"),
      el("p", {}, `${word(data.counted)}. Undefended models, percent: means and sample deviations over all seeds.`),
      small(["Attack", "Backbone, dataset", "Rate", "Gate", "ACC", "ASR", "RA", "ACC of the benign twin"], body, 4), facts(data.settings),
      triggers(data.scenarios.map((_, p) => ({ p })))));
    document.getElementById("reading").append(el("details", {}, el("summary", {}, "How to read this"), facts(data.reading)));
  }

  document.getElementById("about").textContent = word(data.about);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  filters();
  scenarios();
  filter();
})();
