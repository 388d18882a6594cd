"use strict";
// The page makes its form from /api/model, so a new field of the server needs a line here only if it is of a new kind (`KINDS`).

const $ = (id) => document.getElementById(id);
const SAVED = "dit_jax.drawings"; // of this tab: ids of drawings, newest first; the server has the images
const MOST_SAVED = 64;
const FEW_CLASSES = 24; // more get a filter
const ENDS = ["done", "failed", "cancelled"];
const WORDS = { balanced: "all in turn", random: "random", none: "no class", chosen: "chosen" };

let model = null, fields = null, controls = {}, running = null, stream = null;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value; else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

// The form: a control has `node`, `get()` and `set(value)`; null stands for the default.

const KINDS = { integer: numberField, number: numberField, choice: choiceField, labels: labelsField, text: textField };

function labelled(name, field, ...inputs) {
  const label = element("label", { htmlFor: `field-${name}` }, field.label);
  if (field.hint) label.append(" ", element("span", { className: "hint" }, field.hint));
  return element("div", { className: "field" }, label, ...inputs);
}

function numberField(name, field) {
  const whole = field.kind === "integer";
  const input = element("input", { id: `field-${name}`, type: "number", inputMode: whole ? "numeric" : "decimal",
    min: field.minimum, max: field.maximum, step: field.step ?? 1, autocomplete: "off" });
  const get = () => input.value.trim() === "" && !input.validity.badInput ? null : Number(input.value);
  const set = (value) => { input.value = value ?? ""; input.dispatchEvent(new Event("input")); };
  let node;
  if (name === "seed") {
    const other = element("button", { type: "button", title: "Another seed" }, "Other");
    other.setAttribute("aria-label", "Another random seed");
    other.addEventListener("click", () => set(crypto.getRandomValues(new Uint32Array(1))[0]));
    node = labelled(name, field, element("div", { className: "joined" }, input, other));
    node.classList.add("wide");
  } else if (!whole) {
    const slider = element("input", { type: "range", min: field.minimum, max: Math.min(field.maximum, 10), step: field.step });
    slider.setAttribute("aria-label", `${field.label}, slider`);
    slider.addEventListener("input", () => { input.value = slider.value; });
    input.addEventListener("input", () => { slider.value = input.value; });
    node = labelled(name, field, input, slider);
  } else {
    node = labelled(name, field, input);
  }
  set(field.default);
  return { node, get, set, input };
}

function choiceField(name, field) {
  const select = element("select", { id: `field-${name}` });
  for (const choice of field.choices) select.append(element("option", { value: choice.name }, choice.name));
  select.value = field.default;
  return { node: labelled(name, field, select), get: () => select.value, set: (value) => { select.value = value; }, input: select };
}

function textField(name, field) {
  const input = element("textarea", { id: `field-${name}`, rows: name === "prompt" ? 3 : 1, maxLength: field.maximum });
  input.value = field.default;
  const node = labelled(name, field, input);
  node.classList.add("wide");
  return { node, get: () => input.value, set: (value) => { input.value = value ?? ""; }, input };
}

function labelsField(name, field) {
  const select = element("select", { id: `field-${name}` });
  for (const word of [...field.choices, "chosen"]) select.append(element("option", { value: word }, WORDS[word] ?? word));
  select.value = field.default;
  const boxes = field.classes.map((text, label) => element("input", { type: "checkbox", value: label }));
  const chips = field.classes.map((text, label) => element("label", {}, boxes[label], element("span", {}, text)));
  const classes = element("div", { className: "classes", role: "group" }, ...chips);
  classes.setAttribute("aria-label", "Chosen classes");
  const chosen = () => boxes.filter((box) => box.checked).map((box) => Number(box.value));
  classes.addEventListener("change", () => { select.value = chosen().length ? "chosen" : field.default; });
  select.addEventListener("change", () => { if (select.value !== "chosen") boxes.forEach((box) => { box.checked = false; }); });
  const node = labelled(name, field, select);
  node.classList.add("wide");
  if (field.classes.length > FEW_CLASSES) {
    const filter = element("input", { type: "search", className: "filter", placeholder: `Search ${field.classes.length} classes` });
    filter.setAttribute("aria-label", "Search classes");
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      chips.forEach((chip, label) => {
        chip.hidden = !boxes[label].checked && !`${label} ${field.classes[label]}`.toLowerCase().includes(wanted);
      });
    });
    filter.addEventListener("keydown", (event) => { if (event.key === "Enter") event.preventDefault(); });
    node.append(filter);
  }
  node.append(classes);
  const set = (value) => {
    const given = Array.isArray(value) ? value : [];
    boxes.forEach((box, label) => { box.checked = given.includes(label); });
    select.value = Array.isArray(value) ? "chosen" : value ?? field.default;
  };
  return { node, get: () => select.value === "chosen" ? chosen() : select.value, set, input: select };
}

