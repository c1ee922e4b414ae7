// Runs the page's script, which is packed like its numbers; assets/*.js is its text.
(async () => {
  try {
    const { script } = JSON.parse(document.getElementById("data").textContent);
    const bytes = Uint8Array.from(atob(script), (c) => c.charCodeAt(0));
    const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
    document.head.append(Object.assign(document.createElement("script"), { textContent: text }));
  } catch (error) {
    document.querySelector("main").append(`This page cannot be drawn here (${error.message}). Open it in a newer browser.`);
    throw error;
  }
})();
