"use strict";
const find = (id) => document.getElementById(id);
const socket = new WebSocket(`${location.protocol.replace("http", "ws")}//${location.host}/play`);
socket.binaryType = "arraybuffer";

const FRAME_HEAD = 12; // bytes: number of the prediction, of the frame, and whether it was given
const EVALUATIONS = [1, 2, 4, 8, 16];
let limit = { bytes: 0, text: "" };
let clip = null; // its number
let play = { number: 0, origin: null, samples: 0, height: 0, width: 0, fps: 1 }; // the present prediction
let queue = []; // frames that came and were not shown
let shown = null; // the frame that is
let due = 0; // when the next frame is shown, at the video's rate
let paused = matchMedia("(prefers-reduced-motion: reduce)").matches, steps = 0, ended = false;
let times = []; // when the last frames were shown

const tell = (message) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));

function note(text) {
  find("note").textContent = text;
  find("note").hidden = !text;
}

// Predict from a shown frame of one future, or from the clip's beginning.
function start(origin) {
  if (clip === null) return;
  note("");
  ended = false;
  play.number += 1;
  play.origin = origin;
  if (paused && !origin) steps = 1; // so that there is a picture
  queue = [];
  times = [];
  tell({
    start: {
      play: play.number, clip, origin, samples: Number(find("samples").value),
      nfe: Number(find("nfe").value) || null, decoder: find("decoder").value || null,
      seed: Math.min(Math.max(Math.floor(Number(find("seed").value)), 0), 2 ** 53 - 2) || 0,
    },
  });
}
const here = (sample = 0) => shown && { frame: shown.number, sample: Math.min(sample, play.samples - 1) };

function branch(sample) {
  find("seed").value = Number(find("seed").value) + 1;
  if (find("samples").value === "1") find("samples").value = 3;
  find("count").value = find("samples").value;
  start(here(sample));
}

function choose(number) {
  clip = number;
  for (const button of find("clips").children) button.setAttribute("aria-pressed", Number(button.dataset.number) === clip);
  shown = null;
  start(null);
}

function addClip({ number, name, thumbnail }) {
  const button = document.createElement("button"), image = new Image();
  Object.assign(image, { src: thumbnail, alt: name });
  button.dataset.number = number;
  button.title = name;
  button.append(image);
  button.addEventListener("click", () => choose(number));
  find("clips").append(button);
}

function began({ samples, height, width, fps }) {
  const before = [...find("futures").children].map((panel) => panel.firstChild);
  Object.assign(play, { samples, height, width, fps });
  find("futures").replaceChildren(...Array.from({ length: samples }, (_, sample) => {
    const panel = document.createElement("button"), canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    panel.append(canvas);
    panel.title = "other futures from this picture";
    panel.setAttribute("aria-label", `future ${sample + 1}: others from here`);
    panel.addEventListener("click", () => branch(sample));
    if (play.origin) canvas.getContext("2d").drawImage(before[play.origin.sample], 0, 0);
    panel.classList.toggle("predicted", Boolean(play.origin));
    return panel;
  }));
  find("speed").options[0].textContent = `as the video: ${round(fps)}/s`;
}

function show(frame, now) {
  const { width, height } = play, size = width * height * 4;
  [...find("futures").children].forEach((panel, sample) => {
    const pixels = new Uint8ClampedArray(frame.data, FRAME_HEAD + sample * size, size);
    panel.firstChild.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
    panel.classList.toggle("predicted", !frame.given);
  });
  shown = { number: frame.number, given: frame.given };
  times.push(now);
}

// The prediction waits for what is shown: a pause, the video's rate, a slow browser and a hidden tab all slow it down.
function tick(now) {
  requestAnimationFrame(tick);
  let drew = false;
  while (queue.length && (!paused || steps)) {
    const pace = !steps && (queue[0].given || find("speed").value === "video") ? 1000 / play.fps : 0;
    if (pace && now < due) break;
    due = Math.max(due, now - pace) + pace;
    show(queue.shift(), now);
    if (steps) steps -= 1;
    drew = true;
  }
  if (!drew) return;
  tell({ shown: shown.number });
  say();
}

const round = (rate) => (rate < 10 ? Math.round(rate * 10) / 10 : Math.round(rate));

function measure() {
  while (times.length > 2 && times[1] < times.at(-1) - 1000) times.shift();
  const seconds = (times.at(-1) - times[0]) / 1000;
  find("rate").value = paused || ended || !(seconds > 0.3) ? "" : `${round((times.length - 1) / seconds)} frames/s`;
}

function say() {
  if (shown) find("where").value = `${shown.given ? "given" : "predicted"} frame ${shown.number + 1}${paused ? ", paused" : ""}`;
}

function pause(wanted) {
  paused = wanted;
  times = [];
  find("pause").textContent = paused ? "Go on" : "Pause";
  say();
  if (!paused && ended) start(here());
}

async function upload(file) {
  if (file.size > limit.bytes) return note(`${file.name} is too large: at most ${limit.text}.`);
  note(`Reading ${file.name} ...`);
  try {
    const answer = await fetch(`clips?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    const { clip: added, error } = await answer.json();
    if (error) return note(error);
    addClip(added);
    choose(added.number);
  } catch {
    note(`${file.name}: the upload was cut off.`);
  }
}

function hello(told) {
  document.title = `${told.name} - RIVER play`;
  find("name").textContent = told.name;
  limit = { bytes: told.most_bytes, text: told.most_text };
  find("seed").value = told.seed;
  find("nfe").options[0].textContent = `the run's: ${told.sampler.replace(" evaluations per frame", "")}`;
  find("nfe").append(...EVALUATIONS.map((nfe) => new Option(`euler, ${nfe}`, nfe)));
  find("decoder").append(...told.decoders.map((name) => new Option(name, name)));
  find("decoding").hidden = !told.decoders.length;
  told.clips.forEach(addClip);
  if (told.clips.length) choose(told.clips[0].number);
  else note(`There are no test clips here: upload a clip. (${told.missing})`);
}

socket.addEventListener("message", ({ data }) => {
  if (data instanceof ArrayBuffer) {
    const [number, frame, given] = new Uint32Array(data, 0, 3);
    if (number === play.number) queue.push({ number: frame, given: Boolean(given), data });
    return;
  }
  const told = JSON.parse(data);
  if ("began" in told) { if (told.began === play.number) began(told); }
  else if ("ended" in told) { ended = true; note(told.ended); }
  else hello(told);
});
socket.addEventListener("close", () => { ended = true; note("The server has ended: start it again, then reload this page."); });

find("pause").addEventListener("click", () => pause(!paused && !ended));
find("step").addEventListener("click", () => { pause(true); steps = 1; if (ended) start(here()); });
find("again").addEventListener("click", () => { shown = null; start(null); });
find("branch").addEventListener("click", () => branch(0));
find("samples").addEventListener("input", () => { find("count").value = find("samples").value; });
for (const name of ["samples", "nfe", "decoder", "seed"]) find(name).addEventListener("change", () => start(here()));
find("file").addEventListener("change", ({ target }) => { if (target.files.length) upload(target.files[0]); target.value = ""; });
setInterval(measure, 200);
requestAnimationFrame(tick);
pause(paused);
