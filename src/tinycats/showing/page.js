// The gallery's page: asks the server for what there is, and shows it. No library, no build.

const byId = (id) => document.getElementById(id);
const LIVE = 2000; // milliseconds between two looks at runs in progress
const tags = new Map(); // what was answered last, and its tag

/** An element with attributes and children; text is text, whatever is in it. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The JSON at an address; undefined if it is what it was the last time. */
async function news(address) {
  const known = tags.get(address);
  const answer = await fetch(address, known ? { headers: { "If-None-Match": known } } : {});
  if (answer.status === 304) return undefined;
  if (!answer.ok) throw new Error(await whyNot(answer));
  tags.set(address, answer.headers.get("ETag"));
  return answer.json();
}

async function whyNot(answer) {
  try {
    return (await answer.json()).detail;
  } catch {
    return `the server says ${answer.status}`;
  }
}

// --- runs ---------------------------------------------------------------------------------------------------------

let runs = [];
let chosen = decodeURIComponent(location.hash.slice(1));
let grids = [];

const progress = (run) => `step ${run.step} of ${run.steps ?? "?"}`;
const best = (run) => (run.best ? `${run.best.metric} ${run.best.value.toFixed(4)}` : "");

function showRuns() {
  const focused = document.activeElement?.dataset?.run;
  byId("no-runs").hidden = runs.length > 0;
  byId("runs").replaceChildren(
    ...runs.map((run) => {
      const words = [run.script.replace(".py", ""), progress(run), best(run), run.state].filter(Boolean);
      const button = element("button", { type: "button", "data-run": run.name }, run.name);
      button.append(element("small", {}, words.join(" · ")));
      button.setAttribute("aria-current", String(run.name === chosen));
      button.addEventListener("click", () => choose(run.name));
      return element("li", {}, button);
    }),
  );
  if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
}

async function choose(name) {
  chosen = name;
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  for (const button of document.querySelectorAll("[data-run]")) {
    button.setAttribute("aria-current", String(button.dataset.run === name));
  }
  tags.clear();
  grids = [];
  byId("curves").replaceChildren();
  await showRun();
}

async function showRun() {
  const name = chosen;
  const address = `api/runs/${encodeURIComponent(name)}`;
  const [run, curves] = await Promise.all([news(address), news(`${address}/curves`)]);
  if (name !== chosen) return;
  byId("run").hidden = false;
  if (run) {
    byId("run-title").textContent = run.name;
    byId("run-state").textContent = [run.script, progress(run), best(run), run.state].filter(Boolean).join(" · ");
    byId("run-resume").hidden = run.state !== "interrupted";
    byId("run-resume").querySelector("code").textContent = run.resume;
    byId("run-report").hidden = !run.report;
    byId("run-report").querySelector("a").href = `runs/${encodeURIComponent(name)}/report.html`;
    const rows = Object.entries(run.options).sort();
    byId("options").tBodies[0].replaceChildren(
      ...rows.map(([key, value]) => element("tr", {}, element("td", {}, key), element("td", {}, String(value)))),
    );
    showGrids(run.samples);
  }
  if (curves) {
    const figures = Object.values(curves).map((svg) => {
      const parsed = new DOMParser().parseFromString(svg, "image/svg+xml").documentElement;
      return element("figure", { style: "margin:0" }, document.importNode(parsed, true));
    });
    byId("curves").replaceChildren(...(figures.length ? figures : [element("p", {}, "Nothing to be seen yet.")]));
  }
}

function showGrids(names) {
  const atTheEnd = Number(byId("step").value) >= grids.length - 1;
  grids = names;
  byId("samples").hidden = names.length === 0;
  byId("step").max = Math.max(0, names.length - 1);
  if (atTheEnd) byId("step").value = names.length - 1;
  showGrid();
}

function showGrid() {
  const name = grids[Number(byId("step").value)];
  if (!name) return;
  const step = Number(name.replace("step_", ""));
  byId("step-number").textContent = step;
  byId("step").setAttribute("aria-valuetext", `step ${step}`);
  const address = `api/runs/${encodeURIComponent(chosen)}/samples/${name}.png`;
  if (byId("grid").getAttribute("src") !== address) byId("grid").src = address;
  byId("grid").alt = `Samples of ${chosen} after step ${step}: a row for each class`;
}

