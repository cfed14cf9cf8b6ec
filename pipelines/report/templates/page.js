"use strict";
// Without this script the page shows clips as sheets of all their frames.
document.documentElement.classList.add("scripted");

function clips() {
  const player = document.querySelector(".player");
  if (!player) return;
  const [button, slider, where, speed] = [".play", ".frame", ".where", ".speed"].map((name) => player.querySelector(name));
  const context = Number(player.dataset.context);
  const frames = player.dataset.frames.split(" ").map(Number);
  const sheets = [...document.querySelectorAll(".sheet")];
  document.querySelectorAll(".clip details").forEach((details) => { details.open = false; });
  let timer = null;

  function draw() {
    const column = Number(slider.value), frame = frames[column], given = frame < context;
    where.textContent = given ? `frame ${frame + 1}, given` : `predicted frame ${frame + 1 - context}`;
    slider.setAttribute("aria-valuetext", where.textContent);
    for (const sheet of sheets) {
      sheet.closest(".clip").querySelectorAll("canvas").forEach((canvas, row) => {
        const { width, height } = canvas;
        canvas.getContext("2d").drawImage(sheet, column * width, row * height, width, height, 0, 0, width, height);
        canvas.classList.toggle("happened", !given && row === 0);
        canvas.classList.toggle("predicted", !given && row > 0);
      });
    }
  }
  function play() {
    const column = Number(slider.value), last = column === frames.length - 1;
    const duration = (1000 * (last ? 1 : frames[column + 1] - frames[column])) / (player.dataset.fps * speed.value);
    // Pause for a second on the last frame, as the GIFs do.
    const rest = last ? Math.max(1000, duration) : duration;
    timer = setTimeout(() => {
      slider.value = (Number(slider.value) + 1) % frames.length;
      draw();
      play();
    }, rest);
    button.textContent = "Pause";
  }
  function pause() {
    clearTimeout(timer);
    timer = null;
    button.textContent = "Play";
  }
  button.addEventListener("click", () => (timer ? pause() : play()));
  slider.addEventListener("input", () => { pause(); draw(); });
  Promise.all(sheets.map((sheet) => sheet.decode())).then(() => {
    slider.value = frames.findIndex((frame) => frame >= context);
    draw();
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  });
}

function hoverValues() {
  document.querySelectorAll("svg[data-chart]").forEach((drawing) => {
    const chart = JSON.parse(drawing.dataset.chart), figure = drawing.parentElement;
    const rule = drawing.querySelector(".rule"), width = drawing.viewBox.baseVal.width;
    let tip = null;
    function hide() {
      if (tip) tip.remove();
      tip = null;
      rule.setAttribute("visibility", "hidden");
    }
    function show(event) {
      const box = drawing.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * width;
      const nearest = (points) => points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
      const lines = chart.lines.filter((line) => line.points.length);
      const at = nearest(lines.map((line) => nearest(line.points)));
      rule.setAttribute("x1", at[0]);
      rule.setAttribute("x2", at[0]);
      rule.setAttribute("visibility", "visible");
      if (!tip) tip = figure.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
      const title = Object.assign(document.createElement("b"), { textContent: `${chart.x} ${at[1]}` });
      const rows = lines.flatMap((line) => {
        const point = nearest(line.points);
        if (Math.abs(point[0] - at[0]) > 1) return [];
        const row = document.createElement("div");
        row.append(Object.assign(document.createElement("i"), { className: line.style }), `${line.name} ${point[2]}`);
        return [row];
      });
      tip.replaceChildren(title, ...rows);
      const around = figure.getBoundingClientRect();
      const place = box.left - around.left + (at[0] / width) * box.width;
      const left = place > box.width / 2 ? place - tip.offsetWidth - 10 : place + 10;
      tip.style.left = `${Math.max(0, left)}px`;
      tip.style.top = `${box.top - around.top + 14}px`;
    }
    drawing.addEventListener("pointermove", show);
    drawing.addEventListener("pointerdown", show);
    drawing.addEventListener("pointerleave", hide);
  });
}

clips();
hoverValues();
