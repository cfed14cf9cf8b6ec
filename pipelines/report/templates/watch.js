
const REFRESH = 2000;
const main = document.querySelector("main"), run = document.title;
let shown = null;

const titleOf = (details) => details.closest("section").id + details.closest("figure").querySelector("strong").textContent;

// Pictures that are shown already stay the same elements, which go on playing; new ones are loaded first.
async function draw(text) {
  const fresh = document.createElement("template");
  fresh.innerHTML = text;
  const pictures = [...fresh.content.querySelectorAll("img")].map((image) => {
    const place = document.createElement("span");
    const there = main.querySelector(`img[src="${image.getAttribute("src")}"]`);
    const picture = there || document.importNode(image);
    image.replaceWith(place);
    return [place, picture];
  });
  await Promise.allSettled(pictures.map(([, picture]) => picture.decode()));
  const open = new Set([...main.querySelectorAll("details[open]")].map(titleOf));
  main.replaceChildren(fresh.content);
  for (const [place, picture] of pictures) place.replaceWith(picture);
  for (const details of main.querySelectorAll("details")) details.open = open.has(titleOf(details));
  hoverValues();
}

function tellAge() {
  for (const line of main.querySelectorAll("[data-written]")) {
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - line.dataset.written));
    line.textContent = `last line ${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`} ago`;
    line.classList.toggle("late", seconds > line.dataset.late);
  }
  const bar = main.querySelector("progress");
  document.title = bar ? `${Math.floor(100 * bar.position)} % ${run}` : run;
}

async function update() {
  // Neither in a tab that nobody sees nor under a pointer that reads values.
  if (!document.hidden && !document.querySelector(".tip")) {
    try {
      const answer = await fetch("live"), text = answer.ok ? await answer.text() : shown;
      if (text !== shown) await draw(text);
      shown = text;
      document.getElementById("ended").hidden = true;
    } catch {
      document.getElementById("ended").hidden = false;
    }
    tellAge();
  }
  setTimeout(update, REFRESH);
}

update();
setInterval(tellAge, 1000);
