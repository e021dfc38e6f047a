// A scan is predicted as a job of the service, watched, shown and downloaded. Nothing is loaded from elsewhere.
import { madeUpScan, millilitres } from "./nifti.js";
import { canBeDrawn, makeViewer } from "./viewer.js";

const at = (id) => document.getElementById(id);
const make = (tag, content = {}) => Object.assign(document.createElement(tag), content);
// `job` runs; `kept` is over: further answers are asked of it, until there is another scan
let models = [], files = [], structures = [], job = null, kept = null, viewed = null, viewer = null;

async function ask(path, options = {}) {
  const headers = at("token").value ? { Authorization: `Bearer ${at("token").value}` } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) at("token-row").hidden = false;
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

const model = () => models.find((one) => one.id === at("model").value);
const hasVolumes = () => model().accepts.includes(".nii.gz");  // else pictures
const VIEWED = "nifti", SCAN = "image";
const offered = () => model().answers.filter((answer) =>  // some refer to the slices of a series
  !/^(dicom-seg|rtstruct)/.test(answer) || files.every((file) => /\.zip$/i.test(file.name)));
const say = (text) => { at("said").textContent = text; };
const complain = (error) => { at("problem").textContent = error?.message ?? ""; };

function fail(error) {
  say("");
  complain(error);
  if (Object.keys(error.series ?? {}).length) offerSeries(error.series);
  document.body.dataset.state = "failed";
}

/** The scan is not one series: one of these has to be chosen. */
function offerSeries(series) {
  at("series").replaceChildren(...Object.entries(series).map(([uid, what]) => new Option(`${what} (${uid})`, uid)));
  at("series-row").hidden = false;
  complain(new Error("The scan holds several series. Choose one and predict again."));
  at("series").focus();
}

function showModel() {
  const one = model();
  if (!one) return;
  at("about").textContent = `${one.configuration}, ${one.channels.length} channel(s): ${one.channels.map((c) => c.name).join(", ")}`;
  at("measured").textContent = inWords(one.measured);
  at("accepts").textContent = `${one.accepts.join(", ")}${one.channels.length > 1 && hasVolumes() ? "; one file for each channel" : ""}`;
  at("files").accept = [...one.accepts, ...(one.accepts.includes(".nii.gz") ? [".gz"] : [])].join(",");
  showFiles();
}

/** What the bundle knows of its quality and speed, with what it was measured on. */
function inWords({ quality, speed }) {
  const parts = [];
  if (quality) {
    const of = `${quality.cases} ${quality.held_out ? "held-out" : "training"} case${quality.cases === 1 ? "" : "s"}`;
    parts.push(`Dice ${quality.dice.toFixed(3)} ${quality.against === "teacher" ? "to its teacher " : ""}on ${of}`);
  }
  if (speed) {
    const where = speed.begins_with === "file" ? "from file to file" : "without files";
    parts.push(`${speed.seconds_per_case.toPrecision(2)} s a case ${where}${speed.cpu ? ` on ${speed.cpu}` : ""}`);
  }
  return parts.join("; ");
}

function showFiles() {
  const channels = model()?.channels ?? [];
  at("channels").replaceChildren(...files.map((file, i) => make("li", { textContent: `${channels[i]?.name ?? "?"}: ${file.name}` })));
  at("predict").disabled = !files.length || job !== null;
}

async function take(chosen) {
  files = [...chosen].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));  // channels are numbered
  complain(null);
  forget();
  at("series-row").hidden = true;
  at("result").hidden = true;
  showFiles();
  const drawn = files.find(canBeDrawn);
  viewer?.clear();
  if (drawn) await viewer?.showScan(drawn).catch(() => say("this browser cannot draw the scan; it can be predicted"));
  else if (files.length) say("such a scan is drawn when it is predicted");
}

/** The service need not keep what this page will not ask for any more. */
function forget() {
  if (kept) ask(kept, { method: "DELETE", keepalive: true }).catch(() => {});
  kept = null;
}