function fillSteps() {
  const choice = fields.sampler.choices.find((one) => one.name === controls.sampler.get());
  controls.num_steps.input.disabled = choice.num_steps === null;
  controls.num_steps.input.placeholder = choice.num_steps === null ? "its own" : "";
  controls.num_steps.set(choice.num_steps);
}

function makeForm() {
  for (const [name, field] of Object.entries(fields)) {
    controls[name] = KINDS[field.kind](name, field);
    $("fields").append(controls[name].node);
  }
  controls.sampler.input.addEventListener("change", fillSteps);
  fillSteps();
}

function useSettings(asked) {
  controls.sampler.set(asked.sampler);
  fillSteps();
  for (const [name, value] of Object.entries(asked)) controls[name]?.set(value);
  $("error").textContent = "";
  $("form").scrollIntoView({ block: "nearest" });
  $("draw").focus({ preventScroll: true });
}

// Drawing

function className(label) {
  if (!fields.labels) return "";
  return label === fields.labels.classes.length ? "no class" : fields.labels.classes[label];
}

function makeTiles(container, labels) {
  container.classList.toggle("pixels", Math.max(model.width, model.height) < 128);
  const tiles = labels.map((label, k) => {
    const image = element("img", { alt: `Image ${k}${className(label) && `: ${className(label)}`}`, width: model.width, height: model.height });
    return element("figure", { className: "waiting" }, element("div", { className: "frame" }, image), element("figcaption", { title: className(label) }, className(label) || `${k}`));
  });
  for (const tile of tiles) tile.firstChild.style.aspectRatio = `${model.width} / ${model.height}`;
  container.replaceChildren(...tiles);
}

function show(image, source) {
  image.src = source;
  image.closest("figure").classList.remove("waiting");
}

function tell(status) {
  const before = status.ahead === 1 ? "1 drawing comes" : `${status.ahead} drawings come`;
  const share = status.total ? status.done / status.total : null;
  const text = {
    queued: status.ahead ? `Waiting: ${before} before yours.` : "Waiting for the server …",
    preparing: status.compiles ? "Compiling: the first drawing with these settings takes longer …" : "Starting …",
    drawing: share === null ? `Drawing: ${Math.floor(status.done / status.num_images)} evaluations` : `Drawing: ${Math.floor(100 * share)} %`,
  }[status.state] ?? "";
  if ($("status").textContent !== text) $("status").textContent = text;
  if (status.state === "drawing" && share !== null) $("progress").value = share; else $("progress").removeAttribute("value");
}

function listen(job) {
  running = job;
  save(job.id);
  $("draw").disabled = true;
  $("cancel").disabled = false;
  $("running").hidden = false;
  $("empty").hidden = true;
  makeTiles($("live"), job.labels);
  tell(job);
  stream = new EventSource(`/api/jobs/${job.id}/events`);
  stream.onmessage = (event) => {
    const status = JSON.parse(event.data);
    const images = $("live").querySelectorAll("img");
    for (const [k, source] of Object.entries(status.pictures)) show(images[k], source);
    tell(status);
    if (ENDS.includes(status.state)) end(job, status);
  };
  stream.onerror = async () => { // the browser tries again by itself, unless the drawing or the server is gone
    try {
      await ask(`/api/jobs/${job.id}`);
    } catch (error) {
      if (running === job) end(job, { state: "failed", message: error.message });
    }
  };
}

function end(job, status) {
  stream?.close();
  stream = running = null;
  $("draw").disabled = false;
  $("cancel").disabled = true;
  $("running").hidden = true;
  if (status.state === "done") {
    addToGallery({ ...job, ...status });
  } else {
    forget(job.id);
    $("error").textContent = status.message || (status.state === "cancelled" ? "Cancelled." : "The drawing failed.");
  }
  $("empty").hidden = $("gallery").children.length > 0;
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running || $("draw").disabled) return;
  $("error").textContent = "";
  $("draw").disabled = true;
  const asked = Object.fromEntries(Object.entries(controls).map(([name, control]) => [name, control.get()]));
  try {
    listen(await ask("/api/jobs", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked) }));
    $("running").scrollIntoView({ block: "nearest" }); // on a phone it is below the form
  } catch (error) {
    $("error").textContent = error.message;
    $("draw").disabled = false;
  }
});