byId("step").addEventListener("input", showGrid);
byId("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(byId("run-resume").querySelector("code").textContent);
  say("Copied");
});

// --- models -------------------------------------------------------------------------------------------------------

let models = {};

async function showModels() {
  const answer = await fetch("api/models");
  if (!answer.ok) return;
  models = await answer.json();
  const options = (kind) => models[kind].map(({ run }) => element("option", { value: run }, run || "the last one"));
  for (const [section, select, kind] of [
    ["classify", "classifier", "cats_model.pt"],
    ["sample", "generator", "tiny_dit.pt"],
  ]) {
    const before = byId(select).value;
    byId(section).hidden = models[kind].length === 0;
    byId(select).replaceChildren(...options(kind));
    if (models[kind].some(({ run }) => run === before)) byId(select).value = before;
  }
  showClasses();
}

function showClasses() {
  const before = byId("class").value;
  const model = models["tiny_dit.pt"].find(({ run }) => run === byId("generator").value);
  byId("class").replaceChildren(...(model?.classes ?? []).map((name) => element("option", { value: name }, name)));
  if (model?.classes.includes(before)) byId("class").value = before;
}

byId("generator").addEventListener("change", showClasses);

/** What the server answers to a request that computes; the error is shown in `place`. */
async function ask(place, address, body) {
  place.replaceChildren(element("p", {}, "One moment…"));
  try {
    const answer = await fetch(address, { method: "POST", body });
    if (!answer.ok) throw new Error(await whyNot(answer));
    return await answer.json();
  } catch (error) {
    place.replaceChildren(element("p", { class: "error", role: "alert" }, error.message));
    return undefined;
  }
}

async function classify(photo) {
  const place = byId("answer");
  const run = encodeURIComponent(byId("classifier").value);
  const answer = await ask(place, `api/classify?run=${run}`, photo);
  if (!answer) return;
  const image = element("img", { alt: `The photo ${photo.name}` });
  image.src = URL.createObjectURL(photo);
  const rows = answer.classes.slice(0, 5).map(([name, probability]) => {
    const percent = `${Math.round(100 * probability)}%`;
    const meter = element("meter", { min: 0, max: 1, value: probability, "aria-label": `${name}: ${percent}` });
    return element("li", {}, element("span", {}, name), meter, element("span", {}, percent));
  });
  place.replaceChildren(image, element("ol", {}, ...rows));
}

byId("photo").addEventListener("change", () => byId("photo").files[0] && classify(byId("photo").files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  byId("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) classify(event.dataTransfer.files[0]);
  });
}

byId("sample-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = byId("sample-form").querySelector("button");
  const asked = { class: byId("class").value };
  for (const name of ["count", "seed", "steps"]) asked[name] = Number(byId(name).value);
  button.disabled = true;
  const run = encodeURIComponent(byId("generator").value);
  const answer = await ask(byId("sampled"), `api/sample?run=${run}`, JSON.stringify(asked));
  button.disabled = false;
  if (!answer) return;
  const images = answer.images.map((png, number) => {
    const alt = `${asked.class}, seed ${asked.seed}, number ${number + 1}`;
    return element("img", { alt, src: `data:image/png;base64,${png}` });
  });
  byId("sampled").replaceChildren(...images);
});

// --- now and then -------------------------------------------------------------------------------------------------

const say = (text) => (byId("status").textContent = text);

async function look() {
  try {
    const listed = await news("api/runs");
    if (listed) {
      runs = listed;
      if (!runs.some((run) => run.name === chosen)) chosen = runs[0]?.name ?? "";
      showRuns();
      await showModels();
    }
    if (chosen) await showRun();
    say(runs.some((run) => run.state === "in progress") ? "Live" : "");
  } catch (error) {
    say(`Not up to date: ${error.message}`);
  }
  setTimeout(look, LIVE);
}

look();
