/* The board over all matrices: filters, sorts, links and saves what Python computed. Nothing is averaged or ranked here, and names reach
 * the document as text only. The address keeps every choice, so that it can be shared. */
(() => {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const { el, svg } = globalThis.Elements;
  const LIMIT = 200; // lines before "show all"
  const POINTS = 1500; // of the plane
  const SHARES = ["acc", "asr", "ra"];
  const rows = data.lines.map(([texts, rate, acc, asr, ra, seeds, flags, lines]) => ({
    ...Object.fromEntries(data.texts.map((name, at) => [name, data.words[texts[at]]])),
    rate, acc, asr, ra, seeds, lines, control: Boolean(flags & 1), implanted: Boolean(flags & 2), judged: Boolean(flags & 4),
  }));

  const percent = (share) => (share === null ? "\u2013" : (100 * share).toFixed(1));

  // -- choices, kept in the address --------------------------------------------------------------------------------------------

  const FILTERS = {
    matrix: "Matrix", dataset: "Images", backbone: "Network", attack: "Attack", track: "Track", selection: "Selection",
    role: "Entries", gate: "Attacks",
  };
  const JUDGED = "as its track is ranked";
  const FIXED = { role: ["defenses", "controls"], gate: ["implanted", "not implanted"],
    selection: [JUDGED, "validation", "default", "oracle"] };
  const front = data.titles["cifar10-cpu"] ? "cifar10-cpu" : Object.keys(data.titles)[0] ?? "";
  const start = { matrix: front, dataset: "", backbone: "", attack: "", track: "", selection: JUDGED, role: "", gate: "implanted",
    name: "", sort: "ra", down: "1" };
  const choice = { ...start };
  let all = false;

  function fromAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(start)) choice[name] = given.get(name) ?? start[name];
    if (!COLUMNS.some(([id]) => id === choice.sort)) choice.sort = start.sort;
  }
  function toAddress() {
    const kept = Object.entries(choice).filter(([name, value]) => value !== start[name]);
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  }

  const passes = (row, but) => Object.keys(FILTERS).every((name) => name === but || !choice[name]
    || (name === "role" ? row.control === (choice.role === "controls")
      : name === "selection" && choice.selection === JUDGED ? row.judged
      : name === "gate" ? row.implanted === (choice.gate === "implanted") : row[name] === choice[name]))
    && (but === "name" || row.defense.toLowerCase().includes(choice.name.toLowerCase()));

  const COLUMNS = [["defense", "Defense"], ["where", "Scenario"], ["track", "Track"], ["acc", "ACC"], ["asr", "ASR"], ["ra", "RA"],
    ["seeds", "Seeds"]];
  const keyOf = (row, id) => (id === "where" ? whereOf(row) : row[id]);
  const whereOf = (row) => `${row.attack} on ${row.backbone}, ${row.dataset}`;

  function shown() {
    const down = choice.down === "1" ? -1 : 1;
    return rows.filter((row) => passes(row)).sort((one, other) => {
      const [a, b] = [keyOf(one, choice.sort), keyOf(other, choice.sort)];
      if (a === null || b === null) return (a === null) - (b === null); // what was not measured comes last
      return down * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
  }

  // -- what is saved -----------------------------------------------------------------------------------------------------------

  const SAVED = [...data.texts.slice(0, -1), "rate", ...SHARES, "seeds", "control", "implanted", "state", "lines"];
  function csv(found) {
    const cell = (value) => {
      const text = value === null ? "" : Array.isArray(value) ? value.join(" ") : String(value);
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [SAVED, ...found.map((row) => SAVED.map((name) => row[name]))].map((line) => line.map(cell).join(",")).join("\n");
  }
  const json = (found) => JSON.stringify(found.map((row) => Object.fromEntries(SAVED.map((name) => [name, row[name]]))), null, 1);
  function save(name, type, make) {
    const address = URL.createObjectURL(new Blob([make(shown())], { type }));
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  // -- drawing -----------------------------------------------------------------------------------------------------------------

  function filters() {
    const change = (name) => (event) => { choice[name] = event.target.value; all = false; render(name === "name" ? name : undefined); };
    const pick = ([name, label]) => {
      const there = FIXED[name] ?? [...new Set(rows.filter((row) => passes(row, name)).map((row) => row[name]))];
      const offered = choice[name] && !there.includes(choice[name]) ? [...there, choice[name]] : there;
      return el("label", {}, label, el("select", { id: `filter-${name}`, change: change(name) },
        el("option", { value: "" }, "all"), offered.map((value) => el("option", { value, selected: value === choice[name] }, value))));
    };
    document.getElementById("filters").replaceChildren(
      ...Object.entries(FILTERS).map(pick),
      el("label", {}, "Defense contains", el("input", { type: "search", id: "filter-name", value: choice.name, input: change("name") })),
      el("button", { type: "button", class: "plain", id: "reset", click: () => { Object.assign(choice, start); all = false; render(); } }, "Reset"),
      el("button", { type: "button", class: "plain", id: "csv", click: () => save("levelfield.csv", "text/csv", csv) }, "Save CSV"),
      el("button", { type: "button", class: "plain", id: "json", click: () => save("levelfield.json", "application/json", json) }, "Save JSON"),
    );
  }

  const file = (row) => `${encodeURIComponent(row.matrix)}/rows.csv`;
  function line(row) {
    const marks = [row.control ? "control" : "", row.implanted ? "" : "not implanted", row.state];
    const cell = (name, content, kind) => el("td", { "data-name": name, class: kind }, content);
    return el("tr", { class: row.implanted ? "line" : "line dead" },
      el("td", { class: "left name" }, `${row.defense}, ${row.scope}`, el("span", { class: "aside" }, marks.filter(Boolean).join("; "))),
      el("td", { class: "left where" }, whereOf(row), el("span", { class: "aside" }, `${row.matrix}; rate ${percent(row.rate)} %; by ${row.selection}`)),
      cell("Track", row.track, "left"), SHARES.map((name) => cell(name.toUpperCase(), percent(row[name]))),
      cell("Seeds", [String(row.seeds), el("span", { class: "aside" }, row.lines.length > 1 ? "rows " : "row ", row.lines.map((number, at) =>
        [at ? " " : "", el("a", { href: `${file(row)}#L${number}`, title: `line ${number} of ${row.matrix}/rows.csv` }, String(number))]))]),
    );
  }

  function board(found) {
    const sort = (id) => () => {
      const first = SHARES.includes(id) || id === "seeds" ? "1" : "0";
      choice.down = choice.sort === id ? String(1 - choice.down) : id === "asr" ? "0" : first;
      choice.sort = id;
      render();
    };
    const head = COLUMNS.map(([id, label], at) => el("th", {
      scope: "col", class: at < 3 ? "left" : "",
      "aria-sort": choice.sort !== id ? "none" : choice.down === "1" ? "descending" : "ascending",
    }, el("button", { type: "button", id: `sort-${id}`, click: sort(id) }, label)));
    const part = all ? found : found.slice(0, LIMIT);
    document.getElementById("board").replaceChildren(el("thead", {}, el("tr", {}, head)), el("tbody", {}, part.map(line)));
    document.getElementById("more").replaceChildren(...(part.length < found.length
      ? [el("button", { type: "button", class: "plain", id: "all", click: () => { all = true; render(); } }, `Show all ${found.length} lines`)] : []));
  }

  function plane(found) {
    const points = found.filter((row) => row.acc !== null && row.asr !== null).slice(0, POINTS);
    const [left, top, side] = [34, 8, 260];
    const at = (row) => ({ cx: left + side * row.asr, cy: top + side * (1 - row.acc) });
    const ticks = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
      svg("path", { class: "grid", d: `M${left + side * share} ${top}v${side}M${left} ${top + side * share}h${side}` }),
      svg("text", { x: left + side * share, y: top + side + 14, "text-anchor": "middle" }, String(100 * share)),
      svg("text", { x: left - 5, y: top + side * (1 - share) + 4, "text-anchor": "end" }, String(100 * share)),
    ]);
    const marks = points.map((row) => svg("circle", { ...at(row), r: 3.2, class: row.control ? "faint" : "point" },
      svg("title", {}, `${row.defense}, ${row.scope}: ACC ${percent(row.acc)}, ASR ${percent(row.asr)}; ${whereOf(row)}`)));
    document.getElementById("plane").replaceChildren(
      svg("svg", { viewBox: "0 0 310 310", role: "img", "aria-label": "ACC over ASR of the lines below the filters" }, ticks, marks,
        svg("text", { x: left + side / 2, y: top + side + 32, "text-anchor": "middle" }, "ASR [%]"),
        svg("text", { x: 0, y: 0, transform: `translate(9 ${top + side / 2}) rotate(-90)`, "text-anchor": "middle" }, "ACC [%]")),
      el("figcaption", {}, `ACC over ASR, a point a line${points.length < found.length ? ` (${points.length} of ${found.length})` : ""}; pale: controls. A defense should be at the upper left.`),
    );
  }

  function render(typing) {
    const found = shown();
    toAddress();
    if (!typing) filters(); // not while its field is being written in
    const title = choice.matrix ? `: ${data.titles[choice.matrix] ?? choice.matrix}` : "";
    document.getElementById("status").textContent = `${found.length} of ${rows.length} lines${title}`;
    board(found);
    plane(found);
  }

  document.getElementById("reading").replaceChildren(el("details", {}, el("summary", {}, "How to read this"), el("p", {},
    "Selection: validation: the setting chosen on held-out clean images. default: the published one. oracle: the best on the test set, which no "
    + "defender can choose. Not implanted: the attack did not work, so nothing can be removed. Lines of different tracks were given "
    + "different things. A row's number is its line in rows.csv. The address of this page keeps all choices: copy it to share a view.")));
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { fromAddress(); render(); });
  fromAddress();
  render();
})();