async function load() {
  try {
    models = (await (await ask("/models")).json()).models;
    at("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
    showModel();
    complain(null);
  } catch (error) {
    complain(error);
  }
}

/** Events of a job until it is over; fetched, since an EventSource sends no token. */
async function watch(place) {
  const reader = (await ask(`${place}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
  let last = {};
  for (let text = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const line of blocks.flatMap((block) => block.split("\n")).filter((l) => l.startsWith("data: "))) {
      last = JSON.parse(line.slice(6));
      if (last.kind === "progress") {
        Object.assign(at("progress"), { max: last.total, value: last.done });
        say(`${last.done} of ${last.total} ${last.unit}`);
      } else say(last.text || last.state || "");
    }
  }
  const state = await (await ask(place)).json();
  if (state.state !== "done") throw Object.assign(new Error(state.error || state.state), { series: state.series });
  return state;
}

/** An answer of a job that is over: [blob, name of the file]. */
async function answered(place, answer) {
  if (!place) throw new Error("the prediction was given back to the service; predict again");
  const result = await ask(`${place}/result?${new URLSearchParams({ answer })}`);
  const name = /filename="([^"]+)"/.exec(result.headers.get("content-disposition"));
  return [await result.blob(), name ? name[1] : answer];
}

/** Predict the files; the state of the job, which is `kept` then. */
async function predicted() {
  const form = new FormData();
  for (const file of files) form.append("image", file, "image");
  complain(null);
  forget();
  document.body.dataset.state = "busy";
  say("sending");
  at("progress").removeAttribute("value");  // which makes it one without an end
  try {
    job = "";
    setBusy(true);
    const wanted = { answer: VIEWED, ...(at("series-row").hidden ? {} : { series: at("series").value }) };
    const taken = await ask(`/models/${model().id}/jobs?${new URLSearchParams(wanted)}`, { method: "POST", body: form });
    kept = job = `/jobs/${(await taken.json()).id}`;
    return await watch(job);
  } catch (error) {
    forget();
    throw error;
  } finally {
    job = null;
    at("progress").value = 0;
    setBusy(false);
  }
}

function setBusy(isBusy) {
  for (const id of ["files", "model", "example", "series"]) at(id).disabled = isBusy;
  at("cancel").disabled = !isBusy;
  at("predict").disabled = isBusy || !files.length;
  for (const button of at("downloads").children) button.disabled = isBusy;
}

async function predict(event) {
  event?.preventDefault();
  try {
    const isVolume = hasVolumes();
    const state = await predicted();
    const [blob, name] = await answered(kept, VIEWED);
    viewed = { blob, name };
    structures = model().labels.map((label) => ({ ...label, isShown: true }));
    showLegend(isVolume ? await millilitres(blob) : null);
    showTimes(state.times_s);
    at("downloads").replaceChildren(...offered().map((answer) =>
      make("button", { type: "button", textContent: answer, onclick: () => download(answer) })));
    at("result").hidden = false;
    if (viewer) {
      if (!files.some(canBeDrawn)) await viewer.showScan(new File([(await answered(kept, SCAN))[0]], "scan.nii.gz"));
      await viewer.showLabels(blob, structures, Number(at("opacity").value));
      offerViews(isVolume);
    }
    say("done");
    document.body.dataset.state = "shown";
  } catch (error) {
    fail(error);
  }
}

/** Seconds of each stage, and their sum: the service's `total` begins with `load`. */
function showTimes({ total, ...stages }) {
  const all = (stages.upload ?? 0) + (stages.queued ?? 0) + total;
  at("times").replaceChildren(...Object.entries({ ...stages, total: all }).flatMap(([stage, seconds]) =>
    [make("dt", { textContent: stage }), make("dd", { textContent: seconds.toFixed(2) })]));
}

function showLegend(volumes) {
  at("legend").tBodies[0].replaceChildren(...structures.map((structure) => {
    const shown = make("input", { type: "checkbox", checked: true, id: `shown-${structure.value}` });
    shown.addEventListener("change", () => {
      structure.isShown = shown.checked;
      viewer?.colour(structures);
    });
    const label = make("label", { htmlFor: shown.id }), colour = make("span", { className: "colour" });
    colour.style.background = structure.colour;
    label.append(colour, structure.name);
    const row = document.createElement("tr"), of = new Set([structure.value, ...structure.values]);
    const volume = volumes && [...of].reduce((sum, value) => sum + (volumes.get(value) ?? 0), 0);
    for (const content of [shown, label, volume === null ? "" : volume.toFixed(2)]) {
      const cell = make("td");
      cell.append(content);
      row.append(cell);
    }
    return row;
  }));
}

async function download(answer) {
  complain(null);
  setBusy(true);
  at("cancel").disabled = true;
  try {
    let { blob, name } = viewed;
    if (answer !== VIEWED) [blob, name] = await answered(kept, answer);
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  } catch (error) {
    complain(error);
  } finally {
    setBusy(false);
  }
}

async function example() {
  const one = model();
  if (!one) return;
  if (!hasVolumes()) return complain(new Error("there is no example for models of pictures"));
  const spacing = [...one.spacing_mm].reverse();
  while (spacing.length < 3) spacing.push(1);
  await take(one.channels.map((_, seed) => madeUpScan(spacing, seed)));
  await predict();
}

/** Buttons for what the viewer can show; a picture has one plane. What is shown stays, where it can. */
function offerViews(isVolume) {
  const names = isVolume ? Object.keys(viewer.kinds) : ["Axial"];
  const before = [...at("views").children].find((button) => button.ariaPressed === "true")?.textContent;
  const shown = names.includes(before) ? before : names[0];
  at("views").replaceChildren(...names.map((name) => {
    const button = make("button", { type: "button", textContent: name, ariaPressed: String(name === shown) });
    button.addEventListener("click", () => {
      for (const other of at("views").children) other.ariaPressed = String(other === button);
      viewer.view(name);
    });
    return button;
  }));
  viewer.asPicture(!isVolume);
  viewer.view(shown);
}

at("form").addEventListener("submit", predict);
at("model").addEventListener("change", showModel);
at("token").addEventListener("change", load);
at("files").addEventListener("change", () => take(at("files").files));
at("example").addEventListener("click", () => example().catch(complain));
at("cancel").addEventListener("click", () => job && ask(job, { method: "DELETE" }).catch(complain));
at("opacity").addEventListener("input", () => viewer?.opacity(Number(at("opacity").value)));
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover");
    if (kind === "drop" && job === null && event.dataTransfer.files.length) take(event.dataTransfer.files).catch(complain);
  });
}
window.addEventListener("pagehide", forget);
await load();
viewer = await makeViewer(at("canvas"), (where) => { at("where").textContent = where; }).catch(() => null);
if (viewer) {
  offerViews(true);
} else {
  at("stage").hidden = true;
  at("where").textContent = "This browser has no WebGL 2, so nothing is drawn; results can be downloaded.";
}
document.body.dataset.state = "ready";
