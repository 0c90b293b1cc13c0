// Sorting, filtering, paging and rating of the cohort page. Without it the page is a table and plots.
"use strict";
(() => {
  const series = JSON.parse(document.getElementById("data").textContent);
  const body = document.querySelector("#series tbody");
  const rows = [...body.rows];
  const heads = [...document.querySelectorAll("#series thead th")];
  const RATING = heads.length - 2;
  const byId = (id) => document.getElementById(id);
  const circles = new Map();
  for (const circle of document.querySelectorAll("circle")) {
    const index = Number(circle.dataset.i);
    if (!circles.has(index)) circles.set(index, []);
    circles.get(index).push(circle);
  }
  // One set of ratings per page address; the file of ratings that was read when the page was made comes first.
  const KEY = "dsiprep-ratings:" + location.pathname;
  const PAGE = 120; // rows shown at first; more appear on scrolling, because a table of thousands is slow to lay out
  let order = series.map((_, index) => index);
  let shown = [];
  let limit = PAGE;
  let chosen = -1;
  let picture = 0;

  const stored = () => { try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; } };
  const store = () => {
    const kept = {};
    for (const one of series) if (one.rating || one.note) kept[one.name] = [one.rating, one.note];
    try { localStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* a private window: ratings are kept until it closes */ }
  };
  const showRating = (index) => {
    rows[index].cells[RATING].textContent = series[index].rating;
    rows[index].cells[RATING + 1].textContent = series[index].note;
  };

  // Sorting
  const sort = (head, key) => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const column = heads.indexOf(head);
    const value = (index) => key === undefined
      ? rows[index].cells[column].textContent
      : series[index].values[key] ?? (up ? Infinity : -Infinity);
    const values = series.map((_, index) => value(index));
    order.sort((a, b) => {
      const difference = key === undefined ? values[a].localeCompare(values[b]) : values[a] - values[b];
      return (up ? difference : -difference) || a - b;
    });
    body.append(...order.map((index) => rows[index]));
    limit = PAGE;
    render();
  };
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const key = head.dataset.key === undefined ? undefined : Number(head.dataset.key);
    button.addEventListener("click", () => sort(head, key));
  }

  // Filtering
  const passes = (one) => {
    const show = byId("show").value;
    if (show === "bad" && !one.values[1]) return false;
    if (show === "look" && !one.values[1] && !one.values[2]) return false;
    if (show === "far" && one.values[0] <= 3) return false;
    if (show === "unrated" && one.rating) return false;
    if (show === "exclude" && one.rating !== "exclude") return false;
    return one.name.toLowerCase().includes(byId("filter").value.trim().toLowerCase());
  };
  const render = () => {
    shown = order.filter((index) => passes(series[index]));
    const visible = new Set(shown.slice(0, limit));
    rows.forEach((row, index) => { row.hidden = !visible.has(index); });
    byId("count").textContent = `${shown.length} of ${series.length} series`;
  };
  const filter = () => {
    limit = PAGE;
    render();
    const passing = new Set(shown);
    for (const [index, points] of circles) for (const circle of points) circle.style.display = passing.has(index) ? "" : "none";
  };
  const table = document.querySelector(".scroll");
  table.addEventListener("scroll", () => {
    if (limit >= shown.length || table.scrollTop + table.clientHeight < table.scrollHeight - 200) return;
    limit += PAGE;
    render();
  });

  // One series at a time
  const PICTURES = ["means", "coreg", "hmc"];
  const choose = (index, move = true) => {
    for (const circle of circles.get(chosen) || []) circle.classList.remove("chosen");
    if (chosen >= 0) rows[chosen].removeAttribute("aria-selected");
    chosen = index;
    const one = series[index];
    for (const circle of circles.get(index) || []) circle.classList.add("chosen");
    rows[index].setAttribute("aria-selected", "true");
    byId("viewer").hidden = false;
    const link = byId("open");
    link.textContent = one.name;
    link.href = rows[index].cells[0].firstChild.getAttribute("href");
    byId("state").textContent = one.state;
    byId("state").className = "state " + (one.state === "not measured" ? "unknown" : one.state);
    byId("checks").replaceChildren(...one.checks.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    byId("thumbnail").hidden = !one.thumbnail;
    byId("thumbnail").alt = `${one.name}: brain mask, coregistration, and mean image before and after realignment`;
    if (one.thumbnail) byId("thumbnail").src = "data:image/webp;base64," + one.thumbnail;
    byId("note").value = one.note;
    for (const button of document.querySelectorAll("[data-rate]"))
      button.setAttribute("aria-pressed", String(button.dataset.rate === one.rating));
    showLarge();
    if (move) rows[index].scrollIntoView({ block: "nearest" });
  };
  // The full figures lie beside the page, in the folder of the subject; without them the thumbnails remain.
  const showLarge = () => {
    const one = series[chosen];
    const files = picture === 0 ? ["means"] : picture === 1 ? ["coregDwiref"] : ["hmcAfter", "hmcUpAfter"];
    const image = byId("large");
    image.hidden = true;
    const attempt = (left) => {
      if (!left.length) return;
      image.onload = () => { image.hidden = false; };
      image.onerror = () => attempt(left.slice(1));
      image.alt = `${one.name}: ${PICTURES[picture]}`;
      image.src = `${one.subject}/figures/${one.name}_desc-${left[0]}_dwi.png`;
    };
    attempt(files);
    for (const button of document.querySelectorAll("[data-picture]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.picture) === picture));
  };
  const step = (by) => {
    if (!shown.length) return;
    const at = shown.indexOf(chosen);
    const next = at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1);
    if (next >= limit) {
      limit = next + PAGE;
      render();
    }
    choose(shown[next]);
  };
  const rate = (rating) => {
    if (chosen < 0) return;
    series[chosen].rating = rating;
    showRating(chosen);
    store();
    choose(chosen, false);
  };

  // Ratings as CSV
  const quote = (text) => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const csv = () => ["series,rating,note",
    ...series.filter((one) => one.rating || one.note).map((one) => [one.name, one.rating, one.note].map(quote).join(","))
  ].join("\n") + "\n";
  const parse = (text) => {
    const table = [[]];
    let field = "", quoted = false;
    const separator = text.split("\n", 1)[0].includes("\t") ? "\t" : ",";
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (quoted) {
        if (c === '"' && text[i + 1] === '"') { field += '"'; i++; }
        else if (c === '"') quoted = false;
        else field += c;
      } else if (c === '"') quoted = true;
      else if (c === separator || c === "\n") {
        table.at(-1).push(field.replace(/\r$/, ""));
        field = "";
        if (c === "\n") table.push([]);
      } else field += c;
    }
    if (field || table.at(-1).length) table.at(-1).push(field);
    return table.filter((row) => row.length > 1);
  };
  const read = (text) => {
    const [names, ...lines] = parse(text);
    const position = new Map(series.map((one, index) => [one.name, index]));
    for (const row of lines) {
      const index = position.get(row[names.indexOf("series")]);
      if (index === undefined) continue;
      const rating = row[names.indexOf("rating")] || "";
      series[index].rating = ["keep", "exclude"].includes(rating) ? rating : "";
      series[index].note = row[names.indexOf("note")] || "";
      showRating(index);
    }
    store();
    filter();
  };

  for (const [name, [rating, note]] of Object.entries(stored())) {
    const index = series.findIndex((one) => one.name === name);
    if (index < 0 || series[index].rating || series[index].note) continue;
    Object.assign(series[index], { rating, note });
    showRating(index);
  }
  byId("tools").hidden = false;
  byId("filter").addEventListener("input", filter);
  byId("show").addEventListener("change", filter);
  byId("note").addEventListener("input", () => {
    if (chosen < 0) return;
    series[chosen].note = byId("note").value;
    showRating(chosen);
    store();
  });
  byId("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "group_ratings.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  byId("load").addEventListener("change", async (event) => {
    if (event.target.files[0]) read(await event.target.files[0].text());
  });
  body.addEventListener("click", (event) => {
    if (event.target.closest("a")) return;
    const row = event.target.closest("tr");
    if (row) choose(Number(row.dataset.i));
  });
  document.querySelector(".strips").addEventListener("click", (event) => {
    if (event.target.dataset.i !== undefined) choose(Number(event.target.dataset.i));
  });
  document.querySelector(".strips").addEventListener("pointerover", (event) => {
    const index = event.target.dataset.i;
    byId("hovered").textContent = index === undefined ? "" : series[Number(index)].name;
  });
  for (const button of document.querySelectorAll("[data-rate]")) button.addEventListener("click", () => rate(button.dataset.rate));
  for (const button of document.querySelectorAll("[data-picture]"))
    button.addEventListener("click", () => { picture = Number(button.dataset.picture); showLarge(); });
  const keys = { ArrowDown: () => step(1), ArrowUp: () => step(-1), k: () => rate("keep"), e: () => rate("exclude"), u: () => rate("") };
  for (const digit of [0, 1, 2]) keys[String(digit + 1)] = () => { picture = digit; if (chosen >= 0) showLarge(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input,textarea,select")) return;
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  filter();
})();
