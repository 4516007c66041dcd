// node open_page.mjs CHROMIUM URL [FOLDER] [IMAGE]: what the page shows of a bundle and an image, as JSON.
//
// FOLDER is picked where the URL names no bundle, "" for none. Nothing but the server of the page is reached.

import { chromium } from "playwright-core";

const [executablePath, url, folder, image] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath });
const page = await browser.newPage();
const faults = [];
page.on("pageerror", (error) => faults.push(String(error)));
await page.route("**/*", (route) => {
  const wanted = route.request().url();
  if (new URL(wanted).origin === new URL(url).origin) return route.continue();
  faults.push(wanted);
  return route.abort();
});

await page.goto(url);
await isReady();
if (folder) {
  await page.setInputFiles("#folder", folder);
  await isReady();
}
if (image && (await page.isEnabled("#file"))) {
  await page.setInputFiles("#file", image);
  await isReady();
}
const shown = {
  facts: Object.fromEntries(
    await page.$$eval("#facts dt", (terms) =>
      terms.map((term) => [term.textContent, term.nextSibling.textContent]),
    ),
  ),
  classes: await page.$$eval("#result:not([hidden]) li", (rows) =>
    rows.map((row) => [...row.children].map((cell) => cell.textContent)),
  ),
  error: await page.$eval("#error", (node) => (node.hidden ? null : node.textContent)),
  faults,
};
await browser.close();
process.stdout.write(JSON.stringify(shown));

function isReady() {
  return page.waitForSelector("#folder:enabled");
}
