// The page's script: no library, no build step. Names of files and words of a query are only ever set as text.
"use strict";

const POLL_MS = 500; // while files are being indexed
const SERVER_POLL_MS = 3000; // while the embedding server does not answer
const THUMBNAIL = 360, SHEET = 1400; // pixels of width
// Yellow to red, as ColorBrewer's YlOrRd, from the lowest value to the highest.
const COLOURS = [[255, 255, 204], [254, 217, 118], [253, 141, 60], [227, 26, 28], [128, 0, 38]];
const OPACITY = 0.7; // of the highest value; the lowest is clear

const $ = (id) => document.getElementById(id);
let limits = {};
let found = null; // the last search: its number, and its pages with both scores and places
let shownPages = []; // in the order of the list
let serverIsAway = false;

/** Make an element with a class and children; strings become text. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Send a request to this page's own server; what it refuses is thrown with its code and message. */
async function ask(path, options) {
  let reply, body;
  try {
    reply = await fetch(path, options);
    body = await reply.json();
  } catch {
    throw Object.assign(new Error("This page's own program does not answer. Start it again with make search-page."), { code: "PAGE_AWAY" });
  }
  if (!reply.ok) throw Object.assign(new Error(body.error.message), { code: body.error.code });
  return body;
}

function plural(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

// --- the embedding server ---------------------------------------------------------------------------------------

/** Show why nothing can be embedded, and look again until it can. */
async function checkServer() {
  try {
    await ask("api/server");
    if (serverIsAway) {
      // What failed because of it is indexed now.
      for (const job of await ask("api/files")) if (job.state === "failed" && job.code === "SERVER_AWAY") await retry(job);
    }
    serverIsAway = false;
    $("server").hidden = true;
    if ($("problem").dataset.code === "SERVER_AWAY") $("problem").hidden = true;
  } catch (error) {
    showServerProblem(error);
  }
}

function showServerProblem(error) {
  const isAway = error.code === "SERVER_AWAY";
  $("server-title").textContent = isAway ? "The embedding server does not answer." : "The embedding server cannot be used.";
  $("server-what").hidden = !isAway;
  $("server-why").textContent = error.message;
  $("server").hidden = false;
  if (!serverIsAway) {
    serverIsAway = true;
    lookAgain();
  }
}

function lookAgain() {
  setTimeout(async () => {
    await checkServer();
    if (serverIsAway) lookAgain();
  }, SERVER_POLL_MS);
}

// --- files ------------------------------------------------------------------------------------------------------

const refused = []; // files that never became a job: their names and why
let polling = false;

async function addFiles(files) {
  await Promise.all([...files].map(addFile));
  followJobs();
}

async function addFile(file) {
  try {
    if (file.size > limits.max_file_bytes) {
      throw new Error(`larger than ${Math.floor(limits.max_file_bytes / 2 ** 20)} MiB, the most that this page takes`);
    }
    await ask(`api/files?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
  } catch (error) {
    refused.push({ name: file.name, problem: error.message });
  }
}

async function addSamples() {
  $("samples").disabled = true;
  try {
    await ask("api/samples", { method: "POST" });
  } catch (error) {
    refused.push({ name: "the samples", problem: error.message });
  }
  $("samples").disabled = false;
  followJobs();
}

async function retry(job) {
  try {
    await ask(`api/files/${job.id}/retry`, { method: "POST" });
  } catch (error) {
    refused.push({ name: job.name, problem: error.message });
  }
  followJobs();
}

/** Show how far the files are until all of them have ended. */
async function followJobs() {
  if (polling) return;
  polling = true;
  try {
    for (;;) {
      const jobs = await ask("api/files");
      showJobs(jobs);
      if (!jobs.some((job) => job.state === "waiting" || job.state === "indexing")) break;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  } catch (error) {
    refused.push({ name: "the list of files", problem: error.message });
    showJobs([]);
  }
  polling = false;
  showFacts();
}

function showJobs(jobs) {
  const list = $("jobs");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.job : null;
  const items = jobs.map(jobItem);
  for (const { name, problem } of refused) {
    items.push(make("li", "", make("span", "name", name), make("span", "bad", problem)));
  }
  list.replaceChildren(...items.reverse());
  if (focused) list.querySelector(`[data-job="${focused}"]`)?.focus();
  const ended = jobs.filter((job) => job.state === "done" || job.state === "unchanged").length;
  const failed = refused.length + jobs.filter((job) => job.state === "failed").length;
  const line = jobs.length || failed ? `${ended} of ${plural(jobs.length, "file")} indexed${failed ? `, ${failed} failed` : ""}` : "";
  if ($("announce").textContent !== line) $("announce").textContent = line;
  const away = jobs.find((job) => job.code === "SERVER_AWAY");
  if (away) showServerProblem({ code: away.code, message: away.problems[0] });
}

function jobItem(job) {
  const item = make("li", "", make("span", "name", job.name));
  if (job.state === "waiting" || job.state === "indexing") {
    const bar = make("progress");
    bar.max = job.n_pages;
    bar.value = job.n_done;
    bar.setAttribute("aria-label", `${job.name}: pages indexed`);
    item.append(bar, make("span", "state", job.state === "waiting" ? "waiting" : `${job.n_done} of ${plural(job.n_pages, "page")}`));
  } else if (job.state === "done") {
    item.append(make("span", "done", `${plural(job.n_pages - job.problems.length - job.n_more_problems, "page")} indexed`));
  } else if (job.state === "unchanged") {
    item.append(make("span", "done", "in the index already"));
  }
  const problems = job.code === "SERVER_AWAY" ? ["not indexed: the embedding server does not answer"] : job.problems;
  for (const problem of problems) item.append(make("span", "bad", problem));
  if (job.n_more_problems) item.append(make("span", "bad", `and ${plural(job.n_more_problems, "more page")}`));
  if (job.state === "failed") {
    const again = make("button", "", "Try again");
    again.type = "button";
    again.dataset.job = job.id;
    again.setAttribute("aria-label", `Try again: ${job.name}`);
    again.addEventListener("click", () => retry(job));
    item.append(again);
  }
  return item;
}

async function showFacts() {
  try {
    limits = await ask("api/index");
    $("facts").textContent = limits.n_pages ? `${plural(limits.n_pages, "page")} of ${plural(limits.n_files, "file")} in the index` : "Nothing is indexed yet";
    $("text").maxLength = limits.max_query;
  } catch (error) {
    $("facts").textContent = error.message;
  }
}

/** Let files be dropped on an element. */
function takeDrops(element, take) {
  const over = (on) => (event) => {
    event.preventDefault();
    element.classList.toggle("over", on);
  };
  element.addEventListener("dragenter", over(true));
  element.addEventListener("dragover", over(true));
  element.addEventListener("dragleave", over(false));
  element.addEventListener("drop", (event) => {
    over(false)(event);
    event.stopPropagation();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}

// --- search -----------------------------------------------------------------------------------------------------

let nSearches = 0; // that were begun; what an earlier one finds late is not shown

/** Search, show what was found, or say why not. `what` is a text or a picture's file. */
async function search(what) {
  const isPicture = what instanceof File;
  const label = isPicture ? `the picture ${what.name}` : `“${what}”`;
  $("problem").hidden = true;
  if (!isPicture && !what) return showProblem("Type what to look for first.");
  if (isPicture && what.size > limits.max_picture_bytes) {
    return showProblem(`The picture is larger than ${Math.floor(limits.max_picture_bytes / 2 ** 20)} MiB.`);
  }
  const number = ++nSearches;
  $("search").setAttribute("aria-busy", "true");
  $("found").hidden = false;
  $("summary").textContent = `Searching for ${label} …`;
  try {
    const reply = isPicture
      ? await ask("api/search/picture", { method: "POST", body: what })
      : await ask("api/search", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ text: what }) });
    if (number !== nSearches) return;
    found = reply;
    found.isPicture = isPicture;
    for (const score of ["maxsim", "dense"]) {
      [...found.pages].sort((a, b) => b[score] - a[score]).forEach((page, i) => (page[`${score}Place`] = i + 1));
    }
    const among = found.n_pages > found.pages.length ? `, the best by dense of ${found.n_pages}` : "";
    $("summary").textContent = `${plural(found.pages.length, "page")} for ${label}${among}`;
    showResults();
  } catch (error) {
    if (number !== nSearches) return;
    $("found").hidden = true;
    if (error.code === "SERVER_AWAY") showServerProblem(error);
    const isAway = error.code === "SERVER_AWAY";
    showProblem(isAway ? "Nothing was searched: the embedding server does not answer." : error.message, error.code);
  }
  $("search").setAttribute("aria-busy", "false");
}

function showProblem(message, code = "") {
  $("problem").textContent = message;
  $("problem").dataset.code = code;
  $("problem").hidden = false;
}

function order() {
  return document.querySelector("[name=order]:checked").value;
}

function showResults() {
  const by = order();
  shownPages = [...found.pages].sort((a, b) => a[`${by}Place`] - b[`${by}Place`]);
  $("results").replaceChildren(...shownPages.map((page, i) => make("li", "", resultCard(page, i, by))));
}

function resultCard(page, i, by) {
  const picture = make("img");
  picture.alt = "";
  picture.loading = "lazy";
  picture.src = pictureOf(page, THUMBNAIL);
  picture.addEventListener("error", () => picture.replaceWith(make("span", "hint", "No picture: the file was moved or changed.")));
  const scores = make("dl");
  for (const [score, name] of [["maxsim", "MaxSim"], ["dense", "Dense"]]) {
    const chosen = score === by ? "chosen" : "";
    scores.append(make("dt", chosen, name), make("dd", chosen, page[score].toFixed(3)), make("dd", chosen, `place ${page[`${score}Place`]}`));
  }
  const about = make("span", "", make("span", "name", page.name), make("span", "number", `page ${page.number}`), scores);
  const card = make("button", "", picture, about);
  card.type = "button";
  card.tabIndex = i === 0 ? 0 : -1;
  card.addEventListener("click", () => openPage(i));
  card.addEventListener("focus", () => {
    for (const other of cards()) other.tabIndex = other === card ? 0 : -1;
  });
  return card;
}

function cards() {
  return [...$("results").querySelectorAll("button")];
}

function pictureOf(page, width) {
  return `api/pages/${page.digest}/${page.number}/picture?width=${width}`;
}

/** Move the focus through the results: along the row, or to the row above or below. */
function moveInResults(event) {
  const all = cards();
  const here = all.indexOf(event.target.closest("button"));
  if (here < 0) return;
  const top = (card) => card.getBoundingClientRect().top;
  const width = all.filter((card) => Math.abs(top(card) - top(all[0])) < 2).length; // cards a row
  const there = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + width, ArrowUp: here - width, Home: 0, End: all.length - 1 }[event.key];
  if (there === undefined) return;
  event.preventDefault();
  all[Math.min(Math.max(there, 0), all.length - 1)].focus();
}

// --- a page and its maps ----------------------------------------------------------------------------------------

let open = -1; // place in shownPages
let map = null;
let kept = 0; // the word whose map is shown when none is pointed at

async function openPage(i) {
  open = i;
  map = null;
  kept = 0;
  const page = shownPages[i];
  $("viewer-title").textContent = `${page.name}, page ${page.number}`;
  for (const score of ["maxsim", "dense"]) {
    $(score).textContent = page[score].toFixed(3);
    $(`${score}-place`).textContent = `${page[`${score}Place`]} of ${shownPages.length}`;
  }
  $("previous").disabled = i === 0;
  $("next").disabled = i === shownPages.length - 1;
  $("words").replaceChildren();
  $("lowest").textContent = $("highest").textContent = "";
  $("sheet-problem").hidden = true;
  $("sheet-picture").hidden = $("overlay").hidden = false;
  $("overlay").width = $("overlay").height = 1;
  $("sheet-picture").alt = `${page.name}, page ${page.number}`;
  $("sheet-picture").src = pictureOf(page, SHEET);
  $("words-hint").hidden = found.isPicture;
  if (!$("viewer").open) $("viewer").showModal();
  try {
    const reply = await ask(`api/queries/${found.query}/pages/${page.digest}/${page.number}/map`);
    if (open !== i) return; // another page was opened meanwhile
    map = reply;
    $("words").replaceChildren(...map.words.map(wordButton));
    showMap(0);
  } catch (error) {
    if (open === i) showSheetProblem(error.message);
  }
}

function showSheetProblem(message) {
  $("sheet-problem").textContent = message;
  $("sheet-problem").hidden = false;
  $("overlay").hidden = true;
}

function wordButton(word, i) {
  const button = make("button", "", make("span", "", word.name), make("small", "", word.score.toFixed(2)));
  button.type = "button";
  button.tabIndex = i === 0 ? 0 : -1;
  button.addEventListener("pointerenter", () => showMap(i));
  button.addEventListener("pointerleave", () => showMap(kept));
  button.addEventListener("focus", () => {
    for (const other of $("words").children) other.tabIndex = other === button ? 0 : -1;
    showMap(i);
  });
  button.addEventListener("blur", () => showMap(kept));
  button.addEventListener("click", () => {
    kept = i;
    showMap(i);
  });
  return button;
}

/** Draw a word's map over the page, a pixel of the canvas a patch: nothing is known of what is within one. */
function showMap(i) {
  if (!map) return;
  [...$("words").children].forEach((button, j) => {
    button.classList.toggle("shown", j === i);
    button.setAttribute("aria-pressed", String(j === kept));
  });
  const word = map.words[i];
  const values = word.values.flat();
  const lowest = Math.min(...values), highest = Math.max(...values);
  const overlay = $("overlay");
  overlay.width = map.columns;
  overlay.height = map.rows;
  overlay.dataset.word = word.name;
  const pixels = new ImageData(map.columns, map.rows);
  values.forEach((value, k) => {
    const share = (value - lowest) / (highest - lowest || 1);
    pixels.data.set([...colour(share), 255 * OPACITY * share], 4 * k);
  });
  overlay.getContext("2d").putImageData(pixels, 0, 0);
  const best = values.indexOf(highest);
  const row = Math.floor(best / map.columns) + 1, column = (best % map.columns) + 1;
  overlay.setAttribute("aria-label", `Map of ${word.name}: highest in row ${row} of ${map.rows}, column ${column} of ${map.columns}`);
  $("lowest").textContent = lowest.toFixed(3);
  $("highest").textContent = highest.toFixed(3);
}

function colour(share) {
  const place = share * (COLOURS.length - 1);
  const i = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[i].map((from, k) => from + (COLOURS[i + 1][k] - from) * (place - i));
}

function drawScale() {
  const pixels = new ImageData($("scale").width, 1);
  for (let x = 0; x < pixels.width; x++) pixels.data.set([...colour(x / (pixels.width - 1)), 255], 4 * x);
  $("scale").getContext("2d").putImageData(pixels, 0, 0);
}

function moveInWords(event) {
  const all = [...$("words").children];
  const here = all.indexOf(event.target.closest("button"));
  const there = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (here < 0 || there === undefined) return;
  event.preventDefault();
  all[Math.min(Math.max(there, 0), all.length - 1)].focus();
}

// --- all together -----------------------------------------------------------------------------------------------

function start() {
  drawScale();
  takeDrops($("drop"), addFiles);
  takeDrops($("query"), (files) => search(files[0]));
  // A file that misses both boxes would be opened by the browser in place of this page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  $("choose").addEventListener("change", () => {
    addFiles($("choose").files).then(() => ($("choose").value = ""));
  });
  $("by-picture").addEventListener("change", () => {
    const [file] = $("by-picture").files;
    if (file) search(file).then(() => ($("by-picture").value = "")); // so that the same one can be chosen again
  });
  $("samples").addEventListener("click", addSamples);
  $("query").addEventListener("submit", (event) => {
    event.preventDefault();
    search($("text").value.trim());
  });
  for (const radio of document.querySelectorAll("[name=order]")) radio.addEventListener("change", showResults);
  $("results").addEventListener("keydown", moveInResults);
  $("words").addEventListener("keydown", moveInWords);
  $("previous").addEventListener("click", () => openPage(open - 1));
  $("next").addEventListener("click", () => openPage(open + 1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("close", () => cards()[open]?.focus());
  $("colours").addEventListener("change", () => $("sheet").classList.toggle("coloured", $("colours").checked));
  $("sheet").classList.add("coloured");
  $("sheet-picture").addEventListener("error", () => {
    $("sheet-picture").hidden = true;
    showSheetProblem("There is no picture of this page: its file was moved or changed. Add it again.");
  });
  showFacts();
  checkServer();
  followJobs();
}

start();
