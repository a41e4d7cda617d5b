// Offline: the page's own files from the network where there is one, else as they were; Pyodide's never change.
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event, url = new URL(request.url);
  if (request.method !== "GET") return;
  if (/\/pyodide[@-]\d/.test(url.pathname)) event.respondWith(caches.match(url.href).then((kept) => kept ?? fetch(request)));
  else if (url.origin === location.origin) {
    event.respondWith(fetch(request).catch(async (error) => {
      const kept = await caches.match(url.origin + url.pathname);
      if (kept) return kept;
      throw error;
    }));
  }
});
