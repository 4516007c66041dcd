// node open_report.mjs CHROMIUM FILE: how a page fits windows, light and dark, and what it asks for, as JSON.

import { chromium } from "playwright-core";

const [executablePath, file] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath });
const shown = [];
for (const width of [390, 1280]) {
  for (const colorScheme of ["light", "dark"]) {
    const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
    const faults = [];
    page.on("pageerror", (error) => faults.push(String(error)));
    page.on("console", (message) => faults.push(message.text()));
    page.on("request", (request) => {
      if (!/^(file|data):/.test(request.url())) faults.push(request.url());
    });
    await page.goto(`file://${file}`);
    shown.push(await page.evaluate(look, { width, colorScheme, faults }));
    await page.close();
  }
}
await browser.close();
process.stdout.write(JSON.stringify(shown));

// Runs in the page.
function look(asked) {
  const box = (node) => node.getBoundingClientRect();
  const words = [...document.querySelectorAll("main svg text")].filter((node) => node.checkVisibility());
  const outside = words.filter((node) => {
    const card = box(node.closest(".card"));
    return box(node).left < card.left - 1 || box(node).right > card.right + 1;
  });
  const cards = [...document.querySelectorAll(".card")];
  const pictures = [...document.images];
  return {
    ...asked,
    page: document.documentElement.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    outside: outside.map((node) => node.textContent),
    cut: cards.filter((card) => card.scrollWidth > card.clientWidth + 1).map((card) => card.innerText.slice(0, 40)),
    letters: Math.min(...words.map((node) => box(node).height)),
    pictures: pictures.filter((image) => image.complete && image.naturalWidth).length,
  };
}
