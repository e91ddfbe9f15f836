"use strict";
// The report and the page of a run in progress: slider, enlarged pictures, and news of the run.
const at = (id) => document.getElementById(id);

function showFrame() {
  const slider = at("frame-at");
  if (!slider) return;
  const frame = at("frames").children[Number(slider.value)].dataset;
  at("frame").src = frame.uri;
  at("frame").alt = `The same noise after step ${frame.step}`;
  at("frame-step").textContent = Number(frame.step).toLocaleString("en");
  slider.setAttribute("aria-valuetext", `step ${frame.step}`);
}

function prepare() {
  for (const image of document.querySelectorAll("img.zoom")) {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
  }
}

function enlarge(image) {
  const shown = new Image();
  shown.src = image.src;
  shown.alt = image.alt;
  at("enlarged").replaceChildren(shown);
  at("zoomed").showModal();
}

document.addEventListener("input", (event) => {
  if (event.target.id === "frame-at") showFrame();
});
document.addEventListener("click", (event) => {
  if (event.target.matches("img.zoom")) enlarge(event.target);
  if (event.target.id === "close") at("zoomed").close();
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("img.zoom") && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    enlarge(event.target);
  }
});

function openDetails() {
  return [...document.querySelectorAll("#content details")].map((part) => part.open);
}

// Put the new page in the place of the old one; what the reader has set stays as it is.
async function renew() {
  const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
  const open = openDetails(), slider = at("frame-at"), focus = document.activeElement.id;
  const old = slider && slider.value !== slider.max ? slider.value : null;
  at("content").replaceWith(document.adoptNode(page.getElementById("content")));
  document.title = page.title;
  document.querySelectorAll("#content details").forEach((part, i) => { part.open = Boolean(open[i]); });
  if (old !== null && at("frame-at")) {
    at("frame-at").value = old;
    showFrame();
  }
  prepare();
  if (focus && at(focus)) at(focus).focus({ preventScroll: true });
}

let version = null;
async function follow() {
  let again = true;
  try {
    const answer = await fetch("/state");
    const state = await answer.json();
    if (!answer.ok) throw new Error(state.error);
    at("live-text").textContent = state.text;
    document.querySelector(".live progress").value = state.share;
    if (version !== null && state.version !== version) await renew();
    version = state.version;
    again = !state.finished;
  } catch (error) {
    const gone = error instanceof TypeError;
    at("live-text").textContent = gone ? "The watcher is gone; start fewstep watch again." : error.message;
  }
  if (again) setTimeout(follow, 2000);
}

prepare();
if (document.body.dataset.live !== undefined) {
  history.replaceState(null, "", "/");
  follow();
}
