
// The page of one endpoint. Whatever comes from the server or the user is shown as text nodes, never as markup.

const POLL_MS = 2000;
const SLOW_POLL_MS = 15000;
const SAMPLES = 60;
const TOP_CLASSES = 10;
const LONG_FORM = 30;
const LARGEST_MATRIX = 30;
const PARTS = ["train", "validation", "holdout"];

// the page may be at /second or at /second/, where relative addresses would differ
const ROOT = location.origin + location.pathname.replace(/\/*$/, "/");
const KEY_NAME = `bigray-key ${ROOT}`;

const $ = (id) => document.getElementById(id);

let card = null;
let input = null; // the part of the form in use: { record(), reset(), ... }
let key = storedKey();

// ---- small helpers ----

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function show(element, isShown = true) {
  element.hidden = !isShown;
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

const PLAIN = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function number(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return WHOLE.format(value);
  return size < 1e-4 || size >= 1e9 ? value.toExponential(3) : PLAIN.format(value);
}

function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value > 99.9 && value < 100) return "> 99.9 %";
  return `${value.toFixed(1)} %`;
}

function milliseconds(value) {
  if (typeof value !== "number") return "–";
  if (value >= 1000) return `${PLAIN.format(value / 1000)} s`;
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function sizes(shape) {
  return shape.length ? shape.join(" × ") : "number";
}

// ---- the server ----

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return ""; // storage is shut in this browser: the key lives as long as the page
  }
}

function keepKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // as above
  }
  show($("forget"), Boolean(value));
}

function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key) headers.set("authorization", `Bearer ${key}`);
  return fetch(ROOT + path, { cache: "no-store", signal: AbortSignal.timeout(60000), ...options, headers });
}

async function readProblem(response) {
  let message = "";
  try {
    message = (await response.json()).error;
  } catch {
    // what stands before the replicas answers in HTML
  }
  const wait = response.headers.get("retry-after");
  const later = wait ? ` (try again in ${wait} s)` : "";
  return `${response.status}: ${message || response.statusText || "no reason given"}${later}`;
}

function unreachable(error) {
  return error.name === "TimeoutError" ? "The endpoint did not answer within a minute." : "The endpoint cannot be reached.";
}

async function loadCard() {
  let response;
  try {
    response = await request("card");
    if (response.status === 401 || response.status === 403) return askForKey(await readProblem(response));
    if (!response.ok) return showFault(await readProblem(response));
    showCard(await response.json());
  } catch (error) {
    showFault(response?.ok ? "The model card is not what this page can read; reload the page." : unreachable(error));
  }
}

function askForKey(problem) {
  setStatus("waiting", "Needs a key");
  for (const id of ["try", "card", "live", "fault"]) show($(id), false);
  show($("gate"));
  show($("gate-problem"), Boolean(key));
  $("gate-problem").textContent = key ? problem : "";
  keepKey("");
  $("key").focus();
}

function showFault(problem) {
  setStatus("bad", "Not answering");
  show($("fault"));
  $("fault-text").textContent = problem;
}

function setStatus(state, text) {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

// ---- live numbers ----

const rates = [];
let pollTimer = 0;
let isPolling = false;

// goes on while the page is in sight and has what it needs; whoever changes that calls it again
async function poll() {
  clearTimeout(pollTimer);
  if (isPolling || card === null || document.hidden || !$("gate").hidden) return;
  isPolling = true;
  let isWelcome = false;
  try {
    isWelcome = await readStats();
  } finally {
    isPolling = false;
    pollTimer = setTimeout(poll, isWelcome ? POLL_MS : SLOW_POLL_MS);
  }
}

async function readStats() {
  let response;
  try {
    response = await request("stats", { signal: AbortSignal.timeout(10000) });
  } catch {
    setStatus("bad", "Not answering");
    return true;
  }
  if (response.status === 401) {
    askForKey(await readProblem(response));
    return false;
  }
  const stats = response.ok ? await response.json().catch(() => null) : null;
  setStatus(response.status < 500 ? "good" : "bad", response.status < 500 ? "Live" : "Not answering");
  // a key may be good for predictions and not for this; then the page does without
  show($("live"), stats !== null);
  if (stats === null) return false;
  showStats(stats);
  const live = stats.versions?.live;
  if (live && live !== card.version) await loadCard(); // another version went live while the page was open
  return true;
}

function showStats(stats) {
  const total = stats.total ?? {};
  $("rate").textContent = typeof total.rate === "number" ? PLAIN.format(Number(total.rate.toFixed(1))) : "–";
  $("p50").textContent = milliseconds(total.p50_ms);
  $("p99").textContent = milliseconds(total.p99_ms);
  $("replicas").textContent = number(total.replicas);
  rates.push(total.rate ?? 0);
  if (rates.length > SAMPLES) rates.shift();
  drawSpark();
}

function drawSpark() {
  const top = Math.max(1, ...rates);
  const x = (i) => (120 - ((rates.length - 1 - i) * 120) / (SAMPLES - 1)).toFixed(1);
  const points = rates.map((rate, i) => `${x(i)} ${(31 - (rate / top) * 30).toFixed(1)}`);
  $("spark-line").setAttribute("d", `M${points.join("L")}`);
  $("spark-area").setAttribute("d", `M${x(0)} 32L${points.join("L")}L120 32Z`);
}

// ---- the model card ----

function showCard(next) {
  const isSameForm = card !== null && JSON.stringify(formOf(card)) === JSON.stringify(formOf(next));
  card = next;
  show($("gate"), false);
  show($("fault"), false);
  show($("forget"), Boolean(key));
  setStatus("good", "Live");
  document.title = card.name;
  $("name").textContent = card.name;
  $("version").textContent = card.version;
  $("version").title = "Version: the first digits of the weights' hash";
  $("purpose").textContent = purpose();
  for (const id of ["version", "try", "card"]) show($(id));
  if (!isSameForm) buildForm();
  fillCard();
}

function formOf({ inputs, image, generates }) {
  return [inputs, image, generates];
}

function purpose() {
  const count = WHOLE.format(card.classes.length);
  const kinds = { regression: "a number", multilabel: `any of ${count} labels`, language: "the next token" };
  const kind = kinds[card.task] ?? `one of ${count} classes`;
  const [first] = card.inputs;
  const from = first.shape.length
    ? `${first.name} (${sizes(first.shape)})`
    : `${WHOLE.format(card.inputs.length)} ${card.inputs.length === 1 ? "column" : "columns"}`;
  return `Predicts ${card.target}, ${kind}, from ${from}.`;
}

function fillCard() {
  const metrics = Object.entries({ ...card.metrics, ...card.scores });
  $("metrics").replaceChildren(
    ...metrics.map(([name, value]) => make("div", {}, make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, number(value)))),
  );
  show($("metrics"), metrics.length > 0);
  show($("confusion"), card.confusion !== null);
  if (card.confusion !== null) fillConfusion(card.confusion);
  fillPairs($("schema"), schemaPairs());
  const data = dataPairs();
  fillPairs($("data"), data);
  show($("data-part"), data.length > 0);
  fillLineage(card.lineage);
}

function fillPairs(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function schemaPairs() {
  const names = card.inputs.slice(0, 8).map((column) => column.name);
  const more = card.inputs.length - names.length;
  const [first] = card.inputs;
  const pairs = [
    [first.shape.length ? "Input" : `Columns (${WHOLE.format(card.inputs.length)})`, names.join(", ") + (more > 0 ? ` and ${WHOLE.format(more)} more` : "")],
  ];
  if (first.shape.length) pairs.push(["Shape", sizes(first.shape)]);
  if (first.shape.length && first.low !== null) pairs.push(["Values", `${number(first.low)} to ${number(first.high)}`]);
  pairs.push(["Predicts", card.target]);
  if (card.task === "classification") pairs.push(["Classes", listed(card.classes)]);
  return pairs;
}

function listed(names) {
  const shown = names.slice(0, 20).join(", ");
  return names.length > 20 ? `${shown} and ${WHOLE.format(names.length - 20)} more` : shown;
}

function dataPairs() {
  const rows = card.data.rows ?? {};
  const pairs = PARTS.filter((part) => rows[part]).map((part) => [`${part} rows`, number(rows[part])]);
  if (card.data.fingerprint) pairs.push(["Fingerprint", make("code", {}, card.data.fingerprint)]);
  return pairs;
}

function fillConfusion(matrix) {
  const rows = matrix.reduce((sum, row) => sum + row.reduce((a, b) => a + b, 0), 0);
  const right = matrix.reduce((sum, row, i) => sum + row[i], 0);
  $("confusion-note").textContent = `${WHOLE.format(right)} of ${WHOLE.format(rows)} rows were predicted right.`;
  $("confusion-box").replaceChildren(matrix.length > LARGEST_MATRIX ? mistakes(matrix) : heatTable(matrix));
}

function heatTable(matrix) {
  const names = card.classes;
  const head = make("tr", {}, make("td", { class: "axis" }), ...names.map((name) => make("th", { scope: "col", title: name }, name)));
  const axis = make("tr", {}, make("th"), make("th", { scope: "colgroup", colspan: names.length, class: "axis" }, `predicted ${card.target}`));
  head.firstChild.replaceWith(make("th", { scope: "col", class: "axis" }, "actual"));
  const body = matrix.map((row, i) => {
    const total = row.reduce((a, b) => a + b, 0);
    return make("tr", {}, make("th", { scope: "row", title: names[i] }, names[i]), ...row.map((count, j) => heatCell(count, total, i === j)));
  });
  return make("table", { class: "heat" }, make("thead", {}, axis, head), make("tbody", {}, ...body));
}

function heatCell(count, total, isHit) {
  const cell = make("td", {}, WHOLE.format(count));
  if (count === 0) return cell;
  const share = count / total;
  cell.classList.add("some", isHit ? "hit" : "miss");
  cell.classList.toggle("deep", share > 0.55);
  // between the two text colours no shade is readable with either, so the scale jumps over it
  cell.style.setProperty("--share", share > 0.55 ? Math.max(share, 0.8) : Math.min(share, 0.25));
  return cell;
}

function mistakes(matrix) {
  const pairs = matrix.flatMap((row, i) => row.map((count, j) => ({ count, i, j })));
  const worst = pairs.filter(({ count, i, j }) => i !== j && count > 0).sort((a, b) => b.count - a.count);
  const items = worst.slice(0, 10).map(({ count, i, j }) => make("li", {}, `${card.classes[i]} taken for ${card.classes[j]}: ${WHOLE.format(count)}`));
  return items.length ? make("ol", { class: "mistakes" }, ...items) : make("p", {}, "No mistakes.");
}

function fillLineage(lineage) {
  const pairs = [];
  for (const name of ["run", "trial", "model", "step", "epoch", "git"]) {
    const value = lineage[name];
    if (value === null || value === undefined || value === "") continue;
    pairs.push([name, typeof value === "number" ? WHOLE.format(value) : value]);
  }
  if (card.parameters) pairs.push(["parameters", WHOLE.format(card.parameters)]);
  if (card.backend) pairs.push(["served by", card.backend]);
  fillPairs($("lineage"), pairs);
  const parts = [["Settings", lineage.config], ["Seeds", lineage.seeds], ["Versions", lineage.versions]];
  $("settings").replaceChildren(
    ...parts
      .filter(([, value]) => value && Object.keys(value).length)
      .flatMap(([name, value]) => [make("h3", {}, name), make("pre", { tabindex: "0", "aria-label": name }, JSON.stringify(value, null, 2))]),
  );
}

// ---- the form ----

function buildForm() {
  const [first] = card.inputs;
  const kind = card.generates ? "text" : card.image ? "pad" : first.shape.length ? "raw" : "fields";
  for (const id of ["pad", "fields", "raw", "text"]) show($(id), id === kind);
  show($("pad-actions"), kind === "pad");
  show($("example"), kind !== "text");
  $("predict").textContent = kind === "text" ? "Write" : "Predict";
  input = { pad: padInput, raw: rawInput, fields: fieldsInput, text: textInput }[kind]();
  const invites = { pad: "Draw something, or choose a picture.", text: "Begin a text, and the model goes on with it." };
  $("invite").textContent = invites[kind] ?? "Fill in the form and predict, or just press Predict.";
  clearAnswer();
}

// one entry for each column: a number, a choice, a date
function fieldsInput() {
  const grid = $("grid");
  const isLong = card.inputs.length > LONG_FORM;
  grid.classList.toggle("long", isLong);
  show($("find-row"), isLong);
  const fields = card.inputs.map((column, i) => fieldOf(column, i));
  grid.replaceChildren(...fields.map((field) => field.box));
  $("find").oninput = () => {
    const wanted = $("find").value.trim().toLowerCase();
    for (const field of fields) show(field.box, field.column.name.toLowerCase().includes(wanted));
  };
  const reset = () => {
    for (const field of fields) {
      field.set(card.example[field.column.name]);
      checkField(field);
    }
  };
  reset();
  return { reset, record: () => fieldsRecord(fields) };
}

function fieldOf(column, i) {
  const attributes = { id: `field-${i}`, autocomplete: "off", "aria-describedby": `hint-${i}` };
  const build = { category: categoryEntry, date: dateEntry }[column.kind] ?? numberEntry;
  const { entry, ...how } = build(column, attributes);
  const hint = make("small", { id: `hint-${i}` }, how.note ?? "");
  const field = { ...how, column, entry, hint, box: make("div", { class: "field" }, make("label", { for: `field-${i}` }, column.name), entry, hint) };
  entry.addEventListener("input", () => {
    checkField(field);
    markStale();
  });
  return field;
}

// an entry's `read` gives null for a missing value, and undefined where there is none to send
function emptied(column, entry) {
  return column.nullable && !entry.validity.badInput ? null : undefined;
}

function missingNote(column) {
  return column.nullable ? "leave empty if missing" : "";
}

function categoryEntry(column, attributes) {
  const options = column.categories.map((name, i) => make("option", { value: i }, name));
  if (column.unseen !== null) options.push(make("option", { value: "unseen" }, "another, unseen in training"));
  if (column.nullable) options.push(make("option", { value: "missing" }, "missing"));
  const entry = make("select", attributes, ...options);
  return {
    entry,
    wanted: "a category",
    set: (value) => {
      const place = column.categories.indexOf(String(value));
      if (place >= 0) entry.value = place;
      else entry.value = (value ?? null) === null && column.nullable ? "missing" : "unseen";
    },
    read: () => (entry.value === "missing" ? null : entry.value === "unseen" ? column.unseen : column.categories[entry.value]),
  };
}

function dateEntry(column, attributes) {
  const isDay = /^\d{4}-\d{2}-\d{2}$/.test(card.example[column.name] ?? "2000-01-01");
  const entry = make("input", { ...attributes, type: isDay ? "date" : "datetime-local", step: isDay ? null : "any" });
  let given = { shown: "", value: undefined };
  return {
    entry,
    wanted: isDay ? "a date" : "a date and time",
    note: [isDay ? "" : "in UTC", missingNote(column)].filter(Boolean).join(", "),
    set: (value) => {
      entry.value = value === null || isDay ? value : inUtc(value);
      given = { shown: entry.value, value };
    },
    read: () => {
      if (entry.value === "") return emptied(column, entry);
      return entry.value === given.shown ? given.value : entry.value; // a browser has no microseconds
    },
  };
}

// as fields for dates and times take it; text without a zone is UTC already
function inUtc(text) {
  const hasZone = /(Z|[+-]\d{2}(:?\d{2})?)$/.test(String(text).slice(10));
  const moment = new Date(typeof text === "number" ? text * 86400000 : hasZone ? text : `${text}Z`);
  return Number.isNaN(moment.getTime()) ? "" : moment.toISOString().slice(0, 19);
}

function numberEntry(column, attributes) {
  const entry = make("input", { ...attributes, type: "number", step: "any" });
  entry.inputMode = "text"; // the keyboards of phones for numbers have no minus
  if (column.low !== null && column.high !== null) {
    entry.min = column.low;
    entry.max = column.high;
    entry.step = niceStep(column);
  }
  return {
    entry,
    wanted: "a number",
    note: missingNote(column),
    set: (value) => {
      entry.value = shortest(value);
    },
    read: () => (Number.isNaN(entry.valueAsNumber) ? emptied(column, entry) : entry.valueAsNumber),
  };
}

// the fewest digits that are the same number to the model, which reads 32 bits
function shortest(value) {
  if (typeof value !== "number" || Number.isInteger(value)) return value ?? "";
  for (let digits = 1; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === Math.fround(value)) return short;
  }
  return value;
}

function niceStep({ low, high }) {
  if (Number.isInteger(low) && Number.isInteger(high) && high - low >= 20) return 1;
  const rough = (high - low) / 100;
  return rough > 0 ? Number((10 ** Math.floor(Math.log10(rough))).toPrecision(1)) : "any";
}

// the range is that of the training rows: a hint, not a limit
function checkField({ column, entry, hint, box, note }) {
  entry.removeAttribute("aria-invalid");
  if (column.low === null || column.high === null) return;
  const value = entry.valueAsNumber;
  const isOutside = value < column.low || value > column.high;
  box.classList.toggle("outside", isOutside);
  hint.textContent = `${isOutside ? "outside " : ""}${number(column.low)} to ${number(column.high)}${note ? `; ${note}` : ""}`;
}

function fieldsRecord(fields) {
  const record = {};
  for (const { column, entry, box, wanted, read } of fields) {
    const value = read();
    if (value === undefined) {
      show(box);
      entry.setAttribute("aria-invalid", "true");
      entry.focus();
      throw new Error(`Enter ${wanted} for '${column.name}'.`);
    }
    record[column.name] = value;
  }
  return record;
}

// a tensor as JSON
function rawInput() {
  const [column] = card.inputs;
  $("json-label").textContent = column.name;
  $("json-help").textContent = `JSON numbers of shape ${sizes(column.shape)}.`;
  $("json").oninput = markStale;
  const reset = () => {
    $("json").value = rowsAsText(card.example[column.name]);
  };
  reset();
  return { reset, record: () => ({ [column.name]: parseValue($("json").value) }) };
}

function parseValue(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`The value is not JSON: ${error.message}`);
  }
}

// a prompt, and how to go on with it
function textInput() {
  $("prompt").onkeydown = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    $("form").requestSubmit();
  };
  return {
    prompt: () => {
      const prompt = $("prompt").value;
      if (!prompt) throw fieldProblem("prompt", "Enter a prompt.");
      return { prompt, max_tokens: settingOf("max-tokens"), temperature: settingOf("temperature") };
    },
  };
}

function settingOf(id) {
  const value = $(id).valueAsNumber;
  if (Number.isNaN(value)) throw fieldProblem(id, `Enter a number for '${$(id).labels[0].textContent}'.`);
  return value;
}

function fieldProblem(id, message) {
  $(id).focus();
  return new Error(message);
}

// innermost lists on one line each
function rowsAsText(value, indent = "") {
  if (!Array.isArray(value) || !value.some(Array.isArray)) return indent + JSON.stringify(value);
  return `${indent}[\n${value.map((one) => rowsAsText(one, `${indent} `)).join(",\n")}\n${indent}]`;
}

// ---- drawing ----
// Strokes are kept as points in cells of the model's picture, so that they can be drawn at any size, undone, and
// centred before they are measured.

function padInput() {
  const { height, width, channels, layout, low, high } = card.image;
  const isTiny = channels === 1 && Math.max(height, width) <= 32;
  const canvas = $("canvas");
  const scale = Math.max(1, Math.round(640 / Math.max(height, width)));
  const blank = { strokes: [], cells: new Map(), base: null, file: null };
  let sheet = blank;
  let past = [];
  let pen = null;
  let frameWaiting = 0;
  let cursor = { row: Math.floor(height / 2), column: Math.floor(width / 2), isShown: false };

  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.setAttribute("aria-label", `Drawing area of ${height} rows and ${width} columns`);
  $("seen").width = width;
  $("seen").height = height;

  function change(next) {
    past = [...past.slice(-199), sheet];
    sheet = { ...sheet, ...next };
    paint();
    markStale();
  }

  function drawn() {
    return pen ? [...sheet.strokes, pen] : sheet.strokes;
  }

  // levels 0 to 1 for each value of the picture, (rows, columns, channels) in row-major order
  function levels() {
    const values = sheet.base ? Float64Array.from(sheet.base) : inkLevels();
    for (const [cell, level] of sheet.cells) values.fill(level, cell * channels, (cell + 1) * channels);
    return values;
  }

  function inkLevels() {
    // what was painted cell by cell is sent as it is
    const isCentred = isTiny && sheet.cells.size === 0;
    const ink = isCentred ? centred(drawn(), width, height) : { strokes: drawn(), brush: width / 10 };
    const gray = coverage(ink.strokes, ink.brush, width, height);
    return Float64Array.from({ length: gray.length * channels }, (_, i) => gray[Math.floor(i / channels)]);
  }

  function paint() {
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (sheet.file) drawContained(context, sheet.file.bitmap);
    else if (sheet.base) drawLevels(context, levels());
    else {
      drawStrokes(context, drawn(), width / 10, scale);
      drawCells(context);
    }
    drawCursor(context);
    paintSeen();
    $("undo").disabled = past.length === 0;
    $("clear").disabled = isBlank();
  }

  function isBlank() {
    return !sheet.file && !sheet.base && sheet.strokes.length === 0 && sheet.cells.size === 0;
  }

  function paintSeen() {
    show($("seen-box"), !sheet.file); // the server makes a picture's pixels fit
    if (!sheet.file) drawLevels($("seen").getContext("2d"), levels());
  }

  function drawLevels(context, values) {
    const pixels = new ImageData(width, height);
    for (let cell = 0; cell < width * height; cell++) {
      for (let i = 0; i < 3; i++) pixels.data[4 * cell + i] = 255 * values[cell * channels + (channels === 3 ? i : 0)];
      pixels.data[4 * cell + 3] = 255;
    }
    const picture = make("canvas", { width, height });
    picture.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, context.canvas.width, context.canvas.height);
  }

  function drawCells(context) {
    for (const [cell, level] of sheet.cells) {
      context.fillStyle = level ? "#fff" : "#000";
      context.fillRect((cell % width) * scale, Math.floor(cell / width) * scale, scale, scale);
    }
  }

  function drawCursor(context) {
    if (!cursor.isShown) return;
    const line = Math.max(2, canvas.width / 200);
    for (const [color, inset] of [["#000", 0], ["#ffb000", line]]) {
      context.strokeStyle = color;
      context.lineWidth = line * 1.5;
      context.strokeRect(cursor.column * scale + inset, cursor.row * scale + inset, scale - 2 * inset, scale - 2 * inset);
    }
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [clamp(share[0], 0, 1) * width, clamp(share[1], 0, 1) * height];
  }

  canvas.onpointerdown = (event) => {
    if (!event.isPrimary || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    cursor.isShown = false;
    if (sheet.file || sheet.base) change(blank);
    pen = [point(event)];
    paint();
  };
  canvas.onpointermove = (event) => {
    if (!pen || !event.isPrimary) return;
    const events = event.getCoalescedEvents?.() ?? [];
    pen.push(...(events.length ? events : [event]).map(point));
    frameWaiting ||= requestAnimationFrame(() => {
      frameWaiting = 0;
      paint();
    });
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    if (!pen || !event.isPrimary) return;
    const stroke = pen;
    pen = null;
    change({ strokes: [...sheet.strokes, stroke] });
    predictSoon();
  };

  function paintCell(level) {
    const cells = new Map(sheet.cells);
    cells.set(cursor.row * width + cursor.column, level);
    change(sheet.file ? { ...blank, cells } : { cells });
    announce();
  }

  function levelAtCursor() {
    return sheet.file ? 0 : levels()[(cursor.row * width + cursor.column) * channels];
  }

  function announce() {
    const state = levelAtCursor() > 0.5 ? "painted" : "empty";
    $("cursor").textContent = `Row ${cursor.row + 1}, column ${cursor.column + 1}, ${state}`;
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.onkeydown = (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && event.key.toLowerCase() === "z") undo();
    else if (isCommand || event.altKey) return;
    else if (event.key in steps) move(...steps[event.key], event.shiftKey);
    else if (event.key === " ") paintCell(levelAtCursor() > 0.5 ? 0 : 1);
    else if (event.key === "Enter") $("form").requestSubmit();
    else return;
    event.preventDefault();
  };
  canvas.onfocus = () => {
    cursor.isShown = canvas.matches(":focus-visible");
    paint();
    if (cursor.isShown) announce();
  };
  canvas.onblur = () => {
    cursor.isShown = false;
    paint();
  };

  function move(down, right, isPainting) {
    const row = clamp(cursor.row + down, 0, height - 1);
    cursor = { row, column: clamp(cursor.column + right, 0, width - 1), isShown: true };
    if (isPainting) return paintCell(1);
    paint();
    announce();
  }

  function undo() {
    if (past.length === 0) return;
    sheet = past.pop();
    paint();
    if (isBlank()) return clearAnswer();
    markStale();
    predictSoon();
  }

  $("undo").onclick = undo;
  $("clear").onclick = () => {
    change(blank);
    clearAnswer();
  };

  async function take(file) {
    if (!file) return;
    if (!["image/png", "image/jpeg"].includes(file.type)) return showProblem(`${file.name}: choose a PNG or a JPEG.`);
    try {
      change({ ...blank, file: { blob: file, bitmap: await createImageBitmap(file) } });
    } catch {
      return showProblem(`${file.name}: the browser cannot read this picture.`);
    }
    predict();
  }

  $("file").onchange = () => {
    take($("file").files[0]);
    $("file").value = "";
  };
  const frame = $("frame");
  frame.ondragover = (event) => {
    event.preventDefault();
    frame.classList.add("over");
  };
  frame.ondragleave = () => frame.classList.remove("over");
  frame.ondrop = (event) => {
    event.preventDefault();
    frame.classList.remove("over");
    take(event.dataTransfer.files[0]);
  };

  paint();
  const name = card.inputs[0].name;
  return {
    reset: () => change({ ...blank, base: exampleLevels(card.example[name]) }),
    file: () => sheet.file?.blob ?? null,
    // as the model sees it, for what is drawn over it later
    picture: () => {
      const picture = make("canvas", { width, height });
      const context = picture.getContext("2d");
      context.fillStyle = "#fff";
      context.fillRect(0, 0, width, height);
      if (sheet.file) context.drawImage(sheet.file.bitmap, 0, 0, width, height);
      else drawLevels(context, levels());
      return picture;
    },
    record: () => {
      if (isBlank()) throw new Error("Nothing is drawn yet.");
      return { [name]: arranged(levels().map((level) => rounded(low + level * (high - low)))) };
    },
  };

  // the layouts of (H, W), (1, H, W), (3, H, W) and (H, W, 3)
  function arranged(values) {
    const rowsOf = (pick) => Array.from({ length: height }, (_, row) => Array.from({ length: width }, (_, column) => pick(row * width + column)));
    if (layout === "HW") return rowsOf((cell) => values[cell]);
    if (layout === "HWC") return rowsOf((cell) => Array.from(values.slice(cell * channels, (cell + 1) * channels)));
    return Array.from({ length: channels }, (_, channel) => rowsOf((cell) => values[cell * channels + channel]));
  }

  function exampleLevels(value) {
    const nested = layout === "HW" ? value.map((row) => row.map((one) => [one])) : layout === "HWC" ? value : lastAxis(value);
    return nested.flat(2).map((one) => clamp((one - low) / (high - low || 1), 0, 1));
  }

  function lastAxis(planes) {
    return planes[0].map((row, i) => row.map((_, j) => planes.map((plane) => plane[i][j])));
  }
}

function rounded(value) {
  return Number(value.toPrecision(5));
}

function drawStrokes(context, strokes, brush, scale) {
  context.save();
  context.scale(scale, scale);
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  context.lineWidth = brush;
  context.shadowColor = "#fff";
  context.shadowBlur = brush * scale * 0.35; // a soft edge; a shadow is measured in pixels, not in scaled units
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
    context.stroke();
  }
  context.restore();
}

// Share of each cell that is under ink: a large picture, averaged over the area of each cell.
function coverage(strokes, brush, width, height) {
  const fine = Math.max(2, Math.round(192 / Math.max(width, height)));
  const sheet = make("canvas", { width: width * fine, height: height * fine });
  const context = sheet.getContext("2d", { willReadFrequently: true });
  drawStrokes(context, strokes, brush, fine);
  const alpha = context.getImageData(0, 0, sheet.width, sheet.height).data;
  const sums = new Float64Array(width * height);
  for (let y = 0; y < sheet.height; y++) {
    for (let x = 0; x < sheet.width; x++) {
      sums[Math.floor(y / fine) * width + Math.floor(x / fine)] += alpha[4 * (y * sheet.width + x) + 3];
    }
  }
  return sums.map((sum) => sum / (255 * fine * fine));
}

// As collections of handwriting have it: one size, in the middle. Those of 28 x 28 leave a seventh free on each side.
// The smallest fill their height, and hold the same amount of ink whatever was written: the pen is chosen for that.
const SMALLEST = 12;
const INK = 0.29;

function centred(strokes, width, height) {
  if (strokes.length === 0) return { strokes, brush: 1 };
  if (Math.max(width, height) > SMALLEST) return fitted(strokes, 0.093 * height, (5 / 7) * width, (5 / 7) * height);
  const withPen = (share) => fitted(strokes, share * height, 0.9 * width, 0.95 * height);
  let [thin, thick] = [0.08, 0.34];
  for (let round = 0; round < 6; round++) {
    const share = (thin + thick) / 2;
    const ink = withPen(share);
    const levels = coverage(ink.strokes, ink.brush, width, height);
    if (levels.reduce((a, b) => a + b, 0) < INK * levels.length) thin = share;
    else thick = share;
  }
  return withPen(thin);
}

// the strokes moved and scaled so that this pen just fits them into a box in the middle
function fitted(strokes, brush, boxWidth, boxHeight) {
  const { width, height } = card.image;
  const points = strokes.flat();
  const [left, right, top, bottom] = [least(points, 0), most(points, 0), least(points, 1), most(points, 1)];
  const scale = Math.min((boxWidth - brush) / (right - left), (boxHeight - brush) / (bottom - top), 8); // a dot stays one
  const place = ([x, y]) => [width / 2 + (x - (left + right) / 2) * scale, height / 2 + (y - (top + bottom) / 2) * scale];
  return { strokes: strokes.map((stroke) => stroke.map(place)), brush };
}

function least(points, axis) {
  return points.reduce((found, point) => Math.min(found, point[axis]), Infinity);
}

function most(points, axis) {
  return points.reduce((found, point) => Math.max(found, point[axis]), -Infinity);
}

function drawContained(context, bitmap) {
  const { width, height } = context.canvas;
  const scale = Math.min(width / bitmap.width, height / bitmap.height);
  const size = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
}

// ---- the answer ----

let asked = 0;
let soon = 0;
let answered = null; // the answer in sight: { body, picture, version }

function predictSoon() {
  clearTimeout(soon);
  soon = setTimeout(predict, 250); // a digit may have a second stroke
}

async function predict() {
  clearTimeout(soon);
  if (input.prompt) return write();
  const turn = ++asked;
  let body;
  try {
    body = requestBody();
  } catch (error) {
    return showProblem(error.message);
  }
  showCurl(body);
  $("predict").setAttribute("aria-busy", "true");
  const picture = input.picture?.() ?? null;
  const started = performance.now();
  try {
    const response = await request("predict", { method: "POST", headers: { "content-type": body.type }, body: body.content });
    const problem = response.ok ? "" : await readProblem(response);
    const document = response.ok ? await response.json() : null;
    if (turn !== asked) return; // a later request is under way
    if (response.status === 401) return askForKey(problem);
    if (problem) return showProblem(problem, response.headers.get("x-request-id"));
    const version = response.headers.get("x-bigray-version") ?? document.version;
    showAnswer(document.predictions[0], performance.now() - started, version);
    answered = { body, picture, version };
  } catch (error) {
    if (turn === asked) showProblem(unreachable(error));
  } finally {
    if (turn === asked) $("predict").removeAttribute("aria-busy");
  }
}

function requestBody() {
  const json = { type: "application/json", file: null };
  if (input.prompt) return { ...json, path: "generate", content: JSON.stringify(input.prompt()) };
  const file = input.file?.() ?? null;
  if (file) return { path: "predict", type: file.type, content: file, file: file.name };
  return { ...json, path: "predict", content: JSON.stringify({ records: [input.record()] }) };
}

function clearAnswer() {
  asked++; // whatever is still on its way is not shown
  clearTimeout(soon);
  $("predict").removeAttribute("aria-busy");
  $("answer-title").parentElement.classList.remove("stale");
  show($("invite"));
  for (const id of ["verdict", "problem", "bars", "took", "written", "explanation", "stop"]) show($(id), false);
  $("glance").textContent = "";
  answered = null;
  writing?.abort();
  writing = null;
  clearExplanation();
}

function markStale() {
  $("answer-title").parentElement.classList.add("stale");
}

function showProblem(message, requestId = null) {
  clearAnswer();
  show($("invite"), false);
  show($("problem"));
  $("problem").textContent = requestId ? `${message}\nRequest ${requestId}` : message;
}

function showAnswer(prediction, elapsedMs, version) {
  clearAnswer();
  for (const id of ["verdict", "took"]) show($(id));
  show($("invite"), false);
  const isClass = "label" in prediction;
  const isList = Array.isArray(prediction.label);
  const text = isClass ? (isList ? prediction.label.join(", ") || "none" : String(prediction.label)) : number(prediction.value);
  // not the largest: a binary model's threshold may choose the other class
  const place = card.classes.length ? card.classes.indexOf(prediction.label) : prediction.label;
  const best = isClass && !isList ? prediction.probabilities[place] : null;
  $("verdict-text").textContent = text;
  $("verdict-text").classList.toggle("long", text.length > 10);
  $("verdict-note").textContent = best === null ? card.target : percent(best);
  $("glance").textContent = text;
  $("took").textContent = `${milliseconds(elapsedMs)} there and back, version ${version}`;
  show($("bars"), isClass);
  if (isClass) showBars(prediction.probabilities);
  show($("explanation"), Boolean(card.explains));
}

function showBars(probabilities) {
  const order = probabilities.map((share, i) => ({ share, name: String(card.classes[i] ?? i) })).sort((a, b) => b.share - a.share);
  $("bars").replaceChildren(
    ...order.slice(0, TOP_CLASSES).map(({ share, name }) => {
      const bar = make("i");
      bar.style.setProperty("--share", share);
      const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
      return make("li", {}, make("span", { class: "name", title: name }, name), track, make("span", { class: "share" }, percent(share)));
    }),
  );
}

// ---- why ----

const MOST_PARTS = 30;

function clearExplanation() {
  show($("explanation-problem"), false);
  $("explain").removeAttribute("aria-busy");
  $("explanation-note").textContent = "";
  $("explanation-body").replaceChildren();
}

async function explain() {
  const turn = asked;
  const { body, picture, version } = answered;
  clearExplanation();
  $("explain").setAttribute("aria-busy", "true");
  $("explanation-note").textContent = "Explaining";
  try {
    // of the very version that answered, which a canary's share or a swap would change
    const path = `v2/models/${encodeURIComponent(card.name)}/versions/${version}/explain`;
    const response = await request(path, { method: "POST", headers: { "content-type": body.type }, body: body.content });
    const problem = response.ok ? "" : await readProblem(response);
    const document = response.ok ? await response.json() : null;
    if (turn !== asked) return;
    if (response.status === 401) return askForKey(problem);
    clearExplanation();
    if (problem) return showUnexplained(problem);
    showExplanation(document.explanations[0], body, picture);
  } catch (error) {
    if (turn === asked) showUnexplained(unreachable(error));
  }
}

function showUnexplained(problem) {
  clearExplanation();
  show($("explanation-problem"));
  $("explanation-problem").textContent = problem;
}

function showExplanation({ label, base, output, attributions }, body, picture) {
  const whom = label === undefined ? "a larger value" : `\u2018${label}\u2019`;
  $("explanation-note").textContent = `From ${number(base)} at the baseline to ${number(output)}, the model's own output: what is above 0 speaks for ${whom}, what is below against it.`;
  if (picture) return $("explanation-body").replaceChildren(heatMap(attributions, picture, whom));
  const isTensor = Array.isArray(attributions);
  const record = body.file === null && !isTensor ? JSON.parse(body.content).records[0] : {};
  const parts = isTensor ? leaves(attributions, card.inputs[0].name) : Object.entries(attributions);
  $("explanation-body").replaceChildren(...partsList(parts, record));
}

// the numbers of a nested list by their places
function leaves(value, name) {
  return Array.isArray(value) ? value.flatMap((one, i) => leaves(one, `${name}[${i}]`)) : [[name, value]];
}

function partsList(parts, record) {
  const order = [...parts].sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
  const shown = order.slice(0, MOST_PARTS);
  const top = Math.abs(shown[0]?.[1] ?? 0) || 1;
  const list = make("ol", { class: "parts", "aria-labelledby": "explanation-title" }, ...shown.map(([name, value]) => partItem(name, value, record[name], top)));
  const left = order.length - shown.length;
  return left > 0 ? [list, make("p", { class: "muted small" }, `and ${WHOLE.format(left)} weaker ones`)] : [list];
}

function partItem(name, value, given, top) {
  const bar = make("i", { class: value < 0 ? "against" : "for" });
  bar.style.setProperty("--share", Math.abs(value) / top);
  const shown = given === undefined ? "" : given === null ? "missing" : typeof given === "number" ? number(given) : given;
  return make(
    "li",
    {},
    make("span", { class: "name", title: name }, name),
    make("span", { class: "given", title: shown }, shown),
    make("span", { class: "signed", "aria-hidden": "true" }, bar),
    make("span", { class: "share" }, signed(value)),
  );
}

function signed(value) {
  return value > 0 ? `+${number(value)}` : number(value);
}

// red and blue over a pale picture, the stronger the more; one pixel must not make all others pale
function heatMap(attributions, picture, whom) {
  const { width, height } = picture;
  const values = attributions.flat();
  const sizes = values.map(Math.abs).sort((a, b) => a - b);
  const top = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes.at(-1) || 1;
  const context = picture.getContext("2d");
  const pixels = context.getImageData(0, 0, width, height);
  values.forEach((value, cell) => {
    const share = Math.min(1, Math.abs(value) / top);
    const gray = (pixels.data[4 * cell] + pixels.data[4 * cell + 1] + pixels.data[4 * cell + 2]) / 3;
    const color = value > 0 ? [214, 39, 40] : [31, 90, 180];
    for (let i = 0; i < 3; i++) pixels.data[4 * cell + i] = (1 - share) * (127 + gray / 2) + share * color[i];
    pixels.data[4 * cell + 3] = 255;
  });
  const map = make("canvas", { width, height, role: "img", "aria-label": `Heat map over the picture: red pixels speak for ${whom}, blue ones against it` });
  map.getContext("2d").putImageData(pixels, 0, 0);
  return make("figure", { class: "heat-map" }, map, make("figcaption", { class: "muted small" }, `Red speaks for ${whom}, blue against it.`));
}

// ---- text ----

let writing = null; // ends the text that is on its way

async function write() {
  let body;
  try {
    body = requestBody();
  } catch (error) {
    return showProblem(error.message);
  }
  clearAnswer();
  showCurl(body);
  const turn = asked;
  const control = (writing = new AbortController());
  show($("invite"), false);
  show($("stop"));
  $("predict").setAttribute("aria-busy", "true");
  try {
    const response = await request(body.path, { method: "POST", headers: { "content-type": body.type }, body: body.content, signal: control.signal });
    const problem = response.ok ? "" : await readProblem(response);
    if (turn !== asked) return;
    if (response.status === 401) return askForKey(problem);
    if (problem) return showProblem(problem, response.headers.get("x-request-id"));
    beginText(JSON.parse(body.content).prompt);
    await showText(response, turn);
  } catch (error) {
    if (turn !== asked) return;
    if (control.signal.aborted && $("written").hidden) clearAnswer();
    else if (control.signal.aborted) endText("Stopped");
    else breakOff(unreachable(error));
  } finally {
    if (turn === asked) {
      show($("stop"), false);
      $("predict").removeAttribute("aria-busy");
    }
  }
}

function beginText(prompt) {
  $("written-prompt").textContent = prompt;
  $("written-text").textContent = "";
  $("written-status").textContent = "Writing";
  show($("written"));
}

async function showText(response, turn) {
  const started = performance.now();
  for await (const event of eventsOf(response.body)) {
    if (turn !== asked) return;
    if (event.error) return breakOff(event.error);
    if (event.done) return endText(`${WHOLE.format(event.tokens)} tokens in ${milliseconds(performance.now() - started)}, version ${response.headers.get("x-bigray-version") ?? card.version}`);
    $("written-text").append(event.text);
  }
  if (turn === asked) breakOff("The connection ended before the text did.");
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have been ended already
  }
}

function endText(status) {
  $("written-status").textContent = status;
}

function breakOff(problem) {
  endText("Broken off");
  show($("problem"));
  $("problem").textContent = problem;
}

// ---- the request as a command ----

function showCurl(body) {
  const data = body.file === null ? `-d ${quoted(body.content)}` : `--data-binary ${quoted(`@${body.file}`)}`;
  const parts = [`curl ${body.path === "generate" ? "-N " : ""}-X POST ${quoted(ROOT + body.path)}`, `-H 'content-type: ${body.type}'`, data];
  if (key) parts.splice(1, 0, '-H "authorization: Bearer $BIGRAY_KEY"'); // the key itself stays out of what people paste
  $("curl").textContent = parts.join(" \\\n  ");
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

async function copyCurl() {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch {
    // without TLS there is no clipboard to write to, only the old way
    getSelection().selectAllChildren($("curl"));
    isCopied = document.execCommand("copy");
  }
  $("copied").textContent = isCopied ? "Copied" : "Selected: copy it with the keyboard";
  setTimeout(() => ($("copied").textContent = ""), 4000);
}

// ---- start ----

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  predict();
});
$("example").addEventListener("click", () => {
  input.reset();
  predict();
});
$("copy").addEventListener("click", copyCurl);
$("explain").addEventListener("click", () => answered && explain());
$("stop").addEventListener("click", () => writing?.abort());
document.querySelector(".command").addEventListener("toggle", () => {
  try {
    showCurl(requestBody());
  } catch {
    if (!$("curl").textContent) $("curl").textContent = "Nothing to send yet.";
  }
});
$("gate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  $("key").value = "";
  if (/^[\x21-\x7e]+$/.test(typed)) {
    keepKey(typed);
    start();
  } else {
    show($("gate-problem"));
    $("gate-problem").textContent = "A key is made of letters, digits and signs without spaces.";
  }
});
$("forget").addEventListener("click", () => {
  keepKey("");
  location.reload();
});
$("retry").addEventListener("click", start);
document.addEventListener("visibilitychange", poll);
for (const [id, path] of [["link-openapi", "openapi.json"], ["link-card", "card"], ["link-metrics", "metrics"]]) $(id).href = ROOT + path;

async function start() {
  await loadCard();
  poll();
}

start();
