"use strict";
// The playground: asks /make for pictures, and shows each step as it comes. No library, no build.

const at = (id) => document.getElementById(id);
const FIELDS = ["seed", "other", "count", "share", "steps", "teacher_steps", "guidance", "label", "prompt"];
let card = null;
let flight = null; // what stops the request that is under way
let panels = {};
let timer = 0;

const kind = () => document.querySelector("input[name=kind]:checked").value;
const words = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const time = (ms) => (ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)}\u00a0ms` : `${(ms / 1000).toFixed(1)}\u00a0s`);

function say(text) { at("status").textContent = text; }

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
  if (text) say("");
}

async function load() {
  const answer = await fetch("/card");
  if (!answer.ok) throw new Error(await answer.text());
  card = await answer.json();
  document.title = `${card.title} · fewstep playground`;
  at("title").textContent = card.title;
  const { student, teacher } = card.models;
  at("lead").textContent = `${words(student.calls, "network call")} a picture` +
    (teacher ? `, beside its teacher's ${words(teacher.calls, "call")}. Both start from the same noise.` : ".");
  setUp(student, teacher);
  for (const side of Object.keys(card.models)) panels[side] = new Panel(side, card.models[side]);
  recall();
  arrange();
  at("go").disabled = false;
  await generate();
}

function setUp(student, teacher) {
  for (const input of document.querySelectorAll("input[name=kind]")) {
    input.closest("label").hidden = !card.kinds.includes(input.value);
  }
  document.querySelector("[data-for=prompt]").hidden = !card.prompts;
  at("prompt").maxLength = card.most.prompt;
  document.querySelector("[data-for=label]").hidden = !card.classes;
  const names = [["", "by the seed"]];
  for (let i = 0; i < card.classes; i++) names.push([String(i), String(i)]);
  names.push([String(card.classes), "none"]);
  at("label").append(...names.map(([value, text]) => new Option(text, value)));
  document.querySelector("[data-for=teacher]").hidden = !teacher;
  document.querySelector("[data-for=guided]").hidden = !card.guided;
  at("teacher_steps").value = teacher ? teacher.steps : "";
  at("teacher_steps").max = card.most.teacher_steps;
  at("seed").max = at("other").max = card.most.seed;
  at("steps").value = Math.min(student.steps, 8);
  at("steps").disabled = student.possible.length < 2;
  at("possible").append(...student.possible.map((k) => new Option(String(k), String(k))));
  at("live").checked = student.parameters < 3e6 && (!teacher || teacher.parameters < 3e6);
  document.body.classList.toggle("small", Math.max(...card.shape.slice(-2)) <= 96);
}

function arrange() {
  // Shows the fields of the chosen kind, with its limits.
  const now = kind();
  for (const part of document.querySelectorAll("[data-kinds]")) {
    part.hidden = !part.dataset.kinds.split(" ").includes(now) ||
      (card.points > 0 && part.contains(at("count")) && now !== "walk");
  }
  const [low, high] = card.points ? [2, 64] : card.counts[now];
  const count = at("count");
  count.min = low;
  count.max = high;
  const rows = card.classes > 1 && card.classes <= 16 ? Math.floor(Math.min(high, 60) / card.classes) : 0;
  const grid = rows ? rows * card.classes : Math.min(high, 16); // whole rows, a column for each class
  const usual = card.points ? 64 : { picture: 1, grid, walk: 8, variations: 8 }[now];
  if (count.dataset.kind !== now || !count.value) count.value = Math.min(high, usual);
  count.dataset.kind = now;
  at("count-name").textContent = card.points ? "Points" : "Pictures";
  at("other-name").textContent = now === "walk" ? "Second seed" : "First seed of the noise";
  at("steps-shown").textContent = at("steps").value;
  at("share-shown").textContent = Number(at("share").value).toFixed(2);
  const { student } = card.models;
  const other = Number(at("steps").value) !== student.steps && !at("steps").disabled;
  at("note").textContent = other
    ? `This student was made for ${words(student.steps, "step")}; in ${at("steps").value} it does what it never learnt.`
    : "";
}

function wanted() {
  // The request, or null where a field is not filled in rightly; the browser then says which.
  for (const input of at("form").elements) {
    if (input.closest("[hidden]") || !input.willValidate) continue;
    if (!input.checkValidity()) {
      fail(`${input.labels[0] ? input.labels[0].textContent.trim().split("\n")[0] : input.name}: ${input.validationMessage}`);
      return null;
    }
  }
  const { student, teacher } = card.models;
  const now = kind();
  const body = { kind: now, seed: Number(at("seed").value) };
  if (now === "walk" || now === "variations") body.other = Number(at("other").value);
  if (now !== "picture" && !(card.points && now !== "walk")) body.count = Number(at("count").value);
  if (now === "variations") body.share = Number(at("share").value);
  if (card.classes && at("label").value !== "") body.label = Number(at("label").value);
  if (card.prompts) body.prompt = at("prompt").value;
  if (!at("steps").disabled && Number(at("steps").value) !== student.steps) body.steps = Number(at("steps").value);
  if (teacher && Number(at("teacher_steps").value) !== teacher.steps) {
    body.teacher_steps = Number(at("teacher_steps").value);
  }
  if (card.guided && Number(at("guidance").value) !== 1) body.guidance = Number(at("guidance").value);
  return body;
}

