// Keeps what the page has loaded, so that it works without a network.
const CACHE = "minimind-v";
const EXAMPLES = ["apple", "dog", "pizza", "sunflower"].map((name) => `examples/${name}.png`);
const PAGE = ["./", "style.css", "page.js", "worker.js", "picture.js", "settings.json", ...EXAMPLES];

addEventListener("install", (event) => {
  skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(PAGE)));
});
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith("http")) event.respondWith(answer(event.request));
});

/** Scripts and models have their version or hash in their names, and never change; the rest is asked for anew. */
async function answer(request) {
  const cache = await caches.open(CACHE);
  const isFixed = /@\d|\/model-\w+\//.test(request.url);
  const kept = isFixed && (await cache.match(request.url));
  if (kept) return kept;
  try {
    const response = await fetch(request);
    if (response.status === 200) await cache.put(request.url, response.clone());
    return response;
  } catch (error) {
    const older = await cache.match(request.url, { ignoreSearch: true });
    if (older) return older;
    throw error;
  }
}
