// What a person does on the Inspector's page, in headless Chromium: connect to a server, list its tools, call add(2, 3).
// `node page.cjs CHROMIUM URL FOLDER SERVER…` prints a line of JSON for each server, and keeps the page open until it gets
// SIGTERM. FOLDER takes the browser's profile, and failed.png and failed.yaml where something is not as expected.
const fs = require("node:fs");
const path = require("node:path");
const { chromium } = require("playwright-core");

const [executablePath, url, folder, ...servers] = process.argv.slice(2);
const FLAGS = [
  "--no-sandbox", // which root cannot have
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1", // the page asks for fonts
];

async function tryOut(page, server) {
  const banner = page.getByRole("banner");
  const main = page.getByRole("main");
  const named = { name: `Connect or disconnect "${server}"` };
  await page.locator("label").filter({ has: page.getByRole("switch", named) }).click();
  await page.getByRole("switch", { ...named, checked: true }).waitFor();
  await banner.getByText("Tools", { exact: true }).click();
  await main.getByRole("heading", { name: /^Tools \([1-9]/ }).waitFor();
  const tools = await main.getByRole("button").filter({ has: page.getByRole("paragraph") }).allInnerTexts();
  await main.getByRole("button", { name: "add", exact: true }).click();
  await main.getByRole("textbox", { name: "A", exact: true }).fill("2");
  await main.getByRole("textbox", { name: "B", exact: true }).fill("3");
  await main.getByRole("button", { name: "Execute Tool" }).click();
  await main.getByRole("heading", { name: "Results", exact: true }).waitFor();
  const result = (await main.locator("pre").first().innerText()).trim();
  return { server, tools, result };
}

async function disconnect(page) {
  await page.getByRole("button", { name: "Disconnect from server" }).click();
  await page.getByRole("switch", { checked: true }).waitFor({ state: "detached" });
}

async function run() {
  const context = await chromium.launchPersistentContext(path.join(folder, "profile"), {
    executablePath,
    args: FLAGS,
    viewport: { width: 1600, height: 1000 },
  });
  const page = context.pages()[0];
  page.setDefaultTimeout(30_000);
  try {
    await page.goto(url);
    for (const [index, server] of servers.entries()) {
      if (index > 0) await disconnect(page);
      console.log(JSON.stringify(await tryOut(page, server)));
    }
    await page.waitForEvent("close", { timeout: 0 });
  } catch (error) {
    await page.screenshot({ path: path.join(folder, "failed.png") });
    fs.writeFileSync(path.join(folder, "failed.yaml"), await page.locator("body").ariaSnapshot());
    throw error;
  } finally {
    await context.close();
  }
}

run();