async function generate() {
  const body = wanted();
  if (!body) return;
  if (flight) flight.abort();
  const mine = (flight = new AbortController());
  fail("");
  remember();
  at("stop").disabled = false;
  at("panels").setAttribute("aria-busy", "true");
  for (const panel of Object.values(panels)) panel.begin(body);
  try {
    const answer = await fetch("/make", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: mine.signal,
    });
    if (!answer.ok) throw new Error(await sentence(answer));
    await follow(answer.body.getReader());
  } catch (error) {
    if (mine.signal.aborted) return;
    fail(error instanceof TypeError ? "The server does not answer: is the command still running?" : error.message);
  } finally {
    if (flight === mine) {
      flight = null;
      at("stop").disabled = true;
      at("panels").removeAttribute("aria-busy");
    }
  }
}

async function sentence(answer) {
  const text = await answer.text();
  try { return JSON.parse(text).error; } catch { return text; }
}

async function follow(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer ended before the pictures did; is the command still running?");
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Error(event.text);
      if (event.event === "end") return finish();
      take(event);
    }
  }
}

function take(event) {
  if (event.event === "waiting") {
    say(event.ahead ? `waiting for ${words(event.ahead, "other request")}` : "making it");
  } else {
    panels[event.side][event.event](event);
  }
}

function finish() {
  const { student, teacher } = panels;
  say(`done: ${Object.values(panels).map((panel) => panel.summary()).join("; ")}`);
  const line = at("compared");
  line.textContent = "";
  if (!teacher) return;
  const word = document.createElement("span");
  word.className = "student-word";
  word.textContent = `${(teacher.calls / student.calls).toLocaleString("en", { maximumFractionDigits: 1 })} times fewer network calls`;
  line.append("The student needs ", word, `, and ${time(student.ms)} in place of ${time(teacher.ms)}.`);
}

class Panel {
  // One model: its picture, the film of its steps, and how to make it again.
  constructor(side, model) {
    this.side = side;
    this.node = at("panel").content.cloneNode(true).firstElementChild;
    this.node.classList.add(side);
    const find = (selector) => this.node.querySelector(selector);
    const heading = find("h2");
    heading.id = `${side}-name`;
    heading.textContent = side === "student" ? "Student" : "Teacher";
    this.node.setAttribute("aria-labelledby", heading.id);
    find(".facts").textContent = `${model.from} · ${words(model.parameters, "parameter")}`;
    [this.image, this.canvas, this.scrub, this.film] = [".picture img", "canvas", ".scrub", ".film"].map(find);
    this.slider = find(".scrub input");
    this.save = find(".save a");
    this.details = find("details");
    this.film.setAttribute("aria-label", `Steps of the ${side}`);
    this.slider.addEventListener("input", () => this.choose(Number(this.slider.value), true));
    for (const block of this.node.querySelectorAll(".code")) {
      block.querySelector("button").addEventListener("click", () => copy(block.querySelector("code")));
    }
    at("panels").append(this.node);
  }

  begin(body) {
    this.body = body;
    this.shown = [];
    this.calls = this.ms = 0;
    this.film.textContent = "";
    this.film.scrollLeft = 0;
    this.film.hidden = body.kind !== "picture";
    this.scrub.hidden = !(body.kind === "picture" || (body.kind === "walk" && !card.points));
    this.slider.disabled = true;
    this.save.hidden = this.details.hidden = true;
    this.figures("waiting", "");
  }

  start(event) {
    this.total = event.calls;
    say(`the ${this.side} makes it in ${words(event.calls, "call")}`);
  }

  state(event) {
    this.count(event);
    if (event.png || event.points) this.add(event, `t = ${Number(event.t.toPrecision(event.t < 1 ? 2 : 3))}`);
  }

  made(event) {
    this.count(event);
    const { kind: now } = this.body;
    if (event.frames) event.frames.forEach((png, i) => this.shown.push({ png, name: `picture ${i + 1} of ${event.frames.length}` }));
    else if (now !== "picture" || event.points) this.shown.push({ ...event, name: "the result" });
    this.slider.disabled = this.shown.length < 2;
    this.slider.max = this.shown.length - 1;
    this.choose(event.frames ? 0 : this.shown.length - 1);
    this.save.href = event.png;
    this.save.download = `${this.side}-${now}-${this.body.seed}.png`;
    this.save.textContent = now === "picture" && !card.points ? "Save the picture" : "Save the grid";
    this.save.hidden = this.details.hidden = false;
    for (const name of ["python", "command"]) {
      const block = this.node.querySelector(`.${name}`);
      block.hidden = !event[name];
      block.querySelector("code").textContent = event[name];
    }
  }