$("cancel").addEventListener("click", async () => {
  const job = running;
  if (!job) return;
  $("cancel").disabled = true;
  try {
    const status = await ask(`/api/jobs/${job.id}`, { method: "DELETE" });
    if (running === job && status.state === "cancelled") end(job, status); // else it was done before: the stream says so
  } catch (error) {
    if (running === job) end(job, { state: "failed", message: error.message });
  }
});

// The gallery

function settingsText(asked) {
  const said = [];
  for (const [name, value] of Object.entries(asked)) {
    if (value === null || value === "" || name === "labels" || name === "prompt") continue;
    if (name === "num_steps") said.push(`${value} steps`);
    else if (name === "num_images") said.push(value === 1 ? "1 image" : `${value} images`);
    else if (name === "sampler") said.push(value);
    else said.push(`${(fields[name]?.label ?? name).toLowerCase()} ${value}`);
  }
  return said.join(", ");
}

function title(asked) {
  if (asked.prompt !== undefined) return asked.prompt || "No prompt";
  if (asked.labels === undefined) return "Images";
  return Array.isArray(asked.labels) ? asked.labels.map(className).join(", ") : `Classes: ${WORDS[asked.labels] ?? asked.labels}`;
}

function addToGallery(job) {
  const tiles = element("div", { className: "tiles" });
  makeTiles(tiles, job.labels);
  tiles.querySelectorAll("figure").forEach((figure, k) => {
    const source = `/api/jobs/${job.id}/images/${k}.png`;
    const link = element("a", { href: source, title: "Download this image" });
    link.setAttribute("download", `seed${job.fields.seed}_${k}.png`);
    link.setAttribute("aria-label", `Download image ${k}, ${className(job.labels[k])}`);
    const image = figure.querySelector("img");
    image.loading = "lazy";
    link.style.aspectRatio = `${model.width} / ${model.height}`;
    figure.firstChild.replaceWith(link);
    link.append(image);
    show(image, source);
  });
  const article = element("article", {},
    element("h2", {}, title(job.fields)),
    element("p", { className: "settings" }, `${settingsText(job.fields)}; ${job.seconds.toFixed(1)} s`),
    tiles);
  const again = element("button", { type: "button" }, "Use these settings again");
  again.addEventListener("click", () => useSettings(job.fields));
  const away = element("button", { type: "button" }, "Remove");
  away.setAttribute("aria-label", "Remove these images from the page");
  away.addEventListener("click", () => {
    forget(job.id);
    article.remove();
    $("empty").hidden = $("gallery").children.length > 0;
    $("draw").focus();
  });
  const file = (name, text) => element("a", { href: `/api/jobs/${job.id}/${name}`, download: name }, text);
  article.append(element("div", { className: "actions" }, again, file("samples.zip", "All as PNG (zip)"), file("samples.npz", "All as npz"), away));
  $("gallery").prepend(article);
}

function saved() {
  try {
    return JSON.parse(sessionStorage.getItem(SAVED) ?? "[]");
  } catch {
    return [];
  }
}

function save(id) {
  sessionStorage.setItem(SAVED, JSON.stringify([id, ...saved().filter((one) => one !== id)].slice(0, MOST_SAVED)));
}

function forget(id) {
  sessionStorage.setItem(SAVED, JSON.stringify(saved().filter((one) => one !== id)));
}

async function restore() { // after a reload
  for (const id of saved().reverse()) {
    let job;
    try {
      job = await ask(`/api/jobs/${id}`);
    } catch (error) {
      if (error.status === 404) forget(id);
      continue;
    }
    if (job.state === "done") addToGallery(job);
    else if (!ENDS.includes(job.state) && !running) listen(job);
    else forget(id);
  }
  $("empty").hidden = running !== null || $("gallery").children.length > 0;
}

async function begin() {
  try {
    ({ model, fields } = await ask("/api/model"));
  } catch (error) {
    $("error").textContent = error.message;
    return;
  }
  document.title = `${model.name} – dit_jax`;
  $("name").textContent = model.name;
  const step = model.step === null ? "" : `, step ${model.step.toLocaleString("en")}`;
  $("network").textContent = `${model.network}${step}; images of ${model.height} x ${model.width}`;
  const pixels = Math.min(Math.max(model.width, 80), 224);
  document.documentElement.style.setProperty("--tile", `${pixels / 16}rem`);
  makeForm();
  await restore();
  if (!running) $("draw").disabled = false;
}

begin();