  count(event) {
    this.calls = event.calls;
    this.ms = event.ms;
    this.figures(words(event.calls, "call"), time(event.ms));
  }

  figures(calls, ms) {
    this.node.querySelector(".calls").textContent = calls;
    this.node.querySelector(".ms").textContent = ms;
  }

  summary() { return `${this.side} ${words(this.calls, "call")}, ${time(this.ms)}`; }

  add(event, name) {
    const place = this.shown.length;
    this.shown.push({ ...event, name: `step ${place + 1}, ${name}, ${Math.round(100 * event.share)}\u00a0% noise` });
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    const thumb = document.createElement(event.points ? "canvas" : "img");
    if (event.points) thumb.width = thumb.height = 128;
    else thumb.alt = "";
    figure.append(thumb, caption);
    figure.addEventListener("click", () => this.choose(place, true));
    this.film.append(figure);
    this.paint(thumb, this.shown[place]);
    this.slider.max = place;
    this.choose(place);
  }

  paint(node, state) {
    const noisy = at("noisy").checked && this.body.kind === "picture";
    if (state.points) scatter(node, (noisy && state.noisy_points) || state.points, this.side);
    else node.src = (noisy && state.noisy) || state.png;
  }

  choose(place, byHand = false) {
    const state = this.shown[place];
    if (!state) return;
    this.slider.value = place;
    this.slider.setAttribute("aria-valuetext", state.name);
    this.node.querySelector(".place").textContent = state.name[0].toUpperCase() + state.name.slice(1);
    this.image.hidden = Boolean(state.points);
    this.canvas.hidden = !state.points;
    const what = `${this.side}, ${describe(this.body)}, ${state.name}`;
    this.image.alt = what;
    this.canvas.setAttribute("aria-label", what);
    this.paint(state.points ? this.canvas : this.image, state);
    [...this.film.children].forEach((figure, i) => figure.classList.toggle("now", i === place));
    const now = this.film.children[place];
    if (now) this.film.scrollLeft = now.offsetLeft - this.film.offsetLeft - this.film.clientWidth / 2 + 34;
    if (byHand && this.body.kind === "walk") {
      for (const other of Object.values(panels)) if (other !== this) other.choose(place);
    }
  }

  again() {
    [...this.film.children].forEach((figure, i) => this.paint(figure.firstElementChild, this.shown[i]));
    this.choose(Number(this.slider.value));
  }
}

function describe(body) {
  const what = { picture: "one picture", grid: `${body.count} pictures`, walk: "a walk", variations: "variations" }[body.kind];
  const of = body.prompt ? ` of “${body.prompt}”` : body.label === undefined ? "" : ` of class ${body.label}`;
  return `${what}${of}, seed ${body.seed}`;
}

function scatter(canvas, points, side) {
  // Points in the plane, all on one scale: the corners are 2 away from the middle.
  const draw = canvas.getContext("2d");
  const { width } = canvas;
  draw.clearRect(0, 0, width, width);
  draw.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${side}`);
  draw.globalAlpha = 0.55;
  const size = width / 180;
  for (const [x, y] of points) {
    draw.beginPath();
    draw.arc((x / 2 + 1) * width / 2, (1 - y / 2) * width / 2, Math.max(size, 1), 0, 7);
    draw.fill();
  }
}

async function copy(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    say("copied");
  } catch {
    getSelection().selectAllChildren(code);
    say("selected: press Ctrl-C to copy");
  }
}

function remember() {
  // The settings are in the address, so that a reload keeps them; the token is not.
  const kept = new URLSearchParams({ kind: kind() });
  for (const name of FIELDS) if (at(name).value !== "") kept.set(name, at(name).value);
  history.replaceState(null, "", `/#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const chosen = document.querySelector(`input[name=kind][value="${CSS.escape(kept.get("kind") || "")}"]`);
  if (chosen && card.kinds.includes(chosen.value)) chosen.checked = true;
  for (const name of FIELDS) if (kept.has(name)) at(name).value = kept.get(name);
  at("count").dataset.kind = kept.has("count") ? kind() : "";
}

function soon() {
  arrange();
  clearTimeout(timer);
  if (at("live").checked) timer = setTimeout(generate, 150);
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
at("form").addEventListener("input", (event) => {
  if (event.target.id === "noisy") for (const panel of Object.values(panels)) panel.again();
  else if (event.target.id !== "live") soon();
});
at("dice").addEventListener("click", () => {
  at("seed").value = Math.floor(Math.random() * 1e6);
  generate();
});
at("stop").addEventListener("click", () => { if (flight) { flight.abort(); say("stopped"); } });
load().catch((error) => fail(error instanceof TypeError ? "The server does not answer: is the command still running?" : error.message));
